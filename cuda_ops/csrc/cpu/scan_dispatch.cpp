// Selects the CPU kernels for the processor, and divides the work.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../route_scan.h"
#include "../wavefront_scan.h"

namespace cuda_ops {

#define SSM_DECLARE(capability)                                          \
  namespace capability {                                                 \
  void route_scan_forward(const RouteScanParams&, ParallelFor);          \
  void route_scan_backward(const RouteScanParams&, ParallelFor);         \
  void wavefront_scan_forward(const WavefrontScanParams&, ParallelFor);  \
  void wavefront_scan_backward(const WavefrontScanParams&, ParallelFor); \
  }

SSM_DECLARE(baseline)
#if defined(__x86_64__)
SSM_DECLARE(avx2)
SSM_DECLARE(avx512)
#endif

namespace {

struct Kernels {
  const char* capability;
  void (*route_scan_forward)(const RouteScanParams&, ParallelFor);
  void (*route_scan_backward)(const RouteScanParams&, ParallelFor);
  void (*wavefront_scan_forward)(const WavefrontScanParams&, ParallelFor);
  void (*wavefront_scan_backward)(const WavefrontScanParams&, ParallelFor);
};

#define SSM_KERNELS(capability)                                                                                       \
  Kernels {                                                                                                           \
    #capability, capability::route_scan_forward, capability::route_scan_backward, capability::wavefront_scan_forward, \
        capability::wavefront_scan_backward                                                                           \
  }

Kernels choose() {
#if defined(__x86_64__)
  // SSM_OPS_CPU_CAPABILITY limits the choice, for tests and comparisons.
  const char* variable = std::getenv("SSM_OPS_CPU_CAPABILITY");
  const std::string cap = variable && *variable ? variable : "avx512";
  const bool only_baseline = cap == "baseline";
  const bool at_most_avx2 = only_baseline || cap == "avx2";
  if (!at_most_avx2 && cap != "avx512")
    throw std::invalid_argument("SSM_OPS_CPU_CAPABILITY is '" + cap + "'; it must be baseline, avx2 or avx512");
  if (!at_most_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return SSM_KERNELS(avx512);
  if (!only_baseline && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return SSM_KERNELS(avx2);
#endif
  return SSM_KERNELS(baseline);
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace

const char* cpu_capability() { return kernels().capability; }

RouteScanSplit route_scan_split(const RouteScanParams& p) {
  // Tiles of at most 64 channels keep a position's vectors in registers and the L1 cache. A power of two of tiles
  // divides evenly among the usual numbers of threads.
  const int64_t units = ceil_div(p.channels / p.groups, kCpuChannelUnit);
  int64_t tiles = 1;
  while (ceil_div(units, tiles) * kCpuChannelUnit > kMaxCpuTileChannels) tiles *= 2;
  const int64_t lines = route_shape(p.route[0], p.per_line, p.height, p.width).lines;
  constexpr int64_t kMaxParts = 8;
  return {tiles, lines < kMaxParts ? lines : kMaxParts};
}

void route_scan_forward_cpu(const RouteScanParams& p, ParallelFor parallel_for) {
  kernels().route_scan_forward(p, parallel_for);
}
void route_scan_backward_cpu(const RouteScanParams& p, ParallelFor parallel_for) {
  kernels().route_scan_backward(p, parallel_for);
}

int64_t wavefront_scan_tiles(const WavefrontScanParams& p, int64_t min_items) {
  const int64_t units = ceil_div(p.channels, kCpuChannelUnit);
  const int64_t tiles = ceil_div(min_items, p.batch > 0 ? p.batch : 1);
  return units < tiles ? units : tiles;
}

void wavefront_scan_forward_cpu(const WavefrontScanParams& p, ParallelFor parallel_for) {
  kernels().wavefront_scan_forward(p, parallel_for);
}
void wavefront_scan_backward_cpu(const WavefrontScanParams& p, ParallelFor parallel_for) {
  kernels().wavefront_scan_backward(p, parallel_for);
}

}  // namespace cuda_ops
