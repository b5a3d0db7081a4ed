// Small kernels for the tests of the interpreter: single instructions, and correct uses of synchronization that the
// tests break in the PTX.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

struct Arguments {
  const float* source;
  float* target;
  int64_t* flags;  // starts as zeros
  int count;
};

// Reverses a block's values through shared memory, twice.
extern "C" __global__ void reverse(Arguments a) {
  extern __shared__ float shared[];
  float value = a.source[threadIdx.x];
  for (int turn = 0; turn < 2; ++turn) {
    shared[threadIdx.x] = value;
    __syncthreads();
    value = shared[a.count - 1 - threadIdx.x] + 1.f;
    __syncthreads();
  }
  a.target[threadIdx.x] = value;
}

// Passes values on within each warp, through shared memory and by a shuffle.
extern "C" __global__ void pass_in_warp(Arguments a) {
  extern __shared__ float shared[];
  shared[threadIdx.x] = a.source[threadIdx.x];
  __syncwarp();
  const float value = shared[threadIdx.x ^ 1];
  a.target[threadIdx.x] = value + __shfl_xor_sync(0xffffffffu, value, 2);
}

// Block n of those in the order of their tickets adds 1 to what the block before it has written.
extern "C" __global__ void chain(Arguments a) {
  extern __shared__ float shared[];
  int64_t* ticket = reinterpret_cast<int64_t*>(shared);
  if (threadIdx.x == 0) *ticket = int64_t(atomicAdd(reinterpret_cast<unsigned long long*>(a.flags), 1ull));
  __syncthreads();
  const int64_t item = *ticket;
  if (threadIdx.x == 0 && item > 0) {
    int64_t done = 0;
    while (done == 0) {
      asm volatile("ld.acquire.gpu.global.s64 %0, [%1];" : "=l"(done) : "l"(a.flags + item) : "memory");
      if (done == 0) __nanosleep(100);
    }
  }
  __syncthreads();
  const float* before = a.target + (item - 1) * blockDim.x;
  a.target[item * blockDim.x + threadIdx.x] =
      item > 0 ? __ldcg(before + blockDim.x - 1 - threadIdx.x) + 1.f : a.source[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0)
    asm volatile("st.release.gpu.global.s64 [%0], %1;" ::"l"(a.flags + item + 1), "l"(int64_t(1)) : "memory");
}
