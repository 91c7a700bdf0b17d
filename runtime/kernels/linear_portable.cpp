// Plain C++, for processors that have none of the other sets, and as the reference of the others.
#include <cstring>
#include <utility>

#include "linear.h"

namespace quantvla {
namespace portable {

constexpr int kRows = 4;
struct Tile;
template <int ROWS, int PANELS, int BITS>
static void tile(const Tile& t);

#include "linear.inl"

static inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
  uint32_t bits = sign | (exponent + 112) << 23 | mantissa << 13;
  float value;
  if (exponent == 31) bits = sign | 0x7F800000 | mantissa << 13;
  std::memcpy(&value, &bits, 4);
  if (exponent != 0) return value;
  value = static_cast<float>(mantissa) / 16777216.0f;  // subnormal: mantissa * 2^-24
  return sign != 0 ? -value : value;
}

template <int ROWS, int PANELS, int BITS>
static void tile(const Tile& t) {
  for (int m = 0; m < ROWS; ++m) {
    for (int p = 0; p < PANELS; ++p) {
      float* out = t.out + (m * PANELS + p) * kPanel;
      const uint8_t* w = t.panel + p * t.panel_bytes;
      const uint16_t* scales = t.panel_scales + static_cast<size_t>(p) * t.blocks * kPanel;
      const int8_t* a = t.codes + static_cast<size_t>(m) * t.in;
      for (int b = 0; b < t.blocks; ++b) {
        int32_t sum[kPanel];
        for (int n = 0; n < kPanel; ++n) sum[n] = t.sums[m * t.blocks + b];
        for (int g = 0; g < t.groups; ++g, w += 64, a += 32 / BITS) {
          for (int n = 0; n < kPanel; ++n) {
            for (int i = 0; i < 4; ++i) {
              const int code = w[n * 4 + i];
              if (BITS == 4) {
                sum[n] += (code & 15) * a[i] + (code >> 4) * a[i + 4];
              } else {
                sum[n] += code * a[i];
              }
            }
          }
        }
        for (int n = 0; n < kPanel; ++n) {
          const float factor = half_to_float(scales[b * kPanel + n]) * t.scales[m * t.blocks + b];
          out[n] = __builtin_fmaf(static_cast<float>(sum[n]), factor, b == 0 ? 0.0f : out[n]);
        }
      }
    }
  }
}

}  // namespace portable

extern const Kernels kPortable = {"portable", portable::kRows, portable::quantize, portable::multiply};

}  // namespace quantvla
