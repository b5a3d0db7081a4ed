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
  int64_t count, repeats;
};

constexpr int64_t kBlock = 1024;  // values; in the first cache whole

void run_block(const Context& context, int64_t block) {
  constexpr int kLanes = Vector<float>::kLanes;
  const int64_t begin = block * kBlock, end = begin + kBlock < context.count ? begin + kBlock : context.count;
  for (int64_t repeat = 0; repeat < context.repeats; ++repeat) {
    for (int64_t i = begin; i < end; i += kLanes) {
      const int count = end - i < kLanes ? int(end - i) : kLanes;
      store(context.y + i, exp2(load(context.x + i, count)), count);
    }
    // Otherwise the compiler may leave out repetitions that write the same values again.
    asm volatile("" : : "r"(context.x), "r"(context.y) : "memory");
  }
}

}  // namespace

void exp2_repeatedly(const float* x, float* y, int64_t count, int64_t repeats, ParallelFor parallel_for) {
  const Context context{x, y, count, repeats};
  parallel_for(
      ceil_div(count, kBlock), 1,
      [](int64_t begin, int64_t end, const void* opaque) {
        for (int64_t block = begin; block < end; ++block) run_block(*static_cast<const Context*>(opaque), block);
      },
      &context);
}

}  // namespace SSM_CPU_CAPABILITY
}  // namespace cuda_ops
