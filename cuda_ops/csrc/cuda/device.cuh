// What the CUDA kernels share: element types, arithmetic, warp reductions, and launches. The tests compile the same
// kernels for the CPU, by headers of their own that stand in for CUDA's.
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

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Blocks of one launch. Tests lower it, to see that more of them are divided among launches.
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

// 2^x by one instruction of the special function unit; relative error 2^-22, and 0 below 2^-126.
__device__ __forceinline__ float fast_exp2(float x) {
#if defined(__CUDACC__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return approximate_exp2(x);
#endif
}

// 1 / x by one instruction, for x from 1 to 2; relative error 2^-23.
__device__ __forceinline__ float fast_reciprocal(float x) {
#if defined(__CUDACC__)
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return approximate_reciprocal(x);
#endif
}

// scale * log(1 + t), for t from 0 to 1: t times the polynomial of degree 7 whose largest relative error is the least, 2^-22.
// The special function unit would take longer: it computes the exponentials.
__device__ __forceinline__ float log_of_one_plus(float t, float scale) {
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

// log2(1 + 2^w), for t = 2^-|w|: a softplus of which both sides are in units of log(2).
__device__ __forceinline__ float softplus2(float w, float t) { return log_of_one_plus(t, kLog2E) + fmaxf(w, 0.f); }

struct Softplus {
  float value;  // log(1 + exp(v))
  float slope;  // 1 / (1 + exp(-v))
};

__device__ __forceinline__ Softplus softplus(float v) {
  const float t = fast_exp2(-fabsf(v) * kLog2E), reciprocal = fast_reciprocal(t + 1.f);
  return {log_of_one_plus(t, 1.f) + fmaxf(v, 0.f), v > 0 ? reciprocal : t * reciprocal};
}

// Sums each of some values over the lanes of a warp, or of each half of it: lane i gets the sum of values[i], modulo their
// number, a power of two of at most as many as there are lanes. Every lane of the warp takes part. Half of the values
// change sides at each level, so that 31 exchanges do for 32 sums.
template <int Lanes, int Count, int Held = Count>
__device__ __forceinline__ float sum_each(float (&values)[Count], int lane) {
  if constexpr (Held > 1) {
    constexpr int kHalf = Held / 2;
    const bool upper = (lane & kHalf) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float given = upper ? values[i] : values[i + kHalf];
      const float kept = upper ? values[i + kHalf] : values[i];
      values[i] = kept + __shfl_xor_sync(kAllLanes, given, kHalf);
    }
    return sum_each<Lanes, Count, kHalf>(values, lane);
  } else {
    float sum = values[0];
#pragma unroll
    for (int step = Count; step < Lanes; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    return sum;
  }
}

// A row of NS floats, 16 bytes at a time where there are so many.
template <int NS>
__device__ __forceinline__ void read_row(const float* row, float (&values)[NS]) {
  if constexpr (NS % 4 == 0) {
#pragma unroll
    for (int n = 0; n < NS; n += 4) {
      const float4 four = *reinterpret_cast<const float4*>(row + n);
      values[n] = four.x, values[n + 1] = four.y, values[n + 2] = four.z, values[n + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int n = 0; n < NS; ++n) values[n] = row[n];
  }
}

// Some states of a thread, which it reads and writes together.
template <int NS>
struct alignas(NS < 4 ? 4 * NS : 16) Pack {
  static constexpr int kStates = NS < 4 ? NS : 4;
  float of[kStates];
};

template <class T>
__device__ __forceinline__ T* at(const GridTensor& tensor, int64_t batch, int64_t row, int64_t column) {
  return static_cast<T*>(tensor.data) + batch * tensor.batch + row * tensor.row + column * tensor.column;
}

// Divides by a number that the host knows, from 1 to 2^31 - 1, in three instructions. Numerators are below 2^31.
struct Divisor {
  uint32_t multiplier, shift;

  Divisor() = default;
  explicit Divisor(int64_t value) : shift(0) {
    while ((int64_t(1) << shift) < value) ++shift;
    multiplier = uint32_t((uint64_t((int64_t(1) << shift) - value) << 32) / uint64_t(value) + 1);
  }
  __device__ __forceinline__ int32_t quotient(int32_t numerator) const {
    const uint32_t n = uint32_t(numerator);
    return int32_t((__umulhi(n, multiplier) + n) >> shift);
  }
};

// Shared memory that a block may have on the current device, in bytes.
inline int shared_memory_limit(int64_t* bytes) {
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  *bytes = limit;
  return int(error);
}

// Lets a kernel have as much shared memory as there is, if it wants more than any kernel may have without asking: the limit
// is the kernel's own and not a launch's, so that launches by several threads, and in graphs, would get into each other's way.
inline int allow_shared(const void* kernel, int64_t shared) {
  if (shared <= 48 * 1024) return cudaSuccess;
  int64_t limit = 0;
  const int error = shared_memory_limit(&limit);
  if (error || shared > limit) return error ? error : int(cudaErrorInvalidConfiguration);
  const cudaError_t refused = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(limit));
  if (refused != cudaSuccess) cudaGetLastError();  // no later launch is to report it
  return int(refused);
}

// Launches as many blocks as there are, in parts where they are too many for one grid: kernels add `first` to their
// block's number. `Arguments` has a member `first_block`.
template <class Arguments>
int launch_blocks(void (*kernel)(Arguments), Arguments arguments, int64_t blocks, int threads, int64_t shared,
                  void* stream) {
  if (blocks == 0) return cudaSuccess;
  const int refused = allow_shared(reinterpret_cast<const void*>(kernel), shared);
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

// Says to other blocks how far this one has come. What the thread wrote before, and what others of its block wrote before
// a barrier between them and the thread, is seen by whoever has acquired the value, and behind a barrier by its block.
__device__ __forceinline__ void store_release(int64_t* global, int64_t value) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.release.gpu.global.s64 [%0], %1;" ::"l"(global), "l"(value) : "memory");
#else
  *global = value;
#endif
}

__device__ __forceinline__ int64_t load_acquire(const int64_t* global) {
#if defined(__CUDA_ARCH__)
  int64_t value;
  asm volatile("ld.acquire.gpu.global.s64 %0, [%1];" : "=l"(value) : "l"(global) : "memory");
  return value;
#else
  return *global;
#endif
}

// Returns CALL(element type, number of states at a time).
#define SSM_DISPATCH_STATES(NS_VALUE, T, CALL) \
  switch (NS_VALUE) {                          \
    case 1: return CALL(T, 1);                 \
    case 2: return CALL(T, 2);                 \
    case 4: return CALL(T, 4);                 \
    case 16: return CALL(T, 16);               \
    default: return CALL(T, kGroup);           \
  }
#define SSM_DISPATCH(DTYPE, NS_VALUE, CALL)                                      \
  switch (DTYPE) {                                                               \
    case DataType::kFloat32: SSM_DISPATCH_STATES(NS_VALUE, float, CALL)          \
    case DataType::kBFloat16: SSM_DISPATCH_STATES(NS_VALUE, __nv_bfloat16, CALL) \
    case DataType::kFloat16: SSM_DISPATCH_STATES(NS_VALUE, __half, CALL)         \
    default: return int(cudaErrorInvalidValue);                                  \
  }

}  // namespace cuda_ops
