// The parts of a linear layer that are the same for all instruction sets, compiled once for each.
// Before it is included, a file defines in its namespace:
//   constexpr int kRows                                                   rows of the largest tile
//   template <int ROWS, int PANELS, int BITS> void tile(const Tile&)      adds all blocks of a tile into Tile::sums

#include "exponential.inl"

static inline Float16 logistic(Float16 x) {
  const Float16 bounded = x < -80.0f ? Float16{} - 80.0f : (x > 80.0f ? Float16{} + 80.0f : x);
  return 1.0f / (1.0f + exponential(-bounded));
}

static inline Float16 activate(Float16 x, Activation activation) {
  switch (activation) {
    case Activation::kGeluTanh:  // x/2 (1 + tanh(z)) = x * logistic(2z)
      return x * logistic(x * (1.5957691216f + 0.0713548162726f * x * x));
    case Activation::kSilu:
      return x * logistic(x);
    default:
      return x;
  }
}

// Quantize one block of a row; returns the sum of the codes. Largest magnitudes are compared as integers, which for
// numbers without sign is the same order, associative, and lets a NaN through to the scale.
static inline int32_t quantize_block(const float* x, int size, int8_t* codes, float* scale) {
  int32_t largest_bits = 0;
  for (int k = 0; k < size; ++k) {
    int32_t bits;
    std::memcpy(&bits, x + k, sizeof bits);
    bits &= 0x7FFFFFFF;
    largest_bits = bits > largest_bits ? bits : largest_bits;
  }
  float largest;
  std::memcpy(&largest, &largest_bits, sizeof largest);
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
  *scale = largest / 127.0f;
  int32_t sum = 0;
  for (int k = 0; k < size; ++k) {
    const float shifted = x[k] * inverse + 12582912.0f;  // round half to even in the last bits of the number
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    const int8_t code = static_cast<int8_t>(bits - 0x4B400000);
    codes[k] = code;
    sum += code;
  }
  return sum;
}

// The order that 4-bit panels want inside eight channels: the four even ones, then the four odd ones.
static inline void even_before_odd(int8_t* codes, int size) {
  for (int k = 0; k < size; k += 8) {
    uint64_t v;
    std::memcpy(&v, codes + k, 8);
    const uint64_t even = (v & 0xFF) | ((v >> 8) & 0xFF00) | ((v >> 16) & 0xFF0000) | ((v >> 24) & 0xFF000000);
    const uint64_t w = v >> 8;
    const uint64_t odd = (w & 0xFF) | ((w >> 8) & 0xFF00) | ((w >> 16) & 0xFF0000) | ((w >> 24) & 0xFF000000);
    v = even | odd << 32;
    std::memcpy(codes + k, &v, 8);
  }
}

static void quantize(const Linear& linear, const Codes& codes, int begin, int end) {
  const Weights& w = linear.weights;
  const int blocks = w.blocks(), offset = w.offset();
  for (int row = begin; row < end; ++row) {
    const size_t at = static_cast<size_t>(row) * w.in;
    for (int b = 0; b < blocks; ++b) {
      const size_t index = static_cast<size_t>(row) * blocks + b;
      const int32_t sum =
          quantize_block(linear.x + at + b * w.block, w.block, codes.codes + at + b * w.block, codes.scales + index);
      codes.sums[index] = -offset * sum;
    }
    if (w.bits == 4) even_before_odd(codes.codes + at, w.in);
  }
}

// A tile: some rows times one or two panels.
struct Tile {
  const int8_t* codes;  // of its first row; rows are `in` apart
  const float* scales;  // of its first row; rows are `blocks` apart
  const int32_t* sums;
  const uint8_t* panel;          // of its first panel; panels are `panel_bytes` apart
  const uint16_t* panel_scales;  // [panel][block][16]
  size_t panel_bytes;
  int in, blocks, panels, groups;  // groups of four (8-bit) or eight (4-bit) channels in a block
  float* out;              // (rows, panels * 16)
};

// Call `body` with a tile of each panel alone.
template <int PANELS, class Body>
static inline void each_panel(Tile t, const Body& body) {
  for (int p = 0; p < PANELS; ++p) {
    body(t);
    t.panel += t.panel_bytes;
    t.panel_scales += static_cast<size_t>(t.blocks) * kPanel;
    t.out += kPanel;
  }
}

template <int BITS, int PANELS, int... ROWS>
static void run_tile(int rows, const Tile& t, std::integer_sequence<int, ROWS...>) {
  (void)((rows == ROWS + 1 ? (tile<ROWS + 1, PANELS, BITS>(t), true) : false) || ...);
}

static void finish(const Linear& linear, const float* sums, int row, int rows, int panel, int panels) {
  const int out = linear.weights.out;
  for (int m = 0; m < rows; ++m) {
    for (int p = 0; p < panels; ++p) {
      const int column = (panel + p) * kPanel;
      const size_t at = static_cast<size_t>(row + m) * out + column;
      Float16 v = *reinterpret_cast<const Float16*>(sums + (m * panels + p) * kPanel);
      if (linear.bias != nullptr) v += *reinterpret_cast<const Float16*>(linear.bias + column);
      v = activate(v, linear.activation);
      if (linear.combine == Combine::kAdd) v += *reinterpret_cast<const Float16*>(linear.other + at);
      if (linear.combine == Combine::kMultiply) v *= *reinterpret_cast<const Float16*>(linear.other + at);
      *reinterpret_cast<Float16*>(linear.y + at) = v;
    }
  }
}

static void multiply(const Linear& linear, const Codes& codes, int row_begin, int row_end, int panel_begin,
                     int panel_end) {
  const Weights& w = linear.weights;
  const int blocks = w.blocks();
  const int tiles = (row_end - row_begin + kRows - 1) / kRows;
  alignas(64) float sums[kRows * 2 * kPanel];
  for (int i = 0; i < tiles; ++i) {  // rows split evenly: 50 are 13 + 13 + 12 + 12, not 13 + 13 + 13 + 11
    const int row = row_begin + (row_end - row_begin) * i / tiles;
    const int rows = row_begin + (row_end - row_begin) * (i + 1) / tiles - row;
    for (int panel = panel_begin; panel < panel_end;) {
      const int panels = panel + 2 <= panel_end ? 2 : 1;
      const Tile t{codes.codes + static_cast<size_t>(row) * w.in,
                   codes.scales + static_cast<size_t>(row) * blocks,
                   codes.sums + static_cast<size_t>(row) * blocks,
                   w.codes + panel * w.panel_bytes(),
                   w.scales + static_cast<size_t>(panel) * blocks * kPanel,
                   w.panel_bytes(),
                   w.in,
                   blocks,
                   panels,
                   w.block * w.bits / 32,
                   sums};
      constexpr auto all = std::make_integer_sequence<int, kRows>();
      if (w.bits == 4) {
        panels == 2 ? run_tile<4, 2>(rows, t, all) : run_tile<4, 1>(rows, t, all);
      } else {
        panels == 2 ? run_tile<8, 2>(rows, t, all) : run_tile<8, 1>(rows, t, all);
      }
      finish(linear, sums, row, rows, panel, panels);
      panel += panels;
    }
  }
}
