// Attention in float32.
#include <cstring>
#include <limits>
#include <vector>

#include "attention.h"

namespace quantvla {
namespace {

#include "attention_float.inl"

}  // namespace

extern const AttentionKernels kAttentionPortable = {"portable", sizeof(float), pack, attend};

}  // namespace quantvla
