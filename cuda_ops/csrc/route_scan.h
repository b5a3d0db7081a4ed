// The route scan's parameters and launchers; see route_scan.py for the equations.
#pragma once

#include <cstdint>

#include "scan_math.h"
#include "scan_types.h"

namespace cuda_ops {

constexpr int kMaxRoutes = 4;

// "state" below is float, or double for kFloat64; "data" is the element type of the map.
struct RouteScanParams {
  DataType dtype;
  int64_t batch, height, width, routes, groups, channels, states;  // channels: of all groups together
  int64_t chunk;                                                   // positions between saved states, 0 for none
  int32_t route[kMaxRoutes];
  bool per_line, delta_softplus;

  GridTensor x;            // (B, H, W, E) data
  GridTensor delta;        // (B, H, W, K, E) data
  GridTensor B, C;         // (B, H, W, K, G, N) data; null means ones
  const void* A;           // (K, E, N) state
  const void* D;           // (K, E) state, or null
  const void* delta_bias;  // (K, E) state, or null
  void* last;              // (B, K, E, N) state, null with per_line
  void* saved;             // (B, K, lines, saved, N, E) state
  void* y;                 // (B, H, W, E) state, contiguous; forward only

  // Backward only. The sums over channels of dB and dC, and over images of the rest, are left to the caller,
  // who adds the parts in a fixed order: the result does not depend on the number of threads.
  GridTensor grad_y;       // (B, H, W, E) data
  const void* grad_last;   // (B, K, E, N) state, or null
  void* grad_x;            // (B, H, W, E) state, contiguous
  GridTensor grad_delta;   // (B, H, W, K, E) data
  void* grad_A;            // (parts, B, K, E, N) state
  void* grad_D;            // (parts, B, K, E) state, or null
  void* grad_delta_bias;   // (parts, B, K, E) state, or null
  void* grad_B;            // (tiles, B, H, W, K, G, N) state, or null
  void* grad_C;            // (tiles, B, H, W, K, G, N) state, or null
};

// How the work is divided; a function of the shape alone. A tile holds whole units of channels.
constexpr int64_t kTileChannels = 64;
struct RouteScanWork {
  int64_t tiles;  // of each group's channels
  int64_t parts;  // of the lines, with per_line
};
RouteScanWork route_scan_work(const RouteScanParams& p);

void route_scan_forward_cpu(const RouteScanParams& p, ParallelFor parallel_for);
void route_scan_backward_cpu(const RouteScanParams& p, ParallelFor parallel_for);

}  // namespace cuda_ops
