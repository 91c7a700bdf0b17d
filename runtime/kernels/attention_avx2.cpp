// Attention in float32 with AVX2 and FMA.
#include <cstring>
#include <limits>
#include <vector>

#include "attention.h"

namespace quantvla {
namespace {

#include "attention_float.inl"

}  // namespace

extern const AttentionKernels kAttentionAvx2 = {"avx2", sizeof(float), pack, attend};

}  // namespace quantvla
