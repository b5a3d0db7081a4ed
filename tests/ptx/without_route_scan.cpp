// Completes the table of kernels where those of the route scan are not compiled.
#include <cstdlib>

#include "route_scan.h"

namespace cuda_ops {

int route_scan_plan_cuda(const RouteScanParams&, bool, RouteScanPlan*) { std::abort(); }
int route_scan_forward_cuda(const RouteScanParams&, const RouteScanPlan&, void*) { std::abort(); }
int route_scan_backward_cuda(const RouteScanParams&, const RouteScanPlan&, void*) { std::abort(); }

}  // namespace cuda_ops
