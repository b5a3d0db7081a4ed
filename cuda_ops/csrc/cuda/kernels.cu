// Table of the CUDA kernels.
#include <cuda_runtime.h>

#include "../cuda_kernels.h"

namespace cuda_ops {

int route_scan_plan_cuda(const RouteScanParams& p, bool backward, RouteScanPlan* plan);
int route_scan_forward_cuda(const RouteScanParams& p, const RouteScanPlan& plan, void* stream);
int route_scan_backward_cuda(const RouteScanParams& p, const RouteScanPlan& plan, void* stream);
int wavefront_scan_plan_cuda(const WavefrontScanParams& p, bool backward, WavefrontScanPlan* plan);
int wavefront_scan_forward_cuda(const WavefrontScanParams& p, const WavefrontScanPlan& plan, void* stream);
int wavefront_scan_backward_cuda(const WavefrontScanParams& p, const WavefrontScanPlan& plan, void* stream);

namespace {
const char* error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
}  // namespace

extern const CudaKernels kCompiledCudaKernels;
const CudaKernels kCompiledCudaKernels = {
    route_scan_plan_cuda,
    route_scan_forward_cuda,
    route_scan_backward_cuda,
    wavefront_scan_plan_cuda,
    wavefront_scan_forward_cuda,
    wavefront_scan_backward_cuda,
    error_string,
};

}  // namespace cuda_ops
