// Forward pass of the route scan for d_state == 1 on CUDA.
#include "route_scan_n1_aggregates.cuh"

namespace cuda_ops {
namespace {

constexpr int kForwardThreads = kMaxForwardWarpsN1 * kWarpSize;

// A chunk's inputs, loaded one iteration ahead.
template <class T, bool LowRank>
struct Prefetch {
  Pair<T> x[kRunPositions];
  Pair<T> delta[kRunPositions];  // or the lane's dt
  float B;                       // of the lane's pixel, times log(2)
  float C;                       // of the lane's pixel

  __device__ __forceinline__ void load(const RouteArgumentsN1& a, const WorkItemN1& item, int64_t k, int32_t index,
                                       const WarpStaging& staging) {
    const WarpChunk chunk(item, index, is_reversed(a.p.route[k]));
    const int32_t pixel = stage_pixel(a, item, k, chunk, staging);
    B = chunk.exists ? load_projection<T>(a, item, a.p.B, k, pixel) * kLn2 : 0.f;
    C = load_projection<T>(a, item, a.p.C, k, pixel);
    __syncwarp();
    int32_t pixels[kRunPositions];
    load_run_pixels(a, item, k, chunk, staging, pixels);
    load_run(item, a.p.x, 0, pixels, x);
    load_delta<T, LowRank>(a, item, k, pixel, pixels, delta);
  }
};

// A lane's run: what the recurrence needs of each position.
struct RunInputs {
  float decay[kRunPositions][2];
  float inflow[kRunPositions][2];
};

// Computes decay and inflow of a run. Returns its aggregate without the decay, and in `delta_sum` the sum of delta that
// gives it.
template <class T>
__device__ __forceinline__ Aggregate compute_run(const PairParameters& parameters, const Pair<T> (&x)[kRunPositions],
                                                 const float (&B)[kRunPositions],
                                                 const float (&delta)[kRunPositions][2], RunInputs& inputs,
                                                 float (&delta_sum)[2]) {
  Aggregate run = Aggregate::identity();
#pragma unroll
  for (int u = 0; u < kRunPositions; ++u) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      delta_sum[c] += delta[u][c];
      inputs.decay[u][c] = fast_exp2(delta[u][c] * parameters.A[c]);
      inputs.inflow[u][c] = pair_to_float(x[u], c) * B[u] * delta[u][c];
      run.state[c] = inputs.decay[u][c] * run.state[c] + inputs.inflow[u][c];
    }
  }
  return run;
}

// Writes the state after the route's last position, starting from the state before the run that contains it.
__device__ __forceinline__ void write_last_state(const RouteArgumentsN1& a, const WorkItemN1& item, int64_t k,
                                                 int32_t count, const float (&start)[2], const RunInputs& inputs) {
  float state[2] = {start[0], start[1]};
#pragma unroll
  for (int u = 0; u < kRunPositions; ++u) {
    if (item.run * kRunPositions + u >= count) break;
#pragma unroll
    for (int c = 0; c < 2; ++c) state[c] = inputs.decay[u][c] * state[c] + inputs.inflow[u][c];
  }
  float* target = static_cast<float*>(a.p.last_state) + (item.batch * a.p.routes + k) * a.p.channels + item.channel;
  target[0] = state[0];
  target[1] = state[1];
}

// A block's shared memory.
struct SharedMemory {
  float* dt_weights;
  float* sums;  // [sum_rows][16]
  WarpCarries carries;
  float* staging;  // two buffers of this warp
  float* skip;     // of the thread's pair

  __device__ __forceinline__ WarpStaging warp_staging(int32_t iteration) const {
    return {staging + (iteration & 1) * WarpStaging::kFloats};
  }
};

// Scans one chunk per warp. `prefetch` holds the chunk's inputs, and the next chunk's afterwards.
template <class T, bool LowRank>
__device__ __forceinline__ void scan_chunks(const RouteArgumentsN1& a, const WorkItemN1& item,
                                            const SharedMemory& memory, int r, int64_t k, bool reversed, int32_t first,
                                            int32_t iteration, const PairParameters& parameters,
                                            Prefetch<T, LowRank>& prefetch) {
  const WarpStaging staging = memory.warp_staging(iteration);
  staging.B()[item.lane] = prefetch.B;
  staging.C()[item.lane] = prefetch.C;
  __syncwarp();
  float B[kRunPositions];
  float delta[kRunPositions][2];
  RunInputs inputs;
  float delta_sum[2] = {0.f, 0.f};
  if (!LowRank) load_staged_run(staging.B(), item.run, B);
  // The next chunk's staging buffer is not in use yet.
  const DtProjection dt_projection{memory.dt_weights + r * a.dt_rank * kTileChannels,
                                   memory.warp_staging(iteration + 1).data};
  parameters.compute_delta<T, LowRank>(a, item, prefetch.delta, dt_projection, delta);
  if (LowRank) load_staged_run(staging.B(), item.run, B);  // as late as possible, to save registers
  const WarpChunk chunk(item, first + item.warp, reversed);
  const int32_t missing = reversed ? chunk.first + kChunkPositions - (item.begin + item.count) : 0;
  if (missing > 0) {
    // Positions before the start of the route must not change its state, and their decays may be infinite. No existing
    // position comes after those past the end.
#pragma unroll
    for (int u = 0; u < kRunPositions; ++u) {
      if (item.run * kRunPositions + u < missing) {
        delta[u][0] = 0.f;
        delta[u][1] = 0.f;
      }
    }
  }
  Aggregate run = compute_run(parameters, prefetch.x, B, delta, inputs, delta_sum);
  int32_t sum_rows[kRunPositions];
  if (r == 0) {
    load_run_sum_rows(a, item, k, chunk, staging, sum_rows);
#pragma unroll
    for (int u = 0; u < kRunPositions; ++u) {
      *sum_at(item, memory.sums, sum_rows[u]) = {memory.skip[0] * pair_to_float(prefetch.x[u], 0),
                                                 memory.skip[1] * pair_to_float(prefetch.x[u], 1)};
    }
  }
#pragma unroll
  for (int c = 0; c < 2; ++c) run.decay[c] = fast_exp2(delta_sum[c] * parameters.A[c]);
  if (first + item.warps < item.chunks) {
    prefetch.load(a, item, k, first + item.warps + item.warp, memory.warp_staging(iteration + 1));
  }

  Aggregate total;
  const Aggregate before = exclusive_scan<false>(item, run, &total);
  if (item.run == kChunkRuns - 1) *memory.carries.aggregate(item, iteration, item.warp) = total.packed();
  __syncthreads();
  float state[2];
  memory.carries.load_warp_start(item, iteration, state);
  if (a.p.chunk && item.run == 0 && item.active && first + item.warp < item.chunks) {
    const int32_t boundary = chunk.boundary(reversed);
    if (boundary > 0 && boundary < a.length) {
      *reinterpret_cast<Pair<float>*>(saved_state(a, item, k, boundary)) = {state[0], state[1]};
    }
  }
  float C[kRunPositions];
  load_staged_run(staging.C(), item.run, C);
  load_run_sum_rows(a, item, k, chunk, staging, sum_rows);
#pragma unroll
  for (int c = 0; c < 2; ++c) state[c] = before.decay[c] * state[c] + before.state[c];
  const float start[2] = {state[0], state[1]};
#pragma unroll
  for (int u = 0; u < kRunPositions; ++u) {
    Pair<float>* sum = sum_at(item, memory.sums, sum_rows[u]);
#pragma unroll
    for (int c = 0; c < 2; ++c) state[c] = inputs.decay[u][c] * state[c] + inputs.inflow[u][c];
    *sum = {sum->val[0] + C[u] * state[0], sum->val[1] + C[u] * state[1]};
  }
  const int32_t count = reversed ? kChunkPositions : item.begin + item.count - chunk.first;  // up to the segment's end
  if (a.p.last_state && item.active && first + item.warp == item.chunks - 1 &&
      item.segment == (reversed ? 0 : a.segments - 1) &&
      item.run == ((count < kChunkPositions ? count : kChunkPositions) - 1) / kRunPositions) {
    write_last_state(a, item, k, count, start, inputs);
  }
  if (item.warp == item.warps - 1 && item.run == kChunkRuns - 1) {
    float* next = memory.carries.state(item, iteration + 1);
    next[0] = state[0];
    next[1] = state[1];
  }
}

// Scans a segment along each of the routes in turn. Sums over routes are kept in shared memory and written once.
template <class T, bool LowRank>
__global__ void __launch_bounds__(kForwardThreads, 1) scan_forward_n1(RouteArgumentsN1 a) {
  SSM_DYNAMIC_SHARED(shared);
  const WorkItemN1 item(a);
  float* sums = shared + (LowRank ? a.route_count * a.dt_rank * kTileChannels : 0);  // after the dt weights
  const WarpCarries carries{sums + sum_row_count(a.segment_length, item.warps) * kTileChannels};
  float* staging_buffers = carries.data + WarpCarries::floats(item.warps);
  float* staging = staging_buffers + item.warp * 2 * WarpStaging::kFloats;
  float* skip = staging_buffers + item.warps * 2 * WarpStaging::kFloats + 2 * item.pair;
  const SharedMemory memory{shared, sums, carries, staging, skip};
  if (LowRank) DtProjection::stage_weights(a, item, memory.dt_weights);
  stage_skip(a, item, memory.skip);
  int32_t iteration = 0;  // counted over all routes
  for (int r = 0; r < a.route_count; ++r) {
    const int64_t k = a.routes[r];
    const bool reversed = is_reversed(a.p.route[k]);
    const PairParameters parameters(a, item, k);
    if (threadIdx.x < kTilePairs) {
      const bool zero = a.segments == 1;
      const float* start = static_cast<const float*>(a.p.segment_states) + (zero ? 0 : segment_index(a, item, k));
      memory.carries.state(item, iteration)[0] = zero ? 0.f : start[0];
      memory.carries.state(item, iteration)[1] = zero ? 0.f : start[1];
    }
    Prefetch<T, LowRank> prefetch;
    prefetch.load(a, item, k, item.warp, memory.warp_staging(iteration));
    for (int32_t first = 0; first < item.chunks; first += item.warps, ++iteration) {
      scan_chunks<T, LowRank>(a, item, memory, r, k, reversed, first, iteration, parameters, prefetch);
    }
    __syncthreads();
  }
  write_route_sums<T>(a, item, memory.sums, a.p.y);
}

}  // namespace

int route_scan_n1_forward_cuda(const RouteScanParams& p, const RouteScanPlan& plan, void* stream) {
  const int64_t shared = shared_floats_n1(p, plan.segment_length, plan.warps) * int64_t(sizeof(float));
  const int threads = int(plan.warps * kWarpSize);
  return launch_n1<false>(p, plan, stream, [&](const RouteArgumentsN1& a, int64_t blocks) {
#define SSM_SCAN(T, LOW_RANK) launch_blocks(scan_forward_n1<T, LOW_RANK>, a, blocks, threads, shared, stream)
    SSM_DISPATCH_N1(p.dtype, p.dt_rank, SSM_SCAN)
#undef SSM_SCAN
  });
}

}  // namespace cuda_ops
