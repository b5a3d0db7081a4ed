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
  GridTensor delta;        // (B, H, W, K, E) data, or its factors: (B, H, W, K, rank)
  GridTensor B, C;         // (B, H, W, K, G, N) data; null means ones
  const void* A;           // (K, E, N) state
  const void* D;           // (K, E) state, or null
  const void* delta_bias;  // (K, E) state, or null
  const void* delta_weight;  // (K, E, rank) state: what makes delta of its factors; on CUDA alone
  int64_t rank;              // 0 where delta is given as such
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

  // CUDA only, where y and grad_x above hold sums over some of the routes; sized by the plan.
  void* result;            // (B, H, W, E) data, contiguous: y or grad_x
  void* steps;             // (B, K, lines, segments, E) float: sums of step sizes
  void* ends;              // (B, K, lines, segments, N, E) float: states at, or gradients of the states at, an end
};

// How the work is divided; a function of the shape alone. A tile holds whole units of channels.
constexpr int64_t kTileChannels = 64;
struct RouteScanWork {
  int64_t tiles;  // of each group's channels
  int64_t parts;  // of the lines, with per_line
};
RouteScanWork route_scan_work(const RouteScanParams& p);

// How CUDA kernels divide the work. Lines fall into segments, which blocks scan side by side: first each by itself as if
// it started from zero, then, with what the segments before hand over, for good. One segment needs no first time.
struct RouteScanPlan {
  int64_t segment, segments;  // positions of a segment, and segments of a line
  int64_t warps, tiles;       // of a block of the last pass, and such blocks for each group's channels
  bool partial;               // whether y or grad_x is needed for sums over some of the routes
  bool one_state;             // whether the kernels for maps with one state serve
};

void route_scan_forward_cpu(const RouteScanParams& p, ParallelFor parallel_for);
void route_scan_backward_cpu(const RouteScanParams& p, ParallelFor parallel_for);

}  // namespace cuda_ops
