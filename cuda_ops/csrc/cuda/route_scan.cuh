// Shared parts of the route-scan kernels. A thread holds one channel, a block some warps of channels and a segment of a
// line. Positions are counted along the axis of the routes, row by row or column by column, for either direction.
#pragma once

#include "../route_scan.h"
#include "device.cuh"

namespace cuda_ops {

// Plan and launchers for d_state == 1. The plan returns false if these kernels do not support the case.
bool route_scan_n1_plan_cuda(const RouteScanParams& p, bool backward, int64_t shared_limit, RouteScanPlan* plan);
int route_scan_n1_forward_cuda(const RouteScanParams& p, const RouteScanPlan& plan, void* stream);
int route_scan_n1_backward_cuda(const RouteScanParams& p, const RouteScanPlan& plan, void* stream);

namespace {

// Positions whose B and C are staged in shared memory at a time, and positions that a thread prefetches.
constexpr int kStagedPositions = 32;
constexpr int kPrefetch = 8;

// The routes along one axis. A block scans all of them and sums their outputs.
struct RouteArguments {
  RouteScanParams p;
  int32_t route_count;
  int32_t routes[kMaxRoutes];  // indices into p.route
  int32_t length;              // positions per line
  int32_t lines;
  FastDivisor inner_length;  // pixels of a row, or of a column
  int32_t chunk;             // positions between saved states, 0 if none are saved
  int32_t segment_length;
  int32_t segments;
  int32_t tiles;        // of each group's channels
  bool sums_in_shared;  // outputs are summed over routes or groups of states in shared memory
  bool first_axis;
  bool last_axis;
  int64_t first_block;
};

struct WorkItem {
  int64_t batch;
  int32_t line;
  int32_t segment;
  int32_t group;
  int32_t tile;
  int32_t begin;    // first position
  int32_t end;      // one past the last position
  int64_t channel;  // of this thread, counted over all groups
  bool active;      // whether this channel exists
};

__device__ __forceinline__ WorkItem block_work_item(const RouteArguments& a) {
  int64_t index = a.first_block + blockIdx.x;
  WorkItem item;
  item.tile = int32_t(index % a.tiles);
  index /= a.tiles;
  item.group = int32_t(index % a.p.groups);
  index /= a.p.groups;
  item.segment = int32_t(index % a.segments);
  index /= a.segments;
  item.line = int32_t(index % a.lines);
  item.batch = index / a.lines;
  item.begin = item.segment * a.segment_length;
  item.end = a.length - item.begin < a.segment_length ? a.length : item.begin + a.segment_length;
  const int64_t group_channels = a.p.channels / a.p.groups;
  const int64_t channel = int64_t(item.tile) * blockDim.x + threadIdx.x;
  item.active = channel < group_channels;
  item.channel = item.group * group_channels + channel;
  return item;
}

// The pixel at a position: `inner` runs along the axis.
struct PixelPosition {
  int32_t outer;
  int32_t inner;
};

__device__ __forceinline__ int32_t inner_length(const RouteArguments& a) {
  return int32_t(runs_along_columns(a.p.route[a.routes[0]]) ? a.p.height : a.p.width);
}

__device__ __forceinline__ PixelPosition pixel_position(const RouteArguments& a, int32_t line, int32_t position) {
  if (a.p.per_line) return {line, position};
  const int32_t outer = a.inner_length.divide(position);
  return {outer, position - outer * inner_length(a)};
}

// A pointer that follows consecutive positions in either direction, across rows (or columns).
template <class T>
struct PixelIterator {
  T* pointer;
  int64_t step;  // to the next position of the same row
  int64_t jump;  // to the next row

  __device__ __forceinline__ PixelIterator(const RouteArguments& a, T* base, int64_t row_stride, int64_t column_stride,
                                           PixelPosition start, bool reversed) {
    const bool columns = runs_along_columns(a.p.route[a.routes[0]]);
    const int64_t inner = columns ? row_stride : column_stride;
    const int64_t outer = columns ? column_stride : row_stride;
    pointer = base + start.outer * outer + start.inner * inner;
    step = reversed ? -inner : inner;
    jump = outer - (inner_length(a) - 1) * inner;
    if (reversed) jump = -jump;
  }
  __device__ __forceinline__ T& operator*() const { return *pointer; }
  __device__ __forceinline__ void advance(bool wraps) { pointer += wraps ? jump : step; }
};

// Tells pixel iterators when to wrap to the next row.
struct IteratorBounds {
  int32_t inner;
  int32_t length;
  bool reversed;

  __device__ __forceinline__ IteratorBounds(const RouteArguments& a, PixelPosition start, bool reversed_)
      : inner(start.inner), length(inner_length(a)), reversed(reversed_) {}
  __device__ __forceinline__ bool advance() {
    if (reversed) {
      if (--inner >= 0) return false;
      inner = length - 1;
    } else {
      if (++inner < length) return false;
      inner = 0;
    }
    return true;
  }
};

// Iterates over one channel of a (B, H, W, [K,] ...) tensor.
template <class T>
__device__ __forceinline__ PixelIterator<T> iterate(const RouteArguments& a, const GridTensor& tensor,
                                                    const WorkItem& item, int64_t k, PixelPosition start,
                                                    bool reversed) {
  T* base = static_cast<T*>(tensor.data) + item.batch * tensor.batch + k * tensor.route + item.channel;
  return PixelIterator<T>(a, base, tensor.row, tensor.column, start, reversed);
}

// Iterates over one channel of a contiguous (B, H, W, E) tensor.
template <class T>
__device__ __forceinline__ PixelIterator<T> iterate_contiguous(const RouteArguments& a, void* data,
                                                               const WorkItem& item, PixelPosition start,
                                                               bool reversed) {
  T* base = static_cast<T*>(data) + item.batch * a.p.height * a.p.width * a.p.channels + item.channel;
  return PixelIterator<T>(a, base, a.p.width * a.p.channels, a.p.channels, start, reversed);
}

// A value per route and channel, (K, E), or 0 if it does not exist.
__device__ __forceinline__ float channel_parameter(const RouteArguments& a, const WorkItem& item, const void* data,
                                                   int64_t k, bool exists) {
  return exists ? static_cast<const float*>(data)[k * a.p.channels + item.channel] : 0.f;
}

// A and delta_bias of one channel and route, for up to NS states from n0 on. States past the last one have A = 0.
template <int NS>
struct RouteParameters {
  float A_log2e[NS];  // A * log2(e)
  float delta_bias;

  __device__ __forceinline__ void load(const RouteArguments& a, const WorkItem& item, int64_t k, int64_t n0) {
    const int64_t row = k * a.p.channels + item.channel;
#pragma unroll
    for (int n = 0; n < NS; ++n) {
      const bool exists = item.active && n0 + n < a.p.states;
      A_log2e[n] = exists ? static_cast<const float*>(a.p.A)[row * a.p.states + n0 + n] * kLog2E : 0.f;
    }
    delta_bias = item.active && a.p.delta_bias ? static_cast<const float*>(a.p.delta_bias)[row] : 0.f;
  }
};

// Row of a (B, K, lines, segments, ...) buffer.
__device__ __forceinline__ int64_t segment_row(const RouteArguments& a, const WorkItem& item, int64_t k) {
  return ((item.batch * a.p.routes + k) * a.lines + item.line) * a.segments + item.segment;
}

// Row of (B, K, lines, saved, N, E) for the state between positions chunk * (index + 1) - 1 and chunk * (index + 1). A
// reversed route comes from the latter.
__device__ __forceinline__ int64_t saved_row(const RouteArguments& a, const WorkItem& item, int64_t k, int32_t index) {
  return ((item.batch * a.p.routes + k) * a.lines + item.line) * saved_state_count(a.length, a.chunk) + index;
}

// Index of a state of this channel in a (rows, N, E) buffer.
__device__ __forceinline__ int64_t state_index(const RouteArguments& a, const WorkItem& item, int64_t row, int64_t n) {
  return (row * a.p.states + n) * a.p.channels + item.channel;
}

// Row of a (B, K, E, N) buffer.
__device__ __forceinline__ int64_t last_state_row(const RouteArguments& a, const WorkItem& item, int64_t k) {
  return (item.batch * a.p.routes + k) * a.p.channels + item.channel;
}

// Stages B or C of `count` positions in shared memory: NS states from n0 on per position, 0 past the last state. Rows
// of `target` are `row_floats` apart. All threads must call, and synchronize before reading.
template <class T, int NS>
__device__ __forceinline__ void stage_projection(const RouteArguments& a, const WorkItem& item,
                                                 const GridTensor& tensor, int64_t k, int64_t n0, int32_t begin,
                                                 int32_t count, int32_t row_floats, float* target) {
  const bool columns = runs_along_columns(a.p.route[k]);
  const int64_t inner = columns ? tensor.row : tensor.column;
  const int64_t outer = columns ? tensor.column : tensor.row;
  const T* base =
      static_cast<const T*>(tensor.data) + item.batch * tensor.batch + k * tensor.route + item.group * tensor.group;
  for (int32_t i = threadIdx.x; i < count * NS; i += blockDim.x) {
    const int32_t position = i / NS;
    const int32_t n = i % NS;
    float value = 0.f;
    if (n0 + n < a.p.states) {
      value = 1.f;
      if (tensor.data) {
        const PixelPosition pixel = pixel_position(a, item.line, begin + position);
        value = to_float(base[pixel.outer * outer + pixel.inner * inner + n0 + n]);
      }
    }
    target[position * row_floats + n] = value;
  }
}

__device__ __forceinline__ float apply_softplus(const RouteArguments& a, float delta) {
  return a.p.delta_softplus ? softplus(delta).value : delta;
}

// Writes a thread's sums over the routes of this axis, a column of [position][threads], and adds those of the other
// axis if they exist. They are written in T if this axis is the last one, else in float. `axis_sums` may be the result.
template <class T>
__device__ __forceinline__ void write_route_sums(const RouteArguments& a, const WorkItem& item, const float* sums,
                                                 void* axis_sums) {
  const PixelPosition start = pixel_position(a, item.line, item.begin);
  IteratorBounds bounds(a, start, false);
  auto result = iterate_contiguous<T>(a, a.p.result, item, start, false);
  auto partial = iterate_contiguous<float>(a, axis_sums, item, start, false);
  const int32_t count = item.end - item.begin;
  for (int32_t i = 0; i < count; i += kPrefetch) {
    float other_axis[kPrefetch];
    IteratorBounds reading = bounds;
    auto source = partial;
#pragma unroll
    for (int u = 0; u < kPrefetch; ++u) {
      other_axis[u] = !a.first_axis && i + u < count ? *source : 0.f;
      source.advance(reading.advance());
    }
#pragma unroll
    for (int u = 0; u < kPrefetch; ++u) {
      if (i + u >= count) break;
      const float sum = other_axis[u] + sums[(i + u) * int64_t(blockDim.x)];
      if (a.last_axis) {
        *result = from_float<T>(sum);
      } else {
        *partial = sum;
      }
      const bool wraps = bounds.advance();
      result.advance(wraps);
      partial.advance(wraps);
    }
  }
}

// Computes each segment's aggregate: the sum of delta, and the state that the segment produces from a zero state
// (backward: the gradient of the state before the segment, from a zero gradient after it).
template <class T, int NS, bool Backward>
__global__ void segment_aggregates(RouteArguments a) {
  SSM_DYNAMIC_SHARED(shared);
  float* projection = shared;  // [kStagedPositions][NS]: B, or C in the backward pass
  const WorkItem item = block_work_item(a);
  for (int r = 0; r < a.route_count; ++r) {
    const int64_t k = a.routes[r];
    const bool reversed = is_reversed(a.p.route[k]) != Backward;
    for (int64_t n0 = 0; n0 < a.p.states; n0 += NS) {
      RouteParameters<NS> parameters;
      parameters.load(a, item, k, n0);
      float state[NS];
      float delta_sum = 0.f;
#pragma unroll
      for (int n = 0; n < NS; ++n) state[n] = 0.f;
      for (int32_t done = item.begin; done < item.end; done += kStagedPositions) {
        const int32_t count = item.end - done < kStagedPositions ? item.end - done : kStagedPositions;
        const int32_t low = reversed ? item.end - (done - item.begin) - count : done;
        __syncthreads();
        stage_projection<T, NS>(a, item, Backward ? a.p.C : a.p.B, k, n0, low, count, NS, projection);
        __syncthreads();
        const PixelPosition start = pixel_position(a, item.line, reversed ? low + count - 1 : low);
        IteratorBounds bounds(a, start, reversed);
        const GridTensor& source = Backward ? a.p.grad_y : a.p.x;
        auto input_it = iterate<const T>(a, source, item, 0, start, reversed);
        auto delta_it = iterate<const T>(a, a.p.delta, item, k, start, reversed);
        for (int32_t i = 0; i < count; i += kPrefetch) {
          float inputs[kPrefetch];
          float deltas[kPrefetch];
#pragma unroll
          for (int u = 0; u < kPrefetch; ++u) {
            const bool exists = item.active && i + u < count;
            inputs[u] = exists ? to_float(*input_it) : 0.f;
            deltas[u] = exists ? to_float(*delta_it) : 0.f;
            const bool wraps = bounds.advance();
            input_it.advance(wraps);
            delta_it.advance(wraps);
          }
#pragma unroll
          for (int u = 0; u < kPrefetch; ++u) {
            if (i + u >= count) break;
            const float delta = apply_softplus(a, deltas[u] + parameters.delta_bias);
            float row[NS];
            load_row<NS>(projection + (reversed ? count - 1 - (i + u) : i + u) * NS, row);
            delta_sum += delta;
#pragma unroll
            for (int n = 0; n < NS; ++n) {
              const float decay = fast_exp2(delta * parameters.A_log2e[n]);
              state[n] =
                  Backward ? decay * (state[n] + row[n] * inputs[u]) : decay * state[n] + row[n] * (delta * inputs[u]);
            }
          }
        }
      }
      if (!item.active) continue;
      const int64_t row = segment_row(a, item, k);
      if (n0 == 0) static_cast<float*>(a.p.segment_deltas)[row * a.p.channels + item.channel] = delta_sum;
#pragma unroll
      for (int n = 0; n < NS; ++n) {
        if (n0 + n < a.p.states) {
          static_cast<float*>(a.p.segment_states)[state_index(a, item, row, n0 + n)] = state[n];
        }
      }
    }
  }
}

// Warps per block of the state-passing kernel, and segments that a thread prefetches.
constexpr int kStatePassingWarps = 8;
constexpr int kSegmentPrefetch = 8;

struct StatePassingArguments {
  RouteArguments route;
  int64_t channel_tiles;
  bool backward;
  int64_t first_block;
};

// Turns segment aggregates into segment start states in place (exclusive scan over segments). A block has 32 channels
// of one state and route of a line. Lanes are channels, warps consecutive ranges of segments.
__global__ void state_passing(StatePassingArguments arguments) {
  SSM_DYNAMIC_SHARED(shared);
  const RouteArguments& a = arguments.route;
  float* warp_deltas = shared;                                   // [warps][32]
  float* warp_states = shared + kStatePassingWarps * kWarpSize;  // [warps][32]
  int64_t index = arguments.first_block + blockIdx.x;
  const int64_t tile = index % arguments.channel_tiles;
  index /= arguments.channel_tiles;
  const int64_t n = index % a.p.states;
  index /= a.p.states;
  const int64_t line = index % a.lines;
  index /= a.lines;
  const int64_t k = index % a.p.routes;
  const int64_t batch = index / a.p.routes;
  const int32_t lane = threadIdx.x % kWarpSize;
  const int32_t warp = threadIdx.x / kWarpSize;
  const int64_t channel = tile * kWarpSize + lane;
  const bool active = channel < a.p.channels;
  const bool reversed = is_reversed(a.p.route[k]) != arguments.backward;
  const int64_t first_row = ((batch * a.p.routes + k) * a.lines + line) * a.segments;
  const float* deltas = static_cast<const float*>(a.p.segment_deltas) + first_row * a.p.channels + channel;
  float* states = static_cast<float*>(a.p.segment_states) + (first_row * a.p.states + n) * a.p.channels + channel;
  const int64_t states_stride = a.p.states * a.p.channels;
  const int64_t parameter = (k * a.p.channels + channel) * a.p.states + n;
  const float A_log2e = active ? static_cast<const float*>(a.p.A)[parameter] * kLog2E : 0.f;
  const int32_t begin = int32_t(int64_t(a.segments) * warp / kStatePassingWarps);
  const int32_t end = int32_t(int64_t(a.segments) * (warp + 1) / kStatePassingWarps);

  // The aggregate of the warp's segments.
  float state = 0.f;
  float delta_sum = 0.f;
  for (int32_t i = begin; i < end; i += kSegmentPrefetch) {
    float segment_delta[kSegmentPrefetch];
    float segment_state[kSegmentPrefetch];
#pragma unroll
    for (int u = 0; u < kSegmentPrefetch; ++u) {
      const bool exists = active && i + u < end;
      const int64_t segment = reversed ? a.segments - 1 - (i + u) : i + u;
      segment_delta[u] = exists ? deltas[segment * a.p.channels] : 0.f;
      segment_state[u] = exists ? states[segment * states_stride] : 0.f;
    }
#pragma unroll
    for (int u = 0; u < kSegmentPrefetch; ++u) {
      state = fast_exp2(segment_delta[u] * A_log2e) * state + segment_state[u];
      delta_sum += segment_delta[u];
    }
  }
  warp_deltas[threadIdx.x] = delta_sum;
  warp_states[threadIdx.x] = state;
  __syncthreads();

  // The start state of the warp's segments, then of each segment.
  state = 0.f;
  if (arguments.backward && a.p.grad_last_state && active) {
    state =
        static_cast<const float*>(a.p.grad_last_state)[(batch * a.p.routes * a.p.channels) * a.p.states + parameter];
  }
  for (int32_t w = 0; w < warp; ++w) {
    state = fast_exp2(warp_deltas[w * kWarpSize + lane] * A_log2e) * state + warp_states[w * kWarpSize + lane];
  }
  for (int32_t i = begin; i < end; i += kSegmentPrefetch) {
    float segment_delta[kSegmentPrefetch];
    float segment_state[kSegmentPrefetch];
#pragma unroll
    for (int u = 0; u < kSegmentPrefetch; ++u) {
      const bool exists = active && i + u < end;
      const int64_t segment = reversed ? a.segments - 1 - (i + u) : i + u;
      segment_delta[u] = exists ? deltas[segment * a.p.channels] : 0.f;
      segment_state[u] = exists ? states[segment * states_stride] : 0.f;
    }
#pragma unroll
    for (int u = 0; u < kSegmentPrefetch; ++u) {
      if (!active || i + u >= end) break;
      const int64_t segment = reversed ? a.segments - 1 - (i + u) : i + u;
      states[segment * states_stride] = state;
      state = fast_exp2(segment_delta[u] * A_log2e) * state + segment_state[u];
    }
  }
}

inline RouteArguments route_arguments(const RouteScanParams& p, const RouteScanPlan& plan) {
  RouteArguments a{};
  const RouteShape shape = route_shape(p.route[0], p.per_line, p.height, p.width);
  a.p = p;
  a.length = int32_t(shape.length);
  a.lines = int32_t(shape.lines);
  a.chunk = int32_t(p.chunk);
  a.segment_length = int32_t(plan.segment_length);
  a.segments = int32_t(plan.segments);
  a.tiles = int32_t(plan.tiles);
  return a;
}

// Whether an output is a sum over several routes, or over several groups of states.
inline bool sums_in_shared_memory(const RouteScanParams& p) { return p.routes > 1 || !is_specialized(p.states); }

template <bool Backward>
int launch_segment_aggregates(const RouteArguments& a, int64_t blocks, int threads, void* stream) {
  const int64_t states = states_per_pass(a.p.states);
#define SSM_AGGREGATES(T, NS)                                            \
  launch_blocks(segment_aggregates<T, NS, Backward>, a, blocks, threads, \
                kStagedPositions * NS * int64_t(sizeof(float)), stream)
  SSM_DISPATCH(a.p.dtype, states, SSM_AGGREGATES)
#undef SSM_AGGREGATES
}

inline int launch_state_passing(const RouteArguments& a, bool backward, void* stream) {
  StatePassingArguments arguments{a, ceil_div(a.p.channels, kWarpSize), backward, 0};
  const int64_t blocks = a.p.batch * a.p.routes * a.lines * a.p.states * arguments.channel_tiles;
  return launch_blocks(state_passing, arguments, blocks, kStatePassingWarps * kWarpSize,
                       2 * kStatePassingWarps * kWarpSize * int64_t(sizeof(float)), stream);
}

// Calls `launch_scan` for each axis that has routes. With several segments, their start states are computed before.
template <bool Backward, class LaunchScan>
int for_each_axis(const RouteScanParams& p, const RouteScanPlan& plan, void* stream, LaunchScan launch_scan) {
  RouteArguments axes[2] = {route_arguments(p, plan), route_arguments(p, plan)};
  for (int k = 0; k < p.routes; ++k) {
    RouteArguments& a = axes[runs_along_columns(p.route[k])];
    a.routes[a.route_count++] = k;
  }
  axes[0].first_axis = true;
  axes[0].last_axis = axes[1].route_count == 0;
  axes[1].first_axis = axes[0].route_count == 0;
  axes[1].last_axis = true;
  for (int columns = 0; columns < 2; ++columns) {
    axes[columns].sums_in_shared = sums_in_shared_memory(p);
    axes[columns].inner_length = FastDivisor(columns ? p.height : p.width);
  }
  const int64_t blocks = p.batch * axes[0].lines * plan.segments * p.groups * plan.tiles;
  if (plan.segments > 1) {
    const int threads = int(plan.warps * kWarpSize);
    for (const RouteArguments& a : axes) {
      const int error = a.route_count ? launch_segment_aggregates<Backward>(a, blocks, threads, stream) : 0;
      if (error) return error;
    }
    const int error = launch_state_passing(axes[0], Backward, stream);
    if (error) return error;
  }
  for (const RouteArguments& a : axes) {
    const int error = a.route_count ? launch_scan(a, blocks) : 0;
    if (error) return error;
  }
  return 0;
}

}  // namespace
}  // namespace cuda_ops
