// AVX-512 with VNNI. Large blocks: 13 rows times 32 columns of int32 sums in 26 registers, float sums in memory.
// Small blocks, whose sums are scaled often: 13 rows times 16 columns, int32 and float sums both in registers.
#include <immintrin.h>

#include <cstring>
#include <utility>

#include "linear.h"

namespace quantvla {
namespace avx512 {

constexpr int kRows = 13;
constexpr int kSmallBlock = 64;
struct Tile;
template <int ROWS, int PANELS, int BITS>
static void tile(const Tile& t);

#include "linear.inl"

// sum += u8 * s8, four products to a lane. In assembler because GCC 12 copies and spills the sums around its intrinsic.
static inline void dot(__m512i& sum, __m512i u8, __m512i s8) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u8), "v"(s8));
}

static inline void dot_broadcast(__m512i& sum, __m512i u8, const int8_t* s8) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(u8), "m"(*reinterpret_cast<const int32_t(*)>(s8)));
}

static inline __m512i broadcast4(const int8_t* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return _mm512_set1_epi32(v);
}

static inline __m512 half_scales(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

template <int ROWS, int BITS>
static void small_blocks(const Tile& t) {
  const __m512i nibble = _mm512_set1_epi8(15);
  const uint8_t* w = t.panel;
  const int8_t* a = t.codes;
  __m512 total[ROWS];
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m) total[m] = _mm512_setzero_ps();
  for (int b = 0; b < t.blocks; ++b) {
    __m512i sum[ROWS];
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) sum[m] = _mm512_set1_epi32(t.sums[m * t.blocks + b]);
    for (int g = 0; g < t.groups; ++g) {
      const __m512i v = _mm512_loadu_si512(w);
      const __m512i low = BITS == 4 ? _mm512_and_si512(v, nibble) : v;
#pragma GCC unroll 16
      for (int m = 0; m < ROWS; ++m) dot_broadcast(sum[m], low, a + static_cast<size_t>(m) * t.in);
      if constexpr (BITS == 4) {
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble);
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; ++m) dot_broadcast(sum[m], high, a + static_cast<size_t>(m) * t.in + 4);
      }
      w += 64;
      a += 32 / BITS;
    }
    const __m512 scale = half_scales(t.panel_scales + static_cast<size_t>(b) * kPanel);
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) {
      const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(t.scales[m * t.blocks + b]));
      total[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[m]), factor, total[m]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m) _mm512_store_ps(t.out + m * t.panels * kPanel, total[m]);
}

template <int ROWS, int PANELS, int BITS>
static void large_blocks(const Tile& t) {
  const __m512i nibble = _mm512_set1_epi8(15);
  const size_t second = PANELS == 2 ? t.panel_bytes : 0;
  const size_t second_scales = PANELS == 2 ? static_cast<size_t>(t.blocks) * kPanel : 0;
  const uint8_t* w = t.panel;
  const int8_t* a = t.codes;
  for (int b = 0; b < t.blocks; ++b) {
    __m512i sum[ROWS][PANELS];
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 2
      for (int p = 0; p < PANELS; ++p) sum[m][p] = _mm512_set1_epi32(t.sums[m * t.blocks + b]);
    for (int g = 0; g < t.groups; ++g) {
      __m512i u[PANELS];
#pragma GCC unroll 2
      for (int p = 0; p < PANELS; ++p) {
        u[p] = _mm512_loadu_si512(w + p * second);
        if constexpr (BITS == 4) u[p] = _mm512_and_si512(u[p], nibble);
      }
#pragma GCC unroll 16
      for (int m = 0; m < ROWS; ++m) {
        const __m512i x = broadcast4(a + static_cast<size_t>(m) * t.in);
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; ++p) dot(sum[m][p], u[p], x);
      }
      if constexpr (BITS == 4) {
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; ++p)
          u[p] = _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(w + p * second), 4), nibble);
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; ++m) {
          const __m512i x = broadcast4(a + static_cast<size_t>(m) * t.in + 4);
#pragma GCC unroll 2
          for (int p = 0; p < PANELS; ++p) dot(sum[m][p], u[p], x);
        }
      }
      w += 64;
      a += 32 / BITS;
    }
#pragma GCC unroll 2
    for (int p = 0; p < PANELS; ++p) {
      const __m512 scale = half_scales(t.panel_scales + p * second_scales + static_cast<size_t>(b) * kPanel);
#pragma GCC unroll 16
      for (int m = 0; m < ROWS; ++m) {
        float* out = t.out + (m * PANELS + p) * kPanel;
        const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(t.scales[m * t.blocks + b]));
        const __m512 before = b == 0 ? _mm512_setzero_ps() : _mm512_load_ps(out);
        _mm512_store_ps(out, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[m][p]), factor, before));
      }
    }
  }
}

template <int ROWS, int PANELS, int BITS>
static void tile(const Tile& t) {
  if (t.blocks == 1 || t.groups * 32 / BITS > kSmallBlock) {
    large_blocks<ROWS, PANELS, BITS>(t);
    return;
  }
  each_panel<PANELS>(t, [](const Tile& one) { small_blocks<ROWS, BITS>(one); });
}

}  // namespace avx512

extern const Kernels kAvx512 = {"avx512-vnni", avx512::kRows, avx512::quantize, avx512::multiply};

}  // namespace quantvla
