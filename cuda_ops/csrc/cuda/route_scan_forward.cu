// The route scan's forward pass on CUDA.
#include "route_scan.cuh"

namespace cuda_ops {
namespace {

// Scans a block's segment along each of the routes in turn. Sums over routes lie in shared memory, a column for each
// thread, and go to global memory once.
template <class T, int NS>
__global__ void __launch_bounds__(128, 1) scan_forward(RouteArguments a) {
  SSM_DYNAMIC_SHARED(shared);
  float* projections = shared;                              // [kPiece][2 * NS]: B, then C
  float* sums = shared + kPiece * 2 * NS + threadIdx.x;     // [segment][threads]
  const Task task = task_of_block(a);
  for (int r = 0; r < a.count; ++r) {
    const int64_t k = a.index[r];
    const bool down = runs_backwards(a.p.route[k]);
    for (int64_t n0 = 0; n0 < a.p.states; n0 += NS) {
      const bool first = r == 0 && n0 == 0;
      Parameters<NS> parameters;
      parameters.load(a, task, k, n0);
      const bool with_skip = task.active && a.p.D && n0 == 0;
      const float skip = with_skip ? static_cast<const float*>(a.p.D)[k * a.p.channels + task.channel] : 0.f;
      float state[NS];
#pragma unroll
      for (int n = 0; n < NS; ++n) {
        const bool given = task.active && a.segments > 1 && n0 + n < a.p.states;
        const int64_t row = given ? segment_row(a, task, k) : 0;
        state[n] = given ? static_cast<const float*>(a.p.ends)[state_index(a, task, row, n0 + n)] : 0.f;
      }
      int32_t edge = down ? task.end : task.begin;  // the next piece's
      while (down ? edge > task.begin : edge < task.end) {
        // A piece does not go beyond where states are saved.
        int32_t low = edge, high = edge;
        if (down) {
          const int32_t saved_at = a.chunk ? (edge - 1) / a.chunk * a.chunk : 0;
          low = saved_at > task.begin ? saved_at : task.begin;
          if (high - low > kPiece) low = high - kPiece;
        } else {
          high = a.chunk ? (edge / a.chunk + 1) * a.chunk : task.end;
          if (high > task.end) high = task.end;
          if (high - low > kPiece) high = low + kPiece;
        }
        const int32_t count = high - low;
        __syncthreads();
        fetch<T, NS>(a, task, a.p.B, k, n0, low, count, 2 * NS, projections);
        fetch<T, NS>(a, task, a.p.C, k, n0, low, count, 2 * NS, projections + NS);
        __syncthreads();
        const Place start = place(a, task.line, down ? high - 1 : low);
        Ends ends(a, start, down);
        auto x = walk<const T>(a, a.p.x, task, 0, task.channel, start, down);
        auto delta = walk<const T>(a, a.p.delta, task, k, task.channel, start, down);
        auto y = walk_contiguous<T>(a, a.p.result, task, start, down);
        for (int32_t i = 0; i < count; i += kAhead) {
          float inputs[kAhead], raws[kAhead], outputs[kAhead];
          Ends reading = ends;
#pragma unroll
          for (int u = 0; u < kAhead; ++u) {
            const bool given = task.active && i + u < count;
            inputs[u] = given ? to_float(*x.at) : 0.f;
            raws[u] = given ? to_float(*delta.at) : 0.f;
            const bool over_end = reading.advance();
            x.advance(over_end), delta.advance(over_end);
          }
#pragma unroll
          for (int u = 0; u < kAhead; ++u) {
            if (i + u >= count) break;
            const float d = step_size(a, raws[u] + parameters.bias), inflow = d * inputs[u];
            const float* row = projections + (down ? count - 1 - (i + u) : i + u) * 2 * NS;
            float B[NS], C[NS];
            read_row<NS>(row, B);
            read_row<NS>(row + NS, C);
            float output = skip * inputs[u];
#pragma unroll
            for (int n = 0; n < NS; ++n) {
              state[n] = fast_exp2(d * parameters.rate[n]) * state[n] + B[n] * inflow;
              output += C[n] * state[n];
            }
            outputs[u] = output;
          }
#pragma unroll
          for (int u = 0; u < kAhead; ++u) {
            if (i + u >= count) break;
            if (a.tiled) {
              float* sum = sums + ((down ? high - 1 - (i + u) : low + i + u) - task.begin) * int64_t(blockDim.x);
              *sum = first ? outputs[u] : *sum + outputs[u];
            } else {
              if (task.active) *y.at = from_float<T>(outputs[u]);
              y.advance(ends.advance());
            }
          }
          if (a.tiled) ends = reading;
        }
        edge = down ? low : high;
        if (a.chunk && edge % a.chunk == 0 && edge > 0 && edge < a.length && task.active) {
          const int64_t row = saved_row(a, task, k, edge / a.chunk - 1);
#pragma unroll
          for (int n = 0; n < NS; ++n)
            if (n0 + n < a.p.states) static_cast<float*>(a.p.saved)[state_index(a, task, row, n0 + n)] = state[n];
        }
      }
      if (a.p.last && task.active && edge == (down ? 0 : a.length)) {
        const int64_t row = ((task.batch * a.p.routes + k) * a.p.channels + task.channel) * a.p.states;
#pragma unroll
        for (int n = 0; n < NS; ++n)
          if (n0 + n < a.p.states) static_cast<float*>(a.p.last)[row + n0 + n] = state[n];
      }
    }
  }
  if (a.tiled && task.active) write_sums<T>(a, task, sums, a.p.y);
}

int launch_scans(const RouteArguments& a, const RouteScanPlan& plan, int64_t blocks, void* stream) {
  const int threads = int(plan.warps * kWarp);
  const int64_t states = states_at_a_time(a.p.states);
  const int64_t shared = (kPiece * 2 * states + (a.tiled ? a.segment * threads : 0)) * int64_t(sizeof(float));
#define SSM_SCAN(T, NS) launch_blocks(scan_forward<T, NS>, a, blocks, threads, shared, stream)
  SSM_DISPATCH(a.p.dtype, states, SSM_SCAN)
#undef SSM_SCAN
}

}  // namespace

int route_scan_forward_cuda(const RouteScanParams& p, const RouteScanPlan& plan, void* stream) {
  if (plan.one_state) return one_state_forward_cuda(p, plan, stream);
  return for_each_axis<false>(p, plan, stream, [&](const RouteArguments& a, int64_t blocks) {
    return launch_scans(a, plan, blocks, stream);
  });
}

}  // namespace cuda_ops
