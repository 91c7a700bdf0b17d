// AVX2 and FMA, no VNNI: 4 rows times 16 columns. Products of bytes are added in 16 bits there, which saturates for
// full-range operands. Here it cannot: a sum of two 4-bit products is at most 15 * 127 * 2, and an 8-bit code is
// taken as two halves of at most 128, so that a sum is at most 128 * 127 * 2 = 32512.
#include <immintrin.h>

#include <cstring>
#include <utility>

#include "linear.h"

namespace quantvla {
namespace avx2 {

constexpr int kRows = 4;
struct Tile;
template <int ROWS, int PANELS, int BITS>
static void tile(const Tile& t);

#include "linear.inl"

static inline __m256i broadcast4(const int8_t* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return _mm256_set1_epi32(v);
}

// Half precision to float without F16C: shift into place, and let a product with 2^112 mend the exponent.
static inline __m256 half_scales(const uint16_t* p) {
  const __m256i h = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i magnitude = _mm256_slli_epi32(_mm256_and_si256(h, _mm256_set1_epi32(0x7FFF)), 13);
  const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(h, _mm256_set1_epi32(0x8000)), 16);
  const __m256 value = _mm256_mul_ps(_mm256_castsi256_ps(magnitude), _mm256_set1_ps(0x1p112f));
  return _mm256_or_ps(value, _mm256_castsi256_ps(sign));
}

template <int ROWS, int BITS>
static void one_panel(const Tile& t) {
  const __m256i ones = _mm256_set1_epi16(1), nibble = _mm256_set1_epi8(15), low_bits = _mm256_set1_epi8(127);
  const uint8_t* w = t.panel;
  const int8_t* a = t.codes;
  for (int b = 0; b < t.blocks; ++b) {
    __m256i sum[ROWS][2];
    for (int m = 0; m < ROWS; ++m) sum[m][0] = sum[m][1] = _mm256_set1_epi32(t.sums[m * t.blocks + b]);
    for (int g = 0; g < t.groups; ++g) {
      __m256i first[2], second[2];  // the nibbles, or the halves of a code
      for (int i = 0; i < 2; ++i) {
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32 * i));
        first[i] = BITS == 4 ? _mm256_and_si256(v, nibble) : _mm256_and_si256(_mm256_srli_epi16(v, 1), low_bits);
        second[i] = BITS == 4 ? _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble) : _mm256_sub_epi8(v, first[i]);
      }
      for (int m = 0; m < ROWS; ++m) {
        const int8_t* row = a + static_cast<size_t>(m) * t.in;
        const __m256i x = broadcast4(row), y = BITS == 4 ? broadcast4(row + 4) : x;
        for (int i = 0; i < 2; ++i) {
          const __m256i left = _mm256_maddubs_epi16(first[i], x), right = _mm256_maddubs_epi16(second[i], y);
          const __m256i both = BITS == 4 ? _mm256_madd_epi16(_mm256_add_epi16(left, right), ones)
                                         : _mm256_add_epi32(_mm256_madd_epi16(left, ones), _mm256_madd_epi16(right, ones));
          sum[m][i] = _mm256_add_epi32(sum[m][i], both);
        }
      }
      w += 64;
      a += 32 / BITS;
    }
    for (int i = 0; i < 2; ++i) {
      const __m256 scale = half_scales(t.panel_scales + static_cast<size_t>(b) * kPanel + i * 8);
      for (int m = 0; m < ROWS; ++m) {
        float* out = t.out + m * t.panels * kPanel + i * 8;
        const __m256 factor = _mm256_mul_ps(scale, _mm256_set1_ps(t.scales[m * t.blocks + b]));
        const __m256 before = b == 0 ? _mm256_setzero_ps() : _mm256_loadu_ps(out);
        _mm256_storeu_ps(out, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[m][i]), factor, before));
      }
    }
  }
}

template <int ROWS, int PANELS, int BITS>
static void tile(const Tile& t) {
  each_panel<PANELS>(t, [](const Tile& one) { one_panel<ROWS, BITS>(one); });
}

}  // namespace avx2

extern const Kernels kAvx2 = {"avx2", avx2::kRows, avx2::quantize, avx2::multiply};

}  // namespace quantvla
