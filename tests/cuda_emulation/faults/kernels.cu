// Kernels with a fault each, and one without, for the tests of the emulation.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

struct Arguments {
  const float* source;
  float* target;
  int count;
};

// Each thread reads what its neighbour wrote.
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

// Reads are over before others write again, only if a barrier says so.
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

int main(int argc, char** argv) {
  const struct {
    const char* name;
    void (*kernel)(Arguments);
  } kernels[] = {{"reverse", reverse},           {"without_barrier", without_barrier},
                 {"without_second_barrier", without_second_barrier},
                 {"beyond_shared", beyond_shared}, {"beyond_target", beyond_target},
                 {"uninitialised", uninitialised}, {"divergent", divergent},
                 {"lane_missing", lane_missing}};
  const int count = 64;
  float* source = static_cast<float*>(std::malloc(count * sizeof(float)));
  float* target = static_cast<float*>(std::malloc(count * sizeof(float)));
  for (int i = 0; i < count; ++i) source[i] = float(i), target[i] = NAN;
  if (argc != 3) return 2;
  emulation::machine.seed = unsigned(std::atoi(argv[2]));
  for (const auto& entry : kernels)
    if (!std::strcmp(entry.name, argv[1]))
      SSM_LAUNCH(entry.kernel, 1u, unsigned(count), count * sizeof(float), nullptr, Arguments{source, target, count});
  if (cudaGetLastError() != cudaSuccess) {
    std::printf("error: %s\n", cudaGetErrorString(cudaErrorLaunchFailure));
    return 1;
  }
  int wrong = 0;
  for (int i = 0; i < count; ++i) wrong += !(target[i] == float(count - 1 - i));
  std::printf("%d wrong\n", wrong);
  std::free(source);
  std::free(target);
  return 0;
}
