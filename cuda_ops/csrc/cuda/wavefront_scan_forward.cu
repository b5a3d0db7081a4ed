// Forward pass of the wavefront scan on CUDA.
#include "wavefront_step.cuh"

namespace cuda_ops {
namespace {

// The sum of C * state over a group of states, plus `start`.
template <int NS>
__device__ __forceinline__ float pixel_output(const StateLayout<NS>& layout, const float* C, float start,
                                              const float (&state)[NS]) {
  constexpr int kPack = kPackStates<NS>;
  float output = start;
#pragma unroll
  for (int first = 0; first < NS; first += kPack) {
    float values[kPack];
    load_row<kPack>(C + layout.state_at(first), values);
#pragma unroll
    for (int i = 0; i < kPack; ++i) output += values[i] * state[first + i];
  }
  return output;
}

// Scans work items until none is left. At most 128 registers, so that four blocks of 8 rows fit on a multiprocessor.
template <class T, int NS>
__global__ void __launch_bounds__(kMaxThreads, 2) wavefront_forward(WavefrontArguments a) {
  SSM_DYNAMIC_SHARED(shared);
  const int32_t states_size = state_floats<NS>(a.rows);
  const int32_t projections_size = projection_floats<NS>(a.rows);
  float* step_states = shared;                    // of this step and the previous one
  float* projections = shared + 2 * states_size;  // of this step and the next
  const int32_t steps = int32_t(a.p.width) + a.rows - 1;
  // The work item id is passed through the start of shared memory, which is in use only after the item's first barrier.
  for (int64_t id = -1; fetch_work_item(a, reinterpret_cast<int64_t*>(shared), &id);) {
    const int32_t strip = int32_t(id / a.maps);
    const WorkItem item(a, id, strip);
    const StateLayout<NS> layout(item.lane);
    const int32_t own = layout.thread_offset(item.row + 1);
    const int32_t above = layout.thread_offset(item.row);
    float* boundary_row = strip_boundary_row(a, item, strip + 1 < a.strips ? strip : 0);
    const float* row_above = strip > 0 ? strip_boundary_row(a, item, strip - 1) : boundary_row;
    const bool writes_boundary = strip + 1 < a.strips && item.row == a.rows - 1;
    const float skip = item.active && a.p.D ? static_cast<const float*>(a.p.D)[item.channel] : 0.f;
    ProgressFlag progress(a, id);
    for (int64_t n0 = 0; n0 < total_states<NS>(a); n0 += NS) {
      const StagedA<NS> A_log2e(a, item, n0, projections + 2 * projections_size);
      float state[NS];
      clear(state);
      store_states(step_states + states_size + own, state);
      progress.wait_for(a, n0 / NS, 0);
      PixelIterator<T, NS> iterator(a, item, n0, strip);
      BoundaryRowReader<NS> boundary(a, item, n0, row_above, strip > 0, 0);
      const WavefrontCheckpoints<NS> checkpoints(a, item, n0, strip);
      T* y = pixel_pointer<T>(a.p.y, item.batch, int64_t(strip) * a.rows + item.row, iterator.column) + item.channel;
      PixelInputs<NS> pixel = iterator.load(false);
      boundary.load(a, 0);
      pixel.stage_projections(item, projections);
      boundary.stage(item, step_states + states_size);
      __syncthreads();
      for (int32_t time = 0; time < steps; ++time) {
        progress.wait_for(a, n0 / NS, time + 1);
        iterator.advance(a, 1);
        boundary.advance(a, 1);
        const PixelInputs<NS> next = iterator.load(false);
        boundary.load(a, time + 1);
        const float* step_projections = projections + (time & 1) * projections_size;
        float* here = step_states + (time & 1) * states_size;
        if (item.warp_is_busy(a, time)) {
          advance_states<NS>(pixel, item, A_log2e, step_projections,
                             step_states + ((time + 1) & 1) * states_size + above, state);
        }
        store_states(here + own, state);
        if (pixel.valid) {
          const float* C = step_projections + item.row * 3 * NS + 2 * NS;
          float output = pixel_output<NS>(layout, C, n0 == 0 ? skip * pixel.x : 0.f, state);
          if (NS == kStateGroup && a.grouped) {
            float* sum = group_sum(a, item, strip, time);
            if (n0 > 0) output += *sum;
            *sum = output;
          }
          if (n0 + NS >= total_states<NS>(a)) *y = from_float<T>(output);
          if (writes_boundary) {
            float* column = boundary_row + ((time - item.row) * total_states<NS>(a) + n0) * a.p.channels;
            store_boundary_column<NS>(a, layout, n0, here + own, column);
          }
        }
        const int32_t done = time + 1;
        if (a.p.checkpoints && done % int32_t(kCheckpointSteps) == 0 && done < steps && item.row < a.rows) {
          checkpoints.store(a, done / int32_t(kCheckpointSteps) - 1, state);
        }
        advance_bytes(y, a.bytes.y);
        next.stage_projections(item, projections + ((time + 1) & 1) * projections_size);
        boundary.stage(item, here);
        pixel = next;
        __syncthreads();
        progress.publish(a, n0 / NS, time + 2 - a.rows);
      }
    }
  }
}

int64_t shared_bytes(const WavefrontArguments& a, int64_t states) {
  return 2 * states * (row_slots(a.rows) * (kTileChannels + 3) + 2 * kTileChannels) * int64_t(sizeof(float));
}

}  // namespace

int wavefront_forward_residents(const WavefrontScanParams& p, const WavefrontScanPlan& plan, int64_t* blocks) {
  const WavefrontArguments a = wavefront_arguments(p, plan);
  const int threads = row_slots(a.rows) * kTileChannels;
  const int64_t shared = shared_bytes(a, plan.group);
#define SSM_SCAN(T, NS) resident_blocks(wavefront_forward<T, NS>, threads, shared, blocks)
  SSM_DISPATCH(p.dtype, plan.group, SSM_SCAN)
#undef SSM_SCAN
}

int wavefront_scan_forward_cuda(const WavefrontScanParams& p, const WavefrontScanPlan& plan, void* stream) {
  const WavefrontArguments a = wavefront_arguments(p, plan);
  const int threads = row_slots(a.rows) * kTileChannels;
  const int64_t shared = shared_bytes(a, plan.group);
#define SSM_SCAN(T, NS) launch(wavefront_forward<T, NS>, a, plan.blocks, threads, shared, stream)
  SSM_DISPATCH(p.dtype, plan.group, SSM_SCAN)
#undef SSM_SCAN
}

}  // namespace cuda_ops
