// Shared parts of the wavefront-scan kernels.
//
// With SSM_LAST_WORK_ITEM defined, a block takes the last work item alone and finds all that it waits for: for a
// verifier that cannot follow values through memory.
//
// A work item is a strip of an image's rows and 16 channels. A thread holds one row of the strip and one channel, with
// the row's current states in registers. At step t, row r is at column t - r: the row above was there one step earlier
// and left its states in shared memory. The boundary row, which the first row needs from the strip above (backward: the
// last row from the strip below), is written to global memory by another block, some columns ahead.
#pragma once

#include "../wavefront_scan.h"
#include "device.cuh"

namespace cuda_ops {
namespace {

constexpr int kTileChannels = int(kWavefrontTileChannels);
constexpr int kMaxStripRows = 16;
constexpr int kMinRowSlots = 8;
constexpr int kMaxThreads = kMaxStripRows * kTileChannels;

// Bytes from one column to the next. Deltas are named after their neighbour.
struct ColumnBytes {
  int64_t x;
  int64_t above;
  int64_t before;
  int64_t B_above;
  int64_t B_before;
  int64_t C;
  int64_t y;
  int64_t grad_y;
  int64_t grad_x;
  int64_t grad_above;
  int64_t grad_before;
};

template <class T>
__device__ __forceinline__ void advance_bytes(T*& pointer, int64_t bytes) {
  pointer = reinterpret_cast<T*>(const_cast<char*>(reinterpret_cast<const char*>(pointer)) + bytes);
}

struct WavefrontArguments {
  WavefrontScanParams p;
  ColumnBytes bytes;
  int32_t rows;  // per strip
  int32_t tiles;
  int32_t strips;
  int32_t span;
  bool grouped;
  int64_t maps;               // images times tiles; each has `strips` work items
  int64_t checkpoint_floats;  // of one checkpointed wavefront
};

// The total number of states: a constant except in the kernels that process groups of states.
template <int NS>
__device__ __forceinline__ int64_t total_states(const WavefrontArguments& a) {
  return NS == kStateGroup ? a.p.states : NS;
}

// Fetches the next work item id from a global atomic counter (all threads must call). Returns false if none is left.
// Ids follow dependency order, strip by strip: an item waits only for the same map's previous strip and, backward, for
// the previous tile. So the oldest unfinished item never waits: no deadlock for any number of resident blocks.
// `slot` is in shared memory. `id` is negative before the first call.
__device__ __forceinline__ bool fetch_work_item(const WavefrontArguments& a, int64_t* slot, int64_t* id) {
  __syncthreads();  // the previous work item no longer uses shared memory
#if defined(SSM_LAST_WORK_ITEM)
  *id = a.strips * a.maps - (*id < 0);
#else
  if (threadIdx.x == 0) *slot = int64_t(atomicAdd(static_cast<unsigned long long*>(a.p.counters), 1ull));
  __syncthreads();
  *id = *slot;
#endif
  return *id < a.strips * a.maps;
}

// The id that `fetch_work_item` has stored in `slot`.
__device__ __forceinline__ int64_t fetched_work_item(const int64_t* slot, [[maybe_unused]] int64_t id) {
#if defined(SSM_LAST_WORK_ITEM)
  return id;
#else
  return *slot;
#endif
}

// A strip of an image and a tile of channels, and the thread's row and channel. A warp has two rows.
struct WorkItem {
  int64_t batch;
  int64_t tile;
  int64_t channel;
  int32_t row;       // within the strip
  int32_t lane;      // channel within the tile
  int32_t warp_row;  // first row of the warp
  int32_t map_rows;  // rows of the strip that are on the map
  bool active;       // whether the channel and the row exist

  __device__ __forceinline__ WorkItem(const WavefrontArguments& a, int64_t id, int32_t strip) {
    const int64_t map = id % a.maps;
    const int64_t rest = a.p.height - int64_t(strip) * a.rows;
    tile = map % a.tiles;
    batch = map / a.tiles;
    lane = threadIdx.x % kTileChannels;
    row = threadIdx.x / kTileChannels;
    warp_row = threadIdx.x / kWarpSize * (kWarpSize / kTileChannels);
    map_rows = rest < a.rows ? int32_t(rest) : a.rows;
    channel = tile * kTileChannels + lane;
    active = channel < a.p.channels && row < a.rows;
  }

  // Whether one of the warp's two rows is at a column of the map at a step: the second is one column behind the first.
  // Uniform across the warp.
  __device__ __forceinline__ bool warp_is_busy(const WavefrontArguments& a, int32_t time) const {
    return warp_row < map_rows && uint32_t(time - warp_row) <= uint32_t(a.p.width);
  }
};

// Columns between progress updates. An update costs a fence and each wait a barrier.
constexpr int32_t kColumnsPerUpdate = 8;

// Progress flag between neighbouring strips: number of boundary columns already in global memory, in the order of the
// pass, counted over all groups of states.
struct ProgressFlag {
  int64_t* own;   // of this work item; the previous strip's lies a.maps before
  int32_t order;  // of the strip among those of its map
  int32_t known;  // columns of the current group that thread 0 knows to be available

  __device__ __forceinline__ ProgressFlag(const WavefrontArguments& a, int64_t id)
      : own(static_cast<int64_t*>(a.p.counters) + 1 + id), order(int32_t(id / a.maps)), known(0) {}

  // Waits for a column of the previous strip's boundary row. All threads must call, before any reads the column, for
  // each column from 0 on.
  __device__ __forceinline__ void wait_for(const WavefrontArguments& a, int64_t group, int32_t column) {
    const int32_t width = int32_t(a.p.width);
    if (order == 0 || column % kColumnsPerUpdate || column >= width) return;
    if (threadIdx.x == 0) {
      if (column == 0) known = 0;
      const int32_t needed = width - column < kColumnsPerUpdate ? width : column + kColumnsPerUpdate;
      while (known < needed) {
        const int64_t published = load_acquire(own - a.maps) - group * width;
        known = published < width ? int32_t(published) : width;
        if (known < needed) __nanosleep(100);
      }
    }
    __syncthreads();
  }

  // Publishes the number of columns written. To be called after a barrier that follows the last write.
  __device__ __forceinline__ void publish(const WavefrontArguments& a, int64_t group, int32_t columns) const {
    if (order + 1 == a.strips || threadIdx.x || columns <= 0 || columns > a.p.width) return;
    if (columns % kColumnsPerUpdate == 0 || columns == a.p.width) store_release(own, group * a.p.width + columns);
  }

  // A second flag orders the tiles that add to the same part of the gradients of B and C: number of steps added. Each
  // tile except the first waits for the previous one before it adds a span, and publishes afterwards. All threads must
  // call.
  __device__ __forceinline__ int64_t* own_sums(const WavefrontArguments& a) const {
    return own + (a.strips - 1) * a.maps;
  }
  __device__ __forceinline__ void wait_for_sums(const WavefrontArguments& a, bool first, int64_t steps) const {
    if (first) return;
    if (threadIdx.x == 0) {
      while (load_acquire(own_sums(a) - 1) < steps) __nanosleep(100);
    }
    __syncthreads();
  }
  __device__ __forceinline__ void publish_sums(const WavefrontArguments& a, bool last, int64_t steps) const {
    __syncthreads();
    if (!last && threadIdx.x == 0) store_release(own_sums(a), steps);
  }
};

// Rows of a block's shared arrays: one per 16 threads.
__host__ __device__ __forceinline__ int32_t row_slots(int32_t rows) {
  return rows < kMinRowSlots ? kMinRowSlots : (rows + 1) / 2 * 2;
}

// Index into (rows, W, N, E) states of rows of the map.
__device__ __forceinline__ int64_t row_state_index(const WavefrontArguments& a, const WorkItem& item, int64_t row,
                                                   int64_t column, int64_t n) {
  return ((row * a.p.width + column) * a.p.states + n) * a.p.channels + item.channel;
}

// The states of a strip's last row, at column 0 and state 0: saved for the backward pass, or in the boundary row. All
// strips of an image share the boundary row: a strip overwrites a column that it has read in an earlier step and that
// no other block reads; the next strip waits for the new value.
__device__ __forceinline__ float* strip_boundary_row(const WavefrontArguments& a, const WorkItem& item, int32_t strip) {
  if (!a.p.chunk) return static_cast<float*>(a.p.boundary_row) + row_state_index(a, item, item.batch, 0, 0);
  const int64_t row = item.batch * saved_state_count(a.p.height, a.p.chunk) + strip;
  return static_cast<float*>(a.p.saved_rows) + row_state_index(a, item, row, 0, 0);
}

// The element of `group_sums` for the thread's pixel at a step.
__device__ __forceinline__ float* group_sum(const WavefrontArguments& a, const WorkItem& item, int32_t strip,
                                            int32_t time) {
  const int64_t row = int64_t(strip) * a.rows + item.row;
  const int64_t column = time - item.row;
  const int64_t pixel = (item.batch * a.p.height + row) * a.p.width + column;
  return static_cast<float*>(a.p.group_sums) + pixel * a.p.channels + item.channel;
}

inline WavefrontArguments wavefront_arguments(const WavefrontScanParams& p, const WavefrontScanPlan& plan) {
  WavefrontArguments a{};
  a.p = p;
  a.rows = int32_t(plan.rows);
  a.tiles = int32_t(plan.tiles);
  a.strips = int32_t(plan.strips);
  a.span = int32_t(plan.span);
  a.grouped = plan.grouped;
  a.maps = p.batch * plan.tiles;
  a.checkpoint_floats = plan.tiles * ceil_div(p.states, plan.group) * plan.group * plan.rows * kTileChannels;
  const int64_t size = p.dtype == DataType::kFloat32 ? 4 : 2;
  a.bytes.x = p.x.column * size;
  a.bytes.y = p.y.column * size;
  a.bytes.C = p.C.column * size;
  a.bytes.above = p.above.delta.column * size;
  a.bytes.before = p.before.delta.column * size;
  a.bytes.B_above = p.above.B.column * size;
  a.bytes.B_before = p.before.B.column * size;
  a.bytes.grad_y = p.grad_y.column * size;
  a.bytes.grad_x = p.grad_x.column * size;
  a.bytes.grad_above = p.above.grad_delta.column * size;
  a.bytes.grad_before = p.before.grad_delta.column * size;
  return a;
}

// Number of blocks of the kernel that are resident on an idle device.
inline int resident_blocks(void (*kernel)(WavefrontArguments), int threads, int64_t shared, int64_t* blocks) {
  int device = 0;
  int multiprocessors = 0;
  int per_multiprocessor = 0;
  const int refused = raise_shared_memory_limit(reinterpret_cast<const void*>(kernel), shared);
  if (refused) return refused;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, reinterpret_cast<const void*>(kernel),
                                                          threads, size_t(shared));
  }
  *blocks = int64_t(multiprocessors) * (per_multiprocessor > 0 ? per_multiprocessor : 1);
  if (error != cudaSuccess) cudaGetLastError();  // clear it: a later launch must not report it
  return int(error);
}

inline int launch(void (*kernel)(WavefrontArguments), const WavefrontArguments& a, int64_t blocks, int threads,
                  int64_t shared, void* stream) {
  const int refused = raise_shared_memory_limit(reinterpret_cast<const void*>(kernel), shared);
  if (refused) return refused;
  SSM_LAUNCH(kernel, unsigned(blocks), unsigned(threads), size_t(shared), static_cast<cudaStream_t>(stream), a);
  return int(cudaGetLastError());
}

}  // namespace

// Number of resident blocks of either pass; the other members of the plan must be set.
int wavefront_forward_residents(const WavefrontScanParams& p, const WavefrontScanPlan& plan, int64_t* blocks);
int wavefront_backward_residents(const WavefrontScanParams& p, const WavefrontScanPlan& plan, int64_t* blocks);

}  // namespace cuda_ops
