// Replaces CUDA's header: half precision represented by its bits, rounded to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t exponent = value.bits >> 10 & 31u;
  const uint32_t fraction = value.bits & 1023u;
  float magnitude;
  if (exponent == 31) {
    const uint32_t bits = 0x7f800000u | fraction << 13;
    std::memcpy(&magnitude, &bits, 4);
  } else if (exponent == 0) {
    magnitude = float(fraction) * 0x1p-24f;
  } else {
    const uint32_t bits = (exponent + 112) << 23 | fraction << 13;
    std::memcpy(&magnitude, &bits, 4);
  }
  uint32_t bits;
  std::memcpy(&bits, &magnitude, 4);
  bits |= sign;
  std::memcpy(&magnitude, &bits, 4);
  return magnitude;
}

inline __half __float2half_rn(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return {0x7fff};  // as CUDA converts NaN
  if (bits >= 0x47800000u) return {uint16_t(sign | 0x7c00u)};
  uint32_t result;
  if (bits < 0x38800000u) {
    // Adding 1/2 leaves the rounded bits of a subnormal number in the low bits.
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&result, &magnitude, 4);
    result -= 0x3f000000u;
  } else {
    result = (bits - 0x38000000u + 0xfffu + (bits >> 13 & 1u)) >> 13;
  }
  return {uint16_t(sign | result)};
}
