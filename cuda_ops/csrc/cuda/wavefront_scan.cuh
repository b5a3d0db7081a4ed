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

struct WavefrontArguments {
  WavefrontScanParams p;
  int32_t rows, tiles, strips, span, fronts;
  bool grouped;
  int64_t maps;  // images times tiles; there are `strips` tasks for each
};

// The number of all states. Kernels know theirs, but for the one that takes any number in groups.
template <int NS>
__device__ __forceinline__ int64_t all_states(const WavefrontArguments& a) {
  return NS == kGroup ? a.p.states : NS;
}

// Takes the block's next task, if there is one left; every thread takes part. Tasks are in the order of their strips, first
// those that others wait for. A task waits for the one of the strip before alone, which some running block has taken
// already; so the first of the unfinished tasks never waits, and all get done, however many blocks the device runs at the
// same time and in whatever order it starts them. With many maps, strips follow those that they wait for at a distance.
// The number passes through the start of the shared memory, which is the task's own from its first barrier on.
__device__ __forceinline__ bool take_task(const WavefrontArguments& a, float* shared, int64_t* task) {
  int64_t* place = reinterpret_cast<int64_t*>(shared);
  __syncthreads();  // nobody needs what the task before left in shared memory
  if (threadIdx.x == 0) *place = int64_t(atomicAdd(static_cast<unsigned long long*>(a.p.counters), 1ull));
  __syncthreads();
  *task = *place;
  return *task < a.strips * a.maps;
}

// A thread's place in a task: a row of the strip, and a channel.
struct Seat {
  int64_t batch, tile, channel;
  int32_t row, lane;  // lane: the channel within the tile
  bool active;        // whether there are such a channel and such a row of a strip

  __device__ __forceinline__ Seat(const WavefrontArguments& a, int64_t task) {
    const int64_t map = task % a.maps;
    tile = map % a.tiles, batch = map / a.tiles;
    lane = threadIdx.x % kTile, row = threadIdx.x / kTile;
    channel = tile * kTile + lane;
    active = channel < a.p.channels && row < a.rows;
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
};

// The rows of a block's shared arrays: as many as it has groups of 16 threads.
__host__ __device__ __forceinline__ int32_t row_slots(int32_t rows) {
  return rows < kMinSlots ? kMinSlots : (rows + 1) / 2 * 2;
}

// The decay rates of the block's channels, times log2(e), for up to NS states from n0 on, in shared memory: registers are
// scarce. [above, before][NS][16], 0 beyond the last state.
template <int NS>
struct Rates {
  static constexpr int kFloats = 2 * NS * kTile;
  const float* rates;

  // Every thread of the block takes part, and waits for the others before and after.
  __device__ __forceinline__ Rates(const WavefrontArguments& a, const Seat& seat, int64_t n0, float* target)
      : rates(target + seat.lane) {
    __syncthreads();
    for (int32_t i = threadIdx.x; i < kFloats; i += blockDim.x) {
      const int32_t n = i / kTile % NS;
      const int64_t channel = seat.tile * kTile + i % kTile;
      const bool given = channel < a.p.channels && n0 + n < all_states<NS>(a);
      const void* A = i < NS * kTile ? a.p.above.A : a.p.before.A;
      target[i] = given ? static_cast<const float*>(A)[channel * all_states<NS>(a) + n0 + n] * kLog2E : 0.f;
    }
    __syncthreads();
  }
  __device__ __forceinline__ float above(int n) const { return rates[n * kTile]; }
  __device__ __forceinline__ float before(int n) const { return rates[(NS + n) * kTile]; }
};

// The (…, W, N, E) states of a row of the map: element 0 of a column.
__device__ __forceinline__ int64_t row_state(const WavefrontArguments& a, const Seat& seat, int64_t row, int64_t column,
                                             int64_t n) {
  return ((row * a.p.width + column) * a.p.states + n) * a.p.channels + seat.channel;
}

// A step's projections and what comes from outside of the strip: [slots][3 * NS], then [above, below][NS][16].
template <int NS>
__host__ __device__ __forceinline__ int32_t projections_floats(int32_t rows) {
  return row_slots(rows) * 3 * NS + 2 * NS * kTile;
}
template <int NS>
__device__ __forceinline__ int32_t outer_place(const WavefrontArguments& a, const Seat& seat, bool below, int32_t n) {
  return row_slots(a.rows) * 3 * NS + ((below ? NS : 0) + n) * kTile + seat.lane;
}

// The states of a strip's last row, for column 0 and state 0: saved ones for the backward pass, or the edge. All strips of
// an image share the edge, as they do in the backward pass: a strip has read a column, in an earlier step, when it
// overwrites it with its own, and nobody else reads it; the strip behind waits for that.
__device__ __forceinline__ float* strip_edge(const WavefrontArguments& a, const Seat& seat, int32_t strip) {
  if (!a.p.chunk) return static_cast<float*>(a.p.edge) + row_state(a, seat, seat.batch, 0, 0);
  const int64_t row = seat.batch * saved_states(a.p.height, a.p.chunk) + strip;
  return static_cast<float*>(a.p.saved) + row_state(a, seat, row, 0, 0);
}

// What a thread reads for a step: its pixel's values, and its share of the row's projections.
template <class T, int NS, bool Backward>
struct Step {
  static constexpr int kShare = (3 * NS + kTile - 1) / kTile;
  float u, above, before, grad;  // x, step sizes, gradient of y
  float share[kShare];           // of B above, B before and C, one after the other
  bool valid, has_above, has_before;

  // Values of a neighbour that the pixel does not take are 0, whatever is stored.
  __device__ __forceinline__ void load(const WavefrontArguments& a, const Seat& seat, int64_t n0, int32_t strip,
                                       int32_t time, bool sweep) {
    const int64_t row = int64_t(strip) * a.rows + seat.row, column = time - seat.row;
    const bool on_map = seat.row < a.rows && row < a.p.height && column >= 0 && column < a.p.width;
    const bool corner = row == 0 && column == 0;
    has_above = on_map && (row > 0 || (corner && a.p.starts_from_above));
    has_before = on_map && (corner ? !a.p.starts_from_above : column > 0);
    valid = on_map && seat.active;
    u = valid ? to_float(at<const T>(a.p.x, seat.batch, row, column)[seat.channel]) : 0.f;
    above = valid && has_above ? to_float(at<const T>(a.p.above.delta, seat.batch, row, column)[seat.channel]) : 0.f;
    before = valid && has_before ? to_float(at<const T>(a.p.before.delta, seat.batch, row, column)[seat.channel]) : 0.f;
    grad = 0.f;
    if (Backward && sweep && valid) grad = to_float(at<const T>(a.p.grad_y, seat.batch, row, column)[seat.channel]);
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int index = seat.lane + i * kTile, which = index / NS, n = index % NS;
      share[i] = 0.f;
      if (!on_map || which > 2 || n0 + n >= all_states<NS>(a)) continue;
      if ((which == 0 && !has_above) || (which == 1 && !has_before)) continue;
      const GridTensor& tensor = which == 0 ? a.p.above.B : which == 1 ? a.p.before.B : a.p.C;
      share[i] = to_float(at<const T>(tensor, seat.batch, row, column)[n0 + n]);
    }
  }

  // Puts the share where the row's other threads read it.
  __device__ __forceinline__ void hand_out(const Seat& seat, float* projections) const {
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int index = seat.lane + i * kTile;
      if (index < 3 * NS) projections[seat.row * 3 * NS + index] = share[i];
    }
  }

  // With both neighbours each contributes half: a factor on the inflow, one less in the decay's exponent.
  __device__ __forceinline__ float weight() const { return has_above && has_before ? 0.5f : 1.f; }
  __device__ __forceinline__ float exponent_shift() const { return has_above && has_before ? -1.f : 0.f; }
};

// What comes from outside of the strip for a step: states above the first row, or gradients from below the last one. The
// threads of a channel read them for all rows, each its share.
template <int NS>
struct Outer {
  static constexpr int kShare = (NS + kMinSlots - 1) / kMinSlots;
  float share[kShare];

  // `row` is where the thread's channel has column 0 and state 0, or null where there is no such row. Another block may
  // have written the column in this launch, so it is read past the L1 cache, which does not hear of that.
  __device__ __forceinline__ void load(const WavefrontArguments& a, const Seat& seat, int64_t n0, const float* row,
                                       int32_t column) {
    const bool given = row && seat.channel < a.p.channels && column >= 0 && column < a.p.width;
    const float* source = given ? row + (column * all_states<NS>(a) + n0) * a.p.channels : row;
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int32_t n = seat.row + i * row_slots(a.rows);
      share[i] = given && n < NS && n0 + n < all_states<NS>(a) ? __ldcg(source + n * a.p.channels) : 0.f;
    }
  }

  __device__ __forceinline__ void hand_out(const WavefrontArguments& a, const Seat& seat, bool below,
                                           float* projections) const {
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int32_t n = seat.row + i * row_slots(a.rows);
      if (n < NS) projections[outer_place<NS>(a, seat, below, n)] = share[i];
    }
  }
};

// Where a row's state n of the thread's channel lies in [slots][NS][16].
template <int NS>
__device__ __forceinline__ int32_t place_of(const Seat& seat, int32_t row, int32_t n) {
  return (row * NS + n) * kTile + seat.lane;
}

// The states of a thread's pixel, in place of those of the pixel before it. `above_row` has the states that the strip's
// rows had a step before.
template <class T, int NS, bool Backward>
__device__ __forceinline__ void advance(const WavefrontArguments& a, const Step<T, NS, Backward>& step, const Seat& seat, const Rates<NS>& rates,
                                        const float* projections, const float* above_row, float (&state)[NS]) {
  const float weight = step.weight(), shift = step.exponent_shift();
  const float inflow_above = step.above * step.u * weight, inflow_before = step.before * step.u * weight;
  const float* row = projections + seat.row * 3 * NS;
  const float* states_above = seat.row > 0 ? above_row + place_of<NS>(seat, seat.row - 1, 0)
                                           : projections + outer_place<NS>(a, seat, false, 0);
  constexpr int kRow = NS < 4 ? NS : 4;
#pragma unroll
  for (int first = 0; first < NS; first += kRow) {
    float B_above[kRow], B_before[kRow];
    read_row<kRow>(row + first, B_above);
    read_row<kRow>(row + NS + first, B_before);
#pragma unroll
    for (int i = 0; i < kRow; ++i) {
      const int n = first + i;
      float h = B_above[i] * inflow_above + B_before[i] * inflow_before;
      if (step.has_above) h += fast_exp2(step.above * rates.above(n) + shift) * states_above[n * kTile];
      if (step.has_before) h += fast_exp2(step.before * rates.before(n) + shift) * state[n];
      state[n] = step.valid ? h : 0.f;
    }
  }
}

inline WavefrontArguments arguments_of(const WavefrontScanParams& p, const WavefrontScanPlan& plan) {
  WavefrontArguments a{};
  a.p = p, a.rows = int32_t(plan.rows), a.tiles = int32_t(plan.tiles), a.strips = int32_t(plan.strips);
  a.span = int32_t(plan.span), a.fronts = int32_t(plan.fronts), a.grouped = plan.grouped;
  a.maps = p.batch * plan.tiles;
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
