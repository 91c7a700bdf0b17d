// Every kernel that this processor has on random layers of all shapes, against the portable one: built with the
// address and undefined-behaviour sanitizers by test_kernels.py. Buffers are exactly as large as the shapes say.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

#include "attention.h"
#include "linear.h"

extern "C" {
int quantvla_linear(const char*, const float*, int, const uint8_t*, const uint16_t*, int, int, int, int, const float*,
                    const float*, int, int, float*);
int quantvla_attend(const char*, const float*, const float*, const float*, const float*, int, int, int, int, int, float, float*);
}

template <class T, class Make>
std::unique_ptr<T[]> filled(size_t count, Make make) {
  auto values = std::make_unique<T[]>(count);
  for (size_t i = 0; i < count; ++i) values[i] = make();
  return values;
}

int main(int count, char** names) {
  std::mt19937 random(0);
  const auto real = [&] { return static_cast<float>(random() % 2001) / 500.0f - 2.0f; };
  const auto pick = [&](int low, int high) { return low + static_cast<int>(random() % (high - low + 1)); };
  for (int round = 0; round < 60; ++round) {
    const int bits = pick(0, 1) ? 4 : 8, block = 8 * pick(1, 9), blocks = pick(1, 5), in = block * blocks;
    const int out = 16 * pick(1, 7), rows = pick(1, 40), activation = pick(0, 2), combine = pick(0, 2);
    const auto x = filled<float>(static_cast<size_t>(rows) * in, real), bias = filled<float>(out, real);
    const auto other = filled<float>(static_cast<size_t>(rows) * out, real);
    const auto codes = filled<uint8_t>(static_cast<size_t>(out) * in * bits / 8, random);
    const auto scales = filled<uint16_t>(static_cast<size_t>(out) * blocks, [&] { return 0x2000 + random() % 1024; });
    const auto run = [&](const char* name, float* y) {
      return quantvla_linear(name, x.get(), rows, codes.get(), scales.get(), bits, in, out, block,
                             bias.get(), combine ? other.get() : nullptr, activation, combine,
                             y);
    };
    const auto expected = std::make_unique<float[]>(static_cast<size_t>(rows) * out);
    if (run("portable", expected.get()) != 0) return 1;
    for (int i = 1; i < count; ++i) {
      const auto y = std::make_unique<float[]>(static_cast<size_t>(rows) * out);
      if (run(names[i], y.get()) != 0) return 2;
      for (int j = 0; j < rows * out; ++j)
        if (y[j] != expected[j]) {
          std::printf("%s differs: bits %d in %d out %d block %d rows %d\n", names[i], bits, in, out, block, rows);
          return 3;
        }
    }
    const int heads = pick(1, 3), dim = 32 * pick(1, 2), queries = pick(1, 60), keys = pick(1, 70);
    const auto q = filled<float>(static_cast<size_t>(queries) * heads * dim, real);
    const auto k = filled<float>(static_cast<size_t>(keys) * heads * dim, real), v = filled<float>(static_cast<size_t>(keys) * heads * dim, real);
    const auto mask = filled<float>(static_cast<size_t>(queries) * keys, real);
    const auto o = std::make_unique<float[]>(static_cast<size_t>(queries) * heads * dim);
    for (const char* name : {"portable", "avx2", "avx512-bf16"})
      quantvla_attend(name, q.get(), k.get(), v.get(), mask.get(), 1, heads, queries, keys, dim, 0.125f, o.get());
  }
  std::puts("ok");
  return 0;
}
