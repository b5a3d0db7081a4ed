// Completes the bindings compiled with SSM_EMULATION: which kernels they call, and the CPU kernels, which they never
// call.
#include <cstdlib>

#include "cuda_kernels.h"

namespace cuda_ops {

const CudaKernels* emulated_kernels = nullptr;

RouteScanSplit route_scan_split(const RouteScanParams&) { std::abort(); }
void route_scan_forward_cpu(const RouteScanParams&, ParallelFor) { std::abort(); }
void route_scan_backward_cpu(const RouteScanParams&, ParallelFor) { std::abort(); }
int64_t wavefront_scan_tiles(const WavefrontScanParams&, int64_t) { std::abort(); }
void wavefront_scan_forward_cpu(const WavefrontScanParams&, ParallelFor) { std::abort(); }
void wavefront_scan_backward_cpu(const WavefrontScanParams&, ParallelFor) { std::abort(); }

}  // namespace cuda_ops

extern "C" __attribute__((visibility("default"))) void emulation_use(const cuda_ops::CudaKernels* kernels) {
  cuda_ops::emulated_kernels = kernels;
}
