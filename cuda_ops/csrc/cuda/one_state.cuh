// What the passes of routes over whole maps with one state have in common. A warp has a chunk of 32 consecutive positions
// of 16 channels: a lane has a run of 8 positions of a pair of channels, with all its step sizes and decays in registers,
// so that each is computed once; runs, then warps, then the turns of a block hand their states on. The pixels of a chunk
// are found by a lane each, and shared.
#pragma once

#include <cstring>

#include "route_scan.cuh"

namespace cuda_ops {
namespace {

constexpr int kRun = 8, kPairs = 8, kRuns = kWarp / kPairs, kChunk = kRuns * kRun, kTile = 2 * kPairs;
// The most factors of a step size: a lane has those of its pixel in place of the step sizes of its run.
constexpr int kMostFactors = 2 * kRun;
// The most warps of a block: registers allow no more.
constexpr int kOneStateForwardWarps = 14, kOneStateBackwardWarps = 8;
static_assert(kChunk == kWarp, "each lane finds one pixel of its warp's chunk");

struct OneStateArguments {
  RouteScanParams p;                 // with the pixels' stride as the grid tensors' column strides
  int32_t count, index[kMaxRoutes];  // which routes
  int32_t length;
  Divisor height;             // of the map, for routes down its columns
  int32_t segment, segments;  // positions of a segment, a multiple of a chunk's unless there is one segment
  int32_t tiles;              // of each group's channels
  int32_t rank;               // factors of each step size, 0 where step sizes are given as such
  bool adds, rounds;          // whether the other axis' sums are there, and whether these sums are the last
  int64_t first_block;
};

template <class T>
struct alignas(2 * sizeof(T)) Two {
  T of[2];
};
template <class T>
struct alignas(16) Four {
  T of[4];
};

template <class T>
__device__ __forceinline__ float value_of(const Two<T>& pair, int c) {
  return to_float(pair.of[c]);
}
// By one instruction, where the compiler would first take the pair apart.
__device__ __forceinline__ float value_of(const Two<__nv_bfloat16>& pair, int c) {
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  bits = c ? bits & 0xffff0000u : bits << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// A block's part of a map, and a thread's of that.
struct Site {
  int64_t batch;
  int32_t group, tile, segment, begin, count, chunks;
  int32_t lane, warp, warps, run, pair;
  int64_t channel;  // the first of two
  bool active;      // whether there are such channels

  __device__ __forceinline__ explicit Site(const OneStateArguments& a) {
    int64_t block = a.first_block + blockIdx.x;
    tile = int32_t(block % a.tiles), block /= a.tiles;
    group = int32_t(block % a.p.groups), block /= a.p.groups;
    segment = int32_t(block % a.segments), batch = block / a.segments;
    begin = segment * a.segment;
    count = a.length - begin < a.segment ? a.length - begin : a.segment;
    chunks = (count + kChunk - 1) / kChunk;
    lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    run = lane / kPairs, pair = lane % kPairs;
    const int32_t of_group = int32_t(a.p.channels / a.p.groups), within = tile * kTile + 2 * pair;
    active = within < of_group;
    channel = int64_t(group) * of_group + (active ? within : of_group - 2);
  }
};

__device__ __forceinline__ int32_t pixel_at(const OneStateArguments& a, bool columns, int32_t position) {
  if (!columns) return position;
  const int32_t outer = a.height.quotient(position);
  return (position - outer * int32_t(a.p.height)) * int32_t(a.p.width) + outer;
}

// A chunk in the order of a route. Lane j finds its position j; where the map ends within the chunk, some have none.
struct Chunk {
  int32_t first, position;  // along the axis; `position` is that of this lane, the last one there is if it has none
  bool given;

  __device__ __forceinline__ Chunk(const Site& site, int32_t turn, bool down) {
    first = site.begin + (down ? site.chunks - 1 - turn : turn) * kChunk;
    position = first + (down ? kChunk - 1 - site.lane : site.lane);
    const int32_t end = site.begin + site.count;
    given = turn < site.chunks && position < end;
    if (!given) position = end - 1;
  }
};

// A warp's notes on a chunk in shared memory: [kind][32].
struct Notes {
  static constexpr int kFloats = 4 * kChunk;
  float* at;

  __device__ __forceinline__ int32_t* pixels() const { return reinterpret_cast<int32_t*>(at); }
  __device__ __forceinline__ int32_t* places() const { return reinterpret_cast<int32_t*>(at) + kChunk; }  // among sums
  __device__ __forceinline__ float* inputs() const { return at + 2 * kChunk; }                            // B
  __device__ __forceinline__ float* outputs() const { return at + 3 * kChunk; }                           // C
};

// Finds the lane's pixel, and notes it and its place among the block's sums for the warp, which waits before it reads them.
__device__ __forceinline__ int32_t note_pixel(const OneStateArguments& a, const Site& site, int64_t k, const Chunk& chunk,
                                              const Notes& notes) {
  const int32_t pixel = pixel_at(a, runs_along_columns(a.p.route[k]), chunk.position);
  const int32_t place = a.segments == 1 ? pixel : chunk.position - site.begin;
  notes.pixels()[site.lane] = pixel;
  notes.places()[site.lane] = chunk.given ? place : a.segment + site.warp * kRuns + site.lane / kRun;
  return pixel;
}

// A lane's run of one kind.
template <class T>
__device__ __forceinline__ void read_run(const T* of_warp, int32_t run, T (&values)[kRun]) {
  const Four<T>* fours = reinterpret_cast<const Four<T>*>(of_warp + run * kRun);
#pragma unroll
  for (int u = 0; u < kRun; ++u) values[u] = fours[u / 4].of[u % 4];
}

template <class T>
__device__ __forceinline__ float projection(const OneStateArguments& a, const Site& site, const GridTensor& tensor,
                                            int64_t k, int32_t pixel) {
  if (!tensor.data) return 1.f;
  const T* base = static_cast<const T*>(tensor.data) + site.batch * tensor.batch + k * tensor.route +
                  site.group * tensor.group;
  return to_float(base[pixel * tensor.column]);
}

// The pair's values at the pixels of a run.
template <class T>
__device__ __forceinline__ void load_run(const Site& site, const GridTensor& tensor, int64_t k, const int32_t (&pixels)[kRun],
                                         Two<T> (&values)[kRun]) {
  const T* base = static_cast<const T*>(tensor.data) + site.batch * tensor.batch + k * tensor.route + site.channel;
  const int32_t bytes = int32_t(tensor.column) * int32_t(sizeof(T));  // one multiplication an address
#pragma unroll
  for (int u = 0; u < kRun; ++u)
    values[u] = *reinterpret_cast<const Two<T>*>(reinterpret_cast<const char*>(base) + int64_t(pixels[u]) * bytes);
}

// The step sizes' factors at the lane's pixel, two at a time.
template <class T>
__device__ __forceinline__ void load_factors(const OneStateArguments& a, const Site& site, int64_t k, int32_t pixel,
                                             Two<T> (&values)[kRun]) {
  const T* base = static_cast<const T*>(a.p.delta.data) + site.batch * a.p.delta.batch + k * a.p.delta.route;
  const Two<T>* factors = reinterpret_cast<const Two<T>*>(base + pixel * a.p.delta.column);
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if (2 * i >= a.rank) break;
    values[i] = factors[i];
  }
}

// The step sizes of the pair at the pixels of a run; if they are factored, those of the lane's pixel.
template <class T>
__device__ __forceinline__ void load_steps(const OneStateArguments& a, const Site& site, int64_t k, bool factored,
                                           int32_t pixel, const int32_t (&pixels)[kRun], Two<T> (&values)[kRun]) {
  if (factored) {
    load_factors(a, site, k, pixel, values);
  } else {
    load_run(site, a.p.delta, k, pixels, values);
  }
}

// How a warp makes step sizes of factors, of which there is an even number: by weights in shared memory, and by way of room
// there for a chunk's factors.
struct Factors {
  static constexpr int kAtATime = 4, kFloats = kAtATime * kChunk;
  static_assert(kFloats <= Notes::kFloats, "notes that are not in use are room enough");
  const float* weights;  // [rank][16], times log2(e); those of all routes are at the start of shared memory
  float* room;           // [kAtATime][32]

  static __host__ __device__ __forceinline__ int64_t weight_floats(int64_t routes, int64_t rank) {
    return routes * rank * kTile;
  }

  // Fetches the weights of a block's channels for each of its routes, [route][rank][16]. All threads take part, and wait
  // for each other before they read.
  static __device__ __forceinline__ void fetch_weights(const OneStateArguments& a, const Site& site, float* target) {
    const int32_t of_group = int32_t(a.p.channels / a.p.groups);
    for (int32_t i = threadIdx.x; i < a.count * a.rank * kTile; i += blockDim.x) {
      const int32_t row = i / kTile, r = row / a.rank, within = site.tile * kTile + i % kTile;
      const int64_t channel = int64_t(site.group) * of_group + (within < of_group ? within : of_group - 1);
      const float* weights = static_cast<const float*>(a.p.delta_weight);
      target[i] = weights[(a.index[r] * a.p.channels + channel) * a.rank + row % a.rank] * kLog2E;
    }
  }

  // Adds the products to the steps of a run. The room must be free, and is again.
  template <class T>
  __device__ __forceinline__ void add(const OneStateArguments& a, const Site& site, const Two<T> (&factors)[kRun],
                                      float (&steps)[kRun][2]) const {
#pragma unroll
    for (int first = 0; first < kMostFactors; first += kAtATime) {
      if (first >= a.rank) break;
#pragma unroll
      for (int i = 0; i < kAtATime; i += 2) {
        if (first + i >= a.rank) break;
#pragma unroll
        for (int j = 0; j < 2; ++j) room[(i + j) * kChunk + site.lane] = value_of(factors[(first + i) / 2], j);
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kAtATime; i += 2) {
        if (first + i >= a.rank) break;
#pragma unroll
        for (int j = i; j < i + 2; ++j) {
          float values[kRun];
          read_run(room + j * kChunk, site.run, values);
          const Two<float> weight = *reinterpret_cast<const Two<float>*>(weights + (first + j) * kTile + 2 * site.pair);
#pragma unroll
          for (int u = 0; u < kRun; ++u) {
#pragma unroll
            for (int c = 0; c < 2; ++c) steps[u][c] += values[u] * weight.of[c];
          }
        }
      }
      __syncwarp();
    }
  }
};

// One route's parameters of a pair of channels. Step sizes are in units of log(2): the decay is then 2^(A * step).
struct PairParameters {
  float rate[2], bias[2];

  __device__ __forceinline__ PairParameters(const OneStateArguments& a, const Site& site, int64_t k) {
    const int64_t row = k * a.p.channels + site.channel;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      rate[c] = static_cast<const float*>(a.p.A)[row + c];
      bias[c] = a.p.delta_bias ? static_cast<const float*>(a.p.delta_bias)[row + c] * kLog2E : 0.f;
    }
  }

  // The step sizes of a run from what was loaded of them, and where they are wanted their slopes times log2(e).
  template <class T>
  __device__ __forceinline__ void steps(const OneStateArguments& a, const Site& site, bool factored,
                                        const Two<T> (&raw)[kRun], const Factors& factors, float (&steps)[kRun][2],
                                        float (*slopes)[2] = nullptr) const {
#pragma unroll
    for (int u = 0; u < kRun; ++u) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        steps[u][c] = factored ? bias[c] : value_of(raw[u], c) * kLog2E + bias[c];
        if (slopes) slopes[u][c] = kLog2E;
      }
    }
    if (factored) factors.add(a, site, raw, steps);
    if (!a.p.delta_softplus) return;
#pragma unroll
    for (int u = 0; u < kRun; ++u) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float w = steps[u][c], t = fast_exp2(-fabsf(w));
        steps[u][c] = softplus2(w, t);
        if (!slopes) continue;
        const float scaled = kLog2E * fast_reciprocal(t + 1.f);
        slopes[u][c] = w > 0 ? scaled : t * scaled;
      }
    }
  }
};

// The sums of a pair's D over the routes of a block, left in shared memory, because registers are scarce; behind a barrier.
__device__ __forceinline__ void sum_skips(const OneStateArguments& a, const Site& site, float* skip) {
  if (threadIdx.x < kPairs) {
    skip[0] = skip[1] = 0.f;
    for (int r = 0; a.p.D && r < a.count; ++r) {
#pragma unroll
      for (int c = 0; c < 2; ++c)
        skip[c] += static_cast<const float*>(a.p.D)[a.index[r] * a.p.channels + site.channel + c];
    }
  }
  __syncthreads();
}

// (B, K, segments, E): the row that belongs to a route and a block.
__device__ __forceinline__ int64_t segment_row(const OneStateArguments& a, const Site& site, int64_t k) {
  return ((site.batch * a.p.routes + k) * a.segments + site.segment) * a.p.channels + site.channel;
}

// A stretch of a route as a map from the state before it to the state behind it: decay * state + end.
struct Stretch {
  float decay[2], end[2];
};

// From every lane's own run: what the runs before it do together, in the order of the route or in the opposite one, which
// is nothing for the first; and what the whole chunk does, in `all` of the last run's lanes.
template <bool Back>
__device__ __forceinline__ Stretch runs_before(const Site& site, Stretch own, Stretch* all) {
  const int32_t rank = Back ? kRuns - 1 - site.run : site.run, one = Back ? kPairs : -kPairs;
#pragma unroll
  for (int step = 1; step < kRuns; step *= 2) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float decay = __shfl_sync(kAllLanes, own.decay[c], site.lane + step * one);
      const float end = __shfl_sync(kAllLanes, own.end[c], site.lane + step * one);
      if (rank < step) continue;
      own.end[c] += own.decay[c] * end;
      own.decay[c] *= decay;
    }
  }
  *all = own;
  Stretch before;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const float decay = __shfl_sync(kAllLanes, own.decay[c], site.lane + one);
    const float end = __shfl_sync(kAllLanes, own.end[c], site.lane + one);
    before.decay[c] = rank ? decay : 1.f, before.end[c] = rank ? end : 0.f;
  }
  return before;
}

// What a block's warps hand each other in a turn, twice over so that one barrier a turn is enough: each warp's stretch, and
// the state that the turn starts from.
struct Handover {
  static __host__ __device__ __forceinline__ int64_t floats(int64_t warps) { return 2 * (warps * 2 + 1) * kTile; }
  float* at;

  __device__ __forceinline__ Four<float>* stretch(const Site& site, int32_t turn, int32_t warp) const {
    return reinterpret_cast<Four<float>*>(at + 2 * kTile) + ((turn & 1) * site.warps + warp) * kPairs + site.pair;
  }
  __device__ __forceinline__ float* state(const Site& site, int32_t turn) const {
    return at + (turn & 1) * kTile + 2 * site.pair;
  }

  // The state before the warp's chunk, once every warp has left its stretch.
  __device__ __forceinline__ void start_of_warp(const Site& site, int32_t turn, float (&start)[2]) const {
    start[0] = state(site, turn)[0], start[1] = state(site, turn)[1];
    for (int32_t w = 0; w < site.warp; ++w) {
      const Four<float> before = *stretch(site, turn, w);
      start[0] = before.of[0] * start[0] + before.of[1];
      start[1] = before.of[2] * start[1] + before.of[3];
    }
  }
};

// Adds a block's sums [position][16] over the routes of an axis to those of the other axis, if they are there, and writes
// them: rounded if they are the last.
template <class T>
__device__ __forceinline__ void write_pair_sums(const OneStateArguments& a, const Site& site, const float* sums,
                                                void* partial) {
  const bool columns = a.segments > 1 && runs_along_columns(a.p.route[a.index[0]]);
  const int64_t base = site.batch * a.p.height * a.p.width * a.p.channels + site.channel;
  for (int32_t first = site.warp * kChunk; first < site.count; first += site.warps * kChunk) {
    const int32_t own = first + site.lane < site.count ? first + site.lane : site.count - 1;
    const int32_t pixel = pixel_at(a, columns, site.begin + own);
#pragma unroll
    for (int u = 0; u < kRun; ++u) {
      const int32_t place = first + site.run * kRun + u;
      const int64_t index = base + __shfl_sync(kAllLanes, pixel, site.run * kRun + u) * a.p.channels;
      if (place >= site.count || !site.active) continue;
      Two<float> sum = *reinterpret_cast<const Two<float>*>(sums + place * kTile + 2 * site.pair);
      Two<float>* others = reinterpret_cast<Two<float>*>(static_cast<float*>(partial) + index);
      if (a.adds) sum.of[0] += others->of[0], sum.of[1] += others->of[1];
      if (a.rounds) {
        *reinterpret_cast<Two<T>*>(static_cast<T*>(a.p.result) + index) = {from_float<T>(sum.of[0]),
                                                                          from_float<T>(sum.of[1])};
      } else {
        *others = sum;
      }
    }
  }
}

// The stride from each pixel to the next, row after row.
inline int64_t pixel_stride(const RouteScanParams& p, const GridTensor& tensor) {
  return p.width > 1 ? tensor.column : tensor.row;
}

// The rows of a block's sums: of its positions, and one for each run of a turn, where it has positions that are not there.
__host__ __device__ __forceinline__ int64_t sum_rows(int64_t positions, int64_t warps) { return positions + warps * kRuns; }

// A block's shared memory, in floats: its sums, what its warps hand over and note, a value for each channel, and weights.
inline int64_t one_state_floats(const RouteScanParams& p, int64_t positions, int64_t warps) {
  return sum_rows(positions, warps) * kTile + Handover::floats(warps) + warps * 2 * Notes::kFloats + kTile +
         Factors::weight_floats(p.routes, p.rank);
}

}  // namespace
}  // namespace cuda_ops
