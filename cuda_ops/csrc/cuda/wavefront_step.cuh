// A step of the wavefront scan, for both passes: where states lie in shared memory, what a thread reads ahead, and how its
// states advance.
#pragma once

#include "wavefront_scan.cuh"

namespace cuda_ops {
namespace {

// Where the states of the thread's channel lie in a slot of 16 channels, [NS / 4][16][4]: 4 at a time, and free of bank
// conflicts. Which four they are depends on the lane: its pack i has the states of pack i ^ k of the lane 4 k away, so that
// the first exchanges of a sum over lanes need no selection.
template <int NS>
struct Places {
  static constexpr int kPack = Pack<NS>::kStates, kSlot = NS * kTile;
  int32_t lane, twist;

  __device__ __forceinline__ explicit Places(int32_t lane)
      : lane(lane), twist(NS > kPack ? lane / kPack % (NS / kPack) : 0) {}

  // The number of the state that a thread has at a place of its own, which comes in packs.
  __device__ __forceinline__ int32_t state_at(int32_t i) const { return (i / kPack ^ twist) * kPack + i % kPack; }
  // Where in a slot a state lies.
  __device__ __forceinline__ int32_t of_state(int32_t n) const {
    return (n / kPack ^ twist) * kPack * kTile + lane * kPack + n % kPack;
  }
  // Where in a slot the thread's packs begin; they are kPack * 16 floats apart.
  __device__ __forceinline__ int32_t own(int32_t slot) const { return slot * kSlot + lane * kPack; }
};

template <int NS>
__device__ __forceinline__ Pack<NS> pack_at(const float* own, int first) {
  return *reinterpret_cast<const Pack<NS>*>(own + first * kTile);
}
template <int NS>
__device__ __forceinline__ void put_states(float* own, const float (&states)[NS]) {
  constexpr int kPack = Pack<NS>::kStates;
#pragma unroll
  for (int first = 0; first < NS; first += kPack) {
    Pack<NS> pack;
#pragma unroll
    for (int i = 0; i < kPack; ++i) pack.of[i] = states[first + i];
    *reinterpret_cast<Pack<NS>*>(own + first * kTile) = pack;
  }
}

// A thread's part of the strip's saved fronts. Number 0 has the states before step 8, and so on.
template <int NS>
struct Fronts {
  static constexpr int kPack = Pack<NS>::kStates;
  float* first;

  __device__ __forceinline__ Fronts(const WavefrontArguments& a, const Seat& seat, int64_t n0, int32_t strip) {
    const int64_t number = (seat.batch * a.strips + strip) * wavefront_fronts(a.p.width, a.rows);
    const int64_t groups = (all_states<NS>(a) + NS - 1) / NS, group = seat.tile * groups + n0 / NS;
    first = static_cast<float*>(a.p.fronts) + number * a.front_size + group * (NS * kTile) * a.rows +
            threadIdx.x * kPack;
  }
  // Pack by pack, each of all the tile's threads. What the forward pass writes is read long after, hence the first to leave
  // the caches; and the compiler has to be told that it may write 16 bytes at a time.
  __device__ __forceinline__ void put(const WavefrontArguments& a, int32_t number, const float (&states)[NS]) const {
    float* own = first + number * a.front_size;
#pragma unroll
    for (int n = 0; n < NS; n += kPack) {
      if constexpr (kPack == 4) {
        __stcs(reinterpret_cast<float4*>(own), float4{states[n], states[n + 1], states[n + 2], states[n + 3]});
      } else {
#pragma unroll
        for (int i = 0; i < kPack; ++i) own[i] = states[n + i];
      }
      own += a.rows * kTile * kPack;
    }
  }
  __device__ __forceinline__ void get(const WavefrontArguments& a, int32_t number, float (&states)[NS]) const {
    const float* own = first + number * a.front_size;
#pragma unroll
    for (int n = 0; n < NS; n += kPack) {
      float pack[kPack];
      read_row<kPack>(own, pack);
#pragma unroll
      for (int i = 0; i < kPack; ++i) states[n + i] = pack[i];
      own += a.rows * kTile * kPack;
    }
  }
};

template <int NS>
__device__ __forceinline__ void clear(float (&states)[NS]) {
#pragma unroll
  for (int n = 0; n < NS; ++n) states[n] = 0.f;
}

// Sums values of states, in the order of the thread's places, over the 16 channels of a row: a lane gets the sum of the
// state of its number, modulo NS. Lanes that change sides have each other's states at their places, until a pack is left.
// `Held` values are left to be summed, the first ones.
template <int NS, int Held = NS>
__device__ __forceinline__ float sum_over_channels(float (&values)[NS], int32_t lane) {
  constexpr int kHalf = Held / 2;
  if constexpr (Held > 4) {
#pragma unroll
    for (int i = 0; i < kHalf; ++i) values[i] += __shfl_xor_sync(kAllLanes, values[i + kHalf], kHalf);
    return sum_over_channels<NS, kHalf>(values, lane);
  } else {
    float pack[Held];
#pragma unroll
    for (int i = 0; i < Held; ++i) pack[i] = values[i];
    float sum = sum_each<Held>(pack, lane);
#pragma unroll
    for (int step = NS; step < kTile; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    return sum;
  }
}

// The same of each value times either of two factors of the channel. Where lanes change sides, they hand each other values
// before they are multiplied: half as many.
template <int NS>
__device__ __forceinline__ void sum_products(const float (&values)[NS], float left, float right, int32_t lane,
                                             float* sum_left, float* sum_right) {
  constexpr int kHeld = NS > 4 ? NS / 2 : NS;
  float lefts[NS], rights[NS];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) lefts[i] = values[i] * left, rights[i] = values[i] * right;
  if constexpr (kHeld < NS) {
    const float other_left = __shfl_xor_sync(kAllLanes, left, kHeld);
    const float other_right = __shfl_xor_sync(kAllLanes, right, kHeld);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const float other = __shfl_xor_sync(kAllLanes, values[i + kHeld], kHeld);
      lefts[i] += other * other_left, rights[i] += other * other_right;
    }
  }
  *sum_left = sum_over_channels<NS, kHeld>(lefts, lane);
  *sum_right = sum_over_channels<NS, kHeld>(rights, lane);
}

// The decay rates of the block's channels, times log2(e), for up to NS states from n0 on, in shared memory: registers are
// scarce. [above, before][a slot]. What is beyond the last state decays like that one, and like it remains a number.
template <int NS>
struct Rates {
  static constexpr int kFloats = 2 * NS * kTile;
  const float *above, *before;  // the thread's own

  // Every thread of the block takes part, and waits for the others before and after.
  __device__ __forceinline__ Rates(const WavefrontArguments& a, const Seat& seat, int64_t n0, float* target)
      : above(target + Places<NS>(seat.lane).own(0)), before(target + Places<NS>(seat.lane).own(1)) {
    __syncthreads();
#pragma unroll 1  // how often it runs would take a register for as long as the kernel does
    for (int32_t i = threadIdx.x; i < kFloats; i += blockDim.x) {
      const int32_t lane = i % kTile, n = i / kTile % NS;
      const int64_t channel = seat.tile * kTile + lane;
      const int64_t last = all_states<NS>(a) - 1, state = n0 + n < last ? n0 + n : last;
      const void* A = i < NS * kTile ? a.p.above.A : a.p.before.A;
      target[i / Places<NS>::kSlot * Places<NS>::kSlot + Places<NS>(lane).of_state(n)] =
          channel < a.p.channels ? static_cast<const float*>(A)[channel * (last + 1) + state] * kLog2E : -1.f;
    }
    __syncthreads();
  }
};

// A step's projections: [slots][3 * NS].
template <int NS>
__host__ __device__ __forceinline__ int32_t projections_floats(int32_t rows) {
  return row_slots(rows) * 3 * NS;
}

// The states of a strip's rows: a slot for the row above the strip (or below it), and one for each row.
template <int NS>
__host__ __device__ __forceinline__ int32_t states_floats(int32_t rows) {
  return (row_slots(rows) + 1) * NS * kTile;
}

// What a thread reads for a step: its pixel's values, and its share of the row's projections. Values of a neighbour that
// the pixel does not take are 0, whatever is stored.
template <int NS>
struct Step {
  static constexpr int kShare = (3 * NS + kTile - 1) / kTile;
  float u, above, before, grad;  // x, step sizes, gradient of y
  float share[kShare];           // of B above, B before and C, one after the other
  bool valid, has_above, has_before;  // valid: on the map, and there is such a channel

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
  __device__ __forceinline__ float inflow_above() const { return above * u * weight(); }
  __device__ __forceinline__ float inflow_before() const { return before * u * weight(); }
};

// Consecutive columns of a row.
struct Columns {
  int32_t first;
  uint32_t count;

  __device__ __forceinline__ bool has(int32_t column) const { return uint32_t(column - first) < count; }
};

// A thread's way along its row: the addresses of what it reads go along, so that a step takes no multiplication.
template <class T, int NS>
struct Cursor {
  static constexpr int kShare = Step<NS>::kShare;
  int32_t column;
  Columns all, pixels, with_above, with_before;  // those on the map; those of a channel; those that take a neighbour
  const T *x, *above, *before, *grad, *share[kShare];
  int64_t bytes[kShare];  // of a column of these
  Columns columns_of[kShare];  // that have them

  // At the step of number 0.
  __device__ __forceinline__ Cursor(const WavefrontArguments& a, const Seat& seat, int64_t n0, int32_t strip)
      : column(-seat.row) {
    const int64_t row = int64_t(strip) * a.rows + seat.row;
    const uint32_t width = seat.row < seat.rows_on_map ? uint32_t(a.p.width) : 0;
    const bool first_above = a.p.starts_from_above;  // which neighbour the corner takes
    all = {0, width}, pixels = {0, seat.active ? width : 0};
    with_above = {0, row > 0 || width == 0 ? width : uint32_t(first_above)};
    with_before = row == 0 && !first_above ? all : Columns{1, width ? width - 1 : 0};
    const int64_t channel = seat.active ? seat.channel : 0;
    x = at<const T>(a.p.x, seat.batch, row, column) + channel;
    above = at<const T>(a.p.above.delta, seat.batch, row, column) + channel;
    before = at<const T>(a.p.before.delta, seat.batch, row, column) + channel;
    grad = a.p.grad_y.data ? at<const T>(a.p.grad_y, seat.batch, row, column) + channel : nullptr;
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int index = seat.lane + i * kTile, which = index / NS, n = index % NS;
      const GridTensor& tensor = which == 0 ? a.p.above.B : which == 1 ? a.p.before.B : a.p.C;
      share[i] = at<const T>(tensor, seat.batch, row, column) + n0 + n;
      bytes[i] = which == 0 ? a.bytes.B_above : which == 1 ? a.bytes.B_before : a.bytes.C;
      columns_of[i] = which == 0 ? with_above : which == 1 ? with_before : all;
      if (which > 2 || n0 + n >= all_states<NS>(a)) columns_of[i].count = 0;
    }
  }

  __device__ __forceinline__ void move(const WavefrontArguments& a, int32_t columns) {
    column += columns;
    move_bytes(x, columns * a.bytes.x), move_bytes(grad, columns * a.bytes.grad_y);
    move_bytes(above, columns * a.bytes.above), move_bytes(before, columns * a.bytes.before);
#pragma unroll
    for (int i = 0; i < kShare; ++i) move_bytes(share[i], columns * bytes[i]);
  }

  // Fetches the gradient of y as well if the step is to go back.
  __device__ __forceinline__ Step<NS> load(bool back) const {
    Step<NS> step;
    step.valid = pixels.has(column);
    step.has_above = with_above.has(column), step.has_before = with_before.has(column);
    step.u = step.valid ? to_float(*x) : 0.f;
    step.above = step.valid && step.has_above ? to_float(*above) : 0.f;
    step.before = step.valid && step.has_before ? to_float(*before) : 0.f;
    step.grad = back && step.valid ? to_float(*grad) : 0.f;
#pragma unroll
    for (int i = 0; i < kShare; ++i) step.share[i] = columns_of[i].has(column) ? to_float(*share[i]) : 0.f;
    return step;
  }
};

// A way along the row above the strip, whose states come from outside, or along the one below it, with gradients. The
// threads of a channel read them for all rows, each its share.
template <int NS>
struct Outer {
  static constexpr int kShare = (NS + kMinSlots - 1) / kMinSlots;
  int32_t apart;              // states between those of a thread
  uint32_t width_of[kShare];  // of the row for a state of the share, or 0
  const float* source;
  float share[kShare];

  // At a column. `row` is where the thread's channel has column 0 and state 0, if there is such a row.
  __device__ __forceinline__ Outer(const WavefrontArguments& a, const Seat& seat, int64_t n0, const float* row, bool exists,
                                   int32_t column)
      : apart(row_slots(a.rows)), source(row + (column * all_states<NS>(a) + n0 + seat.row) * a.p.channels) {
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int32_t n = seat.row + i * apart;
      const bool given = exists && seat.channel < a.p.channels && n < NS && n0 + n < all_states<NS>(a);
      width_of[i] = given ? uint32_t(a.p.width) : 0;
    }
  }

  __device__ __forceinline__ void move(const WavefrontArguments& a, int32_t by) {
    source += by * (all_states<NS>(a) * a.p.channels);
  }

  // The states of the column where it is. Another block may have written them in this launch, so they are read past the L1
  // cache, which does not hear of that.
  __device__ __forceinline__ void load(const WavefrontArguments& a, int32_t column) {
#pragma unroll
    for (int i = 0; i < kShare; ++i)
      share[i] = uint32_t(column) < width_of[i] ? __ldcg(source + i * apart * a.p.channels) : 0.f;
  }

  __device__ __forceinline__ void hand_out(const Seat& seat, float* slot) const {
    const Places<NS> places(seat.lane);
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int32_t n = seat.row + i * apart;
      if (n < NS) slot[places.of_state(n)] = share[i];
    }
  }
};

// The states of a thread's pixel, in place of those of the pixel before it. `above` has the states that the thread above
// had a step before. A state that does not exist is 0, so that its decay does not matter: left of the map and above it, all
// inputs are 0, and states start as that. What is right of the map or below it, no pixel of the map reads.
template <int NS>
__device__ __forceinline__ void advance(const Step<NS>& step, const Seat& seat, const Rates<NS>& rates,
                                        const float* projections, const float* above, float (&state)[NS]) {
  constexpr int kPack = Pack<NS>::kStates;
  const Places<NS> places(seat.lane);
  const float shift = step.exponent_shift(), inflow_above = step.inflow_above(), inflow_before = step.inflow_before();
  const float* row = projections + seat.row * 3 * NS;
#pragma unroll
  for (int first = 0; first < NS; first += kPack) {
    const Pack<NS> states_above = pack_at<NS>(above, first);
    const Pack<NS> rates_above = pack_at<NS>(rates.above, first), rates_before = pack_at<NS>(rates.before, first);
    float B_above[kPack], B_before[kPack];
    read_row<kPack>(row + places.state_at(first), B_above);
    read_row<kPack>(row + NS + places.state_at(first), B_before);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const int n = first + i;
      float h = B_above[i] * inflow_above + B_before[i] * inflow_before;
      h += fast_exp2(step.above * rates_above.of[i] + shift) * states_above.of[i];
      h += fast_exp2(step.before * rates_before.of[i] + shift) * state[n];
      state[n] = h;
    }
  }
}

// Writes some of a thread's states, from its place `first` on, to a column that begins at `column` with state n0.
template <int NS>
__device__ __forceinline__ void put_pack(const WavefrontArguments& a, const Places<NS>& places, int64_t n0, int first,
                                         const Pack<NS>& pack, float* column) {
  const int32_t n = places.state_at(first);
  float* target = column + n * a.p.channels;
#pragma unroll
  for (int i = 0; i < Pack<NS>::kStates; ++i) {
    if (n0 + n + i < all_states<NS>(a)) *target = pack.of[i];
    target += a.p.channels;
  }
}

}  // namespace
}  // namespace cuda_ops
