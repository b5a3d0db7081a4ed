// Backward pass of the route scan on CUDA, and the plan of both passes.
#include "route_scan.cuh"

namespace cuda_ops {
namespace {

// Offsets into a block's shared memory, in floats.
struct SharedLayout {
  int64_t projections;
  int64_t projection_sums;
  int64_t states;
  int64_t deltas;
  int64_t delta_slopes;
  int64_t grad_x_sums;
  int64_t grad_delta_sums;
  int64_t end;

  __host__ __device__ SharedLayout(int64_t chunk, int64_t ns, int64_t warps, int64_t segment_length,
                                   bool sums_in_shared, bool grouped) {
    const int64_t threads = warps * kWarpSize;
    projections = 0;                                    // [chunk][2 * ns]: B, then C
    projection_sums = projections + chunk * 2 * ns;     // [warps][chunk][2 * ns]: gradients of B and C
    states = projection_sums + warps * chunk * 2 * ns;  // [chunk][packs][threads]: before each position
    deltas = states + chunk * ns * threads;             // [chunk][threads]
    delta_slopes = deltas + chunk * threads;            // [chunk][threads]
    grad_x_sums = delta_slopes + chunk * threads;       // [segment_length][threads]
    grad_delta_sums = grad_x_sums + (sums_in_shared ? segment_length * threads : 0);  // [segment_length][threads]
    end = grad_delta_sums + (grouped ? segment_length * threads : 0);
  }
};

// Positions whose products are summed over the lanes at a time, limited by registers, and positions that the reverse
// sweep prefetches.
template <int NS>
constexpr int kSumPositions = NS == 1   ? 8
                              : NS == 2 ? 2
                                        : 16 / NS;
template <int NS>
constexpr int kSweepPrefetch = kSumPositions<NS> < 4 ? 4 : kSumPositions<NS>;

// Pointers into shared memory. Except for the projections and their sums, each thread has its own column.
template <int NS>
struct SharedMemory {
  float* projections;
  float* projection_sums;
  StatePack<NS>* states;
  float* deltas;
  float* delta_slopes;
  float* grad_x_sums;
  float* grad_delta_sums;

  __device__ __forceinline__ SharedMemory(float* shared, const SharedLayout& layout)
      : projections(shared + layout.projections),
        projection_sums(shared + layout.projection_sums),
        states(reinterpret_cast<StatePack<NS>*>(shared + layout.states) + threadIdx.x),
        deltas(shared + layout.deltas + threadIdx.x),
        delta_slopes(shared + layout.delta_slopes + threadIdx.x),
        grad_x_sums(shared + layout.grad_x_sums + threadIdx.x),
        grad_delta_sums(shared + layout.grad_delta_sums + threadIdx.x) {}
};

// A chunk of one route: positions [low, high) of a line, and the NS states from n0 on.
struct RouteChunk {
  int64_t k;
  int64_t n0;
  int32_t low;
  int32_t high;
  int32_t count;
  bool reversed;
};

// Values that a thread carries through the chunks of a route.
template <int NS>
struct RouteGradients {
  float carry[NS];   // gradient of the state after the current position
  float grad_A[NS];  // of A, not of A_log2e
  float grad_D;
  float grad_delta_bias;
};

// The gradient of the state after the segment.
template <int NS>
__device__ __forceinline__ void load_carry(const RouteArguments& a, const WorkItem& item, int64_t k, int64_t n0,
                                           RouteGradients<NS>& gradients) {
#pragma unroll
  for (int n = 0; n < NS; ++n) {
    gradients.grad_A[n] = 0.f;
    gradients.carry[n] = 0.f;
    if (!item.active || n0 + n >= a.p.states) continue;
    if (a.segments > 1) {
      const float* states = static_cast<const float*>(a.p.segment_states);
      gradients.carry[n] = states[state_index(a, item, segment_row(a, item, k), n0 + n)];
    } else if (a.p.grad_last_state) {
      const float* grad = global_pointer(static_cast<const float*>(a.p.grad_last_state));
      gradients.carry[n] = grad[last_state_row(a, item, k) * a.p.states + n0 + n];
    }
  }
}

// Scans a chunk forward from its saved state. Keeps the state before each position, delta and the softplus' slope in
// shared memory, and leaves the state after the chunk in `state`.
template <class T, int NS>
__device__ __forceinline__ void recompute_chunk(const RouteArguments& a, const WorkItem& item, const RouteChunk& chunk,
                                                int32_t chunk_length, const RouteParameters<NS>& parameters,
                                                const SharedMemory<NS>& memory, float (&state)[NS]) {
  constexpr int kPack = kPackStates<NS>;
  const int32_t threads = blockDim.x;
  const int32_t boundary = chunk.reversed ? chunk.high : chunk.low;
  const bool saved = item.active && boundary > 0 && boundary < a.length;
  const int64_t row = saved ? saved_row(a, item, chunk.k, boundary / chunk_length - 1) : 0;
#pragma unroll
  for (int n = 0; n < NS; ++n) {
    const bool exists = saved && chunk.n0 + n < a.p.states;
    state[n] = exists ? static_cast<const float*>(a.p.saved_states)[state_index(a, item, row, chunk.n0 + n)] : 0.f;
  }
  const PixelPosition start = pixel_position(a, item.line, chunk.reversed ? chunk.high - 1 : chunk.low);
  IteratorBounds bounds(a, start, chunk.reversed);
  auto x_it = iterate<const T>(a, a.p.x, item, 0, start, chunk.reversed);
  auto delta_it = iterate<const T>(a, a.p.delta, item, chunk.k, start, chunk.reversed);
  for (int32_t i0 = 0; i0 < chunk.count; i0 += kPrefetch) {
    float inputs[kPrefetch];
    float deltas[kPrefetch];
#pragma unroll
    for (int u = 0; u < kPrefetch; ++u) {
      const bool exists = item.active && i0 + u < chunk.count;
      inputs[u] = exists ? to_float(*x_it) : 0.f;
      deltas[u] = exists ? to_float(*delta_it) : 0.f;
      const bool wraps = bounds.advance();
      x_it.advance(wraps);
      delta_it.advance(wraps);
    }
#pragma unroll
    for (int u = 0; u < kPrefetch; ++u) {
      const int32_t i = i0 + u;
      if (i >= chunk.count) break;
      const float biased = deltas[u] + parameters.delta_bias;
      Softplus delta{biased, 1.f};
      if (a.p.delta_softplus) delta = softplus(biased);
      memory.deltas[i * threads] = delta.value;
      memory.delta_slopes[i * threads] = delta.slope;
      float B[NS];
      load_row<NS>(memory.projections + (chunk.reversed ? chunk.count - 1 - i : i) * 2 * NS, B);
#pragma unroll
      for (int first = 0; first < NS; first += kPack) {
        StatePack<NS>& pack = memory.states[(i * (NS / kPack) + first / kPack) * threads];
#pragma unroll
        for (int n = 0; n < kPack; ++n) pack.val[n] = state[first + n];
      }
#pragma unroll
      for (int n = 0; n < NS; ++n) {
        state[n] = fast_exp2(delta.value * parameters.A_log2e[n]) * state[n] + B[n] * (delta.value * inputs[u]);
      }
    }
  }
}

// What a position contributes to the gradients of its inputs, over a group of states.
struct PositionGradients {
  float delta;           // before the softplus
  float through_inflow;  // sum of B * gradient of the state
};

// Differentiates one position. `state` is the state after it, and becomes the state before it. `products` receives a
// channel's shares of the gradients of B and of C.
template <int NS>
__device__ __forceinline__ PositionGradients differentiate_position(const RouteParameters<NS>& parameters,
                                                                    const SharedMemory<NS>& memory, int32_t i,
                                                                    int32_t row, float delta, float x, float grad_y,
                                                                    RouteGradients<NS>& gradients, float (&state)[NS],
                                                                    float* products) {
  constexpr int kPack = kPackStates<NS>;
  const int32_t threads = blockDim.x;
  const float inflow = delta * x;
  const float* projections = memory.projections + row * 2 * NS;
  float grad_exponent = 0.f;
  float through_inflow = 0.f;
#pragma unroll
  for (int first = 0; first < NS; first += kPack) {
    const StatePack<NS> before = memory.states[(i * (NS / kPack) + first / kPack) * threads];
    float B[kPack];
    float C[kPack];
    load_row<kPack>(projections + first, B);
    load_row<kPack>(projections + NS + first, C);
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      const int n = first + e;
      const float decay = fast_exp2(delta * parameters.A_log2e[n]);
      const float grad_state = gradients.carry[n] + C[e] * grad_y;
      gradients.carry[n] = grad_state * decay;
      const float through_decay = gradients.carry[n] * before.val[e];
      grad_exponent += through_decay * parameters.A_log2e[n];
      gradients.grad_A[n] += through_decay * delta;
      through_inflow += B[e] * grad_state;
      products[n] = grad_state * inflow;
      // The state after this position is the one before the next. 16 states do not fit into registers.
      products[NS + n] = grad_y * (NS < 16 ? state[n] : decay * before.val[e] + B[e] * inflow);
      state[n] = before.val[e];
    }
  }
  // A_log2e contains log2(e), so the exponent's gradient is scaled back.
  const float grad_delta = (grad_exponent * kLn2 + through_inflow * x) * memory.delta_slopes[i * threads];
  return {grad_delta, through_inflow};
}

// Sweeps through a chunk from its end: writes the gradients of delta and x, and the warp's sums over channels of the
// gradients of B and C.
template <class T, int NS>
__device__ __forceinline__ void sweep_back(const RouteArguments& a, const WorkItem& item, const RouteChunk& chunk,
                                           int32_t chunk_length, bool first_sum, const RouteParameters<NS>& parameters,
                                           float skip, const SharedMemory<NS>& memory, float (&state)[NS],
                                           RouteGradients<NS>& gradients) {
  constexpr int kLoads = kSweepPrefetch<NS>;
  constexpr int kSummed = kSumPositions<NS>;
  constexpr int kProducts = 2 * NS * kSummed;
  const bool grouped = NS < a.p.states;
  const bool last_group = chunk.n0 + NS >= a.p.states;
  const int32_t threads = blockDim.x;
  const int32_t lane = threadIdx.x % kWarpSize;
  const int32_t warp = threadIdx.x / kWarpSize;
  const bool reversed = chunk.reversed;
  const int32_t count = chunk.count;
  const PixelPosition start = pixel_position(a, item.line, reversed ? chunk.low : chunk.high - 1);
  IteratorBounds bounds(a, start, !reversed);
  auto x_it = iterate<const T>(a, a.p.x, item, 0, start, !reversed);
  auto grad_y_it = iterate<const T>(a, a.p.grad_y, item, 0, start, !reversed);
  auto grad_delta_it = iterate<T>(a, a.p.grad_delta, item, chunk.k, start, !reversed);
  auto grad_x_it = iterate_contiguous<T>(a, a.p.result, item, start, !reversed);
  for (int32_t i0 = (count - 1) / kLoads * kLoads; i0 >= 0; i0 -= kLoads) {
    float inputs[kLoads];
    float grads[kLoads];
    IteratorBounds reading = bounds;
#pragma unroll
    for (int j = kLoads - 1; j >= 0; --j) {
      inputs[j] = 0.f;
      grads[j] = 0.f;
      if (i0 + j >= count) continue;
      if (item.active) {
        inputs[j] = to_float(*x_it);
        grads[j] = to_float(*grad_y_it);
      }
      const bool wraps = reading.advance();
      x_it.advance(wraps);
      grad_y_it.advance(wraps);
    }
#pragma unroll
    for (int g = kLoads / kSummed - 1; g >= 0; --g) {
      float products[kProducts];
#pragma unroll
      for (int u = kSummed - 1; u >= 0; --u) {
        const int j = g * kSummed + u;
        const int32_t i = i0 + j;
#pragma unroll
        for (int n = 0; n < 2 * NS; ++n) products[u * 2 * NS + n] = 0.f;
        if (i >= count) continue;
        const float delta = memory.deltas[i * threads];
        const PositionGradients position =
            differentiate_position<NS>(parameters, memory, i, reversed ? count - 1 - i : i, delta, inputs[j], grads[j],
                                       gradients, state, products + u * 2 * NS);
        float grad_delta = position.delta;
        gradients.grad_delta_bias += grad_delta;
        if (chunk.n0 == 0) gradients.grad_D += grads[j] * inputs[j];
        const int64_t index = int64_t((reversed ? chunk.high - 1 - i : chunk.low + i) - item.begin) * threads;
        if (grouped) {
          if (chunk.n0 > 0) grad_delta += memory.grad_delta_sums[index];
          memory.grad_delta_sums[index] = grad_delta;
        }
        if (item.active && last_group) *grad_delta_it = from_float<T>(grad_delta);
        const float grad_x = position.through_inflow * delta + skip * grads[j];
        if (a.sums_in_shared) {
          memory.grad_x_sums[index] = first_sum ? grad_x : memory.grad_x_sums[index] + grad_x;
        } else if (item.active) {
          *grad_x_it = from_float<T>(grad_x);
        }
        const bool wraps = bounds.advance();
        grad_delta_it.advance(wraps);
        grad_x_it.advance(wraps);
      }
      const float sum = warp_sum_each<kWarpSize>(products, lane);
      const int32_t position = i0 + g * kSummed + lane / (2 * NS);
      if (lane < kProducts && position < count) {
        memory.projection_sums[(warp * chunk_length + position) * 2 * NS + lane % (2 * NS)] = sum;
      }
    }
  }
}

// Adds the warps' sums in their order and writes the gradients of B and C. All threads must call, after a barrier.
template <int NS>
__device__ __forceinline__ void write_projection_gradients(const RouteArguments& a, const WorkItem& item,
                                                           const RouteChunk& chunk, int32_t chunk_length,
                                                           const float* projection_sums) {
  const int32_t threads = blockDim.x;
  for (int32_t e = threadIdx.x; e < chunk.count * 2 * NS; e += threads) {
    const int32_t i = e / (2 * NS);
    const int32_t n = e % NS;
    const bool is_C = e % (2 * NS) >= NS;
    float* target = static_cast<float*>(is_C ? a.p.grad_C : a.p.grad_B);
    if (!target || chunk.n0 + n >= a.p.states) continue;
    float sum = 0.f;
    for (int32_t w = 0; w < threads / kWarpSize; ++w) sum += projection_sums[w * chunk_length * 2 * NS + e];
    const PixelPosition pixel = pixel_position(a, item.line, chunk.reversed ? chunk.high - 1 - i : chunk.low + i);
    const bool columns = runs_along_columns(a.p.route[chunk.k]);
    int64_t index = (item.tile * a.p.batch + item.batch) * a.p.height + (columns ? pixel.inner : pixel.outer);
    index = index * a.p.width + (columns ? pixel.outer : pixel.inner);
    target[((index * a.p.routes + chunk.k) * a.p.groups + item.group) * a.p.states + chunk.n0 + n] = sum;
  }
}

// Goes through a segment from the end of each route, chunk by chunk: recomputes the states from the saved one, then
// sweeps back. Positions of a chunk are counted in the order of the route.
template <class T, int NS>
__global__ void __launch_bounds__(256, 1) scan_backward(RouteArguments a) {
  SSM_DYNAMIC_SHARED(shared);
  const bool grouped = NS < a.p.states;
  const int32_t chunk_length = a.length < a.chunk ? a.length : a.chunk;
  const int32_t threads = blockDim.x;
  const SharedLayout layout(chunk_length, NS, threads / kWarpSize, a.segment_length, a.sums_in_shared, grouped);
  const SharedMemory<NS> memory(shared, layout);
  const WorkItem item = block_work_item(a);

  for (int r = 0; r < a.route_count; ++r) {
    const int64_t k = a.routes[r];
    const bool reversed = is_reversed(a.p.route[k]);
    RouteGradients<NS> gradients;
    gradients.grad_D = 0.f;
    gradients.grad_delta_bias = 0.f;
    const int64_t part = (int64_t(item.line) * a.segments + item.segment) * a.p.batch + item.batch;
    const int64_t part_row = (part * a.p.routes + k) * a.p.channels + item.channel;
    for (int64_t n0 = 0; n0 < a.p.states; n0 += NS) {
      RouteParameters<NS> parameters;
      parameters.load(a, item, k, n0);
      const float skip = channel_parameter(a, item, a.p.D, k, item.active && a.p.D && n0 == 0);
      load_carry<NS>(a, item, k, n0, gradients);
      const int32_t chunks = (item.end - item.begin + chunk_length - 1) / chunk_length;
      for (int32_t c = 0; c < chunks; ++c) {
        RouteChunk chunk{k, n0};
        chunk.reversed = reversed;
        chunk.low = item.begin + (reversed ? c : chunks - 1 - c) * chunk_length;
        chunk.high = chunk.low + chunk_length < item.end ? chunk.low + chunk_length : item.end;
        chunk.count = chunk.high - chunk.low;
        __syncthreads();
        stage_projection<T, NS>(a, item, a.p.B, k, n0, chunk.low, chunk.count, 2 * NS, memory.projections);
        stage_projection<T, NS>(a, item, a.p.C, k, n0, chunk.low, chunk.count, 2 * NS, memory.projections + NS);
        __syncthreads();
        float state[NS];
        recompute_chunk<T, NS>(a, item, chunk, chunk_length, parameters, memory, state);
        sweep_back<T, NS>(a, item, chunk, chunk_length, r == 0 && n0 == 0, parameters, skip, memory, state, gradients);
        __syncthreads();
        write_projection_gradients<NS>(a, item, chunk, chunk_length, memory.projection_sums);
      }
      if (!item.active) continue;
#pragma unroll
      for (int n = 0; n < NS; ++n) {
        if (n0 + n < a.p.states) {
          static_cast<float*>(a.p.grad_A)[part_row * a.p.states + n0 + n] = gradients.grad_A[n];
        }
      }
    }
    if (!item.active) continue;
    if (a.p.grad_D) static_cast<float*>(a.p.grad_D)[part_row] = gradients.grad_D;
    if (a.p.grad_delta_bias) static_cast<float*>(a.p.grad_delta_bias)[part_row] = gradients.grad_delta_bias;
  }
  if (a.sums_in_shared && item.active) write_route_sums<T>(a, item, memory.grad_x_sums, a.p.grad_x);
}

SharedLayout shared_layout(const RouteScanParams& p, const RouteScanPlan& plan, int64_t warps) {
  const int64_t length = route_shape(p.route[0], p.per_line, p.height, p.width).length;
  return SharedLayout(length < p.chunk ? length : p.chunk, states_per_pass(p.states), warps, plan.segment_length,
                      sums_in_shared_memory(p), !is_specialized(p.states));
}

int launch_scan(const RouteArguments& a, const RouteScanPlan& plan, int64_t blocks, void* stream) {
  const int threads = int(plan.warps * kWarpSize);
  const int64_t shared = shared_layout(a.p, plan, plan.warps).end * int64_t(sizeof(float));
#define SSM_SCAN(T, NS) launch_blocks(scan_backward<T, NS>, a, blocks, threads, shared, stream)
  SSM_DISPATCH(a.p.dtype, states_per_pass(a.p.states), SSM_SCAN)
#undef SSM_SCAN
}

// Segments are shortened until this many warps are launched.
constexpr int64_t kMinWarps = 4096;

// Longest segments: without sums in shared memory, with them, and with them and 8 or more states, for which state
// passing costs more.
constexpr int64_t kMaxSegment = 1024;
constexpr int64_t kMaxSummedSegment = 64;
constexpr int64_t kMaxSummedSegmentManyStates = 128;

constexpr int64_t kMaxForwardWarps = 4;
constexpr int64_t kMaxBackwardWarps = 8;

int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace

int route_scan_backward_cuda(const RouteScanParams& p, const RouteScanPlan& plan, void* stream) {
  if (plan.n1) return route_scan_n1_backward_cuda(p, plan, stream);
  return for_each_axis<true>(
      p, plan, stream, [&](const RouteArguments& a, int64_t blocks) { return launch_scan(a, plan, blocks, stream); });
}

int route_scan_plan_cuda(const RouteScanParams& p, bool backward, RouteScanPlan* plan) {
  const RouteShape shape = route_shape(p.route[0], p.per_line, p.height, p.width);
  const int64_t end = int64_t(1) << 30;  // positions are counted in 32 bits
  if (shape.length >= end || shape.lines >= end || p.chunk >= end || p.dtype == DataType::kFloat64) {
    return cudaErrorInvalidValue;
  }
  int64_t limit = 0;
  const int error = shared_memory_limit(&limit);
  if (error) return error;
  if (route_scan_n1_plan_cuda(p, backward, limit, plan)) return 0;

  bool columns = false;
  bool rows = false;
  for (int k = 0; k < p.routes; ++k) (runs_along_columns(p.route[k]) ? columns : rows) = true;
  plan->needs_axis_sums = columns && rows;
  const bool summed = sums_in_shared_memory(p);
  const int64_t states = states_per_pass(p.states);
  const int64_t channel_warps = ceil_div(p.channels / p.groups, kWarpSize);
  const int64_t unit = p.chunk ? p.chunk : kStagedPositions;
  int64_t length = summed ? (states >= 8 ? kMaxSummedSegmentManyStates : kMaxSummedSegment) : kMaxSegment;
  const int64_t warps_per_segment = p.batch * p.routes * shape.lines * p.groups * channel_warps;
  const int64_t min_segments = warps_per_segment ? ceil_div(kMinWarps, warps_per_segment) : 1;
  length = min_of(length, ceil_div(shape.length, min_segments));
  if (length < kMaxSummedSegment) length = kMaxSummedSegment;
  plan->segment_length = ceil_div(length, unit) * unit;
  plan->segments = ceil_div(shape.length, plan->segment_length);
  if (plan->segment_length > shape.length) plan->segment_length = shape.length;

  auto shared_bytes = [&](int64_t warps) {
    const int64_t sums = summed ? plan->segment_length * warps * kWarpSize : 0;
    const int64_t floats = backward ? shared_layout(p, *plan, warps).end : kStagedPositions * 2 * states + sums;
    return floats * int64_t(sizeof(float));
  };
  // Two blocks per multiprocessor hide each other's latency, as long as that leaves blocks of two warps.
  int64_t warps = min_of(channel_warps, backward ? kMaxBackwardWarps : kMaxForwardWarps);
  while (warps > 1 && shared_bytes(warps) > (warps > 2 ? limit / 2 : limit)) --warps;
  if (shared_bytes(warps) > limit) return cudaErrorInvalidConfiguration;
  plan->tiles = ceil_div(channel_warps, warps);
  plan->warps = ceil_div(channel_warps, plan->tiles);
  return 0;
}

}  // namespace cuda_ops
