// The wavefront scan's backward pass on CUDA, and how both passes are divided.
#include "wavefront_step.cuh"

namespace cuda_ops {
namespace {

// A block's shared memory, in floats: what a span of steps leaves, the gradients that rows hand up, projections, rates, and
// the number of the task.
__host__ __device__ __forceinline__ int64_t shared_floats(int64_t slots, int64_t states, int64_t span) {
  return (span + 3) * (slots + 1) * states * kTile + 2 * slots * 3 * states + 2 * states * kTile + 2;
}

// A thread's way back along its row: where what it writes lies.
template <class T>
struct GradientCursor {
  T *x, *above, *before;  // gradients of these

  __device__ __forceinline__ GradientCursor(const WavefrontArguments& a, const Seat& seat, int32_t strip, int32_t time) {
    const int64_t row = int64_t(strip) * a.rows + seat.row, column = time - seat.row;
    x = at<T>(a.p.grad_x, seat.batch, row, column) + seat.channel;
    above = at<T>(a.p.above.grad_delta, seat.batch, row, column) + seat.channel;
    before = at<T>(a.p.before.grad_delta, seat.batch, row, column) + seat.channel;
  }

  __device__ __forceinline__ void back(const WavefrontArguments& a) {
    move_bytes(x, -a.bytes.grad_x), move_bytes(above, -a.bytes.grad_above), move_bytes(before, -a.bytes.grad_before);
  }
};

// Where a thread's states lie that a step back needs: its neighbours' and its own, of its pixel.
struct StatesAround {
  const float *above, *before, *here;
};

// Gradients of a pixel's values, over a group of states; and those of its projections, summed over the channels, of which a
// lane has the one of its number.
struct PixelGradients {
  float x, above, before;
  float B_above, B_before, C;
};

// A step back. `carry` is the gradient of a thread's states that comes from behind, and becomes that for the pixel before;
// the one for the pixel above is left at `to_above`. Gradients of the rates are added up.
template <int NS>
__device__ __forceinline__ PixelGradients go_back(const Step<NS>& step, const Seat& seat, const Rates<NS>& rates,
                                                  const float* projections, const StatesAround& states,
                                                  const float* from_below, float* to_above, float (&carry)[NS],
                                                  float (&grad_above)[NS], float (&grad_before)[NS]) {
  constexpr int kPack = Pack<NS>::kStates;
  const Places<NS> places(seat.lane);
  const float* row = projections + seat.row * 3 * NS;
  const float shift = step.exponent_shift();
  float decay_above = 0.f, decay_before = 0.f, input_above = 0.f, input_before = 0.f;
  float products[NS];
#pragma unroll
  for (int first = 0; first < NS; first += kPack) {
    const Pack<NS> handed = pack_at<NS>(from_below, first), here = pack_at<NS>(states.here, first);
    float C[kPack];
    read_row<kPack>(row + 2 * NS + places.state_at(first), C);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const int n = first + i;
      carry[n] += handed.of[i] + C[i] * step.grad;
      products[n] = step.grad * here.of[i];
    }
  }
  // The carry is the states' gradient now.
  PixelGradients grads;
  grads.C = sum_over_channels(products, seat.lane);
  sum_products(carry, step.inflow_above(), step.inflow_before(), seat.lane, &grads.B_above, &grads.B_before);
  // Nothing, however large, goes through a neighbour that the pixel does not take.
  if (step.has_above) {
#pragma unroll
    for (int first = 0; first < NS; first += kPack) {
      const Pack<NS> above = pack_at<NS>(states.above, first), rate = pack_at<NS>(rates.above, first);
      float B[kPack];
      read_row<kPack>(row + places.state_at(first), B);
      Pack<NS> up;
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const int n = first + i;
        up.of[i] = carry[n] * fast_exp2(step.above * rate.of[i] + shift);
        const float through = up.of[i] * above.of[i];
        decay_above += through * rate.of[i];
        grad_above[n] += through * step.above;
        input_above += B[i] * carry[n];
      }
      *reinterpret_cast<Pack<NS>*>(to_above + first * kTile) = up;
    }
  }
  if (step.has_before) {
#pragma unroll
    for (int first = 0; first < NS; first += kPack) {
      const Pack<NS> before = pack_at<NS>(states.before, first), rate = pack_at<NS>(rates.before, first);
      float B[kPack];
      read_row<kPack>(row + NS + places.state_at(first), B);
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const int n = first + i;
        const float back = carry[n] * fast_exp2(step.before * rate.of[i] + shift), through = back * before.of[i];
        decay_before += through * rate.of[i];
        grad_before[n] += through * step.before;
        input_before += B[i] * carry[n];
        carry[n] = back;
      }
    }
  }
  // Rates are A * log2(e), so what went through the exponents is scaled back.
  const float through_above = input_above * step.weight(), through_before = input_before * step.weight();
  grads.x = through_above * step.above + through_before * step.before;
  grads.above = step.has_above ? decay_above * kLn2 + through_above * step.u : 0.f;
  grads.before = step.has_before ? decay_before * kLn2 + through_before * step.u : 0.f;
  grads.B_above = step.has_above ? grads.B_above : 0.f, grads.B_before = step.has_before ? grads.B_before : 0.f;
  return grads;
}

// The strips are gone through from the last to the first.
__device__ __forceinline__ int32_t strip_of(const WavefrontArguments& a, int64_t task) {
  return a.strips - 1 - int32_t(task / a.maps);
}

// Adds sums over the tile's channels to those of the tiles before: gradients of B and C.
template <int NS>
struct ChannelSums {
  int64_t column;    // where among each of the gradients the thread has its row's column of number 0
  bool first, last;  // whether the tile is, of those that add up their sums
  uint32_t width;    // of the row, or 0 if the thread has no state of it

  __device__ __forceinline__ ChannelSums(const WavefrontArguments& a, const Seat& seat, int64_t n0, int32_t strip) {
    const GridTensor& C = a.p.grad_C;
    const int64_t row = int64_t(strip) * a.rows + seat.row, n = n0 + seat.lane;
    column = seat.batch * C.batch + row * C.row + seat.tile / kSummedTiles * C.route + n;
    first = seat.tile % kSummedTiles == 0, last = seat.tile + 1 == a.tiles || (seat.tile + 1) % kSummedTiles == 0;
    width = seat.row < seat.rows_on_map && seat.lane < NS && n < all_states<NS>(a) ? uint32_t(a.p.width) : 0;
  }

  // A step's lie where the row's states of the step did: those of B above, B before and C, one after the other.
  __device__ __forceinline__ static float* of_step(const Seat& seat, float* states) {
    return states + (seat.row + 1) * Places<NS>::kSlot + seat.lane;
  }
  __device__ __forceinline__ static void put(const Seat& seat, const PixelGradients& pixel, float* states) {
    __syncwarp();  // all of the row's threads have read these states, and nobody needs them any more
    float* sums = of_step(seat, states);
    if (seat.lane < NS) sums[0] = pixel.B_above, sums[NS] = pixel.B_before, sums[2 * NS] = pixel.C;
  }

  // Those of the steps from `begin` to `end`, whose states begin at `states`. All threads take part.
  __device__ __forceinline__ void add(const WavefrontArguments& a, const Seat& seat, const Relay& relay, int64_t n0,
                                      int32_t begin, int32_t end, float* states) const {
    const int64_t steps = a.p.width + a.rows - 1, added = n0 / NS * steps + steps - begin;  // with these
    relay.await_sums(a, first, added);
    int64_t index = column + (begin - seat.row) * a.p.grad_C.column;
    const float* sums = of_step(seat, states);
#pragma unroll 2
    for (int32_t time = begin; time < end; ++time) {
      if (uint32_t(time - seat.row) < width) {
        float* const targets[3] = {static_cast<float*>(a.p.above.grad_B.data) + index,
                                   static_cast<float*>(a.p.before.grad_B.data) + index,
                                   static_cast<float*>(a.p.grad_C.data) + index};
        float totals[3];
        // Another block has written them in this launch.
#pragma unroll
        for (int i = 0; i < 3; ++i) totals[i] = first ? 0.f : __ldcg(targets[i]);
#pragma unroll
        for (int i = 0; i < 3; ++i) *targets[i] = totals[i] + sums[i * NS];
      }
      index += a.p.grad_C.column, sums += states_floats<NS>(a.rows);
    }
    relay.tell_sums(a, last, added);
  }
};

// The gradients of the rates, of which the rows' are kept: sums over these in their order. The task's place is found again,
// since there are not the registers to remember it.
template <int NS>
__device__ __forceinline__ void write_rate_gradients(const WavefrontArguments& a, int64_t task, int64_t n0,
                                                     const float* above, const float* before) {
  const int32_t strip = strip_of(a, task);
  const Seat seat(a, task, strip);
  for (int32_t i = threadIdx.x; i < NS * kTile; i += blockDim.x) {
    const int32_t lane = i % kTile, place = Places<NS>(lane).of_state(i / kTile);
    const int64_t channel = seat.tile * kTile + lane, n = n0 + i / kTile;
    if (channel >= a.p.channels || n >= all_states<NS>(a)) continue;
    float sum_above = 0.f, sum_before = 0.f;
    for (int32_t r = 1; r <= a.rows; ++r) {
      sum_above += above[r * Places<NS>::kSlot + place];
      sum_before += before[r * Places<NS>::kSlot + place];
    }
    const int64_t part = ((strip * a.p.batch + seat.batch) * a.p.channels + channel) * all_states<NS>(a) + n;
    static_cast<float*>(a.p.above.grad_A)[part] = sum_above;
    static_cast<float*>(a.p.before.grad_A)[part] = sum_before;
  }
}

// That of the skip weight, likewise, by threads that have a row of their own.
__device__ __forceinline__ void write_skip_gradient(const WavefrontArguments& a, int64_t task, float own, float* rows) {
  const int32_t strip = strip_of(a, task);
  const Seat seat(a, task, strip);
  __syncthreads();
  rows[threadIdx.x] = own;
  __syncthreads();
  if (seat.row > 0 || !seat.active) return;
  for (int32_t r = 1; r < a.rows; ++r) own += rows[r * kTile + seat.lane];
  static_cast<float*>(a.p.grad_D)[(strip * a.p.batch + seat.batch) * a.p.channels + seat.channel] = own;
}

// From the last strip to the first, and in each span by span from the last one: forward from the saved front before it,
// with every step's states kept, and back. The way back alone waits for the strip below.
template <class T, int NS>
__global__ void __launch_bounds__(kMaxRows* kTile, 1) wavefront_backward(WavefrontArguments a) {
  SSM_DYNAMIC_SHARED(shared);
  constexpr int kPack = Pack<NS>::kStates;
  const int32_t slots = row_slots(a.rows);
  const int32_t states_size = states_floats<NS>(a.rows), projections_size = projections_floats<NS>(a.rows);
  float* kept = shared;                                  // a span's states; first, those before the span
  float* handed_up = kept + (a.span + 1) * states_size;  // of this step and the one behind it; last, from below the strip
  float* projections = handed_up + 2 * states_size;      // of this step and the next
  const int32_t steps = int32_t(a.p.width) + a.rows - 1;
  int64_t* number = reinterpret_cast<int64_t*>(projections + 2 * projections_size + Rates<NS>::kFloats);
  for (int64_t task; take_task(a, number, &task);) {
    const int32_t strip = strip_of(a, task);
    const Seat seat(a, task, strip);
    const Places<NS> places(seat.lane);
    const int32_t own = places.own(seat.row + 1), above_own = places.own(seat.row);
    // A row hands up in the slot of its number, what is below the strip in the last one.
    const int32_t up = places.own(seat.row), from_below = places.own(seat.row == a.rows - 1 ? slots : seat.row + 1);
    // The one row of gradients that all strips of the image hand up.
    float* edge = static_cast<float*>(a.p.edge) + row_state(a, seat, seat.batch, 0, 0);
    const float* row_above = strip > 0 ? strip_edge(a, seat, strip - 1) : edge;
    const bool hands_up = strip > 0 && seat.row == 0;
    const float skip = seat.active && a.p.D ? static_cast<const float*>(a.p.D)[seat.channel] : 0.f;
    float grad_skip = 0.f;
    Relay relay(a, task);
    for (int64_t n0 = 0; n0 < all_states<NS>(a); n0 += NS) {
      const Rates<NS> rates(a, seat, n0, projections + 2 * projections_size);
      float state[NS], carry[NS], grad_above[NS], grad_before[NS];
#pragma unroll
      for (int n = 0; n < NS; ++n) state[n] = carry[n] = grad_above[n] = grad_before[n] = 0.f;
      // What is right of the map or below it hands nothing up.
      for (int32_t i = threadIdx.x; i < 2 * states_size; i += blockDim.x) handed_up[i] = 0.f;
      Cursor<T, NS> cursor(a, seat, n0, strip);
      Outer<NS> above(a, seat, n0, row_above, strip > 0, steps);
      Outer<NS> below(a, seat, n0, edge, strip + 1 < a.strips, int32_t(a.p.width) - 1);
      const Fronts<NS> fronts(a, seat, n0, strip);
      const ChannelSums<NS> channel_sums(a, seat, n0, strip);
      Step<NS> step;
      // A step forward, from the strip's states a step before; what the next one needs is read ahead.
      auto forward = [&](int32_t time, const float* earlier, float* here) {
        cursor.move(a, 1), above.move(a, 1);
        const Step<NS> next = cursor.load(false);
        above.load(a, time + 1);
        if (seat.busy(a, time))
          advance<NS>(step, seat, rates, projections + (time & 1) * projections_size, earlier + above_own, state);
        put_states(here + own, state);
        next.hand_out(seat, projections + ((time + 1) & 1) * projections_size);
        above.hand_out(seat, here);
        step = next;
        __syncthreads();
      };

      GradientCursor<T> written(a, seat, strip, steps - 1);
      for (int32_t end = steps, begin; end > 0; end = begin) {
        const int32_t front = (end - 1) / int32_t(kFrontSteps) * int32_t(kFrontSteps);
        begin = front + (end - 1 - front) / a.span * a.span;
        // Steps before the span use two places by turns, so that the last one leaves its states in the first.
        float* start = kept + ((begin - front) & 1) * states_size;
        clear(state);
        if (front > 0 && seat.row < a.rows) fronts.get(a, front / int32_t(kFrontSteps) - 1, state);
        put_states(start + own, state);
        cursor.move(a, front - seat.row - cursor.column), above.move(a, front - end);
        step = cursor.load(false);
        above.load(a, front);
        step.hand_out(seat, projections + (front & 1) * projections_size);
        above.hand_out(seat, start);
        __syncthreads();
        // Where shared memory does not hold as many steps as there are from one front to the next.
        for (int32_t time = front; time < begin; ++time)
          forward(time, kept + ((begin - time) & 1) * states_size, kept + ((begin - time - 1) & 1) * states_size);
        for (int32_t time = begin; time < end; ++time) {
          float* earlier = kept + (time - begin) * states_size;
          forward(time, earlier, earlier + states_size);
        }

        above.move(a, begin - end);
        // At step t the last row is at column t - rows + 1, which is number steps - 1 - t from the right.
        relay.await(a, n0 / NS, steps - end);
        cursor.move(a, -1);
        step = cursor.load(true);
        below.load(a, end - a.rows), below.move(a, -1);
        step.hand_out(seat, projections + ((end - 1) & 1) * projections_size);
        below.hand_out(seat, handed_up + (end & 1) * states_size + slots * NS * kTile);
        __syncthreads();
        for (int32_t time = end - 1; time >= begin; --time) {
          const bool more = time > begin;
          Step<NS> next;
          if (more) {
            relay.await(a, n0 / NS, steps - time);
            cursor.move(a, -1);
            next = cursor.load(true);
            below.load(a, time - a.rows);
          }
          float* to_above = handed_up + (time & 1) * states_size;
          if (seat.busy(a, time)) {
            float* earlier = kept + (time - begin) * states_size;
            const PixelGradients pixel = go_back<NS>(
                step, seat, rates, projections + (time & 1) * projections_size,
                {earlier + above_own, earlier + own, earlier + states_size + own},
                handed_up + ((time + 1) & 1) * states_size + from_below, to_above + up, carry, grad_above, grad_before);
            if (hands_up && step.valid) {
              float* column = edge + (time * all_states<NS>(a) + n0) * a.p.channels;
#pragma unroll
              for (int first = 0; first < NS; first += kPack)
                put_pack(a, places, n0, first, pack_at<NS>(to_above + up, first), column);
            }
            channel_sums.put(seat, pixel, earlier + states_size);
            if (step.valid) {
              float grads[3] = {pixel.x, pixel.above, pixel.before};
              if (n0 == 0) {
                grads[0] += skip * step.grad;
                grad_skip += step.grad * step.u;
              }
              if (NS == kGroup && a.grouped) {
                const int64_t row = int64_t(strip) * a.rows + seat.row, column = time - seat.row;
                const int64_t index = (seat.batch * a.p.height + row) * a.p.width + column;
                const int64_t map_size = a.p.batch * a.p.height * a.p.width * a.p.channels;
                float* sums = static_cast<float*>(a.p.partial) + index * a.p.channels + seat.channel;
#pragma unroll
                for (int i = 0; i < 3; ++i) {
                  if (n0 > 0) grads[i] += sums[i * map_size];
                  sums[i * map_size] = grads[i];
                }
              }
              if (n0 + NS >= all_states<NS>(a)) {
                *written.x = from_float<T>(grads[0]);
                *written.above = from_float<T>(grads[1]);
                *written.before = from_float<T>(grads[2]);
              }
            }
          }
          written.back(a);
          if (more) {
            next.hand_out(seat, projections + ((time + 1) & 1) * projections_size);
            below.hand_out(seat, to_above + slots * NS * kTile), below.move(a, -1);
            step = next;
          }
          __syncthreads();
          relay.tell(a, n0 / NS, int32_t(a.p.width) - time);
        }
        channel_sums.add(a, seat, relay, n0, begin, end, kept + states_size);
      }

      // The rows' sums, in their order.
      put_states(kept + own, grad_above);
      put_states(kept + states_size + own, grad_before);
      __syncthreads();
      write_rate_gradients<NS>(a, *number, n0, kept, kept + states_size);
    }
    if (a.p.grad_D) write_skip_gradient(a, *number, grad_skip, kept);
  }
}

// Rows of a strip where no states are saved.
constexpr int64_t kRows = 8;

int64_t shared_bytes(int64_t rows, int64_t states, int64_t span) {
  return shared_floats(row_slots(int32_t(rows)), states, span) * int64_t(sizeof(float));
}

}  // namespace

int wavefront_backward_residents(const WavefrontScanParams& p, const WavefrontScanPlan& plan, int64_t* blocks) {
  const int threads = row_slots(int32_t(plan.rows)) * kTile;
  const int64_t shared = shared_bytes(plan.rows, plan.group, plan.span);
#define SSM_SCAN(T, NS) resident_blocks(wavefront_backward<T, NS>, threads, shared, blocks)
  SSM_DISPATCH(p.dtype, plan.group, SSM_SCAN)
#undef SSM_SCAN
}

int wavefront_scan_backward_cuda(const WavefrontScanParams& p, const WavefrontScanPlan& plan, void* stream) {
  const auto same_strides = [](const GridTensor& one, const GridTensor& other) {
    return one.batch == other.batch && one.row == other.row && one.column == other.column && one.route == other.route;
  };
  if (!same_strides(p.grad_C, p.above.grad_B) || !same_strides(p.grad_C, p.before.grad_B)) return cudaErrorInvalidValue;
  const WavefrontArguments a = arguments_of(p, plan);
  const int threads = row_slots(a.rows) * kTile;
  const int64_t shared = shared_bytes(plan.rows, plan.group, plan.span);
#define SSM_SCAN(T, NS) launch(wavefront_backward<T, NS>, a, plan.blocks, threads, shared, stream)
  SSM_DISPATCH(p.dtype, plan.group, SSM_SCAN)
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
  plan->group = states_at_a_time(p.states), plan->grouped = !fast_states(p.states);
  // Two blocks on a multiprocessor hide each other's waiting (the driver takes 1 KiB for each), unless they would have to
  // go forward from a front more than twice.
  const auto longest_span = [&](int64_t bytes) {
    int64_t span = kFrontSteps;
    while (span > 1 && shared_bytes(plan->rows, plan->group, span) > bytes) span /= 2;
    return span;
  };
  plan->span = longest_span((limit + 1024) / 2 - 1024);
  if (plan->span < kFrontSteps / 2) plan->span = longest_span(limit);
  if (backward && shared_bytes(plan->rows, plan->group, plan->span) > limit) return cudaErrorInvalidConfiguration;
  error = (backward ? wavefront_backward_residents : wavefront_forward_residents)(p, *plan, &plan->blocks);
  const int64_t tasks = plan->strips * p.batch * plan->tiles;
  if (tasks < plan->blocks) plan->blocks = tasks;
  return error;
}

}  // namespace cuda_ops
