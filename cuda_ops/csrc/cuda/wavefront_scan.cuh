// What the passes of the wavefront scan share. A block has an image and 16 channels, and goes through the map in strips
// of rows. A thread has a row of the strip and a channel, with the row's current states in registers. At step t row r is
// at column t - r: its neighbour above was there a step before, and has left its states in shared memory.
#pragma once

#include "../wavefront_scan.h"
#include "device.cuh"

namespace cuda_ops {
namespace {

constexpr int kTile = int(kWavefrontTile), kMaxRows = 16;

struct WavefrontArguments {
  WavefrontScanParams p;
  int32_t rows, tiles, span, fronts;
  bool grouped;
  int64_t first_block;
};

// A thread's place: a row of each strip, and a channel.
struct Seat {
  int64_t batch, tile, channel;
  int32_t row, lane;  // lane: the channel within the tile
  bool active;        // whether there are such a channel and such a row of a strip

  __device__ __forceinline__ explicit Seat(const WavefrontArguments& a) {
    const int64_t block = a.first_block + blockIdx.x;
    tile = block % a.tiles, batch = block / a.tiles;
    lane = threadIdx.x % kTile, row = threadIdx.x / kTile;
    channel = tile * kTile + lane;
    active = channel < a.p.channels && row < a.rows;
  }
};

// The rows of a block's shared arrays: as many as it has groups of 16 threads.
__host__ __device__ __forceinline__ int32_t row_slots(int32_t rows) { return (rows + 1) / 2 * 2; }

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
      const bool given = channel < a.p.channels && n0 + n < a.p.states;
      const void* A = i < NS * kTile ? a.p.above.A : a.p.before.A;
      target[i] = given ? static_cast<const float*>(A)[channel * a.p.states + n0 + n] * kLog2E : 0.f;
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

// A step's projections and what comes from outside of the strip: [slots][3 * NS], then [first row, last row][NS][16].
template <int NS>
__host__ __device__ __forceinline__ int32_t projections_floats(int32_t rows) {
  return row_slots(rows) * 3 * NS + 2 * NS * kTile;
}
template <int NS>
__device__ __forceinline__ int32_t outer_place(const WavefrontArguments& a, const Seat& seat, int32_t n) {
  return row_slots(a.rows) * 3 * NS + ((seat.row == 0 ? 0 : NS) + n) * kTile + seat.lane;
}

// Where the states of the last row of the strip above a strip lie: saved ones for the backward pass, or the edge.
__device__ __forceinline__ float* strip_edge(const WavefrontArguments& a, const Seat& seat, int32_t strip,
                                             int64_t* row) {
  const int64_t count = saved_states(a.p.height, a.p.chunk);
  *row = a.p.chunk ? seat.batch * count + strip : seat.batch;
  return static_cast<float*>(a.p.chunk ? a.p.saved : a.p.edge);
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
      if (!on_map || which > 2 || n0 + n >= a.p.states) continue;
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

// Copies what comes from outside of the strip for a step to shared memory: states above the first row, in a backward
// sweep also the gradients from below the last one. It is there after async_wait and the next barrier.
template <int NS>
__device__ __forceinline__ void fetch_outer(const WavefrontArguments& a, const Seat& seat, int64_t n0, int32_t strip,
                                            int32_t time, bool sweep, float* projections) {
  const int64_t row = int64_t(strip) * a.rows + seat.row, column = time - seat.row;
  const bool valid = seat.active && row < a.p.height && column >= 0 && column < a.p.width;
  const bool from_above = valid && seat.row == 0 && strip > 0;
  const bool last = seat.row == a.rows - 1 && seat.row > 0;
  const bool from_below = sweep && valid && last && row + 1 < a.p.height;
  if (seat.row > 0 && !last) return;
  int64_t edge_row = seat.batch;
  const float* edge = from_above ? strip_edge(a, seat, strip - 1, &edge_row) : static_cast<const float*>(a.p.edge);
#pragma unroll
  for (int n = 0; n < NS; ++n) {
    float* target = projections + outer_place<NS>(a, seat, n);
    if ((from_above || from_below) && n0 + n < a.p.states) {
      async_copy(target, edge + row_state(a, seat, edge_row, column, n0 + n));
    } else {
      *target = 0.f;
    }
  }
}

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
  constexpr int kGroup = NS < 4 ? NS : 4;
#pragma unroll
  for (int first = 0; first < NS; first += kGroup) {
    float B_above[kGroup], B_before[kGroup];
    read_row<kGroup>(row + first, B_above);
    read_row<kGroup>(row + NS + first, B_before);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int n = first + i;
      const float above =
          seat.row > 0 ? above_row[place_of<NS>(seat, seat.row - 1, n)] : projections[outer_place<NS>(a, seat, n)];
      float h = B_above[i] * inflow_above + B_before[i] * inflow_before;
      if (step.has_above) h += fast_exp2(step.above * rates.above(n) + shift) * above;
      if (step.has_before) h += fast_exp2(step.before * rates.before(n) + shift) * state[n];
      state[n] = step.valid ? h : 0.f;
    }
  }
}

inline bool fast_states(int64_t states) {
  return states == 1 || states == 2 || states == 4 || states == 8 || states == 16;
}
inline int64_t states_at_a_time(int64_t states) { return fast_states(states) ? states : 8; }

inline WavefrontArguments arguments_of(const WavefrontScanParams& p, const WavefrontScanPlan& plan) {
  WavefrontArguments a{};
  a.p = p, a.rows = int32_t(plan.rows), a.tiles = int32_t(plan.tiles);
  a.span = int32_t(plan.span), a.fronts = int32_t(plan.fronts), a.grouped = plan.grouped;
  return a;
}

#define SSM_DISPATCH_STATES(NS_VALUE, T, CALL) \
  switch (NS_VALUE) {                          \
    case 1: return CALL(T, 1);                 \
    case 2: return CALL(T, 2);                 \
    case 4: return CALL(T, 4);                 \
    case 16: return CALL(T, 16);               \
    default: return CALL(T, 8);                \
  }
#define SSM_DISPATCH(DTYPE, NS_VALUE, CALL)                                      \
  switch (DTYPE) {                                                               \
    case DataType::kFloat32: SSM_DISPATCH_STATES(NS_VALUE, float, CALL)          \
    case DataType::kBFloat16: SSM_DISPATCH_STATES(NS_VALUE, __nv_bfloat16, CALL) \
    case DataType::kFloat16: SSM_DISPATCH_STATES(NS_VALUE, __half, CALL)         \
    default: return int(cudaErrorInvalidValue);                                  \
  }

}  // namespace
}  // namespace cuda_ops
