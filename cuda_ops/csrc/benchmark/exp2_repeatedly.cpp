// The exponential of the CPU kernels by itself, to measure its rate. Compiled by the benchmark, not part of the
// library.
#include "../cpu/simd.h"

namespace {

constexpr int64_t kBlock = 1024;  // values per block, which stay in the L1 cache

void compute_block(const float* x, float* y, int64_t repeats) {
  using namespace cuda_ops::SSM_CPU_CAPABILITY;
  constexpr int kLanes = Vector<float>::kLanes;
  constexpr int kUnroll = 4;
  for (int64_t repeat = 0; repeat < repeats; ++repeat) {
    for (int i = 0; i < kBlock; i += kUnroll * kLanes) {
      for (int u = 0; u < kUnroll; ++u) store(y + i + u * kLanes, exp2(load(x + i + u * kLanes, kLanes)), kLanes);
    }
    // Otherwise the compiler may drop repeats that store the same values again.
    asm volatile("" : : "r"(x), "r"(y) : "memory");
  }
}

}  // namespace

// Computes 2^x of `blocks` blocks of 1024 values, `repeats` times, on `threads` threads.
extern "C" __attribute__((visibility("default"))) void exp2_repeatedly(const float* x, float* y, int64_t blocks,
                                                                       int64_t repeats, int threads) {
  (void)threads;  // unused without OpenMP
#pragma omp parallel for num_threads(threads)
  for (int64_t block = 0; block < blocks; ++block) compute_block(x + block * kBlock, y + block * kBlock, repeats);
}
