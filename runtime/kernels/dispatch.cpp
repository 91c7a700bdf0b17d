// Which kernels this processor gets.
#include <cstring>

#include "attention.h"
#include "linear.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace quantvla {

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx512, kAvx2;
extern const AttentionKernels kAttentionAvx512;
#elif defined(__aarch64__)
extern const Kernels kNeonI8mm, kNeonDot;
#endif

namespace {

struct Candidate {
  const Kernels* kernels;
  bool runs;
};

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
const Candidate* candidates() {
  static const Candidate all[] = {{&kAvx512, has_avx512()}, {&kAvx2, has_avx2()}, {&kPortable, true}, {nullptr, false}};
  return all;
}
#elif defined(__aarch64__)
bool has(unsigned long word, unsigned long bit) {
#if defined(__linux__)
  return (getauxval(word) & bit) != 0;
#else
  (void)word, (void)bit;
  return false;
#endif
}
const Candidate* candidates() {
  constexpr unsigned long kHwcap = 16, kHwcap2 = 26, kAsimdDp = 1ul << 20, kI8mm = 1ul << 13;
  static const Candidate all[] = {{&kNeonI8mm, has(kHwcap2, kI8mm)},
                                  {&kNeonDot, has(kHwcap, kAsimdDp)},
                                  {&kPortable, true},
                                  {nullptr, false}};
  return all;
}
#else
const Candidate* candidates() {
  static const Candidate all[] = {{&kPortable, true}, {nullptr, false}};
  return all;
}
#endif

}  // namespace

const Kernels& kernels_of_this_processor() {
  const Candidate* c = candidates();
  while (!c->runs) ++c;
  return *c->kernels;
}

const Kernels* kernels_by_name(const char* name) {
  for (const Candidate* c = candidates(); c->kernels != nullptr; ++c)
    if (c->runs && std::strcmp(c->kernels->name, name) == 0) return c->kernels;
  return nullptr;
}

const AttentionKernels* attention_of_this_processor() {
#if defined(__x86_64__)
  if (has_avx512() && __builtin_cpu_supports("avx512bf16")) return &kAttentionAvx512;
#endif
  return nullptr;
}

}  // namespace quantvla
