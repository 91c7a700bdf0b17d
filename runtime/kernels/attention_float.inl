// Attention in float32, four queries at a time, for processors without bfloat16 products.
#include "exponential.inl"

constexpr int kRows = 4;

static inline Float16 load(const float* p) { return *reinterpret_cast<const Float16*>(p); }
static inline void store(float* p, Float16 v) { *reinterpret_cast<Float16*>(p) = v; }

// keys: [keys/16][dim][16]; values: [keys][dim]; what is past the last key is zero.
static void pack(const Attention& t, int index, void* to_packed) {
  const int b = index / t.heads, h = index % t.heads, width = t.heads * t.dim;
  const size_t at = static_cast<size_t>(b) * t.keys * width + static_cast<size_t>(h) * t.dim;
  auto* keys = static_cast<float*>(to_packed);
  float* values = keys + static_cast<size_t>(t.padded_keys()) * t.dim;
  if (t.padded_keys() != t.keys) std::memset(keys, 0, t.packed_size() * sizeof(float));
  for (int j = 0; j < t.keys; ++j) {
    const float* k = t.k + at + static_cast<size_t>(j) * width;
    for (int d = 0; d < t.dim; ++d) keys[(static_cast<size_t>(j / 16) * t.dim + d) * 16 + j % 16] = k[d];
    std::memcpy(values + static_cast<size_t>(j) * t.dim, t.v + at + static_cast<size_t>(j) * width,
                t.dim * sizeof(float));
  }
}

// Turn scores into unnormalized shares; returns one over their sum. Scores below the lowest finite number count as that.
static float soften(float* scores, int keys, int padded, const float* bias, float scale) {
  float largest = std::numeric_limits<float>::lowest();
  for (int j = 0; j < keys; ++j) {
    float s = scores[j] * scale + (bias == nullptr ? 0.0f : bias[j]);
    s = s < std::numeric_limits<float>::lowest() ? std::numeric_limits<float>::lowest() : s;
    scores[j] = s;
    largest = s > largest ? s : largest;
  }
  for (int j = keys; j < padded; ++j) scores[j] = std::numeric_limits<float>::lowest();
  for (int j = 0; j < padded; j += 16) store(scores + j, exponential(load(scores + j) - largest));
  float total = 0;
  for (int j = 0; j < keys; ++j) total += scores[j];
  for (int j = keys; j < padded; ++j) scores[j] = 0;
  return 1.0f / total;
}

static void attend(const Attention& t, int index, const void* from_packed, int begin, int end) {
  const int b = index / t.heads, h = index % t.heads, padded = t.padded_keys(), width = t.heads * t.dim;
  const auto* keys = static_cast<const float*>(from_packed);
  const float* values = keys + static_cast<size_t>(padded) * t.dim;
  thread_local std::vector<float> scores;
  if (scores.size() < static_cast<size_t>(kRows) * padded) scores.resize(static_cast<size_t>(kRows) * padded);
  for (int row = begin; row < end; row += kRows) {
    const int rows = end - row < kRows ? end - row : kRows;
    const float* q[kRows];
    float* out[kRows];
    float inverse[kRows];
    for (int m = 0; m < kRows; ++m) {  // a last group repeats its last row
      const size_t at =
          (static_cast<size_t>(b) * t.queries + row + (m < rows ? m : rows - 1)) * width + static_cast<size_t>(h) * t.dim;
      q[m] = t.q + at, out[m] = t.out + at;
    }
    for (int j = 0; j < padded; j += 16) {
      Float16 sum[kRows] = {};
      const float* k = keys + static_cast<size_t>(j) * t.dim;
      for (int d = 0; d < t.dim; ++d, k += 16)
        for (int m = 0; m < kRows; ++m) sum[m] += load(k) * q[m][d];
      for (int m = 0; m < kRows; ++m) store(scores.data() + static_cast<size_t>(m) * padded + j, sum[m]);
    }
    for (int m = 0; m < kRows; ++m) {
      const size_t query = row + (m < rows ? m : rows - 1);
      const float* bias = t.bias == nullptr ? nullptr : t.bias + b * t.bias_batch + h * t.bias_head + query * t.keys;
      inverse[m] = soften(scores.data() + static_cast<size_t>(m) * padded, t.keys, padded, bias, t.scale);
    }
    for (int d = 0; d < t.dim; d += 16) {
      Float16 sum[kRows] = {};
      for (int j = 0; j < t.keys; ++j) {
        const Float16 v = load(values + static_cast<size_t>(j) * t.dim + d);
        for (int m = 0; m < kRows; ++m) sum[m] += v * scores[static_cast<size_t>(m) * padded + j];
      }
      for (int m = 0; m < kRows; ++m) store(out[m] + d, sum[m] * inverse[m]);
    }
  }
}
