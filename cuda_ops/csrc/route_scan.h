// Parameters and launchers of the route scan; see route_scan.py for the equations.
#pragma once

#include <cstdint>

#include "scan_math.h"
#include "scan_types.h"

namespace cuda_ops {

constexpr int kMaxRoutes = 4;

// "state" below is float, or double for kFloat64; "data" is the element type of the map.
//
// Saved state i is the one after chunk * (i + 1) positions of the route on the CPU. On CUDA, positions are counted
// along the axis for either direction, and it is the one between positions chunk * (i + 1) - 1 and chunk * (i + 1).
struct RouteScanParams {
  DataType dtype;
  int64_t batch;
  int64_t height;
  int64_t width;
  int64_t routes;  // at most kMaxRoutes, one with per_line
  int64_t groups;
  int64_t channels;  // of all groups together
  int64_t states;
  int64_t chunk;  // positions between saved states, 0 to save none
  int32_t route[kMaxRoutes];
  bool per_line;
  bool both_ways;  // with per_line: also in the route's reverse, with the same inputs. On CPUs alone, and without saved
                   // states
  bool delta_softplus;

  GridTensor x;            // (B, H, W, E) data
  GridTensor delta;        // (B, H, W, K, E) data, or with dt_rank the low-rank dt: (B, H, W, K, dt_rank)
  GridTensor B;            // (B, H, W, K, G, N) data; null means ones
  GridTensor C;            // (B, H, W, K, G, N) data; null means ones
  const void* A;           // (K, E, N) state
  const void* D;           // (K, E) state, or null
  const void* delta_bias;  // (K, E) state, or null
  const void* dt_weight;   // (K, E, dt_rank) state, delta = dt @ dt_weight^T
  int64_t dt_rank;         // 0 if delta itself is given
  void* last_state;        // (B, K, E, N) state, null with per_line
  void* saved_states;      // (B, K, lines, saved, N, E) state
  void* y;                 // (B, H, W, E) state, contiguous; forward only

  // Backward only. The kernels leave partial sums: over channels for dB and dC, over images for the others. The caller
  // adds the parts in a fixed order, so the result does not depend on the number of threads.
  GridTensor grad_y;            // (B, H, W, E) data
  const void* grad_last_state;  // (B, K, E, N) state, or null
  void* grad_x;                 // (B, H, W, E) state, contiguous
  GridTensor grad_delta;        // (B, H, W, K, E) data
  void* grad_A;                 // (parts, B, K, E, N) state
  void* grad_D;                 // (parts, B, K, E) state, or null
  void* grad_delta_bias;        // (parts, B, K, E) state, or null
  void* grad_B;                 // (tiles, B, H, W, K, G, N) state, or null
  void* grad_C;                 // (tiles, B, H, W, K, G, N) state, or null

  // CUDA only; sized by the plan. With these, y and grad_x above hold the partial sums of one axis of routes, in float;
  // they are null if the plan needs none, and may be `result` itself if that is float.
  void* result;          // (B, H, W, E) data, contiguous: y or grad_x
  void* segment_deltas;  // (B, K, lines, segments, E) float: sum of delta over each segment
  void* segment_states;  // (B, K, lines, segments, N, E) float: segment aggregates, then segment start states
};

// How the CPU kernels and their gradient buffers are divided; a function of the shape alone.
constexpr int64_t kMaxCpuTileChannels = 64;
struct RouteScanSplit {
  int64_t tiles;  // of each group's channels
  int64_t parts;  // of the lines, with per_line
};
RouteScanSplit route_scan_split(const RouteScanParams& p);

// Positions between the states that the kernels for d_state == 1 save.
constexpr int64_t kN1Chunk = 32;

// How the CUDA kernels divide the work. Blocks scan the segments of a line in parallel. With more than one segment, a
// first pass computes each segment's aggregate from a zero state, and state passing turns these into start states.
struct RouteScanPlan {
  int64_t segment_length;
  int64_t segments;      // per line
  int64_t warps;         // per block of the scan kernel
  int64_t tiles;         // blocks for the channels of each group
  bool needs_axis_sums;  // whether y or grad_x is needed as a buffer for the sums of one axis
  bool n1;               // whether the kernels for d_state == 1 are used
};

void route_scan_forward_cpu(const RouteScanParams& p, ParallelFor parallel_for);
void route_scan_backward_cpu(const RouteScanParams& p, ParallelFor parallel_for);

}  // namespace cuda_ops
