// Shared parts of the route-scan kernels for d_state == 1, on routes over whole maps.
//
// A warp scans a chunk of 32 consecutive positions of 16 channels. A lane holds a run of 8 positions of a pair of
// channels, with delta and decay in registers, so that each is computed once. States are passed from run to run by
// shuffles, from warp to warp through shared memory, and from one iteration of the block to the next by the last warp.
// Each lane computes one pixel index of the chunk, and the warp shares them; with SSM_OWN_INDICES defined it computes
// all that it needs, for a verifier that does not follow addresses through memory (tests/ptx/prove.py).
#pragma once

#include <cstring>

#include "route_scan.cuh"

namespace cuda_ops {
namespace {

constexpr int kRunPositions = 8;  // positions per lane
constexpr int kTilePairs = 8;     // pairs of channels per tile
constexpr int kTileChannels = 2 * kTilePairs;
constexpr int kChunkRuns = kWarpSize / kTilePairs;           // runs per chunk
constexpr int kChunkPositions = kChunkRuns * kRunPositions;  // positions per warp
static_assert(kChunkPositions == kWarpSize, "each lane computes one pixel index of its warp's chunk");
static_assert(kChunkPositions == kN1Chunk, "a state is saved before each chunk");

// A lane holds the dt of its pixel in the registers for delta of its run.
constexpr int kMaxDtRank = 2 * kRunPositions;

// Maximum number of warps per block, limited by registers.
constexpr int kMaxForwardWarpsN1 = 14;
constexpr int kMaxBackwardWarpsN1 = 8;

template <class T>
using Pair = AlignedVector<T, 2>;
template <class T>
using Quad = AlignedVector<T, 4>;

struct RouteArgumentsN1 {
  RouteScanParams p;  // with the stride between pixels as the column stride of the grid tensors
  int32_t route_count;
  int32_t routes[kMaxRoutes];  // indices into p.route
  int32_t length;
  FastDivisor height;      // of the map, for routes along columns
  int32_t segment_length;  // a multiple of kChunkPositions unless there is one segment
  int32_t segments;
  int32_t tiles;        // of each group's channels
  int32_t dt_rank;      // 0 if delta itself is given
  bool adds_axis_sums;  // whether the sums of the other axis are to be added
  bool writes_result;   // whether these sums are the final ones
  int64_t first_block;
};

template <class T>
__device__ __forceinline__ float pair_to_float(const Pair<T>& pair, int c) {
  return to_float(pair.val[c]);
}
// One instruction; the compiler would first split the pair.
__device__ __forceinline__ float pair_to_float(const Pair<__nv_bfloat16>& pair, int c) {
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  bits = c ? bits & 0xffff0000u : bits << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// A block's segment and tile of channels, and the thread's run and pair of channels.
struct WorkItemN1 {
  int64_t batch;
  int32_t group;
  int32_t tile;
  int32_t segment;
  int32_t begin;   // first position
  int32_t count;   // positions
  int32_t chunks;  // of kChunkPositions positions
  int32_t lane;
  int32_t warp;
  int32_t warps;
  int32_t run;
  int32_t pair;
  int64_t channel;  // the first of the pair; threads without a pair repeat the last one of the group
  bool active;      // whether the pair exists

  __device__ __forceinline__ explicit WorkItemN1(const RouteArgumentsN1& a) {
    int64_t index = a.first_block + blockIdx.x;
    tile = int32_t(index % a.tiles);
    index /= a.tiles;
    group = int32_t(index % a.p.groups);
    index /= a.p.groups;
    segment = int32_t(index % a.segments);
    batch = index / a.segments;
    begin = segment * a.segment_length;
    count = a.length - begin < a.segment_length ? a.length - begin : a.segment_length;
    chunks = (count + kChunkPositions - 1) / kChunkPositions;
    lane = threadIdx.x % kWarpSize;
    warp = threadIdx.x / kWarpSize;
    warps = blockDim.x / kWarpSize;
    run = lane / kTilePairs;
    pair = lane % kTilePairs;
    const int32_t group_channels = int32_t(a.p.channels / a.p.groups);
    const int32_t within_group = tile * kTileChannels + 2 * pair;
    active = within_group < group_channels;
    channel = int64_t(group) * group_channels + (active ? within_group : group_channels - 2);
  }
};

__device__ __forceinline__ int32_t pixel_index(const RouteArgumentsN1& a, bool columns, int32_t position) {
  if (!columns) return position;
  const int32_t outer = a.height.divide(position);
  return (position - outer * int32_t(a.p.height)) * int32_t(a.p.width) + outer;
}

// A warp's chunk of positions, in the order of the route. Lane j looks up position j. In a partial chunk, lanes without
// a position use the last one.
struct WarpChunk {
  int32_t index;  // along the route, from the item's first chunk
  bool reversed;
  int32_t first;     // along the axis
  int32_t position;  // of this lane, along the axis
  bool exists;       // whether this lane has a position of its own

  __device__ __forceinline__ WarpChunk(const WorkItemN1& item, int32_t index, bool reversed)
      : index(index), reversed(reversed) {
    first = item.begin + (reversed ? item.chunks - 1 - index : index) * kChunkPositions;
    position = first + (reversed ? kChunkPositions - 1 - item.lane : item.lane);
    const int32_t end = item.begin + item.count;
    exists = index < item.chunks && position < end;
    if (!exists) position = end - 1;
  }

  // The position along the axis at which the route enters the chunk.
  __device__ __forceinline__ int32_t boundary(bool reversed) const {
    return reversed ? first + kChunkPositions : first;
  }
};

// A warp's staging buffer in shared memory, [kind][32]: values that lanes look up for the whole chunk.
struct WarpStaging {
  static constexpr int kFloats = 4 * kChunkPositions;
  float* data;

  __device__ __forceinline__ int32_t* pixels() const { return reinterpret_cast<int32_t*>(data); }
  // Rows of the positions among the block's sums.
  __device__ __forceinline__ int32_t* sum_rows() const { return reinterpret_cast<int32_t*>(data) + kChunkPositions; }
  __device__ __forceinline__ float* B() const { return data + 2 * kChunkPositions; }
  __device__ __forceinline__ float* C() const { return data + 3 * kChunkPositions; }
};

// Where the position of a lane is: its pixel, and its row among the block's sums. With one segment, rows are pixels, so
// that the routes of both axes share them. Positions that do not exist get rows from `segment_length` on.
struct LaneIndices {
  int32_t pixel;
  int32_t sum_row;

  __device__ __forceinline__ LaneIndices(const RouteArgumentsN1& a, const WorkItemN1& item, int64_t k,
                                         const WarpChunk& chunk) {
    pixel = pixel_index(a, runs_along_columns(a.p.route[k]), chunk.position);
    const int32_t row = a.segments == 1 ? pixel : chunk.position - item.begin;
    sum_row = chunk.exists ? row : a.segment_length + item.warp * kChunkRuns + item.lane / kRunPositions;
  }
};

// Stages the lane's indices and returns its pixel. The warp must synchronize before reading them.
__device__ __forceinline__ int32_t stage_pixel(const RouteArgumentsN1& a, const WorkItemN1& item, int64_t k,
                                               const WarpChunk& chunk, const WarpStaging& staging) {
  const LaneIndices own(a, item, k, chunk);
  staging.pixels()[item.lane] = own.pixel;
  staging.sum_rows()[item.lane] = own.sum_row;
  return own.pixel;
}

// Loads the run's part of staged values.
template <class T>
__device__ __forceinline__ void load_staged_run(const T* staged, int32_t run, T (&values)[kRunPositions]) {
  const Quad<T>* quads = reinterpret_cast<const Quad<T>*>(staged + run * kRunPositions);
#pragma unroll
  for (int u = 0; u < kRunPositions; ++u) values[u] = quads[u / 4].val[u % 4];
}

#if defined(SSM_OWN_INDICES)
// Calls `use` with the indices of each of the run's positions.
template <class Use>
__device__ __forceinline__ void for_run_indices(const RouteArgumentsN1& a, const WorkItemN1& item, int64_t k,
                                                const WarpChunk& chunk, Use use) {
#pragma unroll
  for (int u = 0; u < kRunPositions; ++u) {
    WorkItemN1 lane = item;
    lane.lane = item.run * kRunPositions + u;
    use(u, LaneIndices(a, lane, k, WarpChunk(lane, chunk.index, chunk.reversed)));
  }
}
#endif

// The pixels of the run's positions, and their rows among the block's sums.
__device__ __forceinline__ void load_run_pixels(const RouteArgumentsN1& a, const WorkItemN1& item, int64_t k,
                                                const WarpChunk& chunk, const WarpStaging& staging,
                                                int32_t (&pixels)[kRunPositions]) {
#if defined(SSM_OWN_INDICES)
  for_run_indices(a, item, k, chunk, [&](int u, const LaneIndices& lane) { pixels[u] = lane.pixel; });
#else
  load_staged_run(staging.pixels(), item.run, pixels);
#endif
}

__device__ __forceinline__ void load_run_sum_rows(const RouteArgumentsN1& a, const WorkItemN1& item, int64_t k,
                                                  const WarpChunk& chunk, const WarpStaging& staging,
                                                  int32_t (&sum_rows)[kRunPositions]) {
#if defined(SSM_OWN_INDICES)
  for_run_indices(a, item, k, chunk, [&](int u, const LaneIndices& lane) { sum_rows[u] = lane.sum_row; });
#else
  load_staged_run(staging.sum_rows(), item.run, sum_rows);
#endif
}

// B or C at the lane's pixel.
template <class T>
__device__ __forceinline__ float load_projection(const RouteArgumentsN1& a, const WorkItemN1& item,
                                                 const GridTensor& tensor, int64_t k, int32_t pixel) {
  if (!tensor.data) return 1.f;
  const T* base =
      static_cast<const T*>(tensor.data) + item.batch * tensor.batch + k * tensor.route + item.group * tensor.group;
  return to_float(base[pixel * tensor.column]);
}

// Loads the pair of channels at the pixels of the run.
template <class T>
__device__ __forceinline__ void load_run(const WorkItemN1& item, const GridTensor& tensor, int64_t k,
                                         const int32_t (&pixels)[kRunPositions], Pair<T> (&values)[kRunPositions]) {
  const T* base = static_cast<const T*>(tensor.data) + item.batch * tensor.batch + k * tensor.route + item.channel;
  const int32_t bytes = int32_t(tensor.column) * int32_t(sizeof(T));  // one multiplication per address
#pragma unroll
  for (int u = 0; u < kRunPositions; ++u) {
    values[u] = *reinterpret_cast<const Pair<T>*>(reinterpret_cast<const char*>(base) + int64_t(pixels[u]) * bytes);
  }
}

// Loads the low-rank dt at the lane's pixel, in pairs.
template <class T>
__device__ __forceinline__ void load_dt(const RouteArgumentsN1& a, const WorkItemN1& item, int64_t k, int32_t pixel,
                                        Pair<T> (&values)[kRunPositions]) {
  const T* base = static_cast<const T*>(a.p.delta.data) + item.batch * a.p.delta.batch + k * a.p.delta.route;
  const Pair<T>* dt = reinterpret_cast<const Pair<T>*>(base + pixel * a.p.delta.column);
#pragma unroll
  for (int i = 0; i < kRunPositions; ++i) {
    if (2 * i >= a.dt_rank) break;
    values[i] = dt[i];
  }
}

// Loads delta of the pair at the pixels of the run, or with LowRank the dt at the lane's pixel.
template <class T, bool LowRank>
__device__ __forceinline__ void load_delta(const RouteArgumentsN1& a, const WorkItemN1& item, int64_t k, int32_t pixel,
                                           const int32_t (&pixels)[kRunPositions], Pair<T> (&values)[kRunPositions]) {
  if (LowRank) {
    load_dt(a, item, k, pixel, values);
  } else {
    load_run(item, a.p.delta, k, pixels, values);
  }
}

// Computes delta = dt @ dt_weight^T per warp. dt_rank must be even. The weights and a staging buffer for one chunk are
// in shared memory.
struct DtProjection {
  static constexpr int kStagedRanks = 4;  // dt values staged at a time
  static constexpr int kFloats = kStagedRanks * kChunkPositions;
  static_assert(kFloats <= WarpStaging::kFloats, "dt is staged in an unused WarpStaging");
  const float* weights;  // [dt_rank][16], times log2(e); the weights of all routes are at the start of shared memory
  float* staging;        // [kStagedRanks][32]

  static __host__ __device__ __forceinline__ int64_t weight_floats(int64_t routes, int64_t dt_rank) {
    return routes * dt_rank * kTileChannels;
  }

  // Stages the weights of the block's channels for all its routes, [route][dt_rank][16]. All threads must call, and
  // synchronize before reading.
  static __device__ __forceinline__ void stage_weights(const RouteArgumentsN1& a, const WorkItemN1& item,
                                                       float* target) {
    const int32_t group_channels = int32_t(a.p.channels / a.p.groups);
    for (int32_t i = threadIdx.x; i < a.route_count * a.dt_rank * kTileChannels; i += blockDim.x) {
      const int32_t row = i / kTileChannels;
      const int32_t r = row / a.dt_rank;
      const int32_t within_group = item.tile * kTileChannels + i % kTileChannels;
      const int64_t channel =
          int64_t(item.group) * group_channels + (within_group < group_channels ? within_group : group_channels - 1);
      const float* dt_weight = static_cast<const float*>(a.p.dt_weight);
      target[i] = dt_weight[(a.routes[r] * a.p.channels + channel) * a.dt_rank + row % a.dt_rank] * kLog2E;
    }
  }

  // Adds the product to `delta` of a run. The staging buffer must be free, and is free afterwards.
  template <class T>
  __device__ __forceinline__ void accumulate(const RouteArgumentsN1& a, const WorkItemN1& item,
                                             const Pair<T> (&dt)[kRunPositions],
                                             float (&delta)[kRunPositions][2]) const {
#pragma unroll
    for (int first = 0; first < kMaxDtRank; first += kStagedRanks) {
      if (first >= a.dt_rank) break;
#pragma unroll
      for (int i = 0; i < kStagedRanks; i += 2) {
        if (first + i >= a.dt_rank) break;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          staging[(i + j) * kChunkPositions + item.lane] = pair_to_float(dt[(first + i) / 2], j);
        }
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kStagedRanks; i += 2) {
        if (first + i >= a.dt_rank) break;
#pragma unroll
        for (int j = i; j < i + 2; ++j) {
          float values[kRunPositions];
          load_staged_run(staging + j * kChunkPositions, item.run, values);
          const Pair<float> weight =
              *reinterpret_cast<const Pair<float>*>(weights + (first + j) * kTileChannels + 2 * item.pair);
#pragma unroll
          for (int u = 0; u < kRunPositions; ++u) {
#pragma unroll
            for (int c = 0; c < 2; ++c) delta[u][c] += values[u] * weight.val[c];
          }
        }
      }
      __syncwarp();
    }
  }
};

// A and delta_bias of a pair of channels for one route. Delta is in units of log(2), so that the decay is
// 2^(A * delta).
struct PairParameters {
  float A[2];
  float delta_bias[2];

  __device__ __forceinline__ PairParameters(const RouteArgumentsN1& a, const WorkItemN1& item, int64_t k) {
    const int64_t row = k * a.p.channels + item.channel;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      A[c] = static_cast<const float*>(a.p.A)[row + c];
      delta_bias[c] = a.p.delta_bias ? static_cast<const float*>(a.p.delta_bias)[row + c] * kLog2E : 0.f;
    }
  }

  // Computes delta of a run from what `load_delta` loaded, and its derivative times log2(e) if `slopes` is given.
  template <class T, bool LowRank>
  __device__ __forceinline__ void compute_delta(const RouteArgumentsN1& a, const WorkItemN1& item,
                                                const Pair<T> (&loaded)[kRunPositions], const DtProjection& projection,
                                                float (&delta)[kRunPositions][2], float (*slopes)[2] = nullptr) const {
#pragma unroll
    for (int u = 0; u < kRunPositions; ++u) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        delta[u][c] = LowRank ? delta_bias[c] : pair_to_float(loaded[u], c) * kLog2E + delta_bias[c];
        if (slopes) slopes[u][c] = kLog2E;
      }
    }
    if (LowRank) projection.accumulate(a, item, loaded, delta);
    if (!a.p.delta_softplus) return;
#pragma unroll
    for (int u = 0; u < kRunPositions; ++u) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float w = delta[u][c];
        const float t = fast_exp2(-fabsf(w));
        delta[u][c] = softplus_base2(w, t);
        if (!slopes) continue;
        const float scaled = kLog2E * fast_reciprocal(t + 1.f);
        slopes[u][c] = w > 0 ? scaled : t * scaled;
      }
    }
  }
};

// Stages the sum of D over the block's routes in shared memory, which saves registers. Ends with a barrier.
__device__ __forceinline__ void stage_skip(const RouteArgumentsN1& a, const WorkItemN1& item, float* skip) {
  if (threadIdx.x < kTilePairs) {
    skip[0] = 0.f;
    skip[1] = 0.f;
    for (int r = 0; a.p.D && r < a.route_count; ++r) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        skip[c] += global_pointer(static_cast<const float*>(a.p.D))[a.routes[r] * a.p.channels + item.channel + c];
      }
    }
  }
  __syncthreads();
}

// Element of a (B, K, segments, E) buffer.
__device__ __forceinline__ int64_t segment_index(const RouteArgumentsN1& a, const WorkItemN1& item, int64_t k) {
  return ((item.batch * a.p.routes + k) * a.segments + item.segment) * a.p.channels + item.channel;
}

// The state saved between the positions `position` - 1 and `position` along the axis, for either direction.
__device__ __forceinline__ float* saved_state(const RouteArgumentsN1& a, const WorkItemN1& item, int64_t k,
                                              int32_t position) {
  const int64_t saved = saved_state_count(a.length, kChunkPositions);
  const int64_t row = (item.batch * a.p.routes + k) * saved + position / kChunkPositions - 1;
  return static_cast<float*>(a.p.saved_states) + row * a.p.channels + item.channel;
}

// Element of a (B, K, E) buffer.
__device__ __forceinline__ int64_t last_state_index(const RouteArgumentsN1& a, const WorkItemN1& item, int64_t k) {
  return (item.batch * a.p.routes + k) * a.p.channels + item.channel;
}

// Scan element: consecutive positions map the state h before them to decay * h + state.
struct Aggregate {
  float decay[2];
  float state[2];

  static __device__ __forceinline__ Aggregate identity() { return {{1.f, 1.f}, {0.f, 0.f}}; }
  __device__ __forceinline__ Quad<float> packed() const { return {decay[0], state[0], decay[1], state[1]}; }
};

// Exclusive warp scan of the runs' aggregates along the route (reversed if `Back`). `total`, valid in the lanes of the
// last run, is the aggregate of the chunk.
template <bool Back>
__device__ __forceinline__ Aggregate exclusive_scan(const WorkItemN1& item, Aggregate run, Aggregate* total) {
  const int32_t rank = Back ? kChunkRuns - 1 - item.run : item.run;
  const int32_t previous = Back ? kTilePairs : -kTilePairs;  // lanes to the previous run
#pragma unroll
  for (int offset = 1; offset < kChunkRuns; offset *= 2) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float decay = __shfl_sync(kFullMask, run.decay[c], item.lane + offset * previous);
      const float state = __shfl_sync(kFullMask, run.state[c], item.lane + offset * previous);
      if (rank < offset) continue;
      run.state[c] += run.decay[c] * state;
      run.decay[c] *= decay;
    }
  }
  *total = run;
  Aggregate before;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const float decay = __shfl_sync(kFullMask, run.decay[c], item.lane + previous);
    const float state = __shfl_sync(kFullMask, run.state[c], item.lane + previous);
    before.decay[c] = rank ? decay : 1.f;
    before.state[c] = rank ? state : 0.f;
  }
  return before;
}

// Double-buffered inter-warp carries, so that one barrier per iteration suffices: each warp's aggregate, and the state
// at the start of the iteration.
struct WarpCarries {
  static __host__ __device__ __forceinline__ int64_t floats(int64_t warps) {
    return 2 * (warps * 2 + 1) * kTileChannels;
  }
  float* data;

  __device__ __forceinline__ Quad<float>* aggregate(const WorkItemN1& item, int32_t iteration, int32_t warp) const {
    return reinterpret_cast<Quad<float>*>(data + 2 * kTileChannels) +
           ((iteration & 1) * item.warps + warp) * kTilePairs + item.pair;
  }
  __device__ __forceinline__ float* state(const WorkItemN1& item, int32_t iteration) const {
    return data + (iteration & 1) * kTileChannels + 2 * item.pair;
  }

  // The state before the warp's chunk. All warps must have stored their aggregates before a barrier.
  __device__ __forceinline__ void load_warp_start(const WorkItemN1& item, int32_t iteration, float (&start)[2]) const {
    start[0] = state(item, iteration)[0];
    start[1] = state(item, iteration)[1];
    for (int32_t w = 0; w < item.warp; ++w) {
      const Quad<float> warp = *aggregate(item, iteration, w);
      start[0] = warp.val[0] * start[0] + warp.val[1];
      start[1] = warp.val[2] * start[1] + warp.val[3];
    }
  }
};

// The block's sums over routes, [sum_rows][16], at a row and the thread's pair of channels.
__device__ __forceinline__ Pair<float>* sum_at(const WorkItemN1& item, float* sums, int32_t row) {
  return reinterpret_cast<Pair<float>*>(sums + row * kTileChannels + 2 * item.pair);
}

// Writes a block's sums [sum_rows][16] over its routes, and adds those of the other axis if they exist. They are
// written in T if they are final, else in float. `axis_sums` may be the result.
template <class T>
__device__ __forceinline__ void write_route_sums(const RouteArgumentsN1& a, const WorkItemN1& item, float* sums,
                                                 void* axis_sums) {
  const bool columns = a.segments > 1 && runs_along_columns(a.p.route[a.routes[0]]);
  const int64_t base = item.batch * a.p.height * a.p.width * a.p.channels + item.channel;
  for (int32_t first = item.warp * kChunkPositions; first < item.count; first += item.warps * kChunkPositions) {
    const int32_t own = first + item.lane < item.count ? first + item.lane : item.count - 1;
    const int32_t pixel = pixel_index(a, columns, item.begin + own);
#pragma unroll
    for (int u = 0; u < kRunPositions; ++u) {
      const int32_t row = first + item.run * kRunPositions + u;
      const int64_t index = base + __shfl_sync(kFullMask, pixel, item.run * kRunPositions + u) * a.p.channels;
      if (row >= item.count || !item.active) continue;
      Pair<float> sum = *sum_at(item, sums, row);
      Pair<float>* other_axis = reinterpret_cast<Pair<float>*>(static_cast<float*>(axis_sums) + index);
      if (a.adds_axis_sums) {
        sum.val[0] += other_axis->val[0];
        sum.val[1] += other_axis->val[1];
      }
      if (a.writes_result) {
        *reinterpret_cast<Pair<T>*>(static_cast<T*>(a.p.result) + index) = {from_float<T>(sum.val[0]),
                                                                            from_float<T>(sum.val[1])};
      } else {
        *other_axis = sum;
      }
    }
  }
}

// The stride from each pixel to the next, row by row.
inline int64_t pixel_stride(const RouteScanParams& p, const GridTensor& tensor) {
  return p.width > 1 ? tensor.column : tensor.row;
}

// Rows of a block's sums: one per position, and one per run of an iteration for positions that do not exist.
__host__ __device__ __forceinline__ int64_t sum_row_count(int64_t positions, int64_t warps) {
  return positions + warps * kChunkRuns;
}

// A block's shared memory, in floats: sums, inter-warp carries, two staging buffers per warp, skip weights, dt weights.
inline int64_t shared_floats_n1(const RouteScanParams& p, int64_t positions, int64_t warps) {
  return sum_row_count(positions, warps) * kTileChannels + WarpCarries::floats(warps) +
         warps * 2 * WarpStaging::kFloats + kTileChannels + DtProjection::weight_floats(p.routes, p.dt_rank);
}

}  // namespace
}  // namespace cuda_ops
