// Interface of the tests: the kernels' table, the emulation's settings and its counters.
#include <cuda_runtime.h>

#include "cuda_kernels.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const void* emulated_kernels() { return &cuda_ops::kCompiledCudaKernels; }
EXPORT void emulation_set(unsigned seed, int shared_limit, int multiprocessors, int residents, int fail_launch) {
  emulation::Machine& machine = emulation::machine;
  machine.seed = seed;
  machine.shared_limit = shared_limit;
  machine.multiprocessors = multiprocessors;
  machine.residents = residents;
  machine.fail_launch = fail_launch;
  machine.launches = 0;
  machine.blocks = 0;
}
EXPORT int64_t emulation_launches() { return emulation::machine.launches; }
EXPORT int64_t emulation_blocks() { return emulation::machine.blocks; }
// Runs kernels by a function of the tests, which calls `emulation_fail` where one fails; null ends that.
EXPORT void emulation_launch_by(decltype(emulation::machine.launcher) launcher) {
  emulation::machine.launcher = launcher;
}
EXPORT void emulation_fail(const char* message) {
  emulation::machine.error = cudaErrorLaunchFailure;
  emulation::machine.message = message;
}
