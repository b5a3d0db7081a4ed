// Forward pass of the route scan on CUDA.
#include "route_scan.cuh"

namespace cuda_ops {
namespace {

// Positions [low, high) of a line.
struct PositionRange {
  int32_t low;
  int32_t high;
};

// The positions to scan next, starting at `edge`: at most kStagedPositions, and not past a position where the state is
// saved.
__device__ __forceinline__ PositionRange next_positions(const RouteArguments& a, const WorkItem& item, int32_t edge,
                                                        bool reversed) {
  PositionRange range{edge, edge};
  if (reversed) {
    const int32_t saved_at = a.chunk ? (edge - 1) / a.chunk * a.chunk : 0;
    range.low = saved_at > item.begin ? saved_at : item.begin;
    if (range.high - range.low > kStagedPositions) range.low = range.high - kStagedPositions;
  } else {
    range.high = a.chunk ? (edge / a.chunk + 1) * a.chunk : item.end;
    if (range.high > item.end) range.high = item.end;
    if (range.high - range.low > kStagedPositions) range.high = range.low + kStagedPositions;
  }
  return range;
}

// Scans a segment along each of the routes in turn. Sums over routes are kept in shared memory, one column per thread,
// and written once.
template <class T, int NS>
__global__ void __launch_bounds__(128, 1) scan_forward(RouteArguments a) {
  SSM_DYNAMIC_SHARED(shared);
  float* projections = shared;                                     // [kStagedPositions][2 * NS]: B, then C
  float* sums = shared + kStagedPositions * 2 * NS + threadIdx.x;  // [segment_length][threads]
  const WorkItem item = block_work_item(a);
  for (int r = 0; r < a.route_count; ++r) {
    const int64_t k = a.routes[r];
    const bool reversed = is_reversed(a.p.route[k]);
    for (int64_t n0 = 0; n0 < a.p.states; n0 += NS) {
      const bool first_sum = r == 0 && n0 == 0;
      RouteParameters<NS> parameters;
      parameters.load(a, item, k, n0);
      const float skip = channel_parameter(a, item, a.p.D, k, item.active && a.p.D && n0 == 0);
      float state[NS];
#pragma unroll
      for (int n = 0; n < NS; ++n) {
        const bool exists = item.active && a.segments > 1 && n0 + n < a.p.states;
        const int64_t row = exists ? segment_row(a, item, k) : 0;
        state[n] = exists ? static_cast<const float*>(a.p.segment_states)[state_index(a, item, row, n0 + n)] : 0.f;
      }
      int32_t edge = reversed ? item.end : item.begin;
      while (reversed ? edge > item.begin : edge < item.end) {
        const PositionRange range = next_positions(a, item, edge, reversed);
        const int32_t low = range.low;
        const int32_t high = range.high;
        const int32_t count = high - low;
        __syncthreads();
        stage_projection<T, NS>(a, item, a.p.B, k, n0, low, count, 2 * NS, projections);
        stage_projection<T, NS>(a, item, a.p.C, k, n0, low, count, 2 * NS, projections + NS);
        __syncthreads();
        const PixelPosition start = pixel_position(a, item.line, reversed ? high - 1 : low);
        IteratorBounds bounds(a, start, reversed);
        auto x_it = iterate<const T>(a, a.p.x, item, 0, start, reversed);
        auto delta_it = iterate<const T>(a, a.p.delta, item, k, start, reversed);
        auto y_it = iterate_contiguous<T>(a, a.p.result, item, start, reversed);
        for (int32_t i = 0; i < count; i += kPrefetch) {
          float inputs[kPrefetch];
          float deltas[kPrefetch];
          float outputs[kPrefetch];
          IteratorBounds reading = bounds;
#pragma unroll
          for (int u = 0; u < kPrefetch; ++u) {
            const bool exists = item.active && i + u < count;
            inputs[u] = exists ? to_float(*x_it) : 0.f;
            deltas[u] = exists ? to_float(*delta_it) : 0.f;
            const bool wraps = reading.advance();
            x_it.advance(wraps);
            delta_it.advance(wraps);
          }
#pragma unroll
          for (int u = 0; u < kPrefetch; ++u) {
            if (i + u >= count) break;
            const float delta = apply_softplus(a, deltas[u] + parameters.delta_bias);
            const float inflow = delta * inputs[u];
            const float* row = projections + (reversed ? count - 1 - (i + u) : i + u) * 2 * NS;
            float B[NS];
            float C[NS];
            load_row<NS>(row, B);
            load_row<NS>(row + NS, C);
            float output = skip * inputs[u];
#pragma unroll
            for (int n = 0; n < NS; ++n) {
              state[n] = fast_exp2(delta * parameters.A_log2e[n]) * state[n] + B[n] * inflow;
              output += C[n] * state[n];
            }
            outputs[u] = output;
          }
#pragma unroll
          for (int u = 0; u < kPrefetch; ++u) {
            if (i + u >= count) break;
            if (a.sums_in_shared) {
              float* sum = sums + ((reversed ? high - 1 - (i + u) : low + i + u) - item.begin) * int64_t(blockDim.x);
              *sum = first_sum ? outputs[u] : *sum + outputs[u];
            } else {
              if (item.active) *y_it = from_float<T>(outputs[u]);
              y_it.advance(bounds.advance());
            }
          }
          if (a.sums_in_shared) bounds = reading;
        }
        edge = reversed ? low : high;
        if (a.chunk && edge % a.chunk == 0 && edge > 0 && edge < a.length && item.active) {
          const int64_t row = saved_row(a, item, k, edge / a.chunk - 1);
#pragma unroll
          for (int n = 0; n < NS; ++n) {
            if (n0 + n < a.p.states) {
              static_cast<float*>(a.p.saved_states)[state_index(a, item, row, n0 + n)] = state[n];
            }
          }
        }
      }
      if (a.p.last_state && item.active && edge == (reversed ? 0 : a.length)) {
        const int64_t row = last_state_row(a, item, k) * a.p.states;
#pragma unroll
        for (int n = 0; n < NS; ++n) {
          if (n0 + n < a.p.states) static_cast<float*>(a.p.last_state)[row + n0 + n] = state[n];
        }
      }
    }
  }
  if (a.sums_in_shared && item.active) write_route_sums<T>(a, item, sums, a.p.y);
}

int launch_scan(const RouteArguments& a, const RouteScanPlan& plan, int64_t blocks, void* stream) {
  const int threads = int(plan.warps * kWarpSize);
  const int64_t states = states_per_pass(a.p.states);
  const int64_t sums = a.sums_in_shared ? a.segment_length * threads : 0;
  const int64_t shared = (kStagedPositions * 2 * states + sums) * int64_t(sizeof(float));
#define SSM_SCAN(T, NS) launch_blocks(scan_forward<T, NS>, a, blocks, threads, shared, stream)
  SSM_DISPATCH(a.p.dtype, states, SSM_SCAN)
#undef SSM_SCAN
}

}  // namespace

int route_scan_forward_cuda(const RouteScanParams& p, const RouteScanPlan& plan, void* stream) {
  if (plan.n1) return route_scan_n1_forward_cuda(p, plan, stream);
  return for_each_axis<false>(
      p, plan, stream, [&](const RouteArguments& a, int64_t blocks) { return launch_scan(a, plan, blocks, stream); });
}

}  // namespace cuda_ops
