// The wavefront scan's forward pass on CUDA.
#include "wavefront_scan.cuh"

namespace cuda_ops {
namespace {

// At most 128 registers: four blocks of 8 rows fit on a multiprocessor then.
template <class T, int NS>
__global__ void __launch_bounds__(kMaxRows* kTile, 2) wavefront_forward(WavefrontArguments a) {
  SSM_DYNAMIC_SHARED(shared);
  const int32_t slots = row_slots(a.rows), states_size = slots * NS * kTile, projections_size = projections_floats<NS>(a.rows);
  float* states_of = shared;                         // [2][slots][NS][16]: of this step and the one before
  float* projections = shared + 2 * states_size;     // of this step and the next
  const int32_t steps = int32_t(a.p.width) + a.rows - 1;
  for (int64_t task; take_task(a, shared, &task);) {
    const Seat seat(a, task);
    const int32_t strip = int32_t(task / a.maps);
    const float* row_above = strip > 0 ? strip_edge(a, seat, strip - 1) : nullptr;
    float* own_edge = strip + 1 < a.strips ? strip_edge(a, seat, strip) : nullptr;
    const float skip = seat.active && a.p.D ? static_cast<const float*>(a.p.D)[seat.channel] : 0.f;
    Relay relay(a, task);
    for (int64_t n0 = 0; n0 < all_states<NS>(a); n0 += NS) {
      const Rates<NS> rates(a, seat, n0, projections + 2 * projections_size);
      float state[NS];
#pragma unroll
      for (int n = 0; n < NS; ++n) {
        state[n] = 0.f;
        states_of[states_size + place_of<NS>(seat, seat.row, n)] = 0.f;
      }
      relay.await(a, n0 / NS, 0);
      Step<T, NS, false> step, next;
      Outer<NS> above;
      step.load(a, seat, n0, strip, 0, false);
      above.load(a, seat, n0, row_above, 0);
      step.hand_out(seat, projections);
      above.hand_out(a, seat, false, projections);
      __syncthreads();
      for (int32_t time = 0; time < steps; ++time) {
        relay.await(a, n0 / NS, time + 1);
        next.load(a, seat, n0, strip, time + 1, false);
        above.load(a, seat, n0, row_above, time + 1);
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
          if (NS == kGroup && a.grouped) {
            const int64_t pixel = (seat.batch * a.p.height + row) * a.p.width + column;
            float* sum = static_cast<float*>(a.p.partial) + pixel * a.p.channels + seat.channel;
            if (n0 > 0) output += *sum;
            *sum = output;
          }
          if (n0 + NS >= all_states<NS>(a)) at<T>(a.p.y, seat.batch, row, column)[seat.channel] = from_float<T>(output);
          if (seat.row == a.rows - 1 && own_edge) {
            float* target = own_edge + (column * all_states<NS>(a) + n0) * a.p.channels;
#pragma unroll
            for (int n = 0; n < NS; ++n)
              if (n0 + n < all_states<NS>(a)) target[n * a.p.channels] = state[n];
          }
        }
        next.hand_out(seat, projections + ((time + 1) & 1) * projections_size);
        above.hand_out(a, seat, false, projections + ((time + 1) & 1) * projections_size);
        step = next;
        __syncthreads();
        relay.tell(a, n0 / NS, time + 2 - a.rows);
      }
    }
  }
}

int64_t shared_bytes(const WavefrontArguments& a, int64_t states) {
  return 2 * states * (row_slots(a.rows) * (kTile + 3) + 3 * kTile) * int64_t(sizeof(float));
}

}  // namespace

int wavefront_forward_residents(const WavefrontScanParams& p, const WavefrontScanPlan& plan, int64_t* blocks) {
  const WavefrontArguments a = arguments_of(p, plan);
  const int64_t states = states_at_a_time(p.states), shared = shared_bytes(a, states);
#define SSM_SCAN(T, NS) resident_blocks(wavefront_forward<T, NS>, row_slots(a.rows) * kTile, shared, blocks)
  SSM_DISPATCH(p.dtype, states, SSM_SCAN)
#undef SSM_SCAN
}

int wavefront_scan_forward_cuda(const WavefrontScanParams& p, const WavefrontScanPlan& plan, void* stream) {
  const WavefrontArguments a = arguments_of(p, plan);
  const int64_t states = states_at_a_time(p.states), shared = shared_bytes(a, states);
#define SSM_SCAN(T, NS) launch(wavefront_forward<T, NS>, a, plan.blocks, row_slots(a.rows) * kTile, shared, stream)
  SSM_DISPATCH(p.dtype, states, SSM_SCAN)
#undef SSM_SCAN
}

}  // namespace cuda_ops
