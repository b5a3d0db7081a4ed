// The route scan's backward pass on CUDA, and how both passes are divided.
#include "route_scan.cuh"

namespace cuda_ops {
namespace {

// A block's shared memory, in floats.
struct Layout {
  int64_t projections, totals, before, steps, slopes, sums, grad_steps, end;

  __host__ __device__ Layout(int64_t chunk, int64_t states, int64_t warps, int64_t segment, bool tiled, bool grouped) {
    const int64_t threads = warps * kWarp;
    projections = 0;                                     // [chunk][2 * states]: B, then C
    totals = projections + chunk * 2 * states;           // [warps][chunk][2 * states]: of the gradients of B and of C
    before = totals + warps * chunk * 2 * states;        // [chunk][packs][threads]: states before each position
    steps = before + chunk * states * threads;           // [chunk][threads]
    slopes = steps + chunk * threads;                    // likewise
    sums = slopes + chunk * threads;                     // [segment][threads]: of the gradient of x
    grad_steps = sums + (tiled ? segment * threads : 0); // [segment][threads]
    end = grad_steps + (grouped ? segment * threads : 0);
  }
};

// Positions whose products are summed over the lanes at a time: as many as registers hold. And those whose inputs are
// loaded ahead.
template <int NS>
constexpr int kSumAhead = NS == 1 ? 8 : NS == 2 ? 2 : 16 / NS;
template <int NS>
constexpr int kSweepAhead = kSumAhead<NS> < 4 ? 4 : kSumAhead<NS>;

// Goes through a block's segment from the end of each route, chunk by chunk: forward again from the saved state, then
// back. `i` counts the positions of a chunk in the order of the route.
template <class T, int NS>
__global__ void __launch_bounds__(256, 1) scan_backward(RouteArguments a) {
  SSM_DYNAMIC_SHARED(shared);
  constexpr int kPack = Pack<NS>::kStates;
  const bool grouped = NS < a.p.states;
  const int32_t chunk = a.length < a.chunk ? a.length : a.chunk;
  const int32_t threads = blockDim.x, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Layout layout(chunk, NS, threads / kWarp, a.segment, a.tiled, grouped);
  float* projections = shared + layout.projections;
  float* totals = shared + layout.totals;
  Pack<NS>* before = reinterpret_cast<Pack<NS>*>(shared + layout.before) + threadIdx.x;
  float* steps = shared + layout.steps + threadIdx.x;
  float* slopes = shared + layout.slopes + threadIdx.x;
  float* sums = shared + layout.sums + threadIdx.x;
  float* grad_steps = shared + layout.grad_steps + threadIdx.x;
  const Task task = task_of_block(a);

  for (int r = 0; r < a.count; ++r) {
    const int64_t k = a.index[r];
    const bool down = runs_backwards(a.p.route[k]);
    float grad_skip = 0.f, grad_bias = 0.f;
    const int64_t part = (int64_t(task.line) * a.segments + task.segment) * a.p.batch + task.batch;
    const int64_t part_row = (part * a.p.routes + k) * a.p.channels + task.channel;
    for (int64_t n0 = 0; n0 < a.p.states; n0 += NS) {
      const bool first_sum = r == 0 && n0 == 0, last_group = n0 + NS >= a.p.states;
      Parameters<NS> parameters;
      parameters.load(a, task, k, n0);
      const bool with_skip = task.active && a.p.D && n0 == 0;
      const float skip = with_skip ? static_cast<const float*>(a.p.D)[k * a.p.channels + task.channel] : 0.f;
      float carry[NS], grad_rate[NS];
#pragma unroll
      for (int n = 0; n < NS; ++n) {
        grad_rate[n] = carry[n] = 0.f;
        if (!task.active || n0 + n >= a.p.states) continue;
        if (a.segments > 1) {
          carry[n] = static_cast<const float*>(a.p.ends)[state_index(a, task, segment_row(a, task, k), n0 + n)];
        } else if (a.p.grad_last) {
          const int64_t row = (task.batch * a.p.routes + k) * a.p.channels + task.channel;
          carry[n] = static_cast<const float*>(a.p.grad_last)[row * a.p.states + n0 + n];
        }
      }
      const int32_t chunks = (task.end - task.begin + chunk - 1) / chunk;
      for (int32_t c = 0; c < chunks; ++c) {
        const int32_t low = task.begin + (down ? c : chunks - 1 - c) * chunk;
        const int32_t high = low + chunk < task.end ? low + chunk : task.end, count = high - low;
        __syncthreads();
        fetch<T, NS>(a, task, a.p.B, k, n0, low, count, 2 * NS, projections);
        fetch<T, NS>(a, task, a.p.C, k, n0, low, count, 2 * NS, projections + NS);
        __syncthreads();

        float state[NS];
        const int32_t boundary = down ? high : low;
        const bool saved = task.active && boundary > 0 && boundary < a.length;
        const int64_t row = saved ? saved_row(a, task, k, boundary / chunk - 1) : 0;
#pragma unroll
        for (int n = 0; n < NS; ++n) {
          const bool given = saved && n0 + n < a.p.states;
          state[n] = given ? static_cast<const float*>(a.p.saved)[state_index(a, task, row, n0 + n)] : 0.f;
        }
        {
          const Place start = place(a, task.line, down ? high - 1 : low);
          Ends ends(a, start, down);
          auto x = walk<const T>(a, a.p.x, task, 0, task.channel, start, down);
          auto delta = walk<const T>(a, a.p.delta, task, k, task.channel, start, down);
          for (int32_t i0 = 0; i0 < count; i0 += kAhead) {
            float inputs[kAhead], raws[kAhead];
#pragma unroll
            for (int u = 0; u < kAhead; ++u) {
              const bool given = task.active && i0 + u < count;
              inputs[u] = given ? to_float(*x.at) : 0.f;
              raws[u] = given ? to_float(*delta.at) : 0.f;
              const bool over_end = ends.advance();
              x.advance(over_end), delta.advance(over_end);
            }
#pragma unroll
            for (int u = 0; u < kAhead; ++u) {
              const int32_t i = i0 + u;
              if (i >= count) break;
              const float raw = raws[u] + parameters.bias;
              Softplus step{raw, 1.f};
              if (a.p.delta_softplus) step = softplus(raw);
              steps[i * threads] = step.value, slopes[i * threads] = step.slope;
              float B[NS];
              read_row<NS>(projections + (down ? count - 1 - i : i) * 2 * NS, B);
#pragma unroll
              for (int first = 0; first < NS; first += kPack) {
                Pack<NS>& pack = before[(i * (NS / kPack) + first / kPack) * threads];
#pragma unroll
                for (int n = 0; n < kPack; ++n) pack.of[n] = state[first + n];
              }
#pragma unroll
              for (int n = 0; n < NS; ++n) {
                state[n] = fast_exp2(step.value * parameters.rate[n]) * state[n] + B[n] * (step.value * inputs[u]);
              }
            }
          }
        }

        constexpr int kLoads = kSweepAhead<NS>, kSummed = kSumAhead<NS>, kProducts = 2 * NS * kSummed;
        const Place start = place(a, task.line, down ? low : high - 1);
        Ends ends(a, start, !down);
        auto x = walk<const T>(a, a.p.x, task, 0, task.channel, start, !down);
        auto grad_y = walk<const T>(a, a.p.grad_y, task, 0, task.channel, start, !down);
        auto grad_delta = walk<T>(a, a.p.grad_delta, task, k, task.channel, start, !down);
        auto grad_x = walk_contiguous<T>(a, a.p.result, task, start, !down);
        for (int32_t i0 = (count - 1) / kLoads * kLoads; i0 >= 0; i0 -= kLoads) {
          float inputs[kLoads], grads[kLoads];
          Ends reading = ends;
#pragma unroll
          for (int j = kLoads - 1; j >= 0; --j) {
            inputs[j] = grads[j] = 0.f;
            if (i0 + j >= count) continue;
            if (task.active) inputs[j] = to_float(*x.at), grads[j] = to_float(*grad_y.at);
            const bool over_end = reading.advance();
            x.advance(over_end), grad_y.advance(over_end);
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
              const float d = steps[i * threads], inflow = d * inputs[j], dy = grads[j];
              const float* row_of = projections + (down ? count - 1 - i : i) * 2 * NS;
              float grad_step = 0.f, through_input = 0.f;
#pragma unroll
              for (int first = 0; first < NS; first += kPack) {
                const Pack<NS> earlier = before[(i * (NS / kPack) + first / kPack) * threads];
                float B[kPack], C[kPack];
                read_row<kPack>(row_of + first, B);
                read_row<kPack>(row_of + NS + first, C);
#pragma unroll
                for (int e = 0; e < kPack; ++e) {
                  const int n = first + e;
                  const float decay = fast_exp2(d * parameters.rate[n]), grad = carry[n] + C[e] * dy;
                  carry[n] = grad * decay;
                  const float through_decay = carry[n] * earlier.of[e];
                  grad_step += through_decay * parameters.rate[n];
                  grad_rate[n] += through_decay * d;
                  through_input += B[e] * grad;
                  products[u * 2 * NS + n] = grad * inflow;
                  // What is behind a position is known from the one after it; with 16 states registers are too few.
                  products[u * 2 * NS + NS + n] = dy * (NS < 16 ? state[n] : decay * earlier.of[e] + B[e] * inflow);
                  state[n] = earlier.of[e];
                }
              }
              // The rate is A * log2(e), so the part that went through the exponent is scaled back.
              float grad_raw = (grad_step * kLn2 + through_input * inputs[j]) * slopes[i * threads];
              grad_bias += grad_raw;
              if (n0 == 0) grad_skip += dy * inputs[j];
              const int64_t of_segment = int64_t((down ? high - 1 - i : low + i) - task.begin) * threads;
              if (grouped) {
                if (n0 > 0) grad_raw += grad_steps[of_segment];
                grad_steps[of_segment] = grad_raw;
              }
              if (task.active && last_group) *grad_delta.at = from_float<T>(grad_raw);
              const float grad_input = through_input * d + skip * dy;
              if (a.tiled) {
                sums[of_segment] = first_sum ? grad_input : sums[of_segment] + grad_input;
              } else if (task.active) {
                *grad_x.at = from_float<T>(grad_input);
              }
              const bool over_end = ends.advance();
              grad_delta.advance(over_end), grad_x.advance(over_end);
            }
            const float total = sum_each<kWarp>(products, lane);
            const int32_t position = i0 + g * kSummed + lane / (2 * NS);
            if (lane < kProducts && position < count)
              totals[(warp * chunk + position) * 2 * NS + lane % (2 * NS)] = total;
          }
        }

        // The sums over a block's channels, of all warps in their order.
        __syncthreads();
        for (int32_t e = threadIdx.x; e < count * 2 * NS; e += threads) {
          const int32_t i = e / (2 * NS), n = e % NS;
          const bool of_C = e % (2 * NS) >= NS;
          float* target = static_cast<float*>(of_C ? a.p.grad_C : a.p.grad_B);
          if (!target || n0 + n >= a.p.states) continue;
          float total = 0.f;
          for (int32_t w = 0; w < threads / kWarp; ++w) total += totals[w * chunk * 2 * NS + e];
          const Place pixel = place(a, task.line, down ? high - 1 - i : low + i);
          const bool columns = runs_along_columns(a.p.route[k]);
          int64_t index = (task.tile * a.p.batch + task.batch) * a.p.height + (columns ? pixel.inner : pixel.outer);
          index = index * a.p.width + (columns ? pixel.outer : pixel.inner);
          target[((index * a.p.routes + k) * a.p.groups + task.group) * a.p.states + n0 + n] = total;
        }
      }
      if (!task.active) continue;
#pragma unroll
      for (int n = 0; n < NS; ++n)
        if (n0 + n < a.p.states) static_cast<float*>(a.p.grad_A)[part_row * a.p.states + n0 + n] = grad_rate[n];
    }
    if (!task.active) continue;
    if (a.p.grad_D) static_cast<float*>(a.p.grad_D)[part_row] = grad_skip;
    if (a.p.grad_delta_bias) static_cast<float*>(a.p.grad_delta_bias)[part_row] = grad_bias;
  }
  if (a.tiled && task.active) write_sums<T>(a, task, sums, a.p.grad_x);
}

Layout layout_of(const RouteScanParams& p, const RouteScanPlan& plan, int64_t warps) {
  const int64_t length = route_shape(p.route[0], p.per_line, p.height, p.width).length;
  return Layout(length < p.chunk ? length : p.chunk, states_at_a_time(p.states), warps, plan.segment,
                sums_in_shared_memory(p), !fast_states(p.states));
}

int launch_scans(const RouteArguments& a, const RouteScanPlan& plan, int64_t blocks, void* stream) {
  const int threads = int(plan.warps * kWarp);
  const int64_t shared = layout_of(a.p, plan, plan.warps).end * int64_t(sizeof(float));
#define SSM_SCAN(T, NS) launch_blocks(scan_backward<T, NS>, a, blocks, threads, shared, stream)
  SSM_DISPATCH(a.p.dtype, states_at_a_time(a.p.states), SSM_SCAN)
#undef SSM_SCAN
}

// Warps that a pass should have on the machine at least, and the longest segments: with sums in shared memory they lie
// there, with many states it costs more to hand these over.
constexpr int64_t kWantedWarps = 4096, kTiledSegment = 64, kTiledSegmentOfManyStates = 128, kLongestSegment = 1024;
constexpr int64_t kForwardWarps = 4, kBackwardWarps = 8;

int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace

int route_scan_backward_cuda(const RouteScanParams& p, const RouteScanPlan& plan, void* stream) {
  if (plan.one_state) return one_state_backward_cuda(p, plan, stream);
  return for_each_axis<true>(p, plan, stream, [&](const RouteArguments& a, int64_t blocks) {
    return launch_scans(a, plan, blocks, stream);
  });
}

int route_scan_plan_cuda(const RouteScanParams& p, bool backward, RouteScanPlan* plan) {
  const RouteShape shape = route_shape(p.route[0], p.per_line, p.height, p.width);
  const int64_t longest = int64_t(1) << 30;  // positions are counted in 32 bits
  if (shape.length >= longest || shape.lines >= longest || p.chunk >= longest || p.dtype == DataType::kFloat64)
    return cudaErrorInvalidValue;
  int64_t limit = 0;
  const int error = shared_memory_limit(&limit);
  if (error || one_state_plan_cuda(p, backward, limit, plan)) return error;

  bool columns = false, rows = false;
  for (int k = 0; k < p.routes; ++k) (runs_along_columns(p.route[k]) ? columns : rows) = true;
  plan->partial = columns && rows;
  const bool tiled = sums_in_shared_memory(p);
  const int64_t states = states_at_a_time(p.states), channel_warps = ceil_div(p.channels / p.groups, kWarp);
  const int64_t unit = p.chunk ? p.chunk : kPiece;
  int64_t segment = tiled ? (states >= 8 ? kTiledSegmentOfManyStates : kTiledSegment) : kLongestSegment;
  const int64_t lines = p.batch * p.routes * shape.lines * p.groups * channel_warps;
  const int64_t wanted = lines ? ceil_div(kWantedWarps, lines) : 1;
  segment = min_of(segment, ceil_div(shape.length, wanted));
  if (segment < kTiledSegment) segment = kTiledSegment;
  plan->segment = ceil_div(segment, unit) * unit;
  plan->segments = ceil_div(shape.length, plan->segment);
  if (plan->segment > shape.length) plan->segment = shape.length;

  auto shared = [&](int64_t warps) {
    const int64_t floats = backward ? layout_of(p, *plan, warps).end
                                    : kPiece * 2 * states + (tiled ? plan->segment * warps * kWarp : 0);
    return floats * int64_t(sizeof(float));
  };
  // Two blocks on a multiprocessor hide each other's waiting, where that leaves blocks of two warps.
  const int64_t most = min_of(channel_warps, backward ? kBackwardWarps : kForwardWarps);
  int64_t warps = most;
  while (warps > 1 && shared(warps) > (warps > 2 ? limit / 2 : limit)) --warps;
  if (shared(warps) > limit) return cudaErrorInvalidConfiguration;
  plan->tiles = ceil_div(channel_warps, warps);
  plan->warps = ceil_div(channel_warps, plan->tiles);
  return 0;
}

}  // namespace cuda_ops
