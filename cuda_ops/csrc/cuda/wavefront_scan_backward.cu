// Backward pass of the wavefront scan on CUDA, and the plan of both passes.
#include "wavefront_step.cuh"

namespace cuda_ops {
namespace {

// A block's shared memory, in floats: the states of a span and before it, two steps of carries to the row above,
// projections of two steps, A, and the work item id.
__host__ __device__ __forceinline__ int64_t shared_floats(int64_t slots, int64_t states, int64_t span) {
  return (span + 3) * (slots + 1) * states * kTileChannels + 2 * slots * 3 * states + 2 * states * kTileChannels + 2;
}

// Pointers to the gradients of the thread's pixel, moving backward along its row.
template <class T>
struct GradientIterator {
  T* x;
  T* delta_above;
  T* delta_before;

  __device__ __forceinline__ GradientIterator(const WavefrontArguments& a, const WorkItem& item, int32_t strip,
                                              int32_t time) {
    const int64_t row = int64_t(strip) * a.rows + item.row;
    const int64_t column = time - item.row;
    x = pixel_pointer<T>(a.p.grad_x, item.batch, row, column) + item.channel;
    delta_above = pixel_pointer<T>(a.p.above.grad_delta, item.batch, row, column) + item.channel;
    delta_before = pixel_pointer<T>(a.p.before.grad_delta, item.batch, row, column) + item.channel;
  }

  __device__ __forceinline__ void step_back(const WavefrontArguments& a) {
    advance_bytes(x, -a.bytes.grad_x);
    advance_bytes(delta_above, -a.bytes.grad_above);
    advance_bytes(delta_before, -a.bytes.grad_before);
  }
};

// Where the states of a thread's pixel and of its neighbours lie in shared memory.
struct NeighbourStates {
  const float* above;
  const float* before;
  const float* here;
};

// Gradients of a pixel's inputs over a group of states. Those of the projections are summed over the channels, and lane
// i holds state i.
struct PixelGradients {
  float x;
  float delta_above;
  float delta_before;
  float B_above;
  float B_before;
  float C;
};

// Differentiates one step. `carry` is the gradient of the pixel's states from the next column, and becomes that for the
// previous column; the gradient for the pixel above is stored to `to_above`. Gradients of A are accumulated.
template <int NS>
__device__ __forceinline__ PixelGradients step_backward(const PixelInputs<NS>& pixel, const WorkItem& item,
                                                        const StagedA<NS>& A_log2e, const float* projections,
                                                        const NeighbourStates& states, const float* from_below,
                                                        float* to_above, float (&carry)[NS], float (&grad_A_above)[NS],
                                                        float (&grad_A_before)[NS]) {
  constexpr int kPack = kPackStates<NS>;
  const StateLayout<NS> layout(item.lane);
  const float* row = projections + item.row * 3 * NS;
  const float shift = pixel.exponent_shift();
  float exponent_above = 0.f;
  float exponent_before = 0.f;
  float inflow_above = 0.f;
  float inflow_before = 0.f;
  float products[NS];
#pragma unroll
  for (int first = 0; first < NS; first += kPack) {
    const StatePack<NS> below = load_pack<NS>(from_below, first);
    const StatePack<NS> here = load_pack<NS>(states.here, first);
    float C[kPack];
    load_row<kPack>(row + 2 * NS + layout.state_at(first), C);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const int n = first + i;
      carry[n] += below.val[i] + C[i] * pixel.grad_y;
      products[n] = pixel.grad_y * here.val[i];
    }
  }
  // From here on, the carry is the gradient of the pixel's states.
  PixelGradients gradients;
  gradients.C = sum_over_channels(products, item.lane);
  sum_products(carry, pixel.inflow_above(), pixel.inflow_before(), item.lane, &gradients.B_above, &gradients.B_before);
  // An infinite gradient must not pass through a neighbour that does not exist.
  if (pixel.has_above) {
#pragma unroll
    for (int first = 0; first < NS; first += kPack) {
      const StatePack<NS> above = load_pack<NS>(states.above, first);
      const StatePack<NS> A = load_pack<NS>(A_log2e.above, first);
      float B[kPack];
      load_row<kPack>(row + layout.state_at(first), B);
      StatePack<NS> up;
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const int n = first + i;
        up.val[i] = carry[n] * fast_exp2(pixel.delta_above * A.val[i] + shift);
        const float through_decay = up.val[i] * above.val[i];
        exponent_above += through_decay * A.val[i];
        grad_A_above[n] += through_decay * pixel.delta_above;
        inflow_above += B[i] * carry[n];
      }
      *reinterpret_cast<StatePack<NS>*>(to_above + first * kTileChannels) = up;
    }
  }
  if (pixel.has_before) {
#pragma unroll
    for (int first = 0; first < NS; first += kPack) {
      const StatePack<NS> before = load_pack<NS>(states.before, first);
      const StatePack<NS> A = load_pack<NS>(A_log2e.before, first);
      float B[kPack];
      load_row<kPack>(row + NS + layout.state_at(first), B);
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const int n = first + i;
        const float back = carry[n] * fast_exp2(pixel.delta_before * A.val[i] + shift);
        const float through_decay = back * before.val[i];
        exponent_before += through_decay * A.val[i];
        grad_A_before[n] += through_decay * pixel.delta_before;
        inflow_before += B[i] * carry[n];
        carry[n] = back;
      }
    }
  }
  // A_log2e contains log2(e), so the exponents' gradients are scaled back.
  const float weighted_above = inflow_above * pixel.weight();
  const float weighted_before = inflow_before * pixel.weight();
  gradients.x = weighted_above * pixel.delta_above + weighted_before * pixel.delta_before;
  gradients.delta_above = pixel.has_above ? exponent_above * kLn2 + weighted_above * pixel.x : 0.f;
  gradients.delta_before = pixel.has_before ? exponent_before * kLn2 + weighted_before * pixel.x : 0.f;
  gradients.B_above = pixel.has_above ? gradients.B_above : 0.f;
  gradients.B_before = pixel.has_before ? gradients.B_before : 0.f;
  return gradients;
}

// Strips are processed from the last to the first.
__device__ __forceinline__ int32_t strip_of(const WavefrontArguments& a, int64_t id) {
  return a.strips - 1 - int32_t(id / a.maps);
}

// Adds the gradients of B and C, summed over the tile's channels, to those of the previous tiles of the same part.
template <int NS>
struct ProjectionGradients {
  int64_t column;  // index of column 0 of the thread's row, in each of the three gradients
  bool first;      // whether the tile is the first of its part
  bool last;       // whether the tile is the last of its part
  uint32_t width;  // of the row, or 0 if the thread has no state of it

  __device__ __forceinline__ ProjectionGradients(const WavefrontArguments& a, const WorkItem& item, int64_t n0,
                                                 int32_t strip) {
    const GridTensor& C = a.p.grad_C;
    const int64_t row = int64_t(strip) * a.rows + item.row;
    const int64_t n = n0 + item.lane;
    column = item.batch * C.batch + row * C.row + item.tile / kTilesPerPart * C.route + n;
    first = item.tile % kTilesPerPart == 0;
    last = item.tile + 1 == a.tiles || (item.tile + 1) % kTilesPerPart == 0;
    width = item.row < item.map_rows && item.lane < NS && n < total_states<NS>(a) ? uint32_t(a.p.width) : 0;
  }

  // A step's sums replace the row's states of that step: B above, B before and C, one after the other.
  __device__ __forceinline__ static float* staged(const WorkItem& item, float* states) {
    return states + (item.row + 1) * StateLayout<NS>::kSlotFloats + item.lane;
  }
  __device__ __forceinline__ static void stage(const WorkItem& item, const PixelGradients& pixel, float* states) {
    __syncwarp();  // all threads of the row have read these states, which are not needed any more
    float* sums = staged(item, states);
    if (item.lane < NS) {
      sums[0] = pixel.B_above;
      sums[NS] = pixel.B_before;
      sums[2 * NS] = pixel.C;
    }
  }

  // Adds the staged sums of steps [begin, end). All threads must call.
  __device__ __forceinline__ void add(const WavefrontArguments& a, const WorkItem& item, const ProgressFlag& progress,
                                      int64_t n0, int32_t begin, int32_t end, float* states) const {
    const int64_t steps = a.p.width + a.rows - 1;
    const int64_t added = n0 / NS * steps + steps - begin;  // steps, including these
    progress.wait_for_sums(a, first, added);
    int64_t index = column + (begin - item.row) * a.p.grad_C.column;
    const float* sums = staged(item, states);
#pragma unroll 2
    for (int32_t time = begin; time < end; ++time) {
      if (uint32_t(time - item.row) < width) {
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
      index += a.p.grad_C.column;
      sums += state_floats<NS>(a.rows);
    }
    progress.publish_sums(a, last, added);
  }
};

// Writes the gradients of A: the rows' sums, added in their order. The work item is derived from its id again, to save
// registers.
template <int NS>
__device__ __forceinline__ void write_A_gradients(const WavefrontArguments& a, int64_t id, int64_t n0,
                                                  const float* above, const float* before) {
  const int32_t strip = strip_of(a, id);
  const WorkItem item(a, id, strip);
  for (int32_t i = threadIdx.x; i < NS * kTileChannels; i += blockDim.x) {
    const int32_t lane = i % kTileChannels;
    const int32_t offset = StateLayout<NS>(lane).offset_of(i / kTileChannels);
    const int64_t channel = item.tile * kTileChannels + lane;
    const int64_t n = n0 + i / kTileChannels;
    if (channel >= a.p.channels || n >= total_states<NS>(a)) continue;
    float sum_above = 0.f;
    float sum_before = 0.f;
    for (int32_t r = 1; r <= a.rows; ++r) {
      sum_above += above[r * StateLayout<NS>::kSlotFloats + offset];
      sum_before += before[r * StateLayout<NS>::kSlotFloats + offset];
    }
    const int64_t index = ((strip * a.p.batch + item.batch) * a.p.channels + channel) * total_states<NS>(a) + n;
    static_cast<float*>(a.p.above.grad_A)[index] = sum_above;
    static_cast<float*>(a.p.before.grad_A)[index] = sum_before;
  }
}

// Writes the gradient of D in the same way; `rows` is a buffer of one float per thread.
__device__ __forceinline__ void write_D_gradient(const WavefrontArguments& a, int64_t id, float grad_D, float* rows) {
  const int32_t strip = strip_of(a, id);
  const WorkItem item(a, id, strip);
  __syncthreads();
  rows[threadIdx.x] = grad_D;
  __syncthreads();
  if (item.row > 0 || !item.active) return;
  for (int32_t r = 1; r < a.rows; ++r) grad_D += rows[r * kTileChannels + item.lane];
  static_cast<float*>(a.p.grad_D)[(strip * a.p.batch + item.batch) * a.p.channels + item.channel] = grad_D;
}

// Writes the gradients of a pixel's x and deltas, once they are summed over all groups of states.
template <class T, int NS>
__device__ __forceinline__ void write_pixel_gradients(const WavefrontArguments& a, const WorkItem& item, int32_t strip,
                                                      int32_t time, int64_t n0, float skip,
                                                      const PixelInputs<NS>& pixel, const PixelGradients& gradients,
                                                      const GradientIterator<T>& targets, float& grad_D) {
  float values[3] = {gradients.x, gradients.delta_above, gradients.delta_before};
  if (n0 == 0) {
    values[0] += skip * pixel.grad_y;
    grad_D += pixel.grad_y * pixel.x;
  }
  if (NS == kStateGroup && a.grouped) {
    const int64_t map_size = a.p.batch * a.p.height * a.p.width * a.p.channels;
    float* sums = group_sum(a, item, strip, time);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      if (n0 > 0) values[i] += sums[i * map_size];
      sums[i * map_size] = values[i];
    }
  }
  if (n0 + NS >= total_states<NS>(a)) {
    *targets.x = from_float<T>(values[0]);
    *targets.delta_above = from_float<T>(values[1]);
    *targets.delta_before = from_float<T>(values[2]);
  }
}

// A block's shared memory.
template <int NS>
struct SharedMemory {
  int32_t states_size;
  int32_t projections_size;
  float* span_states;  // [span + 1]: before the span, then after each of its steps
  float* carries;  // gradients for the row above, of this step and the previous one; last slot: from below the strip
  float* projections;  // of this step and the next

  __device__ __forceinline__ SharedMemory(const WavefrontArguments& a, float* shared)
      : states_size(state_floats<NS>(a.rows)), projections_size(projection_floats<NS>(a.rows)) {
    span_states = shared;
    carries = span_states + (a.span + 1) * states_size;
    projections = carries + 2 * states_size;
  }
  __device__ __forceinline__ float* staged_A() const { return projections + 2 * projections_size; }
  __device__ __forceinline__ int64_t* work_item_id() const {
    return reinterpret_cast<int64_t*>(staged_A() + StagedA<NS>::kFloats);
  }
  __device__ __forceinline__ float* carries_at(int32_t time) const { return carries + (time & 1) * states_size; }
  __device__ __forceinline__ float* projections_at(int32_t time) const {
    return projections + (time & 1) * projections_size;
  }
};

// Recomputes the states of a span, steps [begin, end), from the checkpointed wavefront before it, and keeps them in
// shared memory.
template <class T, int NS>
struct SpanRecomputation {
  const WavefrontArguments& a;
  const WorkItem& item;
  const SharedMemory<NS>& memory;
  const StagedA<NS>& A_log2e;
  const WavefrontCheckpoints<NS>& checkpoints;
  int32_t own;
  int32_t above_own;

  // One step, from the strip's states one step earlier. Prefetches the next pixel.
  __device__ __forceinline__ void step(int32_t time, const float* earlier, float* here, PixelInputs<NS>& pixel,
                                       PixelIterator<T, NS>& iterator, BoundaryRowReader<NS>& above,
                                       float (&state)[NS]) const {
    iterator.advance(a, 1);
    above.advance(a, 1);
    const PixelInputs<NS> next = iterator.load(false);
    above.load(a, time + 1);
    if (item.warp_is_busy(a, time)) {
      advance_states<NS>(pixel, item, A_log2e, memory.projections_at(time), earlier + above_own, state);
    }
    store_states(here + own, state);
    next.stage_projections(item, memory.projections_at(time + 1));
    above.stage(item, here);
    pixel = next;
    __syncthreads();
  }

  __device__ __forceinline__ void run(int32_t checkpoint, int32_t begin, int32_t end, PixelInputs<NS>& pixel,
                                      PixelIterator<T, NS>& iterator, BoundaryRowReader<NS>& above,
                                      float (&state)[NS]) const {
    // Steps before the span alternate between two slots, so that the last one leaves its states in the first slot.
    float* start = memory.span_states + ((begin - checkpoint) & 1) * memory.states_size;
    clear(state);
    if (checkpoint > 0 && item.row < a.rows) checkpoints.load(a, checkpoint / int32_t(kCheckpointSteps) - 1, state);
    store_states(start + own, state);
    iterator.advance(a, checkpoint - item.row - iterator.column);
    above.advance(a, checkpoint - end);
    pixel = iterator.load(false);
    above.load(a, checkpoint);
    pixel.stage_projections(item, memory.projections_at(checkpoint));
    above.stage(item, start);
    __syncthreads();
    // Only if shared memory holds fewer steps than there are between checkpoints.
    for (int32_t time = checkpoint; time < begin; ++time) {
      step(time, memory.span_states + ((begin - time) & 1) * memory.states_size,
           memory.span_states + ((begin - time - 1) & 1) * memory.states_size, pixel, iterator, above, state);
    }
    for (int32_t time = begin; time < end; ++time) {
      float* earlier = memory.span_states + (time - begin) * memory.states_size;
      step(time, earlier, earlier + memory.states_size, pixel, iterator, above, state);
    }
  }
};

// Strips and spans in reverse. Each span is recomputed forward from its checkpointed wavefront, keeping states, then
// differentiated. Only the reverse sweep waits for the strip below.
template <class T, int NS>
__global__ void __launch_bounds__(kMaxThreads, 1) wavefront_backward(WavefrontArguments a) {
  SSM_DYNAMIC_SHARED(shared);
  const int32_t slots = row_slots(a.rows);
  const SharedMemory<NS> memory(a, shared);
  const int32_t steps = int32_t(a.p.width) + a.rows - 1;
  int64_t* shared_id = memory.work_item_id();
  for (int64_t id = -1; fetch_work_item(a, shared_id, &id);) {
    const int32_t strip = strip_of(a, id);
    const WorkItem item(a, id, strip);
    const StateLayout<NS> layout(item.lane);
    const int32_t own = layout.thread_offset(item.row + 1);
    const int32_t above_own = layout.thread_offset(item.row);
    // A row's carry to the row above is in the slot of its number, that from below the strip in the last slot.
    const int32_t up = layout.thread_offset(item.row);
    const int32_t from_below = layout.thread_offset(item.row == a.rows - 1 ? slots : item.row + 1);
    // All strips of the image write their gradients for the strip above to the same boundary row.
    float* boundary_row = static_cast<float*>(a.p.boundary_row) + row_state_index(a, item, item.batch, 0, 0);
    const float* row_above = strip > 0 ? strip_boundary_row(a, item, strip - 1) : boundary_row;
    const bool writes_boundary = strip > 0 && item.row == 0;
    const float skip = item.active && a.p.D ? static_cast<const float*>(a.p.D)[item.channel] : 0.f;
    float grad_D = 0.f;
    ProgressFlag progress(a, id);
    for (int64_t n0 = 0; n0 < total_states<NS>(a); n0 += NS) {
      const StagedA<NS> A_log2e(a, item, n0, memory.staged_A());
      float state[NS];
      float carry[NS];
      float grad_A_above[NS];
      float grad_A_before[NS];
      clear(state);
      clear(carry);
      clear(grad_A_above);
      clear(grad_A_before);
      // There is no gradient from outside the map.
      for (int32_t i = threadIdx.x; i < 2 * memory.states_size; i += blockDim.x) memory.carries[i] = 0.f;
      PixelIterator<T, NS> iterator(a, item, n0, strip);
      BoundaryRowReader<NS> above(a, item, n0, row_above, strip > 0, steps);
      BoundaryRowReader<NS> below(a, item, n0, boundary_row, strip + 1 < a.strips, int32_t(a.p.width) - 1);
      const WavefrontCheckpoints<NS> checkpoints(a, item, n0, strip);
      const ProjectionGradients<NS> projection_gradients(a, item, n0, strip);
      const SpanRecomputation<T, NS> recomputation{a, item, memory, A_log2e, checkpoints, own, above_own};
      PixelInputs<NS> pixel;
      GradientIterator<T> targets(a, item, strip, steps - 1);
      for (int32_t end = steps, begin; end > 0; end = begin) {
        const int32_t checkpoint = (end - 1) / int32_t(kCheckpointSteps) * int32_t(kCheckpointSteps);
        begin = checkpoint + (end - 1 - checkpoint) / a.span * a.span;
        recomputation.run(checkpoint, begin, end, pixel, iterator, above, state);

        above.advance(a, begin - end);
        // At step t the last row is at column t - rows + 1, the (steps - 1 - t)th from the right.
        progress.wait_for(a, n0 / NS, steps - end);
        iterator.advance(a, -1);
        pixel = iterator.load(true);
        below.load(a, end - a.rows);
        below.advance(a, -1);
        pixel.stage_projections(item, memory.projections_at(end - 1));
        below.stage(item, memory.carries_at(end) + slots * NS * kTileChannels);
        __syncthreads();
        for (int32_t time = end - 1; time >= begin; --time) {
          const bool more = time > begin;
          PixelInputs<NS> next;
          if (more) {
            progress.wait_for(a, n0 / NS, steps - time);
            iterator.advance(a, -1);
            next = iterator.load(true);
            below.load(a, time - a.rows);
          }
          float* to_above = memory.carries_at(time);
          if (item.warp_is_busy(a, time)) {
            float* earlier = memory.span_states + (time - begin) * memory.states_size;
            const NeighbourStates states{earlier + above_own, earlier + own, earlier + memory.states_size + own};
            const PixelGradients gradients = step_backward<NS>(pixel, item, A_log2e, memory.projections_at(time),
                                                               states, memory.carries_at(time + 1) + from_below,
                                                               to_above + up, carry, grad_A_above, grad_A_before);
            if (writes_boundary && pixel.valid) {
              float* column = boundary_row + (time * total_states<NS>(a) + n0) * a.p.channels;
              store_boundary_column<NS>(a, layout, n0, to_above + up, column);
            }
            projection_gradients.stage(item, gradients, earlier + memory.states_size);
            if (pixel.valid) {
              write_pixel_gradients<T, NS>(a, item, strip, time, n0, skip, pixel, gradients, targets, grad_D);
            }
          }
          targets.step_back(a);
          if (more) {
            next.stage_projections(item, memory.projections_at(time + 1));
            below.stage(item, to_above + slots * NS * kTileChannels);
            below.advance(a, -1);
            pixel = next;
          }
          __syncthreads();
          progress.publish(a, n0 / NS, int32_t(a.p.width) - time);
        }
        projection_gradients.add(a, item, progress, n0, begin, end, memory.span_states + memory.states_size);
      }

      store_states(memory.span_states + own, grad_A_above);
      store_states(memory.span_states + memory.states_size + own, grad_A_before);
      __syncthreads();
      write_A_gradients<NS>(a, fetched_work_item(shared_id, id), n0, memory.span_states,
                            memory.span_states + memory.states_size);
    }
    if (a.p.grad_D) write_D_gradient(a, fetched_work_item(shared_id, id), grad_D, memory.span_states);
  }
}

int64_t shared_bytes(int64_t rows, int64_t states, int64_t span) {
  return shared_floats(row_slots(int32_t(rows)), states, span) * int64_t(sizeof(float));
}

}  // namespace

int wavefront_backward_residents(const WavefrontScanParams& p, const WavefrontScanPlan& plan, int64_t* blocks) {
  const int threads = row_slots(int32_t(plan.rows)) * kTileChannels;
  const int64_t shared = shared_bytes(plan.rows, plan.group, plan.span);
#define SSM_SCAN(T, NS) resident_blocks(wavefront_backward<T, NS>, threads, shared, blocks)
  SSM_DISPATCH(p.dtype, plan.group, SSM_SCAN)
#undef SSM_SCAN
}

int wavefront_scan_backward_cuda(const WavefrontScanParams& p, const WavefrontScanPlan& plan, void* stream) {
  const auto has_same_strides = [&](const GridTensor& tensor) {
    return tensor.batch == p.grad_C.batch && tensor.row == p.grad_C.row && tensor.column == p.grad_C.column &&
           tensor.route == p.grad_C.route;
  };
  if (!has_same_strides(p.above.grad_B) || !has_same_strides(p.before.grad_B)) return cudaErrorInvalidValue;
  const WavefrontArguments a = wavefront_arguments(p, plan);
  const int threads = row_slots(a.rows) * kTileChannels;
  const int64_t shared = shared_bytes(plan.rows, plan.group, plan.span);
#define SSM_SCAN(T, NS) launch(wavefront_backward<T, NS>, a, plan.blocks, threads, shared, stream)
  SSM_DISPATCH(p.dtype, plan.group, SSM_SCAN)
#undef SSM_SCAN
}

int wavefront_scan_plan_cuda(const WavefrontScanParams& p, bool backward, WavefrontScanPlan* plan) {
  const int64_t end = int64_t(1) << 30;  // steps are counted in 32 bits
  if (p.width >= end || p.height >= end || p.dtype == DataType::kFloat64) return cudaErrorInvalidValue;
  int64_t limit = 0;
  int error = shared_memory_limit(&limit);
  if (error) return error;
  const int64_t rows = p.chunk ? p.chunk : kWavefrontStripRows;
  plan->rows = rows < p.height ? rows : p.height;
  if (plan->rows > kMaxStripRows) return cudaErrorInvalidConfiguration;
  plan->strips = ceil_div(p.height, plan->rows);
  plan->tiles = ceil_div(p.channels, kTileChannels);
  plan->group = states_per_pass(p.states);
  plan->grouped = !is_specialized(p.states);
  // Two blocks per multiprocessor hide each other's latency (the driver reserves 1 KiB per block), unless they would
  // have to recompute from a checkpoint more than twice.
  const auto longest_span = [&](int64_t bytes) {
    int64_t span = kCheckpointSteps;
    while (span > 1 && shared_bytes(plan->rows, plan->group, span) > bytes) span /= 2;
    return span;
  };
  plan->span = longest_span((limit + 1024) / 2 - 1024);
  if (plan->span < kCheckpointSteps / 2) plan->span = longest_span(limit);
  if (backward && shared_bytes(plan->rows, plan->group, plan->span) > limit) return cudaErrorInvalidConfiguration;
  error = (backward ? wavefront_backward_residents : wavefront_forward_residents)(p, *plan, &plan->blocks);
  const int64_t items = plan->strips * p.batch * plan->tiles;
  if (items < plan->blocks) plan->blocks = items;
  return error;
}

}  // namespace cuda_ops
