// The wavefront scan's backward pass on CUDA, and how both passes are divided.
#include "wavefront_scan.cuh"

namespace cuda_ops {
namespace {

// A block's shared memory, in floats: what a span of steps leaves, the gradients that rows hand up, sums, and projections.
__host__ __device__ __forceinline__ int64_t shared_floats(int64_t slots, int64_t states, int64_t span) {
  return slots * states * ((span + 5) * kTile + 2 * 3) + 6 * states * kTile;
}

// From the last strip to the first: forward through the strip, keeping the states of all its rows every `span` steps;
// then, span by span from the last one, forward once more with every step's states kept, and back. The way back alone
// waits for the strip below.
template <class T, int NS>
__global__ void __launch_bounds__(kMaxRows* kTile, 1) wavefront_backward(WavefrontArguments a) {
  SSM_DYNAMIC_SHARED(shared);
  const int32_t slots = row_slots(a.rows), states_size = slots * NS * kTile, projections_size = projections_floats<NS>(a.rows);
  float* kept = shared;                                       // [span + 1][slots][NS][16]; first, those before the span
  float* handed_up = kept + (a.span + 1) * states_size;       // [2][slots][NS][16]: of this step and the one behind it
  float* grad_above = handed_up + 2 * states_size;            // [2][slots][NS][16]: sums without room in registers
  float* grad_before = grad_above + states_size;
  float* projections = grad_before + states_size;          // of this step and the next
  const int32_t steps = int32_t(a.p.width) + a.rows - 1;
  const int64_t front_size = int64_t(a.rows) * all_states<NS>(a) * kTile;
  float* fronts = static_cast<float*>(a.p.fronts) + blockIdx.x * a.fronts * front_size;
  const int64_t map_size = a.p.batch * a.p.height * a.p.width * a.p.channels;

  for (int64_t task; take_task(a, shared, &task);) {
    const Seat seat(a, task);
    const int32_t strip = a.strips - 1 - int32_t(task / a.maps);
    const int64_t row = int64_t(strip) * a.rows + seat.row;
    const float* row_above = strip > 0 ? strip_edge(a, seat, strip - 1) : nullptr;
    // The one row of gradients that all strips of the image hand up.
    float* edge = static_cast<float*>(a.p.edge) + row_state(a, seat, seat.batch, 0, 0);
    const float* row_below = strip + 1 < a.strips ? edge : nullptr;
    const float skip = seat.active && a.p.D ? static_cast<const float*>(a.p.D)[seat.channel] : 0.f;
    float grad_skip = 0.f;
    Relay relay(a, task);
    for (int64_t n0 = 0; n0 < all_states<NS>(a); n0 += NS) {
      const Rates<NS> rates(a, seat, n0, projections + 2 * projections_size);
      Step<T, NS, true> step, next;
      Outer<NS> above, below;
      float state[NS];
#pragma unroll
      for (int n = 0; n < NS; ++n) {
        grad_above[place_of<NS>(seat, seat.row, n)] = grad_before[place_of<NS>(seat, seat.row, n)] = 0.f;
        state[n] = 0.f;
        kept[states_size + place_of<NS>(seat, seat.row, n)] = 0.f;
      }
      step.load(a, seat, n0, strip, 0, false);
      above.load(a, seat, n0, row_above, 0);
      step.hand_out(seat, projections);
      above.hand_out(a, seat, false, projections);
      __syncthreads();
      for (int32_t time = 0; time < steps; ++time) {
        next.load(a, seat, n0, strip, time + 1, false);
        above.load(a, seat, n0, row_above, time + 1);
        if (time % a.span == 0 && seat.row < a.rows) {
          float* front = fronts + time / a.span * front_size;
#pragma unroll
          for (int n = 0; n < NS; ++n)
            if (n0 + n < all_states<NS>(a)) front[place_of<NS>(seat, 0, n) + seat.row * all_states<NS>(a) * kTile] = state[n];
        }
        advance<T, NS, true>(a, step, seat, rates, projections + (time & 1) * projections_size,
                             kept + ((time + 1) & 1) * states_size, state);
#pragma unroll
        for (int n = 0; n < NS; ++n) kept[(time & 1) * states_size + place_of<NS>(seat, seat.row, n)] = state[n];
        next.hand_out(seat, projections + ((time + 1) & 1) * projections_size);
        above.hand_out(a, seat, false, projections + ((time + 1) & 1) * projections_size);
        step = next;
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
          const bool given = seat.row < a.rows && n0 + n < all_states<NS>(a);
          state[n] = given ? front[place_of<NS>(seat, 0, n) + seat.row * all_states<NS>(a) * kTile] : 0.f;
          kept[place_of<NS>(seat, seat.row, n)] = state[n];
        }
        step.load(a, seat, n0, strip, begin, false);
        above.load(a, seat, n0, row_above, begin);
        step.hand_out(seat, projections + (begin & 1) * projections_size);
        above.hand_out(a, seat, false, projections + (begin & 1) * projections_size);
        __syncthreads();
        for (int32_t time = begin; time < end; ++time) {
          const bool more = time + 1 < end;
          if (more) {
            next.load(a, seat, n0, strip, time + 1, false);
            above.load(a, seat, n0, row_above, time + 1);
          }
          float* earlier = kept + (time - begin) * states_size;
          advance<T, NS, true>(a, step, seat, rates, projections + (time & 1) * projections_size, earlier, state);
#pragma unroll
          for (int n = 0; n < NS; ++n) earlier[states_size + place_of<NS>(seat, seat.row, n)] = state[n];
          if (more) {
            next.hand_out(seat, projections + ((time + 1) & 1) * projections_size);
            above.hand_out(a, seat, false, projections + ((time + 1) & 1) * projections_size);
            step = next;
          }
          __syncthreads();
        }

        // At step t the last row is at column t - rows + 1, which is number steps - 1 - t from the right.
        relay.await(a, n0 / NS, steps - end);
        step.load(a, seat, n0, strip, end - 1, true);
        above.load(a, seat, n0, row_above, end - 1);
        below.load(a, seat, n0, row_below, end - a.rows);
        step.hand_out(seat, projections + ((end - 1) & 1) * projections_size);
        above.hand_out(a, seat, false, projections + ((end - 1) & 1) * projections_size);
        below.hand_out(a, seat, true, projections + ((end - 1) & 1) * projections_size);
        __syncthreads();
        for (int32_t time = end - 1; time >= begin; --time) {
          const bool more = time > begin;
          if (more) {
            relay.await(a, n0 / NS, steps - time);
            next.load(a, seat, n0, strip, time - 1, true);
            above.load(a, seat, n0, row_above, time - 1);
            below.load(a, seat, n0, row_below, time - a.rows);
          }
          const float* earlier = kept + (time - begin) * states_size;
          const float* here = earlier + states_size;
          const float* row_of = projections + (time & 1) * projections_size + seat.row * 3 * NS;
          const float* outer_of = projections + (time & 1) * projections_size;
          const float* from_below = handed_up + ((time + 1) & 1) * states_size;
          float* to_above = handed_up + (time & 1) * states_size;
          const int64_t column = time - seat.row;
          const bool last_of_strip = seat.row == a.rows - 1 || row == a.p.height - 1;
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
            } else {
              carry[n] += outer_of[outer_place<NS>(a, seat, true, n)];
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
              const float state_above = seat.row > 0 ? earlier[place_of<NS>(seat, seat.row - 1, n)]
                                                    : outer_of[outer_place<NS>(a, seat, false, n)];
              up = carry[n] * fast_exp2(step.above * rates.above(n) + shift);
              decay_above += up * state_above * rates.above(n);
              grad_above[place_of<NS>(seat, seat.row, n)] += up * state_above * step.above;
              input_above += row_of[n] * carry[n];
              products[n] = carry[n] * inflow_above;
            }
            if (seat.row > 0) {
              to_above[place_of<NS>(seat, seat.row, n)] = up;
            } else if (strip > 0 && n0 + n < all_states<NS>(a)) {
              edge[(column * all_states<NS>(a) + n0 + n) * a.p.channels] = up;
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
          if (on_map && seat.lane < NS && n0 + seat.lane < all_states<NS>(a)) {
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
            if (NS == kGroup && a.grouped) {
              const int64_t pixel = (seat.batch * a.p.height + row) * a.p.width + column;
              float* sums = static_cast<float*>(a.p.partial) + pixel * a.p.channels + seat.channel;
#pragma unroll
              for (int i = 0; i < 3; ++i) {
                if (n0 > 0) grads[i] += sums[i * map_size];
                sums[i * map_size] = grads[i];
              }
            }
            if (n0 + NS >= all_states<NS>(a)) {
              at<T>(a.p.grad_x, seat.batch, row, column)[seat.channel] = from_float<T>(grads[0]);
              at<T>(a.p.above.grad_delta, seat.batch, row, column)[seat.channel] = from_float<T>(grads[1]);
              at<T>(a.p.before.grad_delta, seat.batch, row, column)[seat.channel] = from_float<T>(grads[2]);
            }
          }
          if (more) {
            next.hand_out(seat, projections + ((time + 1) & 1) * projections_size);
            above.hand_out(a, seat, false, projections + ((time + 1) & 1) * projections_size);
            below.hand_out(a, seat, true, projections + ((time + 1) & 1) * projections_size);
            step = next;
          }
          __syncthreads();
          relay.tell(a, n0 / NS, int32_t(a.p.width) - time);
        }
      }

      // The rows' sums, in their order.
      for (int32_t i = threadIdx.x; i < NS * kTile; i += blockDim.x) {
        const int64_t channel = seat.tile * kTile + i % kTile, n = n0 + i / kTile;
        if (channel >= a.p.channels || n >= all_states<NS>(a)) continue;
        float sum_above = 0.f, sum_before = 0.f;
        for (int32_t r = 0; r < a.rows; ++r) {
          sum_above += grad_above[r * NS * kTile + i];
          sum_before += grad_before[r * NS * kTile + i];
        }
        const int64_t part = ((strip * a.p.batch + seat.batch) * a.p.channels + channel) * all_states<NS>(a) + n;
        static_cast<float*>(a.p.above.grad_A)[part] = sum_above;
        static_cast<float*>(a.p.before.grad_A)[part] = sum_before;
      }
    }
    if (!a.p.grad_D) continue;
    __syncthreads();
    grad_above[seat.row * kTile + seat.lane] = grad_skip;
    __syncthreads();
    if (seat.row > 0 || !seat.active) continue;
    for (int32_t r = 1; r < a.rows; ++r) grad_skip += grad_above[r * kTile + seat.lane];
    static_cast<float*>(a.p.grad_D)[(strip * a.p.batch + seat.batch) * a.p.channels + seat.channel] = grad_skip;
  }
}

// Rows of a strip where no states are saved, and the most steps between those kept in a strip.
constexpr int64_t kRows = 8, kLongestSpan = 8;

int64_t shared_bytes(int64_t rows, int64_t states, int64_t span) {
  return shared_floats(row_slots(int32_t(rows)), states, span) * int64_t(sizeof(float));
}

}  // namespace

int wavefront_backward_residents(const WavefrontScanParams& p, const WavefrontScanPlan& plan, int64_t* blocks) {
  const int threads = row_slots(int32_t(plan.rows)) * kTile;
  const int64_t states = states_at_a_time(p.states), shared = shared_bytes(plan.rows, states, plan.span);
#define SSM_SCAN(T, NS) resident_blocks(wavefront_backward<T, NS>, threads, shared, blocks)
  SSM_DISPATCH(p.dtype, states, SSM_SCAN)
#undef SSM_SCAN
}

int wavefront_scan_backward_cuda(const WavefrontScanParams& p, const WavefrontScanPlan& plan, void* stream) {
  const WavefrontArguments a = arguments_of(p, plan);
  const int threads = row_slots(a.rows) * kTile;
  const int64_t states = states_at_a_time(p.states), shared = shared_bytes(plan.rows, states, plan.span);
#define SSM_SCAN(T, NS) launch(wavefront_backward<T, NS>, a, plan.blocks, threads, shared, stream)
  SSM_DISPATCH(p.dtype, states, SSM_SCAN)
#undef SSM_SCAN
}

int wavefront_scan_plan_cuda(const WavefrontScanParams& p, bool backward, WavefrontScanPlan* plan) {
  const int64_t longest = int64_t(1) << 30;  // steps are counted in 32 bits
  if (p.width >= longest || p.height >= longest || p.dtype == DataType::kFloat64) return cudaErrorInvalidValue;
  int64_t limit = 0;
  int error = shared_memory_limit(&limit);
  if (error) return error;
  const int64_t wanted = p.chunk ? p.chunk : kRows;
  plan->rows = wanted < p.height ? wanted : p.height;
  if (plan->rows > kMaxRows) return cudaErrorInvalidConfiguration;
  plan->strips = ceil_div(p.height, plan->rows), plan->tiles = ceil_div(p.channels, kTile);
  plan->grouped = !fast_states(p.states);
  const int64_t states = states_at_a_time(p.states);
  // Two blocks on a multiprocessor hide each other's waiting. The driver takes 1 KiB for each.
  const int64_t half = (limit + 1024) / 2 - 1024;
  plan->span = kLongestSpan;
  while (plan->span > 1 && backward && shared_bytes(plan->rows, states, plan->span) > half) plan->span /= 2;
  if (backward && shared_bytes(plan->rows, states, plan->span) > limit) return cudaErrorInvalidConfiguration;
  plan->fronts = ceil_div(p.width + plan->rows - 1, plan->span);
  error = (backward ? wavefront_backward_residents : wavefront_forward_residents)(p, *plan, &plan->blocks);
  const int64_t tasks = plan->strips * p.batch * plan->tiles;
  if (tasks < plan->blocks) plan->blocks = tasks;
  return error;
}

}  // namespace cuda_ops
