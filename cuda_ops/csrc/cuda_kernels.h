// Table of the CUDA kernels that the bindings call. A build without CUDA has no table.
#pragma once

#include "route_scan.h"
#include "wavefront_scan.h"

namespace cuda_ops {

// Each function returns 0 or a CUDA error code. Kernels run asynchronously on the given stream.
struct CudaKernels {
  int (*route_scan_plan)(const RouteScanParams& p, bool backward, RouteScanPlan* plan);
  int (*route_scan_forward)(const RouteScanParams& p, const RouteScanPlan& plan, void* stream);
  int (*route_scan_backward)(const RouteScanParams& p, const RouteScanPlan& plan, void* stream);
  int (*wavefront_scan_plan)(const WavefrontScanParams& p, bool backward, WavefrontScanPlan* plan);
  int (*wavefront_scan_forward)(const WavefrontScanParams& p, const WavefrontScanPlan& plan, void* stream);
  int (*wavefront_scan_backward)(const WavefrontScanParams& p, const WavefrontScanPlan& plan, void* stream);
  const char* (*error_string)(int code);
};

// Defined by kernels.cu.
extern const CudaKernels kCompiledCudaKernels;

}  // namespace cuda_ops
