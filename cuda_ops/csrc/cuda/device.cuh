// Helpers shared by the CUDA kernels: element types, arithmetic, warp reductions and launches. The tests compile the
// kernels for the CPU with headers that replace CUDA's.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../scan_math.h"
#include "../scan_types.h"

#if defined(__CUDACC__)
#define SSM_LAUNCH(kernel, blocks, threads, shared, stream, ...) \
  kernel<<<(blocks), (threads), (shared), (stream)>>>(__VA_ARGS__)
#define SSM_DYNAMIC_SHARED(name) extern __shared__ __align__(16) float name[]
#endif

namespace cuda_ops {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Maximum number of blocks per launch. Tests lower it to check that larger grids are split.
#if !defined(SSM_MAX_BLOCKS)
#define SSM_MAX_BLOCKS 0x7fffffff
#endif

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// 2^x by the special function unit; relative error 2^-22, and 0 below 2^-126.
__device__ __forceinline__ float fast_exp2(float x) {
#if defined(__CUDACC__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return approximate_exp2(x);
#endif
}

// 1 / x by the special function unit, for x in [1, 2]; relative error 2^-23.
__device__ __forceinline__ float fast_reciprocal(float x) {
#if defined(__CUDACC__)
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return approximate_reciprocal(x);
#endif
}

// scale * log(1 + t) for t in [0, 1]: t times the minimax polynomial of degree 7, relative error 2^-22. The special
// function unit is left to the exponentials.
__device__ __forceinline__ float scaled_log1p(float t, float scale) {
  float q = -8.5391984489e-3f * scale;
  q = q * t + 4.4089596347e-2f * scale;
  q = q * t - 1.0768166416e-1f * scale;
  q = q * t + 1.7745238098e-1f * scale;
  q = q * t - 2.4495461643e-1f * scale;
  q = q * t + 3.3275479573e-1f * scale;
  q = q * t - 4.9997405383e-1f * scale;
  q = q * t + 9.9999980567e-1f * scale;
  return q * t;
}

// log2(1 + 2^w), given t = 2^-|w|: a softplus with argument and value in units of log(2).
__device__ __forceinline__ float softplus_base2(float w, float t) { return scaled_log1p(t, kLog2E) + fmaxf(w, 0.f); }

struct Softplus {
  float value;  // log(1 + exp(v))
  float slope;  // 1 / (1 + exp(-v))
};

__device__ __forceinline__ Softplus softplus(float v) {
  const float t = fast_exp2(-fabsf(v) * kLog2E);
  const float reciprocal = fast_reciprocal(t + 1.f);
  return {scaled_log1p(t, 1.f) + fmaxf(v, 0.f), v > 0 ? reciprocal : t * reciprocal};
}

// Sums each of Count values over groups of Lanes lanes. Lane i gets the sum of values[i % Count]. Count is a power of
// two and at most Lanes; all lanes of the warp must call. Each level exchanges half of the remaining values, so that 32
// sums take 31 shuffles.
template <int Lanes, int Count, int Remaining = Count>
__device__ __forceinline__ float warp_sum_each(float (&values)[Count], int lane) {
  if constexpr (Remaining > 1) {
    constexpr int kHalf = Remaining / 2;
    const bool upper = (lane & kHalf) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float sent = upper ? values[i] : values[i + kHalf];
      const float kept = upper ? values[i + kHalf] : values[i];
      values[i] = kept + __shfl_xor_sync(kFullMask, sent, kHalf);
    }
    return warp_sum_each<Lanes, Count, kHalf>(values, lane);
  } else {
    float sum = values[0];
#pragma unroll
    for (int offset = Count; offset < Lanes; offset *= 2) sum += __shfl_xor_sync(kFullMask, sum, offset);
    return sum;
  }
}

// Loads N consecutive floats, 16 bytes at a time if N is a multiple of 4: `row` must be aligned to 16 bytes then.
template <int N>
__device__ __forceinline__ void load_row(const float* row, float (&values)[N]) {
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int n = 0; n < N; n += 4) {
      const float4 vector = *reinterpret_cast<const float4*>(row + n);
      values[n] = vector.x;
      values[n + 1] = vector.y;
      values[n + 2] = vector.z;
      values[n + 3] = vector.w;
    }
  } else {
#pragma unroll
    for (int n = 0; n < N; ++n) values[n] = row[n];
  }
}

// N values that are loaded and stored by one instruction; N * sizeof(T) is a power of two of at most 16.
template <class T, int N>
struct alignas(N * sizeof(T)) AlignedVector {
  T val[N];
};

// A pointer into global memory. Where one may be null, the compiler does not find that out by itself, and would load
// through a generic address.
template <class T>
__device__ __forceinline__ T* global_pointer(T* pointer) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// States of a thread that are accessed together.
template <int NS>
constexpr int kPackStates = NS < 4 ? NS : 4;
template <int NS>
using StatePack = AlignedVector<float, kPackStates<NS>>;

template <class T>
__device__ __forceinline__ T* pixel_pointer(const GridTensor& tensor, int64_t batch, int64_t row, int64_t column) {
  return static_cast<T*>(tensor.data) + batch * tensor.batch + row * tensor.row + column * tensor.column;
}

// Division by a divisor known to the host, in three instructions. The divisor is in [1, 2^31), the numerator in
// [0, 2^31).
struct FastDivisor {
  uint32_t multiplier;
  uint32_t shift;

  FastDivisor() = default;
  explicit FastDivisor(int64_t divisor) : shift(0) {
    while ((int64_t(1) << shift) < divisor) ++shift;
    multiplier = uint32_t((uint64_t((int64_t(1) << shift) - divisor) << 32) / uint64_t(divisor) + 1);
  }
  __device__ __forceinline__ int32_t divide(int32_t numerator) const {
    const uint32_t n = uint32_t(numerator);
    return int32_t((__umulhi(n, multiplier) + n) >> shift);
  }
};

// Maximum shared memory per block of the current device, in bytes.
inline int shared_memory_limit(int64_t* bytes) {
  int device = 0;
  int limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  *bytes = limit;
  return int(error);
}

// Raises the kernel's dynamic shared-memory limit to the device maximum if it needs more than 48 KiB. The attribute is
// per kernel, so a constant value keeps concurrent launches and graphs safe.
inline int raise_shared_memory_limit(const void* kernel, int64_t shared) {
  if (shared <= 48 * 1024) return cudaSuccess;
  int64_t limit = 0;
  const int error = shared_memory_limit(&limit);
  if (error) return error;
  if (shared > limit) return int(cudaErrorInvalidConfiguration);
  const cudaError_t refused = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(limit));
  if (refused != cudaSuccess) cudaGetLastError();  // clear it: a later launch must not report it
  return int(refused);
}

// Launches `blocks` blocks, in several grids if they exceed the maximum. Kernels add `first_block`, a member of
// `Arguments`, to their block index.
template <class Arguments>
int launch_blocks(void (*kernel)(Arguments), Arguments arguments, int64_t blocks, int threads, int64_t shared,
                  void* stream) {
  if (blocks == 0) return cudaSuccess;
  const int refused = raise_shared_memory_limit(reinterpret_cast<const void*>(kernel), shared);
  if (refused) return refused;
  for (int64_t first = 0; first < blocks; first += SSM_MAX_BLOCKS) {
    const int64_t rest = blocks - first;
    arguments.first_block = first;
    SSM_LAUNCH(kernel, unsigned(rest < SSM_MAX_BLOCKS ? rest : SSM_MAX_BLOCKS), unsigned(threads), size_t(shared),
               static_cast<cudaStream_t>(stream), arguments);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return int(error);
  }
  return cudaSuccess;
}

// Publishes a value to other blocks. Earlier writes of this thread, and writes of its block before a barrier that
// precedes the call, are visible to a thread that acquires the value, and after a barrier to that thread's block.
__device__ __forceinline__ void store_release(int64_t* global, int64_t value) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.release.gpu.global.s64 [%0], %1;" ::"l"(global), "l"(value) : "memory");
#else
  *global = value;
#endif
}

__device__ __forceinline__ int64_t load_acquire(const int64_t* global) {
#if defined(SSM_LAST_WORK_ITEM)
  return INT64_MAX;
#elif defined(__CUDA_ARCH__)
  int64_t value;
  asm volatile("ld.acquire.gpu.global.s64 %0, [%1];" : "=l"(value) : "l"(global) : "memory");
  return value;
#else
  return *global;
#endif
}

// Returns CALL(element type, states per pass).
#define SSM_DISPATCH_STATES(NS_VALUE, T, CALL) \
  switch (NS_VALUE) {                          \
    case 1: return CALL(T, 1);                 \
    case 2: return CALL(T, 2);                 \
    case 4: return CALL(T, 4);                 \
    case 16: return CALL(T, 16);               \
    default: return CALL(T, kStateGroup);      \
  }
#if !defined(SSM_DISPATCH)  // tests define it, to compile a few of the kernels
#define SSM_DISPATCH(DTYPE, NS_VALUE, CALL)                                      \
  switch (DTYPE) {                                                               \
    case DataType::kFloat32: SSM_DISPATCH_STATES(NS_VALUE, float, CALL)          \
    case DataType::kBFloat16: SSM_DISPATCH_STATES(NS_VALUE, __nv_bfloat16, CALL) \
    case DataType::kFloat16: SSM_DISPATCH_STATES(NS_VALUE, __half, CALL)         \
    default: return int(cudaErrorInvalidValue);                                  \
  }
#endif

}  // namespace cuda_ops
