// What the scans' parameters are made of.
#pragma once

#include <cstdint>

namespace cuda_ops {

enum class DataType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

// A tensor over the grid. Strides are in elements; the last dimension is contiguous.
struct GridTensor {
  void* data = nullptr;  // null where the tensor was not given
  int64_t batch = 0, row = 0, column = 0, route = 0, group = 0;
};

// Runs body(begin, end, context) over [0, count) on the caller's thread pool.
using ParallelFor = void (*)(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, const void*),
                             const void* context);

// CPU kernels divide channels by whole units, and give a thread at least this many state updates.
constexpr int64_t kTileUnit = 16, kGrain = 1 << 14;

// The instruction set that the CPU kernels use here: "baseline", "avx2" or "avx512".
const char* cpu_capability();

}  // namespace cuda_ops
