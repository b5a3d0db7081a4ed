// The wavefront scan's backward pass on CUDA, and how both passes are divided.
#include "wavefront_scan.cuh"

namespace cuda_ops {
namespace {

// A block's shared memory, in floats: what a span of steps leaves, the gradients that rows hand up, sums, and projections.
__host__ __device__ __forceinline__ int64_t shared_floats(int64_t slots, int64_t states, int64_t span) {
  return slots * states * ((span + 5) * kTile + 2 * 3) + 6 * states * kTile;
}

// From the last strip to the first: forward through the strip, keeping the states of all its rows every `span` steps;
// then, span by span from the last one, forward once more with every step's states kept, and back.
template <class T, int NS>
__global__ void __launch_bounds__(kMaxRows* kTile, 1) wavefront_backward(WavefrontArguments a) {
  SSM_DYNAMIC_SHARED(shared);
  const int32_t slots = row_slots(a.rows), states_size = slots * NS * kTile, projections_size = projections_floats<NS>(a.rows);
  float* kept = shared;                                       // [span + 1][slots][NS][16]; first, those before the span
  float* handed_up = kept + (a.span + 1) * states_size;       // [2][slots][NS][16]: of this step and the one behind it
  float* grad_above = handed_up + 2 * states_size;            // [2][slots][NS][16]: sums without room in registers
  float* grad_before = grad_above + states_size;
  float* projections = grad_before + states_size;          // of this step and the next
  const Seat seat(a);
  const int32_t strips = int32_t(ceil_div(a.p.height, a.rows)), steps = int32_t(a.p.width) + a.rows - 1;
  const float skip = seat.active && a.p.D ? static_cast<const float*>(a.p.D)[seat.channel] : 0.f;
  const int64_t front_size = int64_t(a.rows) * a.p.states * kTile;
  float* fronts = static_cast<float*>(a.p.fronts) + (seat.batch * a.tiles + seat.tile) * a.fronts * front_size;
  const int64_t map_size = a.p.batch * a.p.height * a.p.width * a.p.channels;
  float grad_skip = 0.f;

  for (int64_t n0 = 0; n0 < a.p.states; n0 += NS) {
    const Rates<NS> rates(a, seat, n0, projections + 2 * projections_size);
#pragma unroll
    for (int n = 0; n < NS; ++n)
      grad_above[place_of<NS>(seat, seat.row, n)] = grad_before[place_of<NS>(seat, seat.row, n)] = 0.f;
    for (int32_t strip = strips - 1; strip >= 0; --strip) {
      const int64_t row = int64_t(strip) * a.rows + seat.row;
      Step<T, NS, true> step, next;
      float state[NS];
      __syncthreads();
#pragma unroll
      for (int n = 0; n < NS; ++n) {
        state[n] = 0.f;
        kept[states_size + place_of<NS>(seat, seat.row, n)] = 0.f;
      }
      step.load(a, seat, n0, strip, 0, false);
      fetch_outer<NS>(a, seat, n0, strip, 0, false, projections);
      step.hand_out(seat, projections);
      async_wait();
      __syncthreads();
      for (int32_t time = 0; time < steps; ++time) {
        next.load(a, seat, n0, strip, time + 1, false);
        fetch_outer<NS>(a, seat, n0, strip, time + 1, false, projections + ((time + 1) & 1) * projections_size);
        if (time % a.span == 0 && seat.row < a.rows) {
          float* front = fronts + time / a.span * front_size;
#pragma unroll
          for (int n = 0; n < NS; ++n)
            if (n0 + n < a.p.states) front[place_of<NS>(seat, 0, n) + seat.row * a.p.states * kTile] = state[n];
        }
        advance<T, NS, true>(a, step, seat, rates, projections + (time & 1) * projections_size,
                             kept + ((time + 1) & 1) * states_size, state);
#pragma unroll
        for (int n = 0; n < NS; ++n) kept[(time & 1) * states_size + place_of<NS>(seat, seat.row, n)] = state[n];
        next.hand_out(seat, projections + ((time + 1) & 1) * projections_size);
        step = next;
        async_wait();
        __syncthreads();
      }

      float carry[NS];
#pragma unroll
      for (int n = 0; n < NS; ++n) carry[n] = 0.f;
      for (int32_t front_of = a.fronts - 1; front_of >= 0; --front_of) {
        const int32_t begin = front_of * a.span, end = begin + a.span < steps ? begin + a.span : steps;
        const float* front = fronts + front_of * front_size;
#pragma unroll
        for (int n = 0; n < NS; ++n) {
          const bool given = seat.row < a.rows && n0 + n < a.p.states;
          state[n] = given ? front[place_of<NS>(seat, 0, n) + seat.row * a.p.states * kTile] : 0.f;
          kept[place_of<NS>(seat, seat.row, n)] = state[n];
        }
        step.load(a, seat, n0, strip, begin, false);
        fetch_outer<NS>(a, seat, n0, strip, begin, false, projections + (begin & 1) * projections_size);
        step.hand_out(seat, projections + (begin & 1) * projections_size);
        async_wait();
        __syncthreads();
        for (int32_t time = begin; time < end; ++time) {
          next.load(a, seat, n0, strip, time + 1, false);
          fetch_outer<NS>(a, seat, n0, strip, time + 1, false, projections + ((time + 1) & 1) * projections_size);
          float* earlier = kept + (time - begin) * states_size;
          advance<T, NS, true>(a, step, seat, rates, projections + (time & 1) * projections_size, earlier, state);
#pragma unroll
          for (int n = 0; n < NS; ++n) earlier[states_size + place_of<NS>(seat, seat.row, n)] = state[n];
          next.hand_out(seat, projections + ((time + 1) & 1) * projections_size);
          step = next;
          async_wait();
          __syncthreads();
        }

        step.load(a, seat, n0, strip, end - 1, true);
        fetch_outer<NS>(a, seat, n0, strip, end - 1, true, projections + ((end - 1) & 1) * projections_size);
        step.hand_out(seat, projections + ((end - 1) & 1) * projections_size);
        async_wait();
        __syncthreads();
        for (int32_t time = end - 1; time >= begin; --time) {
          next.load(a, seat, n0, strip, time - 1, true);
          fetch_outer<NS>(a, seat, n0, strip, time - 1, true, projections + ((time + 1) & 1) * projections_size);
          const float* earlier = kept + (time - begin) * states_size;
          const float* here = earlier + states_size;
          const float* row_of = projections + (time & 1) * projections_size + seat.row * 3 * NS;
          const float* outer_of = projections + (time & 1) * projections_size;
          const float* from_below = handed_up + ((time + 1) & 1) * states_size;
          float* to_above = handed_up + (time & 1) * states_size;
          const int64_t column = time - seat.row;
          const bool last_of_strip = seat.row == a.rows - 1 || row == a.p.height - 1;
          const bool alone = seat.row == 0 && last_of_strip && row < a.p.height - 1;
          const float weight = step.weight(), shift = step.exponent_shift(), dy = step.grad;
          const float inflow_above = step.above * step.u * weight, inflow_before = step.before * step.u * weight;
          float decay_above = 0.f, decay_before = 0.f, input_above = 0.f, input_before = 0.f;
          // One neighbour after the other: fewer products are held at a time. The carry is the states' gradient by then.
          float products[NS];
#pragma unroll
          for (int n = 0; n < NS; ++n) {
            products[n] = 0.f;
            if (!step.valid) {
              carry[n] = 0.f;
              continue;
            }
            carry[n] += row_of[2 * NS + n] * dy;
            if (!last_of_strip) {
              carry[n] += from_below[place_of<NS>(seat, seat.row + 1, n)];
            } else if (seat.row > 0) {
              carry[n] += outer_of[outer_place<NS>(a, seat, n)];
            } else if (alone && n0 + n < a.p.states) {
              carry[n] += static_cast<const float*>(a.p.edge)[row_state(a, seat, seat.batch, column, n0 + n)];
            }
            products[n] = dy * here[place_of<NS>(seat, seat.row, n)];
          }
          const float sum_C = sum_each<kTile>(products, seat.lane);
#pragma unroll
          for (int n = 0; n < NS; ++n) {
            products[n] = 0.f;
            if (!step.valid) continue;
            float up = 0.f;
            if (step.has_above) {
              const float state_above = seat.row > 0 ? earlier[place_of<NS>(seat, seat.row - 1, n)] : outer_of[outer_place<NS>(a, seat, n)];
              up = carry[n] * fast_exp2(step.above * rates.above(n) + shift);
              decay_above += up * state_above * rates.above(n);
              grad_above[place_of<NS>(seat, seat.row, n)] += up * state_above * step.above;
              input_above += row_of[n] * carry[n];
              products[n] = carry[n] * inflow_above;
            }
            if (seat.row > 0) {
              to_above[place_of<NS>(seat, seat.row, n)] = up;
            } else if (strip > 0 && n0 + n < a.p.states) {
              static_cast<float*>(a.p.edge)[row_state(a, seat, seat.batch, column, n0 + n)] = up;
            }
          }
          const float sum_above = sum_each<kTile>(products, seat.lane);
#pragma unroll
          for (int n = 0; n < NS; ++n) {
            products[n] = 0.f;
            float back = 0.f;
            if (step.valid && step.has_before) {
              const float state_before = earlier[place_of<NS>(seat, seat.row, n)];
              back = carry[n] * fast_exp2(step.before * rates.before(n) + shift);
              decay_before += back * state_before * rates.before(n);
              grad_before[place_of<NS>(seat, seat.row, n)] += back * state_before * step.before;
              input_before += row_of[NS + n] * carry[n];
              products[n] = carry[n] * inflow_before;
            }
            carry[n] = back;
          }
          const float sum_before = sum_each<kTile>(products, seat.lane);
          const bool on_map = seat.row < a.rows && row < a.p.height && column >= 0 && column < a.p.width;
          if (on_map && seat.lane < NS && n0 + seat.lane < a.p.states) {
            const int64_t n = n0 + seat.lane;
            at<float>(a.p.above.grad_B, seat.batch, row, column)[seat.tile * a.p.above.grad_B.route + n] = sum_above;
            at<float>(a.p.before.grad_B, seat.batch, row, column)[seat.tile * a.p.before.grad_B.route + n] = sum_before;
            at<float>(a.p.grad_C, seat.batch, row, column)[seat.tile * a.p.grad_C.route + n] = sum_C;
          }
          if (step.valid) {
            // Rates are A * log2(e), so what went through the exponents is scaled back.
            const float through_above = input_above * weight, through_before = input_before * weight;
            float grads[3] = {through_above * step.above + through_before * step.before,
                              decay_above * kLn2 + through_above * step.u,
                              decay_before * kLn2 + through_before * step.u};
            if (n0 == 0) {
              grads[0] += skip * dy;
              grad_skip += dy * step.u;
            }
            if (a.grouped) {
              const int64_t pixel = (seat.batch * a.p.height + row) * a.p.width + column;
              float* sums = static_cast<float*>(a.p.partial) + pixel * a.p.channels + seat.channel;
#pragma unroll
              for (int i = 0; i < 3; ++i) {
                if (n0 > 0) grads[i] += sums[i * map_size];
                sums[i * map_size] = grads[i];
              }
            }
            if (n0 + NS >= a.p.states) {
              at<T>(a.p.grad_x, seat.batch, row, column)[seat.channel] = from_float<T>(grads[0]);
              at<T>(a.p.above.grad_delta, seat.batch, row, column)[seat.channel] = from_float<T>(grads[1]);
              at<T>(a.p.before.grad_delta, seat.batch, row, column)[seat.channel] = from_float<T>(grads[2]);
            }
          }
          next.hand_out(seat, projections + ((time + 1) & 1) * projections_size);
          step = next;
          async_wait();
          __syncthreads();
        }
      }
    }
    if (!seat.active) continue;
    const int64_t part = (seat.batch * a.rows + seat.row) * a.p.channels + seat.channel;
#pragma unroll
    for (int n = 0; n < NS; ++n) {
      if (n0 + n >= a.p.states) continue;
      static_cast<float*>(a.p.above.grad_A)[part * a.p.states + n0 + n] =
          grad_above[place_of<NS>(seat, seat.row, n)];
      static_cast<float*>(a.p.before.grad_A)[part * a.p.states + n0 + n] =
          grad_before[place_of<NS>(seat, seat.row, n)];
    }
  }
  if (seat.active && a.p.grad_D)
    static_cast<float*>(a.p.grad_D)[(seat.batch * a.rows + seat.row) * a.p.channels + seat.channel] = grad_skip;
}

// Rows of a strip where no states are saved, and the most steps between those kept in a strip.
constexpr int64_t kRows = 8, kLongestSpan = 8;

}  // namespace

int wavefront_scan_backward_cuda(const WavefrontScanParams& p, const WavefrontScanPlan& plan, void* stream) {
  const WavefrontArguments a = arguments_of(p, plan);
  const int64_t slots = row_slots(a.rows), states = states_at_a_time(p.states), blocks = p.batch * plan.tiles;
  const int64_t shared = shared_floats(slots, states, plan.span) * int64_t(sizeof(float));
#define SSM_SCAN(T, NS) launch_blocks(wavefront_backward<T, NS>, a, blocks, int(slots * kTile), shared, stream)
  SSM_DISPATCH(p.dtype, states, SSM_SCAN)
#undef SSM_SCAN
}

int wavefront_scan_plan_cuda(const WavefrontScanParams& p, bool backward, WavefrontScanPlan* plan) {
  const int64_t longest = int64_t(1) << 30;  // steps are counted in 32 bits
  if (p.width >= longest || p.height >= longest || p.dtype == DataType::kFloat64) return cudaErrorInvalidValue;
  int64_t limit = 0;
  const int error = shared_memory_limit(&limit);
  if (error) return error;
  const int64_t wanted = p.chunk ? p.chunk : kRows;
  plan->rows = wanted < p.height ? wanted : p.height;
  if (plan->rows > kMaxRows) return cudaErrorInvalidConfiguration;
  plan->tiles = ceil_div(p.channels, kTile);
  plan->grouped = !fast_states(p.states);
  const int64_t states = states_at_a_time(p.states), slots = row_slots(int32_t(plan->rows));
  // Two blocks on a multiprocessor hide each other's waiting.
  plan->span = kLongestSpan;
  while (plan->span > 1 && backward && shared_floats(slots, states, plan->span) * int64_t(sizeof(float)) > limit / 2)
    plan->span /= 2;
  if (backward && shared_floats(slots, states, plan->span) * int64_t(sizeof(float)) > limit)
    return cudaErrorInvalidConfiguration;
  plan->fronts = ceil_div(p.width + plan->rows - 1, plan->span);
  return 0;
}

}  // namespace cuda_ops
