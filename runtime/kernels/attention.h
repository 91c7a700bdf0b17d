// Attention: softmax(scale q k^T + bias) v. Products are of bfloat16 numbers where the processor has them, else of
// float32; sums, maxima and exponentials are float32 always.
#pragma once

#include <cstddef>
#include <cstdint>

namespace quantvla {

// q (batch, queries, heads * dim), k (batch, keys, heads * dim), v like k, out like q; bias (1 or batch, 1 or heads,
// queries, keys) or null is added to the scaled scores. dim is a multiple of 32.
struct Attention {
  const float *q, *k, *v, *bias;
  float* out;
  int batch, heads, queries, keys, dim;
  size_t bias_batch, bias_head;  // elements from one batch or head of the bias to the next, 0 if shared
  float scale;

  int padded_keys() const { return (keys + 31) / 32 * 32; }
  size_t packed_size() const { return static_cast<size_t>(padded_keys()) * dim * 2; }  // numbers: keys, values of a head
};

constexpr int kQueryBlock = 48;

struct AttentionKernels {
  const char* name;
  size_t number_bytes;  // of a packed number
  // Pack keys and values of head `index` (of batch * heads) to `packed`.
  void (*pack)(const Attention&, int index, void* packed);
  // Compute queries [begin, end) of head `index`, at most kQueryBlock.
  void (*attend)(const Attention&, int index, const void* packed, int begin, int end);
};

// The fastest that this processor has; `in_float`: of those that multiply float32 numbers.
const AttentionKernels& attention_of_this_processor(bool in_float);
// The one called `name`, null if it is not compiled in or this processor lacks it.
const AttentionKernels* attention_by_name(const char* name);

}  // namespace quantvla
