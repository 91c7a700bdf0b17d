// ARMv8.2 with dot products, 6 rows times 16 columns; with I8MM unsigned weights as they are stored, else made signed.
#include <arm_neon.h>

#include <cstring>
#include <utility>

#include "linear.h"

namespace quantvla {
#if defined(__ARM_FEATURE_MATMUL_INT8)
#define QUANTVLA_SET neon_i8mm
#else
#define QUANTVLA_SET neon_dot
#endif
namespace QUANTVLA_SET {

constexpr int kRows = 6;
struct Tile;
template <int ROWS, int PANELS, int BITS>
static void tile(const Tile& t);

#include "linear.inl"

// What a register of stored codes is multiplied as.
#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr bool kOffset = true;
static inline int32x4_t dot(int32x4_t sum, uint8x16_t w, int8x8_t a) { return vusdotq_lane_s32(sum, w, a, 0); }
template <int BITS>
static inline uint8x16_t operand(uint8x16_t w) {
  return w;
}
#else
constexpr bool kOffset = false;
static inline int32x4_t dot(int32x4_t sum, int8x16_t w, int8x8_t a) { return vdotq_lane_s32(sum, w, a, 0); }
template <int BITS>
static inline int8x16_t operand(uint8x16_t w) {
  return vreinterpretq_s8_u8(vsubq_u8(w, vdupq_n_u8(BITS == 4 ? 8 : 128)));
}
#endif

static inline int8x8_t four(const int8_t* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return vreinterpret_s8_s32(vdup_n_s32(v));
}

template <int ROWS, int BITS>
static void one_panel(const Tile& t) {
  const uint8_t* w = t.panel;
  const int8_t* a = t.codes;
  for (int b = 0; b < t.blocks; ++b) {
    int32x4_t sum[ROWS][4];
    for (int m = 0; m < ROWS; ++m)
      for (int i = 0; i < 4; ++i) sum[m][i] = vdupq_n_s32(kOffset ? t.sums[m * t.blocks + b] : 0);
    for (int g = 0; g < t.groups; ++g) {
      for (int i = 0; i < 4; ++i) {
        const uint8x16_t v = vld1q_u8(w + i * 16);
        const auto low = operand<BITS>(BITS == 4 ? vandq_u8(v, vdupq_n_u8(15)) : v);
        for (int m = 0; m < ROWS; ++m) sum[m][i] = dot(sum[m][i], low, four(a + static_cast<size_t>(m) * t.in));
        if (BITS == 4) {
          const auto high = operand<BITS>(vshrq_n_u8(v, 4));
          for (int m = 0; m < ROWS; ++m) sum[m][i] = dot(sum[m][i], high, four(a + static_cast<size_t>(m) * t.in + 4));
        }
      }
      w += 64;
      a += 32 / BITS;
    }
    for (int i = 0; i < 4; ++i) {
      float16x4_t half;
      std::memcpy(&half, t.panel_scales + static_cast<size_t>(b) * kPanel + i * 4, 8);
      const float32x4_t scale = vcvt_f32_f16(half);
      for (int m = 0; m < ROWS; ++m) {
        float* out = t.out + m * t.panels * kPanel + i * 4;
        const float32x4_t factor = vmulq_n_f32(scale, t.scales[m * t.blocks + b]);
        vst1q_f32(out, vfmaq_f32(b == 0 ? vdupq_n_f32(0) : vld1q_f32(out), vcvtq_f32_s32(sum[m][i]), factor));
      }
    }
  }
}

template <int ROWS, int PANELS, int BITS>
static void tile(const Tile& t) {
  each_panel<PANELS>(t, [](const Tile& one) { one_panel<ROWS, BITS>(one); });
}

}  // namespace QUANTVLA_SET

#if defined(__ARM_FEATURE_MATMUL_INT8)
extern const Kernels kNeonI8mm = {"neon-i8mm", neon_i8mm::kRows, neon_i8mm::quantize, neon_i8mm::multiply};
#else
extern const Kernels kNeonDot = {"neon-dot", neon_dot::kRows, neon_dot::quantize, neon_dot::multiply};
#endif

}  // namespace quantvla
