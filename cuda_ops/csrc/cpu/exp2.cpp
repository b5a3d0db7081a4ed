// The scans' exponential by itself, to measure at which rate a machine computes it. Compiled once for each capability.
#include "../scan_math.h"
#include "../scan_types.h"
#include "simd.h"

namespace cuda_ops {
namespace SSM_CPU_CAPABILITY {
namespace {

struct Context {
  const float* x;
  float* y;
  int64_t repeats;
};

constexpr int64_t kBlock = 1024;  // values; they stay in the first cache

void run_block(const Context& context, int64_t block) {
  constexpr int kLanes = Vector<float>::kLanes, kUnroll = 4;
  const float* x = context.x + block * kBlock;
  float* y = context.y + block * kBlock;
  for (int64_t repeat = 0; repeat < context.repeats; ++repeat) {
    for (int i = 0; i < kBlock; i += kUnroll * kLanes)
      for (int u = 0; u < kUnroll; ++u) store(y + i + u * kLanes, exp2(load(x + i + u * kLanes, kLanes)), kLanes);
    // Otherwise the compiler may leave out repetitions that write the same values again.
    asm volatile("" : : "r"(x), "r"(y) : "memory");
  }
}

}  // namespace

void exp2_repeatedly(const float* x, float* y, int64_t count, int64_t repeats, ParallelFor parallel_for) {
  const Context context{x, y, repeats};
  parallel_for(
      count / kBlock, 1,
      [](int64_t begin, int64_t end, const void* opaque) {
        for (int64_t block = begin; block < end; ++block) run_block(*static_cast<const Context*>(opaque), block);
      },
      &context);
}

}  // namespace SSM_CPU_CAPABILITY
}  // namespace cuda_ops
