// What the passes of the route scan share. A thread has a channel, a block some warps of channels and a segment of a
// line. Positions are counted along the axis of the routes: row by row or column by column, whichever way a route goes.
#pragma once

#include "../route_scan.h"
#include "device.cuh"

namespace cuda_ops {

// The kernels for maps with one state: whether they serve, and how; their passes.
bool one_state_plan_cuda(const RouteScanParams& p, bool backward, int64_t shared_limit, RouteScanPlan* plan);
int one_state_forward_cuda(const RouteScanParams& p, const RouteScanPlan& plan, void* stream);
int one_state_backward_cuda(const RouteScanParams& p, const RouteScanPlan& plan, void* stream);

namespace {

// Positions whose B and C a block keeps in shared memory at a time, and those that a thread loads ahead of use.
constexpr int kPiece = 32, kAhead = 8;

// Routes along one axis, whose sum a block makes in one go.
struct RouteArguments {
  RouteScanParams p;
  int32_t count, index[kMaxRoutes];  // which routes
  int32_t length, lines;             // of the axis
  Divisor inner;                     // the pixels of a row, or of a column
  int32_t chunk;                     // positions between saved states, or any length where none are saved
  int32_t segment, segments;
  int32_t tiles;                     // of each group's channels
  bool tiled;                        // sums over routes or over groups of states are made in shared memory
  bool first_axis, last_axis;
  int64_t first_block;
};

struct Task {
  int64_t batch;
  int32_t line, segment, group, tile;
  int32_t begin, end;  // positions
  int64_t channel;     // of this thread, over all groups
  bool active;         // whether there is such a channel
};

__device__ __forceinline__ Task task_of_block(const RouteArguments& a) {
  int64_t index = a.first_block + blockIdx.x;
  Task task;
  task.tile = int32_t(index % a.tiles), index /= a.tiles;
  task.group = int32_t(index % a.p.groups), index /= a.p.groups;
  task.segment = int32_t(index % a.segments), index /= a.segments;
  task.line = int32_t(index % a.lines), task.batch = index / a.lines;
  task.begin = task.segment * a.segment;
  task.end = a.length - task.begin < a.segment ? a.length : task.begin + a.segment;
  const int64_t of_group = a.p.channels / a.p.groups;
  const int64_t channel = int64_t(task.tile) * blockDim.x + threadIdx.x;
  task.active = channel < of_group;
  task.channel = task.group * of_group + channel;
  return task;
}

// The pixel at a position: `inner` runs along the axis.
struct Place {
  int32_t outer, inner;
};

__device__ __forceinline__ int32_t inner_length(const RouteArguments& a) {
  return int32_t(runs_along_columns(a.p.route[a.index[0]]) ? a.p.height : a.p.width);
}

__device__ __forceinline__ Place place(const RouteArguments& a, int32_t line, int32_t position) {
  if (a.p.per_line) return {line, position};
  const int32_t outer = a.inner.quotient(position);
  return {outer, position - outer * inner_length(a)};
}

// An address that follows positions, up or down, over the ends of lines.
template <class T>
struct Walk {
  T* at;
  int64_t step, jump;  // to the next position, within a line and over its end

  __device__ __forceinline__ Walk(const RouteArguments& a, T* base, int64_t row, int64_t column, Place start,
                                  bool down) {
    const bool columns = runs_along_columns(a.p.route[a.index[0]]);
    const int64_t inner = columns ? row : column, outer = columns ? column : row;
    at = base + start.outer * outer + start.inner * inner;
    step = down ? -inner : inner;
    jump = outer - (inner_length(a) - 1) * inner;
    if (down) jump = -jump;
  }
  __device__ __forceinline__ void advance(bool over_end) { at += over_end ? jump : step; }
};

// Knows when a walk leaves a line.
struct Ends {
  int32_t inner, length;
  bool down;

  __device__ __forceinline__ Ends(const RouteArguments& a, Place start, bool down_)
      : inner(start.inner), length(inner_length(a)), down(down_) {}
  __device__ __forceinline__ bool advance() {
    if (down) {
      if (--inner >= 0) return false;
      inner = length - 1;
    } else {
      if (++inner < length) return false;
      inner = 0;
    }
    return true;
  }
};

template <class T>
__device__ __forceinline__ Walk<T> walk(const RouteArguments& a, const GridTensor& tensor, const Task& task, int64_t k,
                                        int64_t last, Place start, bool down) {
  T* base = static_cast<T*>(tensor.data) + task.batch * tensor.batch + k * tensor.route + last;
  return Walk<T>(a, base, tensor.row, tensor.column, start, down);
}

// The (B, H, W, E) tensor without strides.
template <class T>
__device__ __forceinline__ Walk<T> walk_contiguous(const RouteArguments& a, void* data, const Task& task, Place start,
                                                   bool down) {
  T* base = static_cast<T*>(data) + task.batch * a.p.height * a.p.width * a.p.channels + task.channel;
  return Walk<T>(a, base, a.p.width * a.p.channels, a.p.channels, start, down);
}

// One channel's parameters of one route, for up to NS states from n0 on. Those beyond the last state change nothing.
template <int NS>
struct Parameters {
  float rate[NS];  // A * log2(e)
  float bias;

  __device__ __forceinline__ void load(const RouteArguments& a, const Task& task, int64_t k, int64_t n0) {
    const int64_t row = k * a.p.channels + task.channel;
#pragma unroll
    for (int n = 0; n < NS; ++n) {
      const bool given = task.active && n0 + n < a.p.states;
      rate[n] = given ? static_cast<const float*>(a.p.A)[row * a.p.states + n0 + n] * kLog2E : 0.f;
    }
    bias = task.active && a.p.delta_bias ? static_cast<const float*>(a.p.delta_bias)[row] : 0.f;
  }
};

// (B, K, lines, segments, ...): the row that belongs to a route and a task.
__device__ __forceinline__ int64_t segment_row(const RouteArguments& a, const Task& task, int64_t k) {
  return ((task.batch * a.p.routes + k) * a.lines + task.line) * a.segments + task.segment;
}

// The row of (B, K, lines, saved, N, E) at the boundary before position chunk * (index + 1).
__device__ __forceinline__ int64_t saved_row(const RouteArguments& a, const Task& task, int64_t k, int32_t index) {
  return ((task.batch * a.p.routes + k) * a.lines + task.line) * saved_states(a.length, a.chunk) + index;
}

// The element of a row of (rows, N, E).
__device__ __forceinline__ int64_t state_index(const RouteArguments& a, const Task& task, int64_t row, int64_t n) {
  return (row * a.p.states + n) * a.p.channels + task.channel;
}

// Fetches the projections of `count` positions from `begin` on, as rows of NS, 0 beyond the last state. All threads of
// the block take part, and wait for each other before they read.
template <class T, int NS>
__device__ __forceinline__ void fetch(const RouteArguments& a, const Task& task, const GridTensor& tensor, int64_t k,
                                      int64_t n0, int32_t begin, int32_t count, int32_t row, float* target) {
  const bool columns = runs_along_columns(a.p.route[k]);
  const int64_t inner = columns ? tensor.row : tensor.column, outer = columns ? tensor.column : tensor.row;
  const T* base = static_cast<const T*>(tensor.data) + task.batch * tensor.batch + k * tensor.route +
                  task.group * tensor.group;
  for (int32_t i = threadIdx.x; i < count * NS; i += blockDim.x) {
    const int32_t position = i / NS, n = i % NS;
    float value = 0.f;
    if (n0 + n < a.p.states) {
      value = 1.f;
      if (tensor.data) {
        const Place pixel = place(a, task.line, begin + position);
        value = to_float(base[pixel.outer * outer + pixel.inner * inner + n0 + n]);
      }
    }
    target[position * row + n] = value;
  }
}

__device__ __forceinline__ float step_size(const RouteArguments& a, float raw) {
  return a.p.delta_softplus ? softplus(raw).value : raw;
}

// Adds a thread's column of sums [segment][threads] to those of the other axis, if that came first, and writes them:
// rounded if this axis is the last one.
template <class T>
__device__ __forceinline__ void write_sums(const RouteArguments& a, const Task& task, const float* sums,
                                           void* partial) {
  const Place start = place(a, task.line, task.begin);
  Ends ends(a, start, false);
  auto result = walk_contiguous<T>(a, a.p.result, task, start, false);
  auto others = walk_contiguous<float>(a, partial, task, start, false);
  const int32_t count = task.end - task.begin;
  for (int32_t i = 0; i < count; i += kAhead) {
    float before[kAhead];
    Ends reading = ends;
    auto source = others;
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      before[u] = !a.first_axis && i + u < count ? *source.at : 0.f;
      source.advance(reading.advance());
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (i + u >= count) break;
      const float sum = before[u] + sums[(i + u) * int64_t(blockDim.x)];
      if (a.last_axis) {
        *result.at = from_float<T>(sum);
      } else {
        *others.at = sum;
      }
      const bool over_end = ends.advance();
      result.advance(over_end), others.advance(over_end);
    }
  }
}

// Sums of step sizes, and what a segment alone adds to the state behind it; in the backward pass, to the gradient of
// the state before it.
template <class T, int NS, bool Backward>
__global__ void summarize(RouteArguments a) {
  SSM_DYNAMIC_SHARED(shared);
  float* projection = shared;  // [kPiece][NS]
  const Task task = task_of_block(a);
  for (int r = 0; r < a.count; ++r) {
    const int64_t k = a.index[r];
    const bool down = runs_backwards(a.p.route[k]) != Backward;
    for (int64_t n0 = 0; n0 < a.p.states; n0 += NS) {
      Parameters<NS> parameters;
      parameters.load(a, task, k, n0);
      float state[NS], total = 0.f;
#pragma unroll
      for (int n = 0; n < NS; ++n) state[n] = 0.f;
      for (int32_t done = task.begin; done < task.end; done += kPiece) {
        const int32_t count = task.end - done < kPiece ? task.end - done : kPiece;
        const int32_t low = down ? task.end - (done - task.begin) - count : done;
        __syncthreads();
        fetch<T, NS>(a, task, Backward ? a.p.C : a.p.B, k, n0, low, count, NS, projection);
        __syncthreads();
        const Place start = place(a, task.line, down ? low + count - 1 : low);
        Ends ends(a, start, down);
        const GridTensor& source = Backward ? a.p.grad_y : a.p.x;
        auto input = walk<const T>(a, source, task, 0, task.channel, start, down);
        auto delta = walk<const T>(a, a.p.delta, task, k, task.channel, start, down);
        for (int32_t i = 0; i < count; i += kAhead) {
          float inputs[kAhead], raws[kAhead];
#pragma unroll
          for (int u = 0; u < kAhead; ++u) {
            const bool given = task.active && i + u < count;
            inputs[u] = given ? to_float(*input.at) : 0.f;
            raws[u] = given ? to_float(*delta.at) : 0.f;
            const bool over_end = ends.advance();
            input.advance(over_end), delta.advance(over_end);
          }
#pragma unroll
          for (int u = 0; u < kAhead; ++u) {
            if (i + u >= count) break;
            const float d = step_size(a, raws[u] + parameters.bias);
            float row[NS];
            read_row<NS>(projection + (down ? count - 1 - (i + u) : i + u) * NS, row);
            total += d;
#pragma unroll
            for (int n = 0; n < NS; ++n) {
              const float decay = fast_exp2(d * parameters.rate[n]);
              state[n] = Backward ? decay * (state[n] + row[n] * inputs[u]) : decay * state[n] + row[n] * (d * inputs[u]);
            }
          }
        }
      }
      if (!task.active) continue;
      const int64_t row = segment_row(a, task, k);
      if (n0 == 0) static_cast<float*>(a.p.steps)[row * a.p.channels + task.channel] = total;
#pragma unroll
      for (int n = 0; n < NS; ++n)
        if (n0 + n < a.p.states) static_cast<float*>(a.p.ends)[state_index(a, task, row, n0 + n)] = state[n];
    }
  }
}

// Replaces what each segment adds by what it starts from. Lanes are channels, warps consecutive ranges of segments,
// blocks 32 channels of one state of one route of a line.
constexpr int kCombineWarps = 8, kCombineAhead = 8;

struct CombineArguments {
  RouteArguments route;
  int64_t channel_tiles;
  bool backward;
  int64_t first_block;
};

__global__ void combine(CombineArguments c) {
  SSM_DYNAMIC_SHARED(shared);
  const RouteArguments& a = c.route;
  float* steps_of = shared;                           // [warps][32]
  float* ends_of = shared + kCombineWarps * kWarp;    // likewise
  int64_t index = c.first_block + blockIdx.x;
  const int64_t tile = index % c.channel_tiles;
  index /= c.channel_tiles;
  const int64_t n = index % a.p.states;
  index /= a.p.states;
  const int64_t line = index % a.lines;
  index /= a.lines;
  const int64_t k = index % a.p.routes, batch = index / a.p.routes;
  const int32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t channel = tile * kWarp + lane;
  const bool active = channel < a.p.channels;
  const bool down = runs_backwards(a.p.route[k]) != c.backward;
  const int64_t first_row = ((batch * a.p.routes + k) * a.lines + line) * a.segments;
  const float* steps = static_cast<const float*>(a.p.steps) + first_row * a.p.channels + channel;
  float* ends = static_cast<float*>(a.p.ends) + (first_row * a.p.states + n) * a.p.channels + channel;
  const int64_t ends_stride = a.p.states * a.p.channels;
  const int64_t parameter = (k * a.p.channels + channel) * a.p.states + n;
  const float rate = active ? static_cast<const float*>(a.p.A)[parameter] * kLog2E : 0.f;
  const int32_t begin = int32_t(int64_t(a.segments) * warp / kCombineWarps);
  const int32_t end = int32_t(int64_t(a.segments) * (warp + 1) / kCombineWarps);

  float state = 0.f, total = 0.f;
  for (int32_t i = begin; i < end; i += kCombineAhead) {
    float step[kCombineAhead], own[kCombineAhead];
#pragma unroll
    for (int u = 0; u < kCombineAhead; ++u) {
      const bool given = active && i + u < end;
      const int64_t segment = down ? a.segments - 1 - (i + u) : i + u;
      step[u] = given ? steps[segment * a.p.channels] : 0.f;
      own[u] = given ? ends[segment * ends_stride] : 0.f;
    }
#pragma unroll
    for (int u = 0; u < kCombineAhead; ++u) {
      state = fast_exp2(step[u] * rate) * state + own[u];
      total += step[u];
    }
  }
  steps_of[threadIdx.x] = total;
  ends_of[threadIdx.x] = state;
  __syncthreads();

  state = 0.f;
  if (c.backward && a.p.grad_last && active)
    state = static_cast<const float*>(a.p.grad_last)[(batch * a.p.routes * a.p.channels) * a.p.states + parameter];
  for (int32_t before = 0; before < warp; ++before)
    state = fast_exp2(steps_of[before * kWarp + lane] * rate) * state + ends_of[before * kWarp + lane];
  for (int32_t i = begin; i < end; i += kCombineAhead) {
    float step[kCombineAhead], own[kCombineAhead];
#pragma unroll
    for (int u = 0; u < kCombineAhead; ++u) {
      const bool given = active && i + u < end;
      const int64_t segment = down ? a.segments - 1 - (i + u) : i + u;
      step[u] = given ? steps[segment * a.p.channels] : 0.f;
      own[u] = given ? ends[segment * ends_stride] : 0.f;
    }
#pragma unroll
    for (int u = 0; u < kCombineAhead; ++u) {
      if (!active || i + u >= end) break;
      const int64_t segment = down ? a.segments - 1 - (i + u) : i + u;
      ends[segment * ends_stride] = state;
      state = fast_exp2(step[u] * rate) * state + own[u];
    }
  }
}

inline RouteArguments arguments_of(const RouteScanParams& p, const RouteScanPlan& plan) {
  RouteArguments a{};
  const RouteShape shape = route_shape(p.route[0], p.per_line, p.height, p.width);
  a.p = p;
  a.length = int32_t(shape.length), a.lines = int32_t(shape.lines);
  a.chunk = int32_t(p.chunk);
  a.segment = int32_t(plan.segment), a.segments = int32_t(plan.segments);
  a.tiles = int32_t(plan.tiles);
  return a;
}

// Whether an output is a sum of several routes, or of several groups of states.
inline bool sums_in_shared_memory(const RouteScanParams& p) { return p.routes > 1 || !fast_states(p.states); }

template <bool Backward>
int launch_summaries(const RouteArguments& a, int64_t blocks, int threads, void* stream) {
  const int64_t states = states_at_a_time(a.p.states);
#define SSM_SUMMARIZE(T, NS) \
  launch_blocks(summarize<T, NS, Backward>, a, blocks, threads, kPiece * NS * int64_t(sizeof(float)), stream)
  SSM_DISPATCH(a.p.dtype, states, SSM_SUMMARIZE)
#undef SSM_SUMMARIZE
}

inline int launch_combine(const RouteArguments& a, bool backward, void* stream) {
  CombineArguments c{a, ceil_div(a.p.channels, kWarp), backward, 0};
  const int64_t blocks = a.p.batch * a.p.routes * a.lines * a.p.states * c.channel_tiles;
  return launch_blocks(combine, c, blocks, kCombineWarps * kWarp,
                       2 * kCombineWarps * kWarp * int64_t(sizeof(float)), stream);
}

// Calls `last_pass` for each axis that has routes, after the segments' summaries where there are several of them.
template <bool Backward, class LastPass>
int for_each_axis(const RouteScanParams& p, const RouteScanPlan& plan, void* stream, LastPass last_pass) {
  RouteArguments axes[2] = {arguments_of(p, plan), arguments_of(p, plan)};
  for (int k = 0; k < p.routes; ++k) {
    RouteArguments& a = axes[runs_along_columns(p.route[k])];
    a.index[a.count++] = k;
  }
  axes[0].first_axis = true, axes[0].last_axis = axes[1].count == 0;
  axes[1].first_axis = axes[0].count == 0, axes[1].last_axis = true;
  for (int columns = 0; columns < 2; ++columns) {
    axes[columns].tiled = sums_in_shared_memory(p);
    axes[columns].inner = Divisor(columns ? p.height : p.width);
  }
  const int64_t blocks = p.batch * axes[0].lines * plan.segments * p.groups * plan.tiles;
  if (plan.segments > 1) {
    for (const RouteArguments& a : axes) {
      const int error = a.count ? launch_summaries<Backward>(a, blocks, int(plan.warps * kWarp), stream) : 0;
      if (error) return error;
    }
    const int error = launch_combine(axes[0], Backward, stream);
    if (error) return error;
  }
  for (const RouteArguments& a : axes) {
    const int error = a.count ? last_pass(a, blocks) : 0;
    if (error) return error;
  }
  return 0;
}

}  // namespace
}  // namespace cuda_ops
