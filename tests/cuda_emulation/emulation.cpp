// What the tests set and read of the emulation, beside the kernels' table.
#include <cuda_runtime.h>

#include "cuda_kernels.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const void* emulated_kernels() { return &cuda_ops::kCompiledCudaKernels; }
EXPORT void emulation_set(unsigned seed, int shared_limit, int fail_launch) {
  emulation::machine.seed = seed, emulation::machine.shared_limit = shared_limit;
  emulation::machine.fail_launch = fail_launch, emulation::machine.launches = emulation::machine.blocks = 0;
}
EXPORT int64_t emulation_launches() { return emulation::machine.launches; }
EXPORT int64_t emulation_blocks() { return emulation::machine.blocks; }
