// AVX-512 with BF16: 12 rows times 32 columns of float sums in 24 registers, for scores and for the output.
#include <immintrin.h>

#include <cstring>
#include <limits>
#include <vector>

#include "attention.h"

namespace quantvla {
namespace {

constexpr int kRows = 12;

inline __m256i sixteen_bfloat16(const float* p) {
  const __m256bh half = _mm512_cvtneps_pbh(_mm512_loadu_ps(p));
  __m256i bits;
  std::memcpy(&bits, &half, 32);
  return bits;
}

// sum += a b over pairs of bfloat16; in assembler for the same reason as the integer product.
inline void dot(__m512& sum, __m512i a, __m512i b) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }

inline __m512i broadcast_pair(const uint16_t* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return _mm512_set1_epi32(v);
}

// out (ROWS, 32) = a (ROWS, pairs * 2) times two panels of 16 columns (pairs, 16, 2), scaled.
template <int ROWS>
void tile(const uint16_t* a, size_t a_stride, const uint16_t* first, const uint16_t* second, int pairs, float* out,
          size_t out_stride) {
  __m512 sum[ROWS][2];
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
  for (int g = 0; g < pairs; ++g) {
    const __m512i b0 = _mm512_loadu_si512(first), b1 = _mm512_loadu_si512(second);
    first += 32, second += 32;
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) {
      const __m512i x = broadcast_pair(a + m * a_stride);
      dot(sum[m][0], b0, x);
      dot(sum[m][1], b1, x);
    }
    a += 2;
  }
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m) {
    _mm512_storeu_ps(out + m * out_stride, sum[m][0]);
    _mm512_storeu_ps(out + m * out_stride + 16, sum[m][1]);
  }
}

using TileFunction = void (*)(const uint16_t*, size_t, const uint16_t*, const uint16_t*, int, float*, size_t);
constexpr TileFunction kTiles[kRows] = {tile<1>, tile<2>, tile<3>, tile<4>,  tile<5>,  tile<6>,
                                        tile<7>, tile<8>, tile<9>, tile<10>, tile<11>, tile<12>};

// 2^x for x <= 0, relative error below 1e-4: the results are rounded to bfloat16, whose steps are 4e-3.
inline __m512 power_of_two(__m512 x) {
  const __m512 r = _mm512_reduce_ps(x, 0);  // x - round(x)
  __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(0.0558263180f), _mm512_set1_ps(0.2401536108f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.6931265079f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.9999252552f));
  return _mm512_scalef_ps(p, _mm512_sub_ps(x, r));
}

// keys: [keys/16][dim/2][16][2]; values: [dim/16][keys/2][16][2]; what is past the last key is zero.
void pack(const Attention& t, int index, void* to_packed) {
  auto* packed = static_cast<uint16_t*>(to_packed);
  const int b = index / t.heads, h = index % t.heads, padded = t.padded_keys(), width = t.heads * t.dim;
  const float* k = t.k + (static_cast<size_t>(b) * t.keys) * width + h * t.dim;
  const float* v = t.v + (static_cast<size_t>(b) * t.keys) * width + h * t.dim;
  auto* keys = reinterpret_cast<uint32_t*>(packed);  // a pair of channels of one key
  uint16_t* values = packed + static_cast<size_t>(padded) * t.dim;
  if (padded != t.keys) std::memset(packed, 0, t.packed_size() * sizeof(uint16_t));
  const __m256i order = _mm256_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112);  // pairs of a key are 16 keys apart
  for (int j = 0; j < t.keys; ++j) {
    const float* kj = k + static_cast<size_t>(j) * width;
    uint32_t* to = keys + static_cast<size_t>(j / 16) * (t.dim / 2) * 16 + j % 16;
    for (int d = 0; d < t.dim; d += 16) _mm256_i32scatter_epi32(to + d / 2 * 16, order, sixteen_bfloat16(kj + d), 4);
  }
  for (int j = 0; j < t.keys; j += 2) {
    const float* vj = v + static_cast<size_t>(j) * width;
    for (int d = 0; d < t.dim; d += 16) {
      const __m512i even = _mm512_cvtepu16_epi32(sixteen_bfloat16(vj + d));
      const __m512i odd =
          j + 1 < t.keys ? _mm512_cvtepu16_epi32(sixteen_bfloat16(vj + width + d)) : _mm512_setzero_si512();
      _mm512_storeu_si512(values + (static_cast<size_t>(d / 16) * (padded / 2) + j / 2) * 32,
                          _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
  }
}

// The lanes of 16 that hold one of `left` remaining keys.
inline __mmask16 valid_keys(int left) {
  return left >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << (left > 0 ? left : 0)) - 1);
}

// Turn scaled scores into unnormalized probabilities in bfloat16; returns one over their sum.
float soften(float* scores, uint16_t* out, int keys, int padded, const float* bias, float scale) {
  constexpr float kLog2e = 1.44269504f;
  const __m512 factor = _mm512_set1_ps(scale * kLog2e);
  __m512 largest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (int j = 0; j < padded; j += 16) {
    const __mmask16 valid = valid_keys(keys - j);
    __m512 s = _mm512_mul_ps(_mm512_load_ps(scores + j), factor);
    if (bias != nullptr) s = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(valid, bias + j), _mm512_set1_ps(kLog2e), s);
    // No score below the lowest finite one: a row that is masked whole then has equal shares, as in float arithmetic.
    s = _mm512_max_ps(_mm512_set1_ps(std::numeric_limits<float>::lowest()), s);
    s = _mm512_mask_mov_ps(_mm512_set1_ps(-std::numeric_limits<float>::infinity()), valid, s);
    _mm512_store_ps(scores + j, s);
    largest = _mm512_max_ps(largest, s);
  }
  const __m512 highest = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
  __m512 total = _mm512_setzero_ps();
  for (int j = 0; j < padded; j += 16) {
    const __m512 below = _mm512_sub_ps(_mm512_load_ps(scores + j), highest);
    const __m512 p = power_of_two(_mm512_max_ps(_mm512_set1_ps(-150.0f), below));  // NaN is kept: the second operand
    total = _mm512_add_ps(total, _mm512_maskz_mov_ps(valid_keys(keys - j), p));
    const __m256bh half = _mm512_cvtneps_pbh(p);
    std::memcpy(out + j, &half, 32);
  }
  return 1.0f / _mm512_reduce_add_ps(total);
}

void attend(const Attention& t, int index, const void* from_packed, int begin, int end) {
  const auto* packed = static_cast<const uint16_t*>(from_packed);
  const int b = index / t.heads, h = index % t.heads, padded = t.padded_keys(), width = t.heads * t.dim;
  const uint16_t* keys = packed;
  const uint16_t* values = packed + static_cast<size_t>(padded) * t.dim;
  thread_local std::vector<float> room;
  const size_t wanted = static_cast<size_t>(kRows) * (padded + padded / 2 + t.dim / 2 + t.dim) + 64;
  if (room.size() < wanted) room.resize(wanted);
  float* scores = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(room.data()) + 63) / 64 * 64);
  float* result = scores + static_cast<size_t>(kRows) * padded;
  auto* shares = reinterpret_cast<uint16_t*>(result + static_cast<size_t>(kRows) * t.dim);
  uint16_t* queries = shares + static_cast<size_t>(kRows) * padded;
  float inverse[kRows];
  for (int row = begin; row < end; row += kRows) {
    const int rows = end - row < kRows ? end - row : kRows;
    for (int m = 0; m < rows; ++m) {
      const float* q = t.q + (static_cast<size_t>(b) * t.queries + row + m) * width + h * t.dim;
      for (int d = 0; d < t.dim; d += 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(queries + m * t.dim + d), sixteen_bfloat16(q + d));
    }
    const size_t key_panel = static_cast<size_t>(t.dim) * 16, value_panel = static_cast<size_t>(padded) * 16;
    for (int j = 0; j < padded; j += 32)
      kTiles[rows - 1](queries, t.dim, keys + j / 16 * key_panel, keys + (j / 16 + 1) * key_panel, t.dim / 2,
                       scores + j, padded);
    for (int m = 0; m < rows; ++m) {
      const float* bias = t.bias == nullptr ? nullptr
                                            : t.bias + b * t.bias_batch + h * t.bias_head +
                                                  static_cast<size_t>(row + m) * t.keys;
      inverse[m] = soften(scores + static_cast<size_t>(m) * padded, shares + static_cast<size_t>(m) * padded, t.keys,
                          padded, bias, t.scale);
    }
    for (int d = 0; d < t.dim; d += 32)
      kTiles[rows - 1](shares, padded, values + d / 16 * value_panel, values + (d / 16 + 1) * value_panel, padded / 2,
                       result + d, t.dim);
    for (int m = 0; m < rows; ++m) {
      float* out = t.out + (static_cast<size_t>(b) * t.queries + row + m) * width + h * t.dim;
      for (int d = 0; d < t.dim; ++d) out[d] = result[m * t.dim + d] * inverse[m];
    }
  }
}

}  // namespace

extern const AttentionKernels kAttentionAvx512 = {"avx512-bf16", sizeof(uint16_t), pack, attend};

}  // namespace quantvla
