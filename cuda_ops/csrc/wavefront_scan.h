// Parameters and launchers of the wavefront scan; see wavefront_scan.py for the equations.
#pragma once

#include <cstdint>

#include "scan_math.h"
#include "scan_types.h"

namespace cuda_ops {

// Tensors that belong to one of a pixel's two neighbours. "state" is float, or double for kFloat64; "data" is the
// element type of the map.
struct Neighbour {
  GridTensor delta;  // (B, H, W, E) data
  GridTensor B;      // (B, H, W, N) data
  const void* A;     // (E, N) state

  // Backward only.
  GridTensor grad_delta;  // (B, H, W, E) data
  GridTensor grad_B;      // (parts, B, H, W, N) state
  void* grad_A;           // (B, E, N) state
};

// The kernels start at row 0 and column 0 and move along the rows. The caller chooses strides, which may be negative,
// so that this is the start corner and the rows are the shorter lines of the map. If the map is wide, rows of the
// kernels are columns of the map, and `above` is the left neighbour.
struct WavefrontScanParams {
  DataType dtype;
  int64_t batch;
  int64_t height;
  int64_t width;
  int64_t channels;
  int64_t states;
  int64_t chunk;           // rows between saved rows, 0 to save none
  bool starts_from_above;  // which neighbour's inflow starts the recurrence at the first pixel

  GridTensor x;  // (B, H, W, E) data
  GridTensor C;  // (B, H, W, N) data
  Neighbour above;
  Neighbour before;  // the previous pixel of the row
  const void* D;     // (E) state, or null
  GridTensor y;      // (B, H, W, E) data; forward only
  void* saved_rows;  // (B, saved, W, N, E) state: states of the last row of each chunk except the last

  // Backward only. In tensors with parts, `route` is the stride between parts. A part sums over one tile of channels,
  // on CUDA over several tiles. The caller adds parts and images in a fixed order, so the result does not depend on the
  // number of threads.
  GridTensor grad_y;  // (B, H, W, E) data
  GridTensor grad_x;  // (B, H, W, E) data
  GridTensor grad_C;  // (parts, B, H, W, N) state, with the strides of both grad_B
  void* grad_D;       // (B, E) state, or null

  // CUDA only; there, grad_A and grad_D have a leading dimension of `strips` parts.
  // (B, strips, checkpoints, tiles, N, rows, 16) float, or null: checkpointed wavefronts, the states before every 8th
  // step of a strip. N is padded to whole groups. The order of the last three is that of WavefrontCheckpoints.
  void* checkpoints;
  // (B, W, N, E) float: states of a strip's last row (backward: gradients of the states above its first row)
  void* boundary_row;
  void* group_sums;  // (1 or 3, B, H, W, E) float: y, or gradients of x and both deltas, summed over groups of states
  void* counters;    // int64, zero before each pass: next work item and progress flags, see wavefront_counter_count
};

// How the CUDA kernels divide the work. A work item is a strip of an image's rows and a tile of channels; blocks fetch
// work items until none is left. Each row of a strip trails the row above it by one column, so that a step advances all
// rows by one pixel.
constexpr int64_t kWavefrontTileChannels = 16;
constexpr int64_t kWavefrontStripRows = 8;  // if no rows are saved; a chunk has as many otherwise
struct WavefrontScanPlan {
  int64_t rows;    // per strip
  int64_t tiles;   // of channels
  int64_t strips;  // per image
  int64_t blocks;  // at most the number of resident blocks and of work items
  int64_t span;    // steps whose states the backward pass keeps at a time
  int64_t group;   // states per pass
  bool grouped;    // whether `group_sums` is needed
};

// Tiles that add their gradients of B and C to the same part, one after the other. More tiles take less memory and wait
// longer.
constexpr int64_t kTilesPerPart = 4;

// One for the next work item; one progress flag per work item that another strip follows; backward, one per work item
// for the sums of the tiles.
SSM_HOST_DEVICE int64_t wavefront_counter_count(int64_t strips, int64_t maps, bool backward) {
  return 1 + (strips - 1) * maps + (backward ? strips * maps : 0);
}

// Steps between checkpointed wavefronts, and their number per strip. None is saved before the first step.
constexpr int64_t kCheckpointSteps = 8;
SSM_HOST_DEVICE int64_t wavefront_checkpoint_count(int64_t width, int64_t rows) {
  return (width + rows - 2) / kCheckpointSteps;
}

// Number of CPU tiles of channels that gives at least `min_items` work items for the batch, if there are enough
// channels; a function of the shape alone. Backward, each tile needs its own gradients of B and C.
constexpr int64_t kMinForwardItems = 16;
constexpr int64_t kMinBackwardItems = 8;
int64_t wavefront_scan_tiles(const WavefrontScanParams& p, int64_t min_items);

void wavefront_scan_forward_cpu(const WavefrontScanParams& p, ParallelFor parallel_for);
void wavefront_scan_backward_cpu(const WavefrontScanParams& p, ParallelFor parallel_for);

}  // namespace cuda_ops
