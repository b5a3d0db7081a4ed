// The segments of maps that are too large for a block, and the launches of the passes over maps with one state.
#pragma once

#include "one_state.cuh"

namespace cuda_ops {
namespace {

constexpr int kSummaryWarps = 8;

// What each segment adds to the state behind it, or to the gradient of the state before it, and its sum of step sizes. A
// warp goes through its share of the chunks.
template <class T, bool Backward, bool Factored>
__global__ void __launch_bounds__(kSummaryWarps* kWarp, 2) one_state_summary(OneStateArguments a) {
  SSM_DYNAMIC_SHARED(shared);
  const Site site(a);
  float* rest = shared + (Factored ? a.count * a.rank * kTile : 0);  // behind weights
  Four<float>* stretches = reinterpret_cast<Four<float>*>(rest);   // [warps][pairs]
  float* totals = rest + site.warps * 2 * kTile;                    // [warps][16]
  const Notes notes{totals + site.warps * kTile + site.warp * Notes::kFloats};
  float* room = totals + site.warps * (kTile + Notes::kFloats) + site.warp * Factors::kFloats;  // if step sizes are factored
  if (Factored) {
    Factors::fetch_weights(a, site, shared);
    __syncthreads();
  }
  const int32_t share = (site.chunks + site.warps - 1) / site.warps;
  const int32_t end = (site.warp + 1) * share < site.chunks ? (site.warp + 1) * share : site.chunks;
  for (int r = 0; r < a.count; ++r) {
    const int64_t k = a.index[r];
    const PairParameters parameters(a, site, k);
    Stretch whole{{1.f, 1.f}, {0.f, 0.f}};
    float total[2] = {0.f, 0.f};
    for (int32_t turn = site.warp * share; turn < end; ++turn) {
      const Chunk chunk(site, Backward ? site.chunks - 1 - turn : turn, runs_backwards(a.p.route[k]));
      __syncwarp();
      const int32_t pixel = note_pixel(a, site, k, chunk, notes);
      const float factor = projection<T>(a, site, Backward ? a.p.C : a.p.B, k, pixel);
      notes.inputs()[site.lane] = !chunk.given ? 0.f : Backward ? factor : factor * kLn2;
      __syncwarp();
      int32_t pixels[kRun], places[kRun];
      float factors[kRun], steps[kRun][2], sum[2] = {0.f, 0.f};
      Two<T> values[kRun], raw[kRun];
      read_run(notes.pixels(), site.run, pixels);
      load_steps(a, site, k, Factored, pixel, pixels, raw);
      load_run(site, Backward ? a.p.grad_y : a.p.x, 0, pixels, values);
      read_run(notes.places(), site.run, places);
      read_run(notes.inputs(), site.run, factors);
      parameters.steps(a, site, Factored, raw, {shared + r * a.rank * kTile, room}, steps);
      Stretch own{{1.f, 1.f}, {0.f, 0.f}}, all;
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const int u = Backward ? kRun - 1 - i : i;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float step = places[u] < a.segment ? steps[u][c] : 0.f, decay = fast_exp2(step * parameters.rate[c]);
          const float value = value_of(values[u], c) * factors[u];
          sum[c] += step;
          own.end[c] = Backward ? decay * (own.end[c] + value) : decay * own.end[c] + value * step;
        }
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) own.decay[c] = fast_exp2(sum[c] * parameters.rate[c]), total[c] += sum[c];
      runs_before<Backward>(site, own, &all);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        whole.end[c] = all.decay[c] * whole.end[c] + all.end[c];
        whole.decay[c] *= all.decay[c];
      }
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
      for (int step = kPairs; step < kWarp; step *= 2) total[c] += __shfl_xor_sync(kAllLanes, total[c], step);
    }
    if (site.run == (Backward ? 0 : kRuns - 1)) {
      stretches[site.warp * kPairs + site.pair] = {whole.decay[0], whole.end[0], whole.decay[1], whole.end[1]};
      *reinterpret_cast<Two<float>*>(totals + site.warp * kTile + 2 * site.pair) = {total[0], total[1]};
    }
    __syncthreads();
    if (threadIdx.x < kPairs && site.active) {
      float state[2] = {0.f, 0.f}, steps[2] = {0.f, 0.f};
      for (int32_t w = 0; w < site.warps; ++w) {
        const Four<float> stretch = stretches[w * kPairs + site.pair];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          state[c] = stretch.of[2 * c] * state[c] + stretch.of[2 * c + 1];
          steps[c] += totals[w * kTile + 2 * site.pair + c];
        }
      }
      const int64_t row = segment_row(a, site, k);
      *reinterpret_cast<Two<float>*>(static_cast<float*>(a.p.steps) + row) = {steps[0] * kLn2, steps[1] * kLn2};
      *reinterpret_cast<Two<float>*>(static_cast<float*>(a.p.ends) + row) = {state[0], state[1]};
    }
    __syncthreads();
  }
}

// Calls CALL(type, whether step sizes are factored).
#define SSM_DISPATCH_STEPS(T, FACTORED, CALL) FACTORED ? CALL(T, true) : CALL(T, false)
#define SSM_DISPATCH_ONE_STATE(DTYPE, FACTORED, CALL)                                   \
  switch (DTYPE) {                                                                      \
    case DataType::kFloat32: return SSM_DISPATCH_STEPS(float, FACTORED, CALL);          \
    case DataType::kBFloat16: return SSM_DISPATCH_STEPS(__nv_bfloat16, FACTORED, CALL); \
    case DataType::kFloat16: return SSM_DISPATCH_STEPS(__half, FACTORED, CALL);         \
    default: return int(cudaErrorInvalidValue);                                         \
  }

template <bool Backward>
int launch_one_state_summary(const OneStateArguments& a, int64_t blocks, void* stream) {
  const int64_t floats = kSummaryWarps * (3 * kTile + Notes::kFloats) +
                         (a.rank ? kSummaryWarps * Factors::kFloats + Factors::weight_floats(a.count, a.rank) : 0);
  const int64_t shared = floats * int64_t(sizeof(float));
#define SSM_SUMMARIZE(T, FACTORED) \
  launch_blocks(one_state_summary<T, Backward, FACTORED>, a, blocks, kSummaryWarps * kWarp, shared, stream)
  SSM_DISPATCH_ONE_STATE(a.p.dtype, a.rank, SSM_SUMMARIZE)
#undef SSM_SUMMARIZE
}

// Launches `scan` for all routes at once where a line is one segment, else for each axis after the segments' summaries.
template <bool Backward, class Scan>
int for_one_state(const RouteScanParams& p, const RouteScanPlan& plan, void* stream, Scan scan) {
  OneStateArguments a{};
  a.p = p;
  a.length = int32_t(p.height * p.width), a.segment = int32_t(plan.segment), a.segments = int32_t(plan.segments);
  a.tiles = int32_t(plan.tiles), a.rank = int32_t(p.rank), a.height = Divisor(p.height);
  for (GridTensor* tensor : {&a.p.x, &a.p.delta, &a.p.B, &a.p.C, &a.p.grad_y, &a.p.grad_delta})
    tensor->column = pixel_stride(p, *tensor);
  const int64_t blocks = p.batch * p.groups * plan.tiles * plan.segments;
  if (plan.segments == 1) {
    a.count = int32_t(p.routes), a.rounds = true;
    for (int k = 0; k < p.routes; ++k) a.index[k] = k;
    return scan(a, blocks);
  }
  OneStateArguments axes[2] = {a, a};
  for (int k = 0; k < p.routes; ++k) {
    OneStateArguments& axis = axes[runs_along_columns(p.route[k])];
    axis.index[axis.count++] = k;
  }
  axes[0].rounds = !axes[1].count, axes[1].rounds = true, axes[1].adds = axes[0].count > 0;
  for (const OneStateArguments& axis : axes) {
    const int error = axis.count ? launch_one_state_summary<Backward>(axis, blocks, stream) : 0;
    if (error) return error;
  }
  RouteArguments lines{};
  lines.p = p, lines.lines = 1, lines.segments = a.segments;
  const int error = launch_combine(lines, Backward, stream);
  if (error) return error;
  for (const OneStateArguments& axis : axes) {
    const int code = axis.count ? scan(axis, blocks) : 0;
    if (code) return code;
  }
  return 0;
}

}  // namespace
}  // namespace cuda_ops
