// The few operations on tensors that the bindings need, over either of torch's interfaces: the stable ABI, of which one
// library serves every torch from 2.10 on, or ATen's headers, for the older ones. Only binding files include it.
#pragma once

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>

#if defined(SSM_STABLE_ABI)
#include "tensor_stable.h"
#else
#include "tensor_aten.h"
#endif

// In torch's CUDA library alone, and there since torch 2.4: null without.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace cuda_ops {

inline std::string text(const std::string& part) { return part; }
inline std::string text(const char* part) { return part; }
inline std::string text(int64_t part) { return std::to_string(part); }
inline std::string text(int part) { return std::to_string(part); }
inline std::string text(ScalarType part) { return toString(part); }
inline std::string text(double part) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%g", part);
  return digits;
}
inline std::string text(Sizes part) {
  std::string list = "[";
  for (const int64_t size : part) list += (list.size() > 1 ? ", " : "") + std::to_string(size);
  return list + "]";
}

// torch's Python side makes a ValueError of an invalid_argument, and a RuntimeError of a runtime_error.
template <typename Error, typename... Parts>
[[noreturn]] void raise(const Parts&... parts) {
  std::string message;
  ((message += text(parts)), ...);
  throw Error(message);
}

// Raises a ValueError with a message of the parts, which are computed only then.
#define SSM_CHECK(condition, ...) \
  if (!(condition)) ::cuda_ops::raise<std::invalid_argument>(__VA_ARGS__)

}  // namespace cuda_ops
