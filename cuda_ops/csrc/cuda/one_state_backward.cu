// The backward pass over whole maps with one state on CUDA, and how both passes are divided.
#include "one_state_summary.cuh"

namespace cuda_ops {
namespace {

// Adds a pair's sums over the lanes with its channels, and over the warps of the block in their order; the result is there
// for the first warp's first run. `room` is [warps][16] floats, of which two calls must not share any without a barrier.
__device__ __forceinline__ Two<float> sum_over_block(const Site& site, float first, float second, float* room) {
  Two<float> sum{first, second};
#pragma unroll
  for (int step = kPairs; step < kWarp; step *= 2) {
#pragma unroll
    for (int c = 0; c < 2; ++c) sum.of[c] += __shfl_xor_sync(kAllLanes, sum.of[c], step);
  }
  Two<float>* rows = reinterpret_cast<Two<float>*>(room) + site.pair;
  if (site.run == 0) rows[site.warp * kPairs] = sum;
  __syncthreads();
  if (threadIdx.x < kPairs) {
    sum = {0.f, 0.f};
    for (int32_t w = 0; w < site.warps; ++w) sum.of[0] += rows[w * kPairs].of[0], sum.of[1] += rows[w * kPairs].of[1];
  }
  return sum;
}

// Goes through a block's segment from the end of each route. A warp scans its chunk forward from the state saved before
// it, keeps all states, and hands on what its chunk does to the gradient of the state, as the forward pass does states.
template <class T, bool Factored>
__global__ void __launch_bounds__(kOneStateBackwardWarps* kWarp, 1) one_state_backward(OneStateArguments a) {
  SSM_DYNAMIC_SHARED(shared);
  const Site site(a);
  float* sums = shared + (Factored ? a.count * a.rank * kTile : 0);  // [sum_rows][16], behind weights: of the gradient of x
  const Handover handover{sums + sum_rows(a.segment, site.warps) * kTile};
  const Notes notes{handover.at + Handover::floats(site.warps) + site.warp * Notes::kFloats};
  float* skip = notes.at + (site.warps - site.warp) * Notes::kFloats + 2 * site.pair;  // [16]
  float* room = skip - 2 * site.pair + kTile;                                         // [3][warps][16]
  // Room for factors is at the same place, used before a turn's barrier: sums over a block are made behind the last turn.
  float* factors = room + site.warp * Notes::kFloats;
  if (Factored) Factors::fetch_weights(a, site, shared);
  const int64_t part = int64_t(site.segment) * a.p.batch + site.batch;
  sum_skips(a, site, skip);
  int32_t turn = 0;  // over all routes
  for (int r = 0; r < a.count; ++r) {
    const int64_t k = a.index[r];
    const bool down = runs_backwards(a.p.route[k]);
    const PairParameters parameters(a, site, k);
    if (threadIdx.x < kPairs) {
      const float* given = static_cast<const float*>(a.segments > 1 ? a.p.ends : a.p.grad_last);
      if (given) given += a.segments > 1 ? segment_row(a, site, k) : (site.batch * a.p.routes + k) * a.p.channels + site.channel;
#pragma unroll
      for (int c = 0; c < 2; ++c) handover.state(site, turn)[c] = given && site.active ? given[c] : 0.f;
    }
    float grad_rate[2] = {0.f, 0.f}, grad_bias[2] = {0.f, 0.f}, grad_skip[2] = {0.f, 0.f};
    for (int32_t first = 0; first < site.chunks; first += site.warps, ++turn) {
      const int32_t rank = first + site.warp;
      const Chunk chunk(site, rank < site.chunks ? site.chunks - 1 - rank : site.chunks, down);
      __syncwarp();
      const int32_t pixel = note_pixel(a, site, k, chunk, notes);
      notes.inputs()[site.lane] = chunk.given ? projection<T>(a, site, a.p.B, k, pixel) * kLn2 : 0.f;
      notes.outputs()[site.lane] = projection<T>(a, site, a.p.C, k, pixel);
      __syncwarp();
      Two<T> x[kRun], raw[kRun], grad_y[kRun];
      int32_t pixels[kRun], places[kRun];
      read_run(notes.pixels(), site.run, pixels);
      load_steps(a, site, k, Factored, pixel, pixels, raw);
      load_run(site, a.p.x, 0, pixels, x);
      load_run(site, a.p.grad_y, 0, pixels, grad_y);
      float saved[2] = {0.f, 0.f};
      const int32_t boundary = down ? chunk.first + kChunk : chunk.first;
      if (rank < site.chunks && boundary > 0 && boundary < a.length) {
        const int64_t row = (site.batch * a.p.routes + k) * saved_states(a.length, kChunk) + boundary / kChunk - 1;
        const float* states = static_cast<const float*>(a.p.saved) + row * a.p.channels + site.channel;
        saved[0] = states[0], saved[1] = states[1];
      }

      float steps[kRun][2], slopes[kRun][2], decay[kRun][2], inflow[kRun][2], state[kRun][2];
      float B[kRun], C[kRun];
      parameters.steps(a, site, Factored, raw, {shared + r * a.rank * kTile, factors}, steps, slopes);
      read_run(notes.places(), site.run, places);
      if (rank >= site.chunks || chunk.first + kChunk > site.begin + site.count || !site.active) {
        // Nothing comes from where there is nothing.
#pragma unroll
        for (int u = 0; u < kRun; ++u) {
          if (places[u] < a.segment && site.active) continue;
          grad_y[u] = {from_float<T>(0.f), from_float<T>(0.f)};
          steps[u][0] = steps[u][1] = slopes[u][0] = slopes[u][1] = 0.f;
        }
      }
      if (r == 0) {
#pragma unroll
        for (int u = 0; u < kRun; ++u) {
          Two<float> sum;
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const float dy = value_of(grad_y[u], c);
            sum.of[c] = skip[c] * dy, grad_skip[c] += dy * value_of(x[u], c);
          }
          *reinterpret_cast<Two<float>*>(sums + places[u] * kTile + 2 * site.pair) = sum;
        }
      }
      read_run(notes.inputs(), site.run, B);
      read_run(notes.outputs(), site.run, C);
      Stretch own{{1.f, 1.f}, {0.f, 0.f}}, back, all;
      float total[2] = {0.f, 0.f};
#pragma unroll
      for (int u = 0; u < kRun; ++u) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          total[c] += steps[u][c];
          decay[u][c] = fast_exp2(steps[u][c] * parameters.rate[c]);
          inflow[u][c] = value_of(x[u], c) * B[u] * steps[u][c];
          own.end[c] = decay[u][c] * own.end[c] + inflow[u][c];
        }
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        own.decay[c] = back.decay[c] = fast_exp2(total[c] * parameters.rate[c]);
        back.end[c] = 0.f;
#pragma unroll
        for (int u = kRun - 1; u >= 0; --u)
          back.end[c] = decay[u][c] * (back.end[c] + C[u] * value_of(grad_y[u], c));
      }
      const Stretch before = runs_before<false>(site, own, &all);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float running = before.decay[c] * saved[c] + before.end[c];
#pragma unroll
        for (int u = 0; u < kRun; ++u) {
          state[u][c] = running;  // before the position
          running = decay[u][c] * running + inflow[u][c];
        }
      }
      if (rank >= site.chunks || chunk.first + kChunk > site.begin + site.count) {
        // A state that is not finite stays with the positions that have it.
#pragma unroll
        for (int u = 0; u < kRun; ++u)
          if (places[u] >= a.segment) state[u][0] = state[u][1] = 0.f;
      }
      const Stretch behind = runs_before<true>(site, back, &all);
      if (site.run == 0) *handover.stretch(site, turn, site.warp) = {all.decay[0], all.end[0], all.decay[1], all.end[1]};
      __syncthreads();
      float carry[2];
      handover.start_of_warp(site, turn, carry);
#pragma unroll
      for (int c = 0; c < 2; ++c) carry[c] = site.active ? behind.decay[c] * carry[c] + behind.end[c] : 0.f;

      read_run(notes.places(), site.run, places);
      read_run(notes.pixels(), site.run, pixels);
      const int32_t edge = site.active ? a.segment : 0;
      float through_B[kRun], through_C[kRun];
      char* grad_delta = reinterpret_cast<char*>(static_cast<T*>(a.p.grad_delta.data) + site.batch * a.p.grad_delta.batch +
                                                 k * a.p.grad_delta.route + site.channel);
      const int32_t bytes = int32_t(a.p.grad_delta.column) * int32_t(sizeof(T));
#pragma unroll
      for (int u = kRun - 1; u >= 0; --u) {
        Two<float>* sum = reinterpret_cast<Two<float>*>(sums + places[u] * kTile + 2 * site.pair);
        Two<float> grad_x = *sum;
        Two<T> grad_raw;
        through_B[u] = through_C[u] = 0.f;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float dy = value_of(grad_y[u], c), input = value_of(x[u], c), step = steps[u][c];
          const float grad = carry[c] + C[u] * dy, weighted = B[u] * grad;
          carry[c] = grad * decay[u][c];
          const float through_decay = carry[c] * state[u][c];
          const float raw_grad = (through_decay * (parameters.rate[c] * kLn2) + weighted * input) * slopes[u][c];
          grad_rate[c] += through_decay * step, grad_bias[c] += raw_grad;
          grad_x.of[c] += weighted * step;
          grad_raw.of[c] = from_float<T>(raw_grad);
          through_B[u] += grad * (input * step);
          through_C[u] += dy * (decay[u][c] * state[u][c] + inflow[u][c]);
        }
        *sum = grad_x;
        Two<T>* target = reinterpret_cast<Two<T>*>(grad_delta + int64_t(pixels[u]) * bytes);
        if (places[u] < edge) *target = grad_raw;
      }
      if (site.warp == site.warps - 1 && site.run == 0) {
        float* next = handover.state(site, turn + 1);
        next[0] = carry[0], next[1] = carry[1];
      }
      // A lane gets the sums over the channels at the pixel that it found.
      const float grad_B = sum_each<kPairs>(through_B, site.lane) * kLn2, grad_C = sum_each<kPairs>(through_C, site.lane);
      if (chunk.given) {
        const int64_t image = int64_t(site.tile) * a.p.batch + site.batch;
        const int64_t row = (image * a.p.height * a.p.width + pixel) * a.p.routes + k;
        const int64_t index = row * a.p.groups + site.group;
        if (a.p.grad_B) static_cast<float*>(a.p.grad_B)[index] = grad_B;
        if (a.p.grad_C) static_cast<float*>(a.p.grad_C)[index] = grad_C;
      }
    }
    const int64_t size = int64_t(site.warps) * kTile;
    const Two<float> of_rate = sum_over_block(site, grad_rate[0], grad_rate[1], room);
    const Two<float> of_bias = sum_over_block(site, grad_bias[0], grad_bias[1], room + size);
    if (r == 0) {
      // The same for every route.
      const Two<float> of_skip = sum_over_block(site, grad_skip[0], grad_skip[1], room + 2 * size);
      for (int i = 0; a.p.grad_D && threadIdx.x < kPairs && site.active && i < a.count; ++i) {
        const int64_t row = (part * a.p.routes + a.index[i]) * a.p.channels + site.channel;
        *reinterpret_cast<Two<float>*>(static_cast<float*>(a.p.grad_D) + row) = of_skip;
      }
    }
    if (threadIdx.x < kPairs && site.active) {
      const int64_t row = (part * a.p.routes + k) * a.p.channels + site.channel;
      *reinterpret_cast<Two<float>*>(static_cast<float*>(a.p.grad_A) + row) = {of_rate.of[0] * kLn2, of_rate.of[1] * kLn2};
      if (a.p.grad_delta_bias)
        *reinterpret_cast<Two<float>*>(static_cast<float*>(a.p.grad_delta_bias) + row) = of_bias;
    }
    __syncthreads();
  }
  write_pair_sums<T>(a, site, sums, a.p.grad_x);
}

// A block's shared memory, in floats, of the backward pass: room for sums is there in place of the second notes.
int64_t backward_floats(const RouteScanParams& p, int64_t positions, int64_t warps) {
  static_assert(Notes::kFloats >= 3 * kTile, "the second notes' place is large enough for three sums");
  return one_state_floats(p, positions, warps);
}

// Segments of maps that are too large for a block, and the warps of a block that leaves room for another one.
constexpr int64_t kSegment = 512, kFewWarps = 8;

}  // namespace

bool one_state_plan_cuda(const RouteScanParams& p, bool backward, int64_t shared_limit, RouteScanPlan* plan) {
  if (p.states != 1 || p.per_line || (p.chunk && p.chunk != kChunk) || p.channels / p.groups % 2) return false;
  if (p.rank % 2 || p.rank > kMostFactors) return false;
  const int64_t size = p.dtype == DataType::kFloat32 ? 4 : 2;
  const auto walks_evenly = [&](const GridTensor& tensor) {
    return p.width == 1 || p.height == 1 || tensor.row == p.width * tensor.column;
  };
  const auto has_pairs = [&](const GridTensor& tensor) {
    const int64_t stride = pixel_stride(p, tensor);
    return reinterpret_cast<uintptr_t>(tensor.data) % (2 * size) == 0 && tensor.batch % 2 == 0 && tensor.route % 2 == 0 &&
           stride % 2 == 0 && stride * size >> 31 == 0 && walks_evenly(tensor);
  };
  if (!has_pairs(p.x) || !has_pairs(p.delta) || !walks_evenly(p.B) || !walks_evenly(p.C)) return false;
  if (backward && (!has_pairs(p.grad_y) || !has_pairs(p.grad_delta))) return false;

  const int64_t length = p.height * p.width, most = backward ? kOneStateBackwardWarps : kOneStateForwardWarps;
  plan->tiles = ceil_div(p.channels / p.groups, kTile);
  const auto fits = [&](int64_t segment, int64_t most_warps, int64_t limit) {
    const int64_t chunks = ceil_div(segment, kChunk);
    plan->segment = segment, plan->segments = ceil_div(length, segment);
    plan->warps = ceil_div(chunks, ceil_div(chunks, most_warps));
    const int64_t floats = backward ? backward_floats(p, segment, plan->warps) : one_state_floats(p, segment, plan->warps);
    return floats * int64_t(sizeof(float)) <= limit;
  };
  // The driver keeps 1 KiB for each block.
  if (!fits(length, kFewWarps, shared_limit / 2 - 512) && !fits(length, most, shared_limit) &&
      !fits(kSegment, kFewWarps, shared_limit))
    return false;
  plan->one_state = true;
  bool columns = false, rows = false;
  for (int k = 0; k < p.routes; ++k) (runs_along_columns(p.route[k]) ? columns : rows) = true;
  plan->partial = plan->segments > 1 && columns && rows;
  return true;
}

int one_state_backward_cuda(const RouteScanParams& p, const RouteScanPlan& plan, void* stream) {
  const int64_t shared = backward_floats(p, plan.segment, plan.warps) * int64_t(sizeof(float));
  return for_one_state<true>(p, plan, stream, [&](const OneStateArguments& a, int64_t blocks) {
#define SSM_SCAN(T, FACTORED) \
  launch_blocks(one_state_backward<T, FACTORED>, a, blocks, int(plan.warps* kWarp), shared, stream)
    SSM_DISPATCH_ONE_STATE(p.dtype, p.rank, SSM_SCAN)
#undef SSM_SCAN
  });
}

}  // namespace cuda_ops
