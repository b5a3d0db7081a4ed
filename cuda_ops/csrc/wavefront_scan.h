// The wavefront scan's parameters and launchers; see wavefront_scan.py for the equations.
#pragma once

#include <cstdint>

#include "scan_math.h"
#include "scan_types.h"

namespace cuda_ops {

// What belongs to one of the two neighbours that a pixel's state comes from. "state" is float, or double for kFloat64;
// "data" is the element type of the map.
struct Neighbour {
  GridTensor delta;       // (B, H, W, E) data
  GridTensor B;           // (B, H, W, N) data
  const void* A;          // (E, N) state
  GridTensor grad_delta;  // (B, H, W, E) data; this and what follows, backward only
  GridTensor grad_B;      // (parts, B, H, W, N) state
  void* grad_A;           // (B, E, N) state
};

// The kernels start at row 0 and column 0 and go along the rows. The caller chooses strides, which may be negative, so
// that this is the corner to start from and the rows are the map's shorter lines. Rows of the kernels are columns of
// the map where it is wide, and `above` is then the left neighbour.
struct WavefrontScanParams {
  DataType dtype;
  int64_t batch, height, width, channels, states;
  int64_t chunk;           // rows between saved ones, 0 for none
  bool starts_from_above;  // which neighbour's inflow starts the recurrence at the first pixel

  GridTensor x, C;  // (B, H, W, E) and (B, H, W, N) data
  Neighbour above, before;
  const void* D;  // (E) state, or null
  GridTensor y;   // (B, H, W, E) data; forward only
  void* saved;    // (B, saved, W, N, E) state: the states of the last row of each chunk but the last

  // Backward only. In tensors with parts, `route` is the stride between these: a part has the sums of a tile of channels,
  // on CUDA of several tiles. The caller adds parts and images in a fixed order: the result does not depend on the number
  // of threads.
  GridTensor grad_y, grad_x;  // (B, H, W, E) data
  GridTensor grad_C;          // (parts, B, H, W, N) state, in the strides of both grad_B
  void* grad_D;               // (B, E) state, or null

  // CUDA only; there, grad_A and grad_D above have a leading dimension of `strips` parts. In the fronts, states are filled
  // up to whole groups.
  void* fronts;    // (B, strips, fronts, tiles, N, rows, 16) float, or null: the states before every 8th step of a strip
  void* edge;      // (B, W, N, E) float: the states of a strip's last row, or the gradients of those above its first one
  void* partial;   // (1 or 3, B, H, W, E) float: sums over groups of states of y, or of the gradients of x and deltas
  void* counters;  // int64, zero before each pass: the next task, and tasks' progress (see wavefront_counters)
};

// How CUDA kernels divide the work: a task is a strip of an image's rows and a tile of channels; blocks take one task
// after the other. The rows of a strip are one column apart from each other, so that a step advances all of them by a
// pixel.
constexpr int64_t kWavefrontTile = 16;
struct WavefrontScanPlan {
  int64_t rows, tiles;  // of a strip, and of the channels
  int64_t strips;       // of an image
  int64_t blocks;       // no more than run at the same time, nor than there are tasks
  int64_t span;         // steps whose states the backward pass keeps at a time
  int64_t group;        // states at a time
  bool grouped;         // whether there are more, or fewer: sums over groups are in `partial`
};

// Tiles that add up their gradients of B and C, one after the other. More would need less memory, and wait longer.
constexpr int64_t kSummedTiles = 4;

// One for the next task; one for each task that another strip's follows; in the backward pass, one for each task.
SSM_HOST_DEVICE int64_t wavefront_counters(int64_t strips, int64_t maps, bool backward) {
  return 1 + (strips - 1) * maps + (backward ? strips * maps : 0);
}

// Steps between the fronts that the forward pass saves, and how many a strip has: none is needed before the first step.
constexpr int64_t kFrontSteps = 8;
SSM_HOST_DEVICE int64_t wavefront_fronts(int64_t width, int64_t rows) { return (width + rows - 2) / kFrontSteps; }

// Tiles of channels that give at least so many tasks for the whole batch, where there are enough channels; a function
// of the shape alone. In the backward pass each tile costs gradients of B and C of its own.
constexpr int64_t kForwardTasks = 16, kBackwardTasks = 8;
int64_t wavefront_scan_tiles(const WavefrontScanParams& p, int64_t tasks);

void wavefront_scan_forward_cpu(const WavefrontScanParams& p, ParallelFor parallel_for);
void wavefront_scan_backward_cpu(const WavefrontScanParams& p, ParallelFor parallel_for);

// 2^x of each of `count` values, whole blocks of 1024, `repeats` times over: what the scans' exponentials cost.
void exp2_repeatedly_cpu(const float* x, float* y, int64_t count, int64_t repeats, ParallelFor parallel_for);

}  // namespace cuda_ops
