// What the passes of the wavefront scan share. A task is a strip of an image's rows and 16 channels. A thread has a row of
// the strip and a channel, with the row's current states in registers. At step t row r is at column t - r: its neighbour
// above was there a step before, and has left its states in shared memory. What the first row needs of the strip above it
// (in the backward pass: the last row of the strip below), another block leaves in global memory, some columns ahead.
#pragma once

#include "../wavefront_scan.h"
#include "device.cuh"

namespace cuda_ops {
namespace {

constexpr int kTile = int(kWavefrontTile), kMaxRows = 16, kMinSlots = 8;

// Bytes from one column to the next, of what the kernels go along: step sizes are named by their neighbour.
struct ColumnBytes {
  int64_t x, above, before, B_above, B_before, C;
  int64_t y, grad_y, grad_x, grad_above, grad_before;
};
template <class T>
__device__ __forceinline__ void move_bytes(T*& pointer, int64_t bytes) {
  pointer = reinterpret_cast<T*>(const_cast<char*>(reinterpret_cast<const char*>(pointer)) + bytes);
}

struct WavefrontArguments {
  WavefrontScanParams p;
  ColumnBytes bytes;
  int32_t rows, tiles, strips, span;
  bool grouped;
  int64_t maps;        // images times tiles; there are `strips` tasks for each
  int64_t front_size;  // in floats
};

// The number of all states. Kernels know theirs, but for the one that takes any number in groups.
template <int NS>
__device__ __forceinline__ int64_t all_states(const WavefrontArguments& a) {
  return NS == kGroup ? a.p.states : NS;
}

// Takes the block's next task, if there is one left; every thread takes part. Tasks are in the order of their strips, first
// those that others wait for. A task waits for the one of the strip before, and in the backward pass for the one of the tile
// before, which running blocks have taken already; so the first of the unfinished tasks never waits, and all get done,
// however many blocks the device runs at the same time and in whatever order it starts them. With many maps, strips follow
// those that they wait for at a distance. The number passes through a place in shared memory.
__device__ __forceinline__ bool take_task(const WavefrontArguments& a, int64_t* place, int64_t* task) {
  __syncthreads();  // nobody needs what the task before left in shared memory
  if (threadIdx.x == 0) *place = int64_t(atomicAdd(static_cast<unsigned long long*>(a.p.counters), 1ull));
  __syncthreads();
  *task = *place;
  return *task < a.strips * a.maps;
}

// A thread's place in a task: a row of the strip, and a channel. A warp has two rows.
struct Seat {
  int64_t batch, tile, channel;
  int32_t row, lane;  // lane: the channel within the tile
  int32_t first_row;  // of the warp
  int32_t rows_on_map;
  bool active;        // whether there are such a channel and such a row of a strip

  __device__ __forceinline__ Seat(const WavefrontArguments& a, int64_t task, int32_t strip) {
    const int64_t map = task % a.maps, rest = a.p.height - int64_t(strip) * a.rows;
    tile = map % a.tiles, batch = map / a.tiles;
    lane = threadIdx.x % kTile, row = threadIdx.x / kTile, first_row = threadIdx.x / kWarp * (kWarp / kTile);
    rows_on_map = rest < a.rows ? int32_t(rest) : a.rows;
    channel = tile * kTile + lane;
    active = channel < a.p.channels && row < a.rows;
  }

  // Whether any of the warp's pixels of a step is on the map, or is the one behind a row's last: the same for all lanes.
  __device__ __forceinline__ bool busy(const WavefrontArguments& a, int32_t time) const {
    return first_row < rows_on_map && uint32_t(time - first_row) <= uint32_t(a.p.width);
  }
};

// Columns after which a strip says how far it has come. Each strip trails the one before by so many and by its rows; saying
// so takes a fence, and hearing of it a barrier, which are to be few beside the steps.
constexpr int32_t kHandedOver = 8;

// What a task hears of the strip before it and tells the one behind it: how many columns of the row between them are in
// global memory, in the order in which the pass goes through them, after those of all groups of states before.
struct Relay {
  int64_t* own;   // the progress of this task; what it hears lies as many places before as there are maps
  int32_t turn;   // of the strip among those of its map
  int32_t known;  // columns of this group, as thread 0 last heard

  __device__ __forceinline__ Relay(const WavefrontArguments& a, int64_t task)
      : own(static_cast<int64_t*>(a.p.counters) + 1 + task), turn(int32_t(task / a.maps)), known(0) {}

  // To be called by all threads before any reads a column, for one column after the other from 0 on.
  __device__ __forceinline__ void await(const WavefrontArguments& a, int64_t group, int32_t column) {
    const int32_t width = int32_t(a.p.width);
    if (turn == 0 || column % kHandedOver || column >= width) return;
    if (threadIdx.x == 0) {
      if (column == 0) known = 0;
      const int32_t needed = width - column < kHandedOver ? width : column + kHandedOver;
      while (known < needed) {
        const int64_t told = load_acquire(own - a.maps) - group * width;
        known = told < width ? int32_t(told) : width;
        if (known < needed) __nanosleep(100);
      }
    }
    __syncthreads();
  }

  // To be called behind a barrier that follows the writing of the last of so many columns.
  __device__ __forceinline__ void tell(const WavefrontArguments& a, int64_t group, int32_t columns) const {
    if (turn + 1 == a.strips || threadIdx.x || columns <= 0 || columns > a.p.width) return;
    if (columns % kHandedOver == 0 || columns == a.p.width) store_release(own, group * a.p.width + columns);
  }

  // Of tiles that add up sums over their channels, each but the first waits for the one before, and each but the last tells
  // the next one: of how many steps sums are added. All threads call both, before and after they add a span's.
  __device__ __forceinline__ int64_t* own_sums(const WavefrontArguments& a) const {
    return own + (a.strips - 1) * a.maps;
  }
  __device__ __forceinline__ void await_sums(const WavefrontArguments& a, bool first, int64_t steps) const {
    if (first) return;
    if (threadIdx.x == 0)
      while (load_acquire(own_sums(a) - 1) < steps) __nanosleep(100);
    __syncthreads();
  }
  __device__ __forceinline__ void tell_sums(const WavefrontArguments& a, bool last, int64_t steps) const {
    __syncthreads();
    if (!last && threadIdx.x == 0) store_release(own_sums(a), steps);
  }
};

// The rows of a block's shared arrays: as many as it has groups of 16 threads.
__host__ __device__ __forceinline__ int32_t row_slots(int32_t rows) {
  return rows < kMinSlots ? kMinSlots : (rows + 1) / 2 * 2;
}

// The (…, W, N, E) states of a row of the map: element 0 of a column.
__device__ __forceinline__ int64_t row_state(const WavefrontArguments& a, const Seat& seat, int64_t row, int64_t column,
                                             int64_t n) {
  return ((row * a.p.width + column) * a.p.states + n) * a.p.channels + seat.channel;
}

// The states of a strip's last row, for column 0 and state 0: saved ones for the backward pass, or the edge. All strips of
// an image share the edge, as they do in the backward pass: a strip has read a column, in an earlier step, when it
// overwrites it with its own, and nobody else reads it; the strip behind waits for that.
__device__ __forceinline__ float* strip_edge(const WavefrontArguments& a, const Seat& seat, int32_t strip) {
  if (!a.p.chunk) return static_cast<float*>(a.p.edge) + row_state(a, seat, seat.batch, 0, 0);
  const int64_t row = seat.batch * saved_states(a.p.height, a.p.chunk) + strip;
  return static_cast<float*>(a.p.saved) + row_state(a, seat, row, 0, 0);
}

inline WavefrontArguments arguments_of(const WavefrontScanParams& p, const WavefrontScanPlan& plan) {
  WavefrontArguments a{};
  a.p = p, a.rows = int32_t(plan.rows), a.tiles = int32_t(plan.tiles), a.strips = int32_t(plan.strips);
  a.span = int32_t(plan.span), a.grouped = plan.grouped;
  a.maps = p.batch * plan.tiles;
  a.front_size = plan.tiles * ceil_div(p.states, plan.group) * plan.group * plan.rows * kTile;
  const int64_t size = p.dtype == DataType::kFloat32 ? 4 : 2;
  a.bytes.x = p.x.column * size, a.bytes.y = p.y.column * size, a.bytes.C = p.C.column * size;
  a.bytes.above = p.above.delta.column * size, a.bytes.before = p.before.delta.column * size;
  a.bytes.B_above = p.above.B.column * size, a.bytes.B_before = p.before.B.column * size;
  a.bytes.grad_y = p.grad_y.column * size, a.bytes.grad_x = p.grad_x.column * size;
  a.bytes.grad_above = p.above.grad_delta.column * size, a.bytes.grad_before = p.before.grad_delta.column * size;
  return a;
}

// Blocks of the kernel that the device runs at the same time if it has nothing else to do; more would not help.
inline int resident_blocks(void (*kernel)(WavefrontArguments), int threads, int64_t shared, int64_t* blocks) {
  int device = 0, multiprocessors = 0, each = 0;
  const int refused = allow_shared(reinterpret_cast<const void*>(kernel), shared);
  if (refused) return refused;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, reinterpret_cast<const void*>(kernel), threads,
                                                          size_t(shared));
  *blocks = int64_t(multiprocessors) * (each > 0 ? each : 1);
  if (error != cudaSuccess) cudaGetLastError();  // no later launch is to report it
  return int(error);
}

inline int launch(void (*kernel)(WavefrontArguments), const WavefrontArguments& a, int64_t blocks, int threads,
                  int64_t shared, void* stream) {
  const int refused = allow_shared(reinterpret_cast<const void*>(kernel), shared);
  if (refused) return refused;
  SSM_LAUNCH(kernel, unsigned(blocks), unsigned(threads), size_t(shared), static_cast<cudaStream_t>(stream), a);
  return int(cudaGetLastError());
}

}  // namespace

// Blocks of either pass that the device runs at the same time; the plan's other members are given.
int wavefront_forward_residents(const WavefrontScanParams& p, const WavefrontScanPlan& plan, int64_t* blocks);
int wavefront_backward_residents(const WavefrontScanParams& p, const WavefrontScanPlan& plan, int64_t* blocks);

}  // namespace cuda_ops
