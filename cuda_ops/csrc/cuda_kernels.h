// The CUDA kernels as the bindings call them: by a table, which a build without CUDA lacks.
#pragma once

#include "route_scan.h"
#include "wavefront_scan.h"

namespace cuda_ops {

// Each function returns 0 or CUDA's error code. Kernels run on the given stream; nothing here waits for them.
struct CudaKernels {
  int (*route_scan_plan)(const RouteScanParams& p, bool backward, RouteScanPlan* plan);
  int (*route_scan_forward)(const RouteScanParams& p, const RouteScanPlan& plan, void* stream);
  int (*route_scan_backward)(const RouteScanParams& p, const RouteScanPlan& plan, void* stream);
  int (*wavefront_scan_plan)(const WavefrontScanParams& p, bool backward, WavefrontScanPlan* plan);
  int (*wavefront_scan_forward)(const WavefrontScanParams& p, const WavefrontScanPlan& plan, void* stream);
  int (*wavefront_scan_backward)(const WavefrontScanParams& p, const WavefrontScanPlan& plan, void* stream);
  const char* (*error_string)(int code);
};

// What nvcc compiled; defined where the library is built with CUDA.
extern const CudaKernels kCompiledCudaKernels;

}  // namespace cuda_ops
