// One step of the wavefront scan, used by both passes: the layout of states in shared memory, what a thread prefetches,
// and the recurrence.
#pragma once

#include "wavefront_scan.cuh"

namespace cuda_ops {
namespace {

// Layout of the states of 16 channels in a slot of shared memory: [NS / 4][16][4], accessed in packs of 4 states
// without bank conflicts. The order of the packs depends on the lane: pack i of a lane holds the states of pack i ^ k
// of the lane 4 * k away. So the first exchanges of a sum over lanes need no selection.
template <int NS>
struct StateLayout {
  static constexpr int kPack = kPackStates<NS>;
  static constexpr int kSlotFloats = NS * kTileChannels;
  int32_t lane;
  int32_t twist;

  __device__ __forceinline__ explicit StateLayout(int32_t lane)
      : lane(lane), twist(NS > kPack ? lane / kPack % (NS / kPack) : 0) {}

  // The state that the thread holds at its index i.
  __device__ __forceinline__ int32_t state_at(int32_t i) const { return (i / kPack ^ twist) * kPack + i % kPack; }
  // The offset of a state in a slot.
  __device__ __forceinline__ int32_t offset_of(int32_t n) const {
    return (n / kPack ^ twist) * kPack * kTileChannels + lane * kPack + n % kPack;
  }
  // The offset of the thread's first pack in a slot; its packs are kPack * 16 floats apart.
  __device__ __forceinline__ int32_t thread_offset(int32_t slot) const { return slot * kSlotFloats + lane * kPack; }
};

template <int NS>
__device__ __forceinline__ StatePack<NS> load_pack(const float* thread_states, int first) {
  return *reinterpret_cast<const StatePack<NS>*>(thread_states + first * kTileChannels);
}
template <int NS>
__device__ __forceinline__ void store_states(float* thread_states, const float (&states)[NS]) {
  constexpr int kPack = kPackStates<NS>;
#pragma unroll
  for (int first = 0; first < NS; first += kPack) {
    StatePack<NS> pack;
#pragma unroll
    for (int i = 0; i < kPack; ++i) pack.val[i] = states[first + i];
    *reinterpret_cast<StatePack<NS>*>(thread_states + first * kTileChannels) = pack;
  }
}

// A thread's part of the strip's checkpointed wavefronts. Checkpoint i holds the states before step 8 * (i + 1).
template <int NS>
struct WavefrontCheckpoints {
  static constexpr int kPack = kPackStates<NS>;
  float* first;

  __device__ __forceinline__ WavefrontCheckpoints(const WavefrontArguments& a, const WorkItem& item, int64_t n0,
                                                  int32_t strip) {
    const int64_t index = (item.batch * a.strips + strip) * wavefront_checkpoint_count(a.p.width, a.rows);
    const int64_t groups = (total_states<NS>(a) + NS - 1) / NS;
    const int64_t group = item.tile * groups + n0 / NS;
    first = static_cast<float*>(a.p.checkpoints) + index * a.checkpoint_floats + group * (NS * kTileChannels) * a.rows +
            threadIdx.x * kPack;
  }
  // Packs are stored one after the other for all threads of the tile. They are read much later, hence the streaming
  // stores; float4 allows the compiler stores of 16 bytes.
  __device__ __forceinline__ void store(const WavefrontArguments& a, int32_t index, const float (&states)[NS]) const {
    float* target = first + index * a.checkpoint_floats;
#pragma unroll
    for (int n = 0; n < NS; n += kPack) {
      if constexpr (kPack == 4) {
        __stcs(reinterpret_cast<float4*>(target), float4{states[n], states[n + 1], states[n + 2], states[n + 3]});
      } else {
#pragma unroll
        for (int i = 0; i < kPack; ++i) target[i] = states[n + i];
      }
      target += a.rows * kTileChannels * kPack;
    }
  }
  __device__ __forceinline__ void load(const WavefrontArguments& a, int32_t index, float (&states)[NS]) const {
    const float* source = first + index * a.checkpoint_floats;
#pragma unroll
    for (int n = 0; n < NS; n += kPack) {
      float pack[kPack];
      load_row<kPack>(source, pack);
#pragma unroll
      for (int i = 0; i < kPack; ++i) states[n + i] = pack[i];
      source += a.rows * kTileChannels * kPack;
    }
  }
};

template <int NS>
__device__ __forceinline__ void clear(float (&states)[NS]) {
#pragma unroll
  for (int n = 0; n < NS; ++n) states[n] = 0.f;
}

// Sums values of states, in the order of StateLayout, over the 16 channels of a row: lane i gets the sum of state
// i % NS. While more than a pack is left, exchanged lanes hold each other's states at the same indices. Only the first
// `Remaining` values are still to be summed.
template <int NS, int Remaining = NS>
__device__ __forceinline__ float sum_over_channels(float (&values)[NS], int32_t lane) {
  constexpr int kHalf = Remaining / 2;
  if constexpr (Remaining > 4) {
#pragma unroll
    for (int i = 0; i < kHalf; ++i) values[i] += __shfl_xor_sync(kFullMask, values[i + kHalf], kHalf);
    return sum_over_channels<NS, kHalf>(values, lane);
  } else {
    float pack[Remaining];
#pragma unroll
    for (int i = 0; i < Remaining; ++i) pack[i] = values[i];
    float sum = warp_sum_each<Remaining>(pack, lane);
#pragma unroll
    for (int offset = NS; offset < kTileChannels; offset *= 2) sum += __shfl_xor_sync(kFullMask, sum, offset);
    return sum;
  }
}

// The same for the products of each value with two factors of the channel. The first exchange passes values before they
// are multiplied, which halves the shuffles.
template <int NS>
__device__ __forceinline__ void sum_products(const float (&values)[NS], float first_factor, float second_factor,
                                             int32_t lane, float* first_sum, float* second_sum) {
  constexpr int kRemaining = NS > 4 ? NS / 2 : NS;
  float first[NS];
  float second[NS];
#pragma unroll
  for (int i = 0; i < kRemaining; ++i) {
    first[i] = values[i] * first_factor;
    second[i] = values[i] * second_factor;
  }
  if constexpr (kRemaining < NS) {
    const float other_first = __shfl_xor_sync(kFullMask, first_factor, kRemaining);
    const float other_second = __shfl_xor_sync(kFullMask, second_factor, kRemaining);
#pragma unroll
    for (int i = 0; i < kRemaining; ++i) {
      const float other = __shfl_xor_sync(kFullMask, values[i + kRemaining], kRemaining);
      first[i] += other * other_first;
      second[i] += other * other_second;
    }
  }
  *first_sum = sum_over_channels<NS, kRemaining>(first, lane);
  *second_sum = sum_over_channels<NS, kRemaining>(second, lane);
}

// A * log2(e) of the tile's channels for up to NS states from n0 on, staged in shared memory to save registers:
// [above, before][slot]. States past the last one repeat its A, so that they stay finite.
template <int NS>
struct StagedA {
  static constexpr int kFloats = 2 * NS * kTileChannels;
  const float* above;   // of this thread
  const float* before;  // of this thread

  // All threads of the block must call. Starts and ends with a barrier.
  __device__ __forceinline__ StagedA(const WavefrontArguments& a, const WorkItem& item, int64_t n0, float* target)
      : above(target + StateLayout<NS>(item.lane).thread_offset(0)),
        before(target + StateLayout<NS>(item.lane).thread_offset(1)) {
    __syncthreads();
#pragma unroll 1  // an unrolled loop would occupy a register for the rest of the kernel
    for (int32_t i = threadIdx.x; i < kFloats; i += blockDim.x) {
      const int32_t lane = i % kTileChannels;
      const int32_t n = i / kTileChannels % NS;
      const int64_t channel = item.tile * kTileChannels + lane;
      const int64_t last = total_states<NS>(a) - 1;
      const int64_t state = n0 + n < last ? n0 + n : last;
      const void* A = i < NS * kTileChannels ? a.p.above.A : a.p.before.A;
      constexpr int kSlotFloats = StateLayout<NS>::kSlotFloats;
      target[i / kSlotFloats * kSlotFloats + StateLayout<NS>(lane).offset_of(n)] =
          channel < a.p.channels ? static_cast<const float*>(A)[channel * (last + 1) + state] * kLog2E : -1.f;
    }
    __syncthreads();
  }
};

// Size of the staged projections of one step: [row slots][3 * NS].
template <int NS>
__host__ __device__ __forceinline__ int32_t projection_floats(int32_t rows) {
  return row_slots(rows) * 3 * NS;
}

// Size of the states of a strip's rows: a slot for the boundary row, and one per row.
template <int NS>
__host__ __device__ __forceinline__ int32_t state_floats(int32_t rows) {
  return (row_slots(rows) + 1) * NS * kTileChannels;
}

// What a thread loads for a step: its pixel's values, and its share of the row's projections. Values of a neighbour
// that does not exist are 0, so that NaN there cannot leak in.
template <int NS>
struct PixelInputs {
  static constexpr int kShare = (3 * NS + kTileChannels - 1) / kTileChannels;
  float x;
  float delta_above;
  float delta_before;
  float grad_y;
  float projections[kShare];  // of the row's B above, B before and C, one after the other
  bool valid;                 // whether the pixel and the channel exist
  bool has_above;
  bool has_before;

  // Stages the share of the projections for the row's other threads.
  __device__ __forceinline__ void stage_projections(const WorkItem& item, float* target) const {
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int index = item.lane + i * kTileChannels;
      if (index < 3 * NS) target[item.row * 3 * NS + index] = projections[i];
    }
  }

  // With both neighbours, each contributes half: a factor of the inflow, and -1 in the decay's exponent.
  __device__ __forceinline__ float weight() const { return has_above && has_before ? 0.5f : 1.f; }
  __device__ __forceinline__ float exponent_shift() const { return has_above && has_before ? -1.f : 0.f; }
  __device__ __forceinline__ float inflow_above() const { return delta_above * x * weight(); }
  __device__ __forceinline__ float inflow_before() const { return delta_before * x * weight(); }
};

// A range of columns of a row.
struct ColumnRange {
  int32_t first;
  uint32_t count;

  __device__ __forceinline__ bool contains(int32_t column) const { return uint32_t(column - first) < count; }
};

// Pixel iterator along the thread's row: pointers advance by constant strides, without multiplications.
template <class T, int NS>
struct PixelIterator {
  static constexpr int kShare = PixelInputs<NS>::kShare;
  int32_t column;
  ColumnRange on_map;  // columns of the map
  ColumnRange valid;   // the same, if the channel exists
  // Columns that have a neighbour above, or before. The map's first pixel has one of them, whose state is 0.
  ColumnRange with_above;
  ColumnRange with_before;
  const T* x;
  const T* delta_above;
  const T* delta_before;
  const T* grad_y;
  const T* projections[kShare];
  int64_t projection_bytes[kShare];      // from one column to the next
  ColumnRange projection_range[kShare];  // columns at which they are loaded

  // Starts at step 0.
  __device__ __forceinline__ PixelIterator(const WavefrontArguments& a, const WorkItem& item, int64_t n0, int32_t strip)
      : column(-item.row) {
    const int64_t row = int64_t(strip) * a.rows + item.row;
    const uint32_t width = item.row < item.map_rows ? uint32_t(a.p.width) : 0;
    const bool starts_from_above = a.p.starts_from_above;
    on_map = {0, width};
    valid = {0, item.active ? width : 0};
    with_above = {0, row > 0 || width == 0 ? width : uint32_t(starts_from_above)};
    with_before = row == 0 && !starts_from_above ? on_map : ColumnRange{1, width ? width - 1 : 0};
    const int64_t channel = item.active ? item.channel : 0;
    x = pixel_pointer<const T>(a.p.x, item.batch, row, column) + channel;
    delta_above = pixel_pointer<const T>(a.p.above.delta, item.batch, row, column) + channel;
    delta_before = pixel_pointer<const T>(a.p.before.delta, item.batch, row, column) + channel;
    grad_y = a.p.grad_y.data ? pixel_pointer<const T>(a.p.grad_y, item.batch, row, column) + channel : nullptr;
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int index = item.lane + i * kTileChannels;
      const int which = index / NS;
      const int n = index % NS;
      const GridTensor& tensor = which == 0 ? a.p.above.B : which == 1 ? a.p.before.B : a.p.C;
      projections[i] = pixel_pointer<const T>(tensor, item.batch, row, column) + n0 + n;
      projection_bytes[i] = which == 0 ? a.bytes.B_above : which == 1 ? a.bytes.B_before : a.bytes.C;
      projection_range[i] = which == 0 ? with_above : which == 1 ? with_before : on_map;
      if (which > 2 || n0 + n >= total_states<NS>(a)) projection_range[i].count = 0;
    }
  }

  __device__ __forceinline__ void advance(const WavefrontArguments& a, int32_t columns) {
    column += columns;
    advance_bytes(x, columns * a.bytes.x);
    advance_bytes(grad_y, columns * a.bytes.grad_y);
    advance_bytes(delta_above, columns * a.bytes.above);
    advance_bytes(delta_before, columns * a.bytes.before);
#pragma unroll
    for (int i = 0; i < kShare; ++i) advance_bytes(projections[i], columns * projection_bytes[i]);
  }

  // Loads the current pixel, and grad_y if `with_grad`.
  __device__ __forceinline__ PixelInputs<NS> load(bool with_grad) const {
    PixelInputs<NS> pixel;
    pixel.valid = valid.contains(column);
    pixel.has_above = with_above.contains(column);
    pixel.has_before = with_before.contains(column);
    pixel.x = pixel.valid ? to_float(*x) : 0.f;
    pixel.delta_above = pixel.valid && pixel.has_above ? to_float(*delta_above) : 0.f;
    pixel.delta_before = pixel.valid && pixel.has_before ? to_float(*delta_before) : 0.f;
    pixel.grad_y = with_grad && pixel.valid ? to_float(*grad_y) : 0.f;
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      pixel.projections[i] = projection_range[i].contains(column) ? to_float(*projections[i]) : 0.f;
    }
    return pixel;
  }
};

// Reads the boundary row: the states of the row above the strip, or the gradients of the row below it. The threads of a
// channel share its states among all rows.
template <int NS>
struct BoundaryRowReader {
  static constexpr int kShare = (NS + kMinRowSlots - 1) / kMinRowSlots;
  int32_t stride;          // between the states of a thread
  uint32_t width[kShare];  // of the row, 0 if the state does not exist
  const float* source;
  float states[kShare];

  // Starts at a column. `row` points to column 0 and state 0 of the thread's channel, if `exists`.
  __device__ __forceinline__ BoundaryRowReader(const WavefrontArguments& a, const WorkItem& item, int64_t n0,
                                               const float* row, bool exists, int32_t column)
      : stride(row_slots(a.rows)), source(row + (column * total_states<NS>(a) + n0 + item.row) * a.p.channels) {
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int32_t n = item.row + i * stride;
      const bool loads = exists && item.channel < a.p.channels && n < NS && n0 + n < total_states<NS>(a);
      width[i] = loads ? uint32_t(a.p.width) : 0;
    }
  }

  __device__ __forceinline__ void advance(const WavefrontArguments& a, int32_t columns) {
    source += columns * (total_states<NS>(a) * a.p.channels);
  }

  // Loads the current column. Another block may have written it in this launch, so the load bypasses the L1 cache,
  // which is not coherent.
  __device__ __forceinline__ void load(const WavefrontArguments& a, int32_t column) {
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      states[i] = uint32_t(column) < width[i] ? __ldcg(source + i * stride * a.p.channels) : 0.f;
    }
  }

  __device__ __forceinline__ void stage(const WorkItem& item, float* slot) const {
    const StateLayout<NS> layout(item.lane);
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int32_t n = item.row + i * stride;
      if (n < NS) slot[layout.offset_of(n)] = states[i];
    }
  }
};

// Replaces the states of the previous pixel by those of the current one. `above` holds the states that the thread above
// left one step earlier. States outside the map need no special case: left of it and above it, all inputs and states
// are 0; no pixel reads states right of it or below it.
template <int NS>
__device__ __forceinline__ void advance_states(const PixelInputs<NS>& pixel, const WorkItem& item,
                                               const StagedA<NS>& A_log2e, const float* projections, const float* above,
                                               float (&state)[NS]) {
  constexpr int kPack = kPackStates<NS>;
  const StateLayout<NS> layout(item.lane);
  const float shift = pixel.exponent_shift();
  const float inflow_above = pixel.inflow_above();
  const float inflow_before = pixel.inflow_before();
  const float* row = projections + item.row * 3 * NS;
#pragma unroll
  for (int first = 0; first < NS; first += kPack) {
    const StatePack<NS> states_above = load_pack<NS>(above, first);
    const StatePack<NS> A_above = load_pack<NS>(A_log2e.above, first);
    const StatePack<NS> A_before = load_pack<NS>(A_log2e.before, first);
    float B_above[kPack];
    float B_before[kPack];
    load_row<kPack>(row + layout.state_at(first), B_above);
    load_row<kPack>(row + NS + layout.state_at(first), B_before);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const int n = first + i;
      float h = B_above[i] * inflow_above + B_before[i] * inflow_before;
      h += fast_exp2(pixel.delta_above * A_above.val[i] + shift) * states_above.val[i];
      h += fast_exp2(pixel.delta_before * A_before.val[i] + shift) * state[n];
      state[n] = h;
    }
  }
}

// Stores the thread's pack at index `first` to global memory; `column` points to state n0 of the column.
template <int NS>
__device__ __forceinline__ void store_pack(const WavefrontArguments& a, const StateLayout<NS>& layout, int64_t n0,
                                           int first, const StatePack<NS>& pack, float* column) {
  const int32_t n = layout.state_at(first);
  float* target = column + n * a.p.channels;
#pragma unroll
  for (int i = 0; i < kPackStates<NS>; ++i) {
    if (n0 + n + i < total_states<NS>(a)) *target = pack.val[i];
    target += a.p.channels;
  }
}

// Stores the states at `thread_states` in shared memory to a column of the boundary row.
template <int NS>
__device__ __forceinline__ void store_boundary_column(const WavefrontArguments& a, const StateLayout<NS>& layout,
                                                      int64_t n0, const float* thread_states, float* column) {
#pragma unroll
  for (int first = 0; first < NS; first += kPackStates<NS>) {
    store_pack<NS>(a, layout, n0, first, load_pack<NS>(thread_states, first), column);
  }
}

}  // namespace
}  // namespace cuda_ops
