// Vectors of 16 floats, in whatever registers an instruction set has, and their exponential.
typedef float Float16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Int16 __attribute__((vector_size(64), aligned(4), may_alias));

// exp(x) for x <= 88, relative error below 2e-7: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes' coefficients).
static inline Float16 exponential(Float16 x) {
  x = x < -87.0f ? Float16{} - 87.0f : x;
  const Float16 shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
  const Float16 n = shifted - 12582912.0f;
  const Float16 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Float16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  Int16 bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4B400000 + 127) << 23;
  Float16 scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}
