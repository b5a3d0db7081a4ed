// The wavefront scan's forward pass on CUDA.
#include "wavefront_scan.cuh"

namespace cuda_ops {
namespace {

template <class T, int NS>
__global__ void __launch_bounds__(kMaxRows* kTile, 1) wavefront_forward(WavefrontArguments a) {
  SSM_DYNAMIC_SHARED(shared);
  const int32_t slots = row_slots(a.rows), states_size = slots * NS * kTile, projections_size = projections_floats<NS>(a.rows);
  float* states_of = shared;                         // [2][slots][NS][16]: of this step and the one before
  float* projections = shared + 2 * states_size;     // of this step and the next
  const Seat seat(a);
  const int32_t strips = int32_t(ceil_div(a.p.height, a.rows)), steps = int32_t(a.p.width) + a.rows - 1;
  const float skip = seat.active && a.p.D ? static_cast<const float*>(a.p.D)[seat.channel] : 0.f;
  for (int64_t n0 = 0; n0 < a.p.states; n0 += NS) {
    const Rates<NS> rates(a, seat, n0, projections + 2 * projections_size);
    for (int32_t strip = 0; strip < strips; ++strip) {
      float state[NS];
#pragma unroll
      for (int n = 0; n < NS; ++n) {
        state[n] = 0.f;
        states_of[states_size + place_of<NS>(seat, seat.row, n)] = 0.f;
      }
      __syncthreads();
      Step<T, NS, false> step, next;
      step.load(a, seat, n0, strip, 0, false);
      fetch_outer<NS>(a, seat, n0, strip, 0, false, projections);
      step.hand_out(seat, projections);
      async_wait();
      __syncthreads();
      for (int32_t time = 0; time < steps; ++time) {
        next.load(a, seat, n0, strip, time + 1, false);
        fetch_outer<NS>(a, seat, n0, strip, time + 1, false, projections + ((time + 1) & 1) * projections_size);
        const float* own_projections = projections + (time & 1) * projections_size;
        advance<T, NS, false>(a, step, seat, rates, own_projections, states_of + ((time + 1) & 1) * states_size, state);
        float* here = states_of + (time & 1) * states_size;
#pragma unroll
        for (int n = 0; n < NS; ++n) here[place_of<NS>(seat, seat.row, n)] = state[n];
        if (step.valid) {
          const int64_t row = int64_t(strip) * a.rows + seat.row, column = time - seat.row;
          float output = n0 == 0 ? skip * step.u : 0.f;
#pragma unroll
          for (int n = 0; n < NS; ++n) output += own_projections[seat.row * 3 * NS + 2 * NS + n] * state[n];
          if (a.grouped) {
            const int64_t pixel = (seat.batch * a.p.height + row) * a.p.width + column;
            float* sum = static_cast<float*>(a.p.partial) + pixel * a.p.channels + seat.channel;
            if (n0 > 0) output += *sum;
            *sum = output;
          }
          if (n0 + NS >= a.p.states) at<T>(a.p.y, seat.batch, row, column)[seat.channel] = from_float<T>(output);
          if (seat.row == a.rows - 1 && strip + 1 < strips) {
            int64_t edge_row;
            float* edge = strip_edge(a, seat, strip, &edge_row);
#pragma unroll
            for (int n = 0; n < NS; ++n)
              if (n0 + n < a.p.states) edge[row_state(a, seat, edge_row, column, n0 + n)] = state[n];
          }
        }
        next.hand_out(seat, projections + ((time + 1) & 1) * projections_size);
        step = next;
        async_wait();
        __syncthreads();
      }
    }
  }
}

}  // namespace

int wavefront_scan_forward_cuda(const WavefrontScanParams& p, const WavefrontScanPlan& plan, void* stream) {
  const WavefrontArguments a = arguments_of(p, plan);
  const int64_t slots = row_slots(a.rows), states = states_at_a_time(p.states), blocks = p.batch * plan.tiles;
  const int64_t shared = 2 * states * (slots * (kTile + 3) + 3 * kTile) * int64_t(sizeof(float));
#define SSM_SCAN(T, NS) launch_blocks(wavefront_forward<T, NS>, a, blocks, int(slots * kTile), shared, stream)
  SSM_DISPATCH(p.dtype, states, SSM_SCAN)
#undef SSM_SCAN
}

}  // namespace cuda_ops
