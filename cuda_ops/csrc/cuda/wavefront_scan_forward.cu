// The wavefront scan's forward pass on CUDA.
#include "wavefront_step.cuh"

namespace cuda_ops {
namespace {

// At most 128 registers: four blocks of 8 rows fit on a multiprocessor then.
template <class T, int NS>
__global__ void __launch_bounds__(kMaxRows* kTile, 2) wavefront_forward(WavefrontArguments a) {
  SSM_DYNAMIC_SHARED(shared);
  constexpr int kPack = Pack<NS>::kStates;
  const int32_t states_size = states_floats<NS>(a.rows), projections_size = projections_floats<NS>(a.rows);
  float* states_of = shared;                         // of this step and the one before
  float* projections = shared + 2 * states_size;     // of this step and the next
  const int32_t steps = int32_t(a.p.width) + a.rows - 1;
  // The task's number passes through the start of shared memory, which is the task's own from its first barrier on.
  for (int64_t task; take_task(a, reinterpret_cast<int64_t*>(shared), &task);) {
    const int32_t strip = int32_t(task / a.maps);
    const Seat seat(a, task, strip);
    const Places<NS> places(seat.lane);
    const int32_t own = places.own(seat.row + 1), above = places.own(seat.row);
    float* edge = strip_edge(a, seat, strip + 1 < a.strips ? strip : 0);
    const float* row_above = strip > 0 ? strip_edge(a, seat, strip - 1) : edge;
    const bool hands_on = strip + 1 < a.strips && seat.row == a.rows - 1;
    const float skip = seat.active && a.p.D ? static_cast<const float*>(a.p.D)[seat.channel] : 0.f;
    Relay relay(a, task);
    for (int64_t n0 = 0; n0 < all_states<NS>(a); n0 += NS) {
      const Rates<NS> rates(a, seat, n0, projections + 2 * projections_size);
      float state[NS];
      clear(state);
      put_states(states_of + states_size + own, state);
      relay.await(a, n0 / NS, 0);
      Cursor<T, NS> cursor(a, seat, n0, strip);
      Outer<NS> outer(a, seat, n0, row_above, strip > 0, 0);
      const Fronts<NS> fronts(a, seat, n0, strip);
      T* y = at<T>(a.p.y, seat.batch, int64_t(strip) * a.rows + seat.row, cursor.column) + seat.channel;
      Step<NS> step = cursor.load(false);
      outer.load(a, 0);
      step.hand_out(seat, projections);
      outer.hand_out(seat, states_of + states_size);
      __syncthreads();
      for (int32_t time = 0; time < steps; ++time) {
        relay.await(a, n0 / NS, time + 1);
        cursor.move(a, 1), outer.move(a, 1);
        const Step<NS> next = cursor.load(false);
        outer.load(a, time + 1);
        const float* own_projections = projections + (time & 1) * projections_size;
        float* here = states_of + (time & 1) * states_size;
        if (seat.busy(a, time))
          advance<NS>(step, seat, rates, own_projections, states_of + ((time + 1) & 1) * states_size + above, state);
        put_states(here + own, state);
        if (step.valid) {
          float output = n0 == 0 ? skip * step.u : 0.f;
          const float* C = own_projections + seat.row * 3 * NS + 2 * NS;
#pragma unroll
          for (int first = 0; first < NS; first += kPack) {
            float values[kPack];
            read_row<kPack>(C + places.state_at(first), values);
#pragma unroll
            for (int i = 0; i < kPack; ++i) output += values[i] * state[first + i];
          }
          if (NS == kGroup && a.grouped) {
            const int64_t row = int64_t(strip) * a.rows + seat.row, column = time - seat.row;
            const int64_t pixel = (seat.batch * a.p.height + row) * a.p.width + column;
            float* sum = static_cast<float*>(a.p.partial) + pixel * a.p.channels + seat.channel;
            if (n0 > 0) output += *sum;
            *sum = output;
          }
          if (n0 + NS >= all_states<NS>(a)) *y = from_float<T>(output);
          if (hands_on) {
            float* column = edge + ((time - seat.row) * all_states<NS>(a) + n0) * a.p.channels;
#pragma unroll
            for (int first = 0; first < NS; first += kPack)
              put_pack(a, places, n0, first, pack_at<NS>(here + own, first), column);
          }
        }
        const int32_t done = time + 1;
        if (a.p.fronts && done % int32_t(kFrontSteps) == 0 && done < steps && seat.row < a.rows)
          fronts.put(a, done / int32_t(kFrontSteps) - 1, state);
        move_bytes(y, a.bytes.y);
        next.hand_out(seat, projections + ((time + 1) & 1) * projections_size);
        outer.hand_out(seat, here);
        step = next;
        __syncthreads();
        relay.tell(a, n0 / NS, time + 2 - a.rows);
      }
    }
  }
}

int64_t shared_bytes(const WavefrontArguments& a, int64_t states) {
  return 2 * states * (row_slots(a.rows) * (kTile + 3) + 2 * kTile) * int64_t(sizeof(float));
}

}  // namespace

int wavefront_forward_residents(const WavefrontScanParams& p, const WavefrontScanPlan& plan, int64_t* blocks) {
  const WavefrontArguments a = arguments_of(p, plan);
  const int64_t shared = shared_bytes(a, plan.group);
#define SSM_SCAN(T, NS) resident_blocks(wavefront_forward<T, NS>, row_slots(a.rows) * kTile, shared, blocks)
  SSM_DISPATCH(p.dtype, plan.group, SSM_SCAN)
#undef SSM_SCAN
}

int wavefront_scan_forward_cuda(const WavefrontScanParams& p, const WavefrontScanPlan& plan, void* stream) {
  const WavefrontArguments a = arguments_of(p, plan);
  const int64_t shared = shared_bytes(a, plan.group);
#define SSM_SCAN(T, NS) launch(wavefront_forward<T, NS>, a, plan.blocks, row_slots(a.rows) * kTile, shared, stream)
  SSM_DISPATCH(p.dtype, plan.group, SSM_SCAN)
#undef SSM_SCAN
}

}  // namespace cuda_ops
