// Which kernels this processor gets.
#include <cstring>

#include "attention.h"
#include "linear.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace quantvla {

extern const Kernels kPortable;
extern const AttentionKernels kAttentionPortable;
#if defined(__x86_64__)
extern const Kernels kAvx512, kAvx2;
extern const AttentionKernels kAttentionAvx512, kAttentionAvx2;
#elif defined(__aarch64__)
extern const Kernels kNeonI8mm, kNeonDot;
#endif

namespace {

// One set of functions and whether this processor runs it; the best first, null last.
template <class Set>
struct Candidate {
  const Set* set;
  bool runs;
};

template <class Set>
const Set& best(const Candidate<Set>* c) {
  while (!c->runs) ++c;
  return *c->set;
}

template <class Set>
const Set* named(const Candidate<Set>* c, const char* name) {
  for (; c->set != nullptr; ++c)
    if (c->runs && std::strcmp(c->set->name, name) == 0) return c->set;
  return nullptr;
}

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
const Candidate<Kernels>* candidates() {
  static const Candidate<Kernels> all[] = {{&kAvx512, has_avx512()}, {&kAvx2, has_avx2()}, {&kPortable, true}, {nullptr, false}};
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
const Candidate<Kernels>* candidates() {
  constexpr unsigned long kHwcap = 16, kHwcap2 = 26, kAsimdDp = 1ul << 20, kI8mm = 1ul << 13;
  static const Candidate<Kernels> all[] = {{&kNeonI8mm, has(kHwcap2, kI8mm)},
                                  {&kNeonDot, has(kHwcap, kAsimdDp)},
                                  {&kPortable, true},
                                  {nullptr, false}};
  return all;
}
#else
const Candidate<Kernels>* candidates() {
  static const Candidate<Kernels> all[] = {{&kPortable, true}, {nullptr, false}};
  return all;
}
#endif

const Candidate<AttentionKernels>* attention_candidates() {
  static const Candidate<AttentionKernels> all[] = {
#if defined(__x86_64__)
      {&kAttentionAvx512, has_avx512() && __builtin_cpu_supports("avx512bf16")},
      {&kAttentionAvx2, has_avx2()},
#endif
      {&kAttentionPortable, true},
      {nullptr, false}};
  return all;
}

}  // namespace

const Kernels& kernels_of_this_processor() { return best(candidates()); }
const Kernels* kernels_by_name(const char* name) { return named(candidates(), name); }
const AttentionKernels& attention_of_this_processor(bool in_float) {
  const Candidate<AttentionKernels>* c = attention_candidates();
  while (in_float && c->set->number_bytes != sizeof(float)) ++c;
  return best(c);
}
const AttentionKernels* attention_by_name(const char* name) { return named(attention_candidates(), name); }

}  // namespace quantvla
