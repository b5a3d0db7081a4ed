// Kernels with one fault each, and correct ones, for the tests of the emulation.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cuda/device.cuh"

struct Arguments {
  const float* source;
  float* target;
  int count;
  float* between;     // [kTurns][count], starts as NaN
  int64_t* progress;  // turns that can be read
  unsigned long long* tickets;
};

// Reverses the values through shared memory.
__global__ void reverse(Arguments a) {
  SSM_DYNAMIC_SHARED(shared);
  shared[threadIdx.x] = a.source[threadIdx.x];
  __syncthreads();
  a.target[threadIdx.x] = shared[a.count - 1 - threadIdx.x];
}

__global__ void without_barrier(Arguments a) {
  SSM_DYNAMIC_SHARED(shared);
  shared[threadIdx.x] = a.source[threadIdx.x];
  a.target[threadIdx.x] = shared[a.count - 1 - threadIdx.x];
}

// Lacks the barrier between reads and the next turn's writes.
__global__ void without_second_barrier(Arguments a) {
  SSM_DYNAMIC_SHARED(shared);
  float value = a.source[threadIdx.x];
  for (int turn = 0; turn < 3; ++turn) {
    shared[threadIdx.x] = value;
    __syncthreads();
    value = shared[a.count - 1 - threadIdx.x];
  }
  a.target[threadIdx.x] = value;
}

// Overwrites values that another warp may not have read yet; only the lanes of the warp have synchronized.
__global__ void overtakes(Arguments a) {
  SSM_DYNAMIC_SHARED(shared);
  shared[threadIdx.x] = a.source[threadIdx.x];
  __syncthreads();
  const float value = __shfl_xor_sync(0xffffffffu, shared[a.count - 1 - (threadIdx.x ^ 1)], 1);
  shared[threadIdx.x] = -1.f;
  __syncthreads();
  a.target[threadIdx.x] = value;
}

__global__ void beyond_shared(Arguments a) {
  SSM_DYNAMIC_SHARED(shared);
  shared[threadIdx.x + (threadIdx.x + 1 == unsigned(a.count))] = 1.f;
  __syncthreads();
  a.target[threadIdx.x] = a.source[threadIdx.x];
}

__global__ void beyond_target(Arguments a) { a.target[threadIdx.x + 1] = a.source[threadIdx.x]; }

__global__ void uninitialised(Arguments a) {
  SSM_DYNAMIC_SHARED(shared);
  if (threadIdx.x > 0) shared[threadIdx.x] = a.source[threadIdx.x];
  __syncthreads();
  a.target[threadIdx.x] = shared[a.count - 1 - threadIdx.x];
}

__global__ void divergent(Arguments a) {
  if (threadIdx.x < 40) __syncthreads();
  a.target[threadIdx.x] = a.source[threadIdx.x];
}

__global__ void lane_missing(Arguments a) {
  float value = a.source[threadIdx.x];
  if (threadIdx.x != 3) value += __shfl_xor_sync(0xffffffffu, value, 1);
  a.target[threadIdx.x] = value;
}

// One block writes several turns of values and publishes its progress; another block reads them.
constexpr int kTurns = 8;
enum Fault { kNone, kDoesNotWait, kWaitsForTooFew, kPublishesTooEarly };

__device__ void pass_values(const Arguments& a, bool reads, Fault fault) {
  float sum = 0.f;
  for (int turn = 0; turn < kTurns; ++turn) {
    float* values = a.between + turn * a.count;
    if (reads) {
      const int64_t needed = fault == kDoesNotWait ? 0 : fault == kWaitsForTooFew && turn > 0 ? turn : turn + 1;
      if (threadIdx.x == 0)
        while (cuda_ops::load_acquire(a.progress) < needed) __nanosleep(1);
      __syncthreads();
      sum += __ldcg(values + a.count - 1 - threadIdx.x);
    } else {
      values[threadIdx.x] = a.source[threadIdx.x];
      if (fault != kPublishesTooEarly) __syncthreads();
      if (threadIdx.x == 0) cuda_ops::store_release(a.progress, turn + 1);
    }
    __syncthreads();
  }
  if (reads) a.target[threadIdx.x] = sum / kTurns;
}

__global__ void does_not_wait(Arguments a) { pass_values(a, blockIdx.x == 1, kDoesNotWait); }
__global__ void waits_for_too_few(Arguments a) { pass_values(a, blockIdx.x == 1, kWaitsForTooFew); }
__global__ void publishes_too_early(Arguments a) { pass_values(a, blockIdx.x == 1, kPublishesTooEarly); }

// Correct if both blocks are resident. Otherwise the reader must not run first, which a ticket ensures.
__global__ void waits_by_number(Arguments a) { pass_values(a, blockIdx.x == 1, kNone); }
__global__ void waits_by_ticket(Arguments a) {
  SSM_DYNAMIC_SHARED(shared);
  if (threadIdx.x == 0) shared[0] = float(atomicAdd(a.tickets, 1ull));
  __syncthreads();
  pass_values(a, shared[0] == 1.f, kNone);
}

int main(int argc, char** argv) {
  const struct {
    const char* name;
    void (*kernel)(Arguments);
    unsigned blocks;
  } kernels[] = {{"reverse", reverse, 1},
                 {"without_barrier", without_barrier, 1},
                 {"without_second_barrier", without_second_barrier, 1},
                 {"overtakes", overtakes, 1},
                 {"beyond_shared", beyond_shared, 1},
                 {"beyond_target", beyond_target, 1},
                 {"uninitialised", uninitialised, 1},
                 {"divergent", divergent, 1},
                 {"lane_missing", lane_missing, 1},
                 {"does_not_wait", does_not_wait, 2},
                 {"waits_for_too_few", waits_for_too_few, 2},
                 {"publishes_too_early", publishes_too_early, 2},
                 {"waits_by_number", waits_by_number, 2},
                 {"waits_by_ticket", waits_by_ticket, 2}};
  const int count = 64;
  const auto allocate = [](int floats) {
    float* memory = static_cast<float*>(std::malloc(floats * sizeof(float)));
    for (int i = 0; i < floats; ++i) memory[i] = NAN;
    return memory;
  };
  float *source = allocate(count), *target = allocate(count), *between = allocate(kTurns * count);
  for (int i = 0; i < count; ++i) source[i] = float(i);
  int64_t progress = 0;
  unsigned long long tickets = 0;
  if (argc != 4) return 2;
  emulation::machine.seed = unsigned(std::atoi(argv[2]));
  emulation::machine.residents = std::atoi(argv[3]);
  for (const auto& entry : kernels)
    if (!std::strcmp(entry.name, argv[1]))
      SSM_LAUNCH(entry.kernel, entry.blocks, unsigned(count), count * sizeof(float), nullptr,
                 Arguments{source, target, count, between, &progress, &tickets});
  if (cudaGetLastError() != cudaSuccess) {
    std::printf("error: %s\n", cudaGetErrorString(cudaErrorLaunchFailure));
    return 1;
  }
  int wrong = 0;
  for (int i = 0; i < count; ++i) wrong += !(target[i] == float(count - 1 - i));
  std::printf("%d wrong\n", wrong);
  std::free(source);
  std::free(target);
  std::free(between);
  return 0;
}
