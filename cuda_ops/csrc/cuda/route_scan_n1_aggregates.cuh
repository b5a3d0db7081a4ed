// Segment aggregates for d_state == 1, for maps that do not fit into a block, and the launches of both passes.
#pragma once

#include "route_scan_n1.cuh"

namespace cuda_ops {
namespace {

constexpr int kAggregateWarps = 8;
constexpr int kAggregateThreads = kAggregateWarps * kWarpSize;

// Computes each segment's aggregate: the sum of delta, and the state (backward: its gradient) that the segment produces
// from zero. Backward, C and grad_y take the place of B and x. Each warp takes consecutive chunks.
template <class T, bool Backward, bool LowRank>
__global__ void __launch_bounds__(kAggregateThreads, 2) segment_aggregates_n1(RouteArgumentsN1 a) {
  SSM_DYNAMIC_SHARED(shared);
  const WorkItemN1 item(a);
  float* buffers = shared + (LowRank ? a.route_count * a.dt_rank * kTileChannels : 0);  // after the dt weights
  Quad<float>* warp_aggregates = reinterpret_cast<Quad<float>*>(buffers);               // [warps][pairs]
  float* warp_deltas = buffers + item.warps * 2 * kTileChannels;                        // [warps][16]
  const WarpStaging staging{warp_deltas + item.warps * kTileChannels + item.warp * WarpStaging::kFloats};
  float* dt_staging =
      warp_deltas + item.warps * (kTileChannels + WarpStaging::kFloats) + item.warp * DtProjection::kFloats;
  if (LowRank) {
    DtProjection::stage_weights(a, item, shared);
    __syncthreads();
  }
  const int32_t warp_chunks = (item.chunks + item.warps - 1) / item.warps;
  const int32_t end = (item.warp + 1) * warp_chunks < item.chunks ? (item.warp + 1) * warp_chunks : item.chunks;
  for (int r = 0; r < a.route_count; ++r) {
    const int64_t k = a.routes[r];
    const PairParameters parameters(a, item, k);
    Aggregate warp = Aggregate::identity();
    float delta_sum[2] = {0.f, 0.f};
    for (int32_t index = item.warp * warp_chunks; index < end; ++index) {
      const WarpChunk chunk(item, Backward ? item.chunks - 1 - index : index, is_reversed(a.p.route[k]));
      __syncwarp();
      const int32_t pixel = stage_pixel(a, item, k, chunk, staging);
      const float own = load_projection<T>(a, item, Backward ? a.p.C : a.p.B, k, pixel);
      staging.B()[item.lane] = !chunk.exists ? 0.f : Backward ? own : own * kLn2;
      __syncwarp();
      int32_t pixels[kRunPositions];
      int32_t sum_rows[kRunPositions];
      float projection[kRunPositions];
      float delta[kRunPositions][2];
      float run_delta[2] = {0.f, 0.f};
      Pair<T> inputs[kRunPositions];
      Pair<T> loaded[kRunPositions];
      load_run_pixels(a, item, k, chunk, staging, pixels);
      load_delta<T, LowRank>(a, item, k, pixel, pixels, loaded);
      load_run(item, Backward ? a.p.grad_y : a.p.x, 0, pixels, inputs);
      load_run_sum_rows(a, item, k, chunk, staging, sum_rows);
      load_staged_run(staging.B(), item.run, projection);
      const DtProjection dt_projection{shared + r * a.dt_rank * kTileChannels, dt_staging};
      parameters.compute_delta<T, LowRank>(a, item, loaded, dt_projection, delta);
      Aggregate run = Aggregate::identity();
#pragma unroll
      for (int i = 0; i < kRunPositions; ++i) {
        const int u = Backward ? kRunPositions - 1 - i : i;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float dt = sum_rows[u] < a.segment_length ? delta[u][c] : 0.f;
          const float decay = fast_exp2(dt * parameters.A[c]);
          const float value = pair_to_float(inputs[u], c) * projection[u];
          run_delta[c] += dt;
          run.state[c] = Backward ? decay * (run.state[c] + value) : decay * run.state[c] + value * dt;
        }
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        run.decay[c] = fast_exp2(run_delta[c] * parameters.A[c]);
        delta_sum[c] += run_delta[c];
      }
      Aggregate total;
      exclusive_scan<Backward>(item, run, &total);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        warp.state[c] = total.decay[c] * warp.state[c] + total.state[c];
        warp.decay[c] *= total.decay[c];
      }
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
      for (int offset = kTilePairs; offset < kWarpSize; offset *= 2) {
        delta_sum[c] += __shfl_xor_sync(kFullMask, delta_sum[c], offset);
      }
    }
    if (item.run == (Backward ? 0 : kChunkRuns - 1)) {
      warp_aggregates[item.warp * kTilePairs + item.pair] = warp.packed();
      *reinterpret_cast<Pair<float>*>(warp_deltas + item.warp * kTileChannels + 2 * item.pair) = {delta_sum[0],
                                                                                                  delta_sum[1]};
    }
    __syncthreads();
    if (threadIdx.x < kTilePairs && item.active) {
      float state[2] = {0.f, 0.f};
      float delta[2] = {0.f, 0.f};
      for (int32_t w = 0; w < item.warps; ++w) {
        const Quad<float> aggregate = warp_aggregates[w * kTilePairs + item.pair];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          state[c] = aggregate.val[2 * c] * state[c] + aggregate.val[2 * c + 1];
          delta[c] += warp_deltas[w * kTileChannels + 2 * item.pair + c];
        }
      }
      const int64_t segment = segment_index(a, item, k);
      *reinterpret_cast<Pair<float>*>(static_cast<float*>(a.p.segment_deltas) + segment) = {delta[0] * kLn2,
                                                                                            delta[1] * kLn2};
      *reinterpret_cast<Pair<float>*>(static_cast<float*>(a.p.segment_states) + segment) = {state[0], state[1]};
    }
    __syncthreads();
  }
}

// Calls CALL(element type, LowRank).
#define SSM_DISPATCH_LOW_RANK(T, LOW_RANK, CALL) LOW_RANK ? CALL(T, true) : CALL(T, false)
#define SSM_DISPATCH_N1(DTYPE, LOW_RANK, CALL)                                             \
  switch (DTYPE) {                                                                         \
    case DataType::kFloat32: return SSM_DISPATCH_LOW_RANK(float, LOW_RANK, CALL);          \
    case DataType::kBFloat16: return SSM_DISPATCH_LOW_RANK(__nv_bfloat16, LOW_RANK, CALL); \
    case DataType::kFloat16: return SSM_DISPATCH_LOW_RANK(__half, LOW_RANK, CALL);         \
    default: return int(cudaErrorInvalidValue);                                            \
  }

template <bool Backward>
int launch_segment_aggregates_n1(const RouteArgumentsN1& a, int64_t blocks, void* stream) {
  const int64_t dt_floats =
      a.dt_rank ? kAggregateWarps * DtProjection::kFloats + DtProjection::weight_floats(a.route_count, a.dt_rank) : 0;
  const int64_t floats = kAggregateWarps * (3 * kTileChannels + WarpStaging::kFloats) + dt_floats;
  const int64_t shared = floats * int64_t(sizeof(float));
#define SSM_AGGREGATES(T, LOW_RANK) \
  launch_blocks(segment_aggregates_n1<T, Backward, LOW_RANK>, a, blocks, kAggregateThreads, shared, stream)
  SSM_DISPATCH_N1(a.p.dtype, a.dt_rank, SSM_AGGREGATES)
#undef SSM_AGGREGATES
}

// Calls `launch_scan` once for all routes if a map is one segment, else for each axis after the segments' start states
// are computed.
template <bool Backward, class LaunchScan>
int launch_n1(const RouteScanParams& p, const RouteScanPlan& plan, void* stream, LaunchScan launch_scan) {
  RouteArgumentsN1 a{};
  a.p = p;
  a.length = int32_t(p.height * p.width);
  a.segment_length = int32_t(plan.segment_length);
  a.segments = int32_t(plan.segments);
  a.tiles = int32_t(plan.tiles);
  a.dt_rank = int32_t(p.dt_rank);
  a.height = FastDivisor(p.height);
  for (GridTensor* tensor : {&a.p.x, &a.p.delta, &a.p.B, &a.p.C, &a.p.grad_y, &a.p.grad_delta}) {
    tensor->column = pixel_stride(p, *tensor);
  }
  const int64_t blocks = p.batch * p.groups * plan.tiles * plan.segments;
  if (plan.segments == 1) {
    a.route_count = int32_t(p.routes);
    a.writes_result = true;
    for (int k = 0; k < p.routes; ++k) a.routes[k] = k;
    return launch_scan(a, blocks);
  }
  RouteArgumentsN1 axes[2] = {a, a};
  for (int k = 0; k < p.routes; ++k) {
    RouteArgumentsN1& axis = axes[runs_along_columns(p.route[k])];
    axis.routes[axis.route_count++] = k;
  }
  axes[0].writes_result = axes[1].route_count == 0;
  axes[1].writes_result = true;
  axes[1].adds_axis_sums = axes[0].route_count > 0;
  for (const RouteArgumentsN1& axis : axes) {
    const int error = axis.route_count ? launch_segment_aggregates_n1<Backward>(axis, blocks, stream) : 0;
    if (error) return error;
  }
  RouteArguments line{};
  line.p = p;
  line.lines = 1;
  line.segments = a.segments;
  const int error = launch_state_passing(line, Backward, stream);
  if (error) return error;
  for (const RouteArgumentsN1& axis : axes) {
    const int code = axis.route_count ? launch_scan(axis, blocks) : 0;
    if (code) return code;
  }
  return 0;
}

}  // namespace
}  // namespace cuda_ops
