// Types and constants shared by the parameters of both scans.
#pragma once

#include <cstdint>

namespace cuda_ops {

enum class DataType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

// A tensor over the grid. Strides are in elements; the last dimension is contiguous.
struct GridTensor {
  void* data = nullptr;  // null if the tensor was not given
  int64_t batch = 0;
  int64_t row = 0;
  int64_t column = 0;
  int64_t route = 0;
  int64_t group = 0;
};

// Runs body(begin, end, context) over [0, count) on the caller's thread pool.
using ParallelFor = void (*)(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, const void*),
                             const void* context);

// CPU tiles hold whole units of channels.
constexpr int64_t kCpuChannelUnit = 16;

// Minimum number of state updates per CPU thread.
constexpr int64_t kMinUpdatesPerThread = 1 << 14;

// The instruction set that the CPU kernels use here: "baseline", "avx2" or "avx512".
const char* cpu_capability();

}  // namespace cuda_ops
