// Results of the special function unit: wrong by a pseudo-random amount of up to the maximum error of NVIDIA's PTX
// manual.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

inline float approximate(float exact, float argument, float bound) {
  uint32_t bits;
  std::memcpy(&bits, &argument, sizeof(bits));
  bits = (bits ^ bits >> 15) * 0x2c1b3c6du;
  bits = (bits ^ bits >> 12) * 0x297a2d39u;
  const float share = float(int32_t(bits ^ bits >> 15)) / 2147483648.f;
  return float(double(exact) * (1. + double(bound) * share));
}
inline float approximate_exp2(float x) {
  const float result = approximate(exp2f(x), x, 0x1p-22f);
  return result < 0x1p-126f ? 0.f : result;
}
inline float approximate_reciprocal(float x) { return approximate(1.f / x, x, 0x1p-23f); }
