// Backward pass of the route scan for d_state == 1 on CUDA, and the plan of both passes.
#include "route_scan_n1_aggregates.cuh"

namespace cuda_ops {
namespace {

constexpr int kBackwardThreads = kMaxBackwardWarpsN1 * kWarpSize;

// Sums a pair of channels over the block, warps in their order. The result is valid in the first run of warp 0.
// `buffer` is [warps][16] floats; calls with the same buffer need a barrier between them.
__device__ __forceinline__ Pair<float> block_sum(const WorkItemN1& item, const float (&values)[2], float* buffer) {
  Pair<float> sum{values[0], values[1]};
#pragma unroll
  for (int offset = kTilePairs; offset < kWarpSize; offset *= 2) {
#pragma unroll
    for (int c = 0; c < 2; ++c) sum.val[c] += __shfl_xor_sync(kFullMask, sum.val[c], offset);
  }
  Pair<float>* rows = reinterpret_cast<Pair<float>*>(buffer) + item.pair;
  if (item.run == 0) rows[item.warp * kTilePairs] = sum;
  __syncthreads();
  if (threadIdx.x < kTilePairs) {
    sum = {0.f, 0.f};
    for (int32_t w = 0; w < item.warps; ++w) {
      sum.val[0] += rows[w * kTilePairs].val[0];
      sum.val[1] += rows[w * kTilePairs].val[1];
    }
  }
  return sum;
}

// A block's shared memory.
template <bool LowRank>
struct SharedMemory {
  float* dt_weights;
  float* sums;  // [sum_rows][16]: gradient of x
  WarpCarries carries;
  WarpStaging staging;
  float* skip;         // of the thread's pair
  float* sum_buffers;  // [3][warps][16]
  float* dt_staging;   // shares sum_buffers, which are used after the last iteration

  __device__ __forceinline__ SharedMemory(const RouteArgumentsN1& a, const WorkItemN1& item, float* shared) {
    dt_weights = shared;
    sums = shared + (LowRank ? a.route_count * a.dt_rank * kTileChannels : 0);
    carries = {sums + sum_row_count(a.segment_length, item.warps) * kTileChannels};
    staging = {carries.data + WarpCarries::floats(item.warps) + item.warp * WarpStaging::kFloats};
    skip = staging.data + (item.warps - item.warp) * WarpStaging::kFloats + 2 * item.pair;
    sum_buffers = skip - 2 * item.pair + kTileChannels;
    dt_staging = sum_buffers + item.warp * WarpStaging::kFloats;
  }
};

// Gradients of a pair's parameters, summed over a lane's positions.
struct ParameterGradients {
  float A[2];  // divided by log(2)
  float delta_bias[2];
  float D[2];
};

// A lane's run: inputs, and values recomputed from them.
template <class T>
struct Run {
  Pair<T> x[kRunPositions];
  Pair<T> grad_y[kRunPositions];
  float delta[kRunPositions][2];
  float delta_slope[kRunPositions][2];
  float decay[kRunPositions][2];
  float inflow[kRunPositions][2];
  float state[kRunPositions][2];  // before each position
  float B[kRunPositions];         // times log(2)
  float C[kRunPositions];
};

// One iteration of a warp: its chunk of one route.
struct Iteration {
  int r;      // number of the route
  int64_t k;  // index of the route
  bool reversed;
  int32_t rank;    // of the chunk, counted from the end of the route
  int32_t number;  // counted over all routes
};

// Whether some positions of the chunk do not exist.
__device__ __forceinline__ bool is_partial(const WorkItemN1& item, const Iteration& iteration, const WarpChunk& chunk) {
  return iteration.rank >= item.chunks || chunk.first + kChunkPositions > item.begin + item.count;
}

// Loads a run and the state saved before its chunk, and computes delta. Returns the lane's pixel.
template <class T, bool LowRank>
__device__ __forceinline__ int32_t load_run_inputs(const RouteArgumentsN1& a, const WorkItemN1& item,
                                                   const SharedMemory<LowRank>& memory, const Iteration& iteration,
                                                   const WarpChunk& chunk, const PairParameters& parameters,
                                                   Run<T>& run, float (&saved)[2], int32_t (&sum_rows)[kRunPositions]) {
  const WarpStaging& staging = memory.staging;
  __syncwarp();
  const int32_t pixel = stage_pixel(a, item, iteration.k, chunk, staging);
  staging.B()[item.lane] = chunk.exists ? load_projection<T>(a, item, a.p.B, iteration.k, pixel) * kLn2 : 0.f;
  staging.C()[item.lane] = load_projection<T>(a, item, a.p.C, iteration.k, pixel);
  __syncwarp();
  Pair<T> loaded[kRunPositions];
  int32_t pixels[kRunPositions];
  load_staged_run(staging.pixels(), item.run, pixels);
  load_delta<T, LowRank>(a, item, iteration.k, pixel, pixels, loaded);
  load_run(item, a.p.x, 0, pixels, run.x);
  load_run(item, a.p.grad_y, 0, pixels, run.grad_y);
  const int32_t boundary = chunk.boundary(iteration.reversed);
  if (iteration.rank < item.chunks && boundary > 0 && boundary < a.length) {
    const float* states = saved_state(a, item, iteration.k, boundary);
    saved[0] = states[0];
    saved[1] = states[1];
  }
  const DtProjection dt_projection{memory.dt_weights + iteration.r * a.dt_rank * kTileChannels, memory.dt_staging};
  parameters.compute_delta<T, LowRank>(a, item, loaded, dt_projection, run.delta, run.delta_slope);
  load_staged_run(staging.sum_rows(), item.run, sum_rows);
  if (is_partial(item, iteration, chunk) || !item.active) {
    // Positions and channels that do not exist contribute nothing.
#pragma unroll
    for (int u = 0; u < kRunPositions; ++u) {
      if (sum_rows[u] < a.segment_length && item.active) continue;
      run.grad_y[u] = {from_float<T>(0.f), from_float<T>(0.f)};
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        run.delta[u][c] = 0.f;
        run.delta_slope[u][c] = 0.f;
      }
    }
  }
  return pixel;
}

// Starts the sums of the gradient of x with the skip connection's share, and adds to the gradient of D.
template <class T>
__device__ __forceinline__ void start_grad_x(const WorkItemN1& item, const Run<T>& run, float* sums, const float* skip,
                                             const int32_t (&sum_rows)[kRunPositions], ParameterGradients& gradients) {
#pragma unroll
  for (int u = 0; u < kRunPositions; ++u) {
    Pair<float> sum;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float grad_y = pair_to_float(run.grad_y[u], c);
      sum.val[c] = skip[c] * grad_y;
      gradients.D[c] += grad_y * pair_to_float(run.x[u], c);
    }
    *sum_at(item, sums, sum_rows[u]) = sum;
  }
}

// Recomputes decay, inflow and states of a run from the state saved before its chunk. Returns the run's aggregate of
// the gradient of the state, against the direction of the route.
template <class T>
__device__ __forceinline__ Aggregate recompute_run(const WorkItemN1& item, const PairParameters& parameters,
                                                   const float (&saved)[2], Run<T>& run) {
  Aggregate forward = Aggregate::identity();
  Aggregate backward;
  float delta_sum[2] = {0.f, 0.f};
#pragma unroll
  for (int u = 0; u < kRunPositions; ++u) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      delta_sum[c] += run.delta[u][c];
      run.decay[u][c] = fast_exp2(run.delta[u][c] * parameters.A[c]);
      run.inflow[u][c] = pair_to_float(run.x[u], c) * run.B[u] * run.delta[u][c];
      forward.state[c] = run.decay[u][c] * forward.state[c] + run.inflow[u][c];
    }
  }
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    forward.decay[c] = fast_exp2(delta_sum[c] * parameters.A[c]);
    backward.decay[c] = forward.decay[c];
    backward.state[c] = 0.f;
#pragma unroll
    for (int u = kRunPositions - 1; u >= 0; --u) {
      backward.state[c] = run.decay[u][c] * (backward.state[c] + run.C[u] * pair_to_float(run.grad_y[u], c));
    }
  }
  Aggregate total;
  const Aggregate before = exclusive_scan<false>(item, forward, &total);
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    float state = before.decay[c] * saved[c] + before.state[c];
#pragma unroll
    for (int u = 0; u < kRunPositions; ++u) {
      run.state[u][c] = state;
      state = run.decay[u][c] * state + run.inflow[u][c];
    }
  }
  return backward;
}

// Sweeps back through a run from `carry`, the gradient of the state after it, which becomes that of the state before
// it. Writes the gradient of delta, adds to the gradient of x, and leaves the pair's shares of the gradients of B
// (divided by log(2)) and C.
template <class T>
__device__ __forceinline__ void sweep_run_back(const RouteArgumentsN1& a, const WorkItemN1& item, int64_t k,
                                               const PairParameters& parameters, const WarpStaging& staging,
                                               float* sums, const Run<T>& run, float (&carry)[2],
                                               float (&grad_B)[kRunPositions], float (&grad_C)[kRunPositions],
                                               ParameterGradients& gradients) {
  int32_t sum_rows[kRunPositions];
  int32_t pixels[kRunPositions];
  load_staged_run(staging.sum_rows(), item.run, sum_rows);
  load_staged_run(staging.pixels(), item.run, pixels);
  const int32_t end = item.active ? a.segment_length : 0;
  char* grad_delta = reinterpret_cast<char*>(static_cast<T*>(a.p.grad_delta.data) + item.batch * a.p.grad_delta.batch +
                                             k * a.p.grad_delta.route + item.channel);
  const int32_t bytes = int32_t(a.p.grad_delta.column) * int32_t(sizeof(T));
#pragma unroll
  for (int u = kRunPositions - 1; u >= 0; --u) {
    Pair<float>* sum = sum_at(item, sums, sum_rows[u]);
    Pair<float> grad_x = *sum;
    Pair<T> pair_grad_delta;
    grad_B[u] = 0.f;
    grad_C[u] = 0.f;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float grad_y = pair_to_float(run.grad_y[u], c);
      const float x = pair_to_float(run.x[u], c);
      const float delta = run.delta[u][c];
      const float grad_state = carry[c] + run.C[u] * grad_y;
      const float through_inflow = run.B[u] * grad_state;
      carry[c] = grad_state * run.decay[u][c];
      const float through_decay = carry[c] * run.state[u][c];
      const float grad_input = (through_decay * (parameters.A[c] * kLn2) + through_inflow * x) * run.delta_slope[u][c];
      gradients.A[c] += through_decay * delta;
      gradients.delta_bias[c] += grad_input;
      grad_x.val[c] += through_inflow * delta;
      pair_grad_delta.val[c] = from_float<T>(grad_input);
      grad_B[u] += grad_state * (x * delta);
      grad_C[u] += grad_y * (run.decay[u][c] * run.state[u][c] + run.inflow[u][c]);
    }
    *sum = grad_x;
    Pair<T>* target = reinterpret_cast<Pair<T>*>(grad_delta + int64_t(pixels[u]) * bytes);
    if (sum_rows[u] < end) *target = pair_grad_delta;
  }
}

// Writes the gradients of B and C at the lane's pixel, summed over the tile's channels.
__device__ __forceinline__ void write_projection_gradients(const RouteArgumentsN1& a, const WorkItemN1& item, int64_t k,
                                                           const WarpChunk& chunk, int32_t pixel,
                                                           float (&grad_B)[kRunPositions],
                                                           float (&grad_C)[kRunPositions]) {
  const float sum_B = warp_sum_each<kTilePairs>(grad_B, item.lane) * kLn2;
  const float sum_C = warp_sum_each<kTilePairs>(grad_C, item.lane);
  if (!chunk.exists) return;
  const int64_t map = int64_t(item.tile) * a.p.batch + item.batch;
  const int64_t row = (map * a.p.height * a.p.width + pixel) * a.p.routes + k;
  const int64_t index = row * a.p.groups + item.group;
  if (a.p.grad_B) static_cast<float*>(a.p.grad_B)[index] = sum_B;
  if (a.p.grad_C) static_cast<float*>(a.p.grad_C)[index] = sum_C;
}

// Differentiates one chunk per warp.
template <class T, bool LowRank>
__device__ __forceinline__ void differentiate_chunks(const RouteArgumentsN1& a, const WorkItemN1& item,
                                                     const SharedMemory<LowRank>& memory, const Iteration& iteration,
                                                     const PairParameters& parameters, ParameterGradients& gradients) {
  const WarpChunk chunk(item, iteration.rank < item.chunks ? item.chunks - 1 - iteration.rank : item.chunks,
                        iteration.reversed);
  Run<T> run;
  int32_t sum_rows[kRunPositions];
  float saved[2] = {0.f, 0.f};
  const int32_t pixel =
      load_run_inputs<T, LowRank>(a, item, memory, iteration, chunk, parameters, run, saved, sum_rows);
  if (iteration.r == 0) start_grad_x(item, run, memory.sums, memory.skip, sum_rows, gradients);
  load_staged_run(memory.staging.B(), item.run, run.B);
  load_staged_run(memory.staging.C(), item.run, run.C);
  const Aggregate own = recompute_run(item, parameters, saved, run);
  if (is_partial(item, iteration, chunk)) {
    // A state that is not finite must not spread to positions that do not exist.
#pragma unroll
    for (int u = 0; u < kRunPositions; ++u) {
      if (sum_rows[u] >= a.segment_length) {
        run.state[u][0] = 0.f;
        run.state[u][1] = 0.f;
      }
    }
  }
  Aggregate total;
  const Aggregate after = exclusive_scan<true>(item, own, &total);
  if (item.run == 0) *memory.carries.aggregate(item, iteration.number, item.warp) = total.packed();
  __syncthreads();
  float carry[2];
  memory.carries.load_warp_start(item, iteration.number, carry);
#pragma unroll
  for (int c = 0; c < 2; ++c) carry[c] = item.active ? after.decay[c] * carry[c] + after.state[c] : 0.f;

  float grad_B[kRunPositions];
  float grad_C[kRunPositions];
  sweep_run_back(a, item, iteration.k, parameters, memory.staging, memory.sums, run, carry, grad_B, grad_C, gradients);
  if (item.warp == item.warps - 1 && item.run == 0) {
    float* next = memory.carries.state(item, iteration.number + 1);
    next[0] = carry[0];
    next[1] = carry[1];
  }
  write_projection_gradients(a, item, iteration.k, chunk, pixel, grad_B, grad_C);
}

// Sums the gradients of a route's parameters over the block and writes them. All threads must call.
__device__ __forceinline__ void write_parameter_gradients(const RouteArgumentsN1& a, const WorkItemN1& item, int r,
                                                          const ParameterGradients& gradients, float* buffers) {
  const int64_t part = int64_t(item.segment) * a.p.batch + item.batch;
  const int64_t buffer_floats = int64_t(item.warps) * kTileChannels;
  const Pair<float> grad_A = block_sum(item, gradients.A, buffers);
  const Pair<float> grad_delta_bias = block_sum(item, gradients.delta_bias, buffers + buffer_floats);
  if (r == 0) {
    // The gradient of D is the same for every route.
    const Pair<float> grad_D = block_sum(item, gradients.D, buffers + 2 * buffer_floats);
    for (int i = 0; a.p.grad_D && threadIdx.x < kTilePairs && item.active && i < a.route_count; ++i) {
      const int64_t row = (part * a.p.routes + a.routes[i]) * a.p.channels + item.channel;
      *reinterpret_cast<Pair<float>*>(static_cast<float*>(a.p.grad_D) + row) = grad_D;
    }
  }
  if (threadIdx.x < kTilePairs && item.active) {
    const int64_t row = (part * a.p.routes + a.routes[r]) * a.p.channels + item.channel;
    *reinterpret_cast<Pair<float>*>(static_cast<float*>(a.p.grad_A) + row) = {grad_A.val[0] * kLn2,
                                                                              grad_A.val[1] * kLn2};
    if (a.p.grad_delta_bias)
      *reinterpret_cast<Pair<float>*>(static_cast<float*>(a.p.grad_delta_bias) + row) = grad_delta_bias;
  }
}

// Goes through a segment from the end of each route. Each warp recomputes the states of a chunk from the one saved
// before it, and passes on the gradient of the state as the forward pass does the state.
template <class T, bool LowRank>
__global__ void __launch_bounds__(kBackwardThreads, 1) scan_backward_n1(RouteArgumentsN1 a) {
  SSM_DYNAMIC_SHARED(shared);
  const WorkItemN1 item(a);
  const SharedMemory<LowRank> memory(a, item, shared);
  if (LowRank) DtProjection::stage_weights(a, item, memory.dt_weights);
  stage_skip(a, item, memory.skip);
  int32_t number = 0;  // of the iteration, counted over all routes
  for (int r = 0; r < a.route_count; ++r) {
    const int64_t k = a.routes[r];
    const bool reversed = is_reversed(a.p.route[k]);
    const PairParameters parameters(a, item, k);
    if (threadIdx.x < kTilePairs) {
      const float* grad = static_cast<const float*>(a.segments > 1 ? a.p.segment_states : a.p.grad_last_state);
      if (grad) grad += a.segments > 1 ? segment_index(a, item, k) : last_state_index(a, item, k);
#pragma unroll
      for (int c = 0; c < 2; ++c) memory.carries.state(item, number)[c] = grad && item.active ? grad[c] : 0.f;
    }
    ParameterGradients gradients{{0.f, 0.f}, {0.f, 0.f}, {0.f, 0.f}};
    for (int32_t first = 0; first < item.chunks; first += item.warps, ++number) {
      const Iteration iteration{r, k, reversed, first + item.warp, number};
      differentiate_chunks<T, LowRank>(a, item, memory, iteration, parameters, gradients);
    }
    write_parameter_gradients(a, item, r, gradients, memory.sum_buffers);
    __syncthreads();
  }
  write_route_sums<T>(a, item, memory.sums, a.p.grad_x);
}

// A block's shared memory, in floats. The sum buffers take the place of the forward pass' second staging buffers.
int64_t backward_shared_floats(const RouteScanParams& p, int64_t positions, int64_t warps) {
  static_assert(WarpStaging::kFloats >= 3 * kTileChannels, "a staging buffer holds a warp's part of three sums");
  return shared_floats_n1(p, positions, warps);
}

// Length of the segments of maps that do not fit into a block, and warps of a block that leaves room for another one.
constexpr int64_t kSegmentPositions = 512;
constexpr int64_t kSharedBlockWarps = 8;

}  // namespace

bool route_scan_n1_plan_cuda(const RouteScanParams& p, bool backward, int64_t shared_limit, RouteScanPlan* plan) {
  if (p.states != 1 || p.per_line || (p.chunk && p.chunk != kChunkPositions)) return false;
  if (p.channels / p.groups % 2 || p.dt_rank % 2 || p.dt_rank > kMaxDtRank) return false;
  const int64_t size = p.dtype == DataType::kFloat32 ? 4 : 2;
  const auto has_even_rows = [&](const GridTensor& tensor) {
    return p.width == 1 || p.height == 1 || tensor.row == p.width * tensor.column;
  };
  const auto has_pairs = [&](const GridTensor& tensor) {
    const int64_t stride = pixel_stride(p, tensor);
    return reinterpret_cast<uintptr_t>(tensor.data) % (2 * size) == 0 && tensor.batch % 2 == 0 &&
           tensor.route % 2 == 0 && stride % 2 == 0 && stride * size >> 31 == 0 && has_even_rows(tensor);
  };
  if (!has_pairs(p.x) || !has_pairs(p.delta) || !has_even_rows(p.B) || !has_even_rows(p.C)) return false;
  if (backward && (!has_pairs(p.grad_y) || !has_pairs(p.grad_delta))) return false;

  const int64_t length = p.height * p.width;
  const int64_t max_warps = backward ? kMaxBackwardWarpsN1 : kMaxForwardWarpsN1;
  plan->tiles = ceil_div(p.channels / p.groups, kTileChannels);
  const auto fits = [&](int64_t segment_length, int64_t warps, int64_t limit) {
    const int64_t chunks = ceil_div(segment_length, kChunkPositions);
    plan->segment_length = segment_length;
    plan->segments = ceil_div(length, segment_length);
    plan->warps = ceil_div(chunks, ceil_div(chunks, warps));
    const int64_t floats = backward ? backward_shared_floats(p, segment_length, plan->warps)
                                    : shared_floats_n1(p, segment_length, plan->warps);
    return floats * int64_t(sizeof(float)) <= limit;
  };
  // The driver reserves 1 KiB per block.
  if (!fits(length, kSharedBlockWarps, shared_limit / 2 - 512) && !fits(length, max_warps, shared_limit) &&
      !fits(kSegmentPositions, kSharedBlockWarps, shared_limit)) {
    return false;
  }
  plan->n1 = true;
  bool columns = false;
  bool rows = false;
  for (int k = 0; k < p.routes; ++k) (runs_along_columns(p.route[k]) ? columns : rows) = true;
  plan->needs_axis_sums = plan->segments > 1 && columns && rows;
  return true;
}

int route_scan_n1_backward_cuda(const RouteScanParams& p, const RouteScanPlan& plan, void* stream) {
  const int64_t shared = backward_shared_floats(p, plan.segment_length, plan.warps) * int64_t(sizeof(float));
  const int threads = int(plan.warps * kWarpSize);
  return launch_n1<true>(p, plan, stream, [&](const RouteArgumentsN1& a, int64_t blocks) {
#define SSM_SCAN(T, LOW_RANK) launch_blocks(scan_backward_n1<T, LOW_RANK>, a, blocks, threads, shared, stream)
    SSM_DISPATCH_N1(p.dtype, p.dt_rank, SSM_SCAN)
#undef SSM_SCAN
  });
}

}  // namespace cuda_ops
