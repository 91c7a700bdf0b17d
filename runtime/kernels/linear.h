// A linear layer on integer weights: the arithmetic, its operands, and the functions that each instruction set provides.
//
// y[m, n] = epilogue(sum over blocks b of  sx[m, b] * sw[n, b] * dot_b(m, n)  + bias[n]),  dot_b exact in int32.
// Input codes are int8, symmetric, round half to even, one scale per row and block. Weight codes are stored with an
// offset (8 or 128) as unsigned numbers; what the offset adds, offset * sum of a row's codes, starts the accumulator.
#pragma once

#include <cstddef>
#include <cstdint>

namespace quantvla {

// Columns of a panel: 16 columns are stored together, see `Weights`.
constexpr int kPanel = 16;

enum class Activation : int { kNone = 0, kGeluTanh = 1, kSilu = 2 };
enum class Combine : int { kNone = 0, kAdd = 1, kMultiply = 2 };

// Panels of 16 output columns. 8 bits: [out/16][in/4][16][4] bytes. 4 bits: [out/16][in/8][16][4] bytes, each holding
// two neighbouring input channels, the even one in the low nibble. Scales: [out/16][in/block][16] half precision.
struct Weights {
  const uint8_t* codes;
  const uint16_t* scales;
  int bits, in, out, block;

  int blocks() const { return in / block; }
  int offset() const { return bits == 4 ? 8 : 128; }
  size_t panel_bytes() const { return static_cast<size_t>(in) * bits / 8 * kPanel; }
};

// Rows of int8 codes with their scales and offset sums, both (rows, blocks).
struct Codes {
  int8_t* codes;
  float* scales;
  int32_t* sums;  // minus offset * sum of the block's codes
};

struct Linear {
  const float* x;  // (rows, in)
  int rows;
  Weights weights;
  const float* bias;   // (out) or null
  const float* other;  // (rows, out) or null: what `combine` adds or multiplies
  Activation activation;
  Combine combine;
  float* y;  // (rows, out)
};

// What one instruction set provides. `quantize` fills rows [begin, end); `multiply` computes
// y[row_begin:row_end, panel_begin*16:panel_end*16].
struct Kernels {
  const char* name;
  int rows_per_tile;
  void (*quantize)(const Linear&, const Codes&, int begin, int end);
  void (*multiply)(const Linear&, const Codes&, int row_begin, int row_end, int panel_begin, int panel_end);
};

// The fastest set that this processor has; never null.
const Kernels& kernels_of_this_processor();
// The set called `name`, null if it is not compiled in or this processor lacks it.
const Kernels* kernels_by_name(const char* name);

}  // namespace quantvla
