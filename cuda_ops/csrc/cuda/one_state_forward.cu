// The forward pass over whole maps with one state on CUDA.
#include "one_state_summary.cuh"

namespace cuda_ops {
namespace {

// A warp's chunk on its way: read ahead of use.
template <class T, bool Factored>
struct Ahead {
  Two<T> x[kRun], delta[kRun];  // the latter as factors where they are given
  float B, C;  // of this lane's pixel

  __device__ __forceinline__ void load(const OneStateArguments& a, const Site& site, int64_t k, int32_t turn,
                                       const Notes& notes) {
    const Chunk chunk(site, turn, runs_backwards(a.p.route[k]));
    const int32_t pixel = note_pixel(a, site, k, chunk, notes);
    B = chunk.given ? projection<T>(a, site, a.p.B, k, pixel) * kLn2 : 0.f;
    C = projection<T>(a, site, a.p.C, k, pixel);
    __syncwarp();
    int32_t pixels[kRun];
    read_run(notes.pixels(), site.run, pixels);
    load_run(site, a.p.x, 0, pixels, x);
    load_steps(a, site, k, Factored, pixel, pixels, delta);
  }
};

// Scans a block's segment along each of the routes in turn. Sums over routes lie in shared memory, and go to global
// memory once.
template <class T, bool Factored>
__global__ void __launch_bounds__(kOneStateForwardWarps* kWarp, 1) one_state_forward(OneStateArguments a) {
  SSM_DYNAMIC_SHARED(shared);
  const Site site(a);
  float* sums = shared + (Factored ? a.count * a.rank * kTile : 0);  // [sum_rows][16], behind weights
  const Handover handover{sums + sum_rows(a.segment, site.warps) * kTile};
  float* notes_of_warp = handover.at + Handover::floats(site.warps) + site.warp * 2 * Notes::kFloats;
  float* skip = notes_of_warp + (site.warps - site.warp) * 2 * Notes::kFloats + 2 * site.pair;  // [16]
  if (Factored) Factors::fetch_weights(a, site, shared);
  sum_skips(a, site, skip);
  int32_t turn = 0;  // over all routes
  for (int r = 0; r < a.count; ++r) {
    const int64_t k = a.index[r];
    const bool down = runs_backwards(a.p.route[k]);
    const PairParameters parameters(a, site, k);
    if (threadIdx.x < kPairs) {
      const bool starts = a.segments == 1;
      const float* ends = static_cast<const float*>(a.p.ends) + (starts ? 0 : segment_row(a, site, k));
      handover.state(site, turn)[0] = starts ? 0.f : ends[0];
      handover.state(site, turn)[1] = starts ? 0.f : ends[1];
    }
    Ahead<T, Factored> ahead;
    ahead.load(a, site, k, site.warp, {notes_of_warp + (turn & 1) * Notes::kFloats});
    for (int32_t first = 0; first < site.chunks; first += site.warps, ++turn) {
      const Notes notes{notes_of_warp + (turn & 1) * Notes::kFloats};
      notes.inputs()[site.lane] = ahead.B, notes.outputs()[site.lane] = ahead.C;
      __syncwarp();
      float B[kRun], steps[kRun][2], decay[kRun][2], inflow[kRun][2], total[2] = {0.f, 0.f};
      if (!Factored) read_run(notes.inputs(), site.run, B);
      // The next chunk's notes are still to come.
      const Factors factors{shared + r * a.rank * kTile, notes_of_warp + ((turn + 1) & 1) * Notes::kFloats};
      parameters.steps(a, site, Factored, ahead.delta, factors, steps);
      if (Factored) read_run(notes.inputs(), site.run, B);  // no sooner: registers are scarce
      const Chunk chunk(site, first + site.warp, down);
      const int32_t missing = down ? chunk.first + kChunk - (site.begin + site.count) : 0;
      if (missing > 0) {
        // The route starts behind these, and their decays may be infinite.
#pragma unroll
        for (int u = 0; u < kRun; ++u)
          if (site.run * kRun + u < missing) steps[u][0] = steps[u][1] = 0.f;
      }
      Stretch own{{1.f, 1.f}, {0.f, 0.f}}, all;
#pragma unroll
      for (int u = 0; u < kRun; ++u) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          total[c] += steps[u][c];
          decay[u][c] = fast_exp2(steps[u][c] * parameters.rate[c]);
          inflow[u][c] = value_of(ahead.x[u], c) * B[u] * steps[u][c];
          own.end[c] = decay[u][c] * own.end[c] + inflow[u][c];
        }
      }
      int32_t places[kRun];
      if (r == 0) {
        read_run(notes.places(), site.run, places);
#pragma unroll
        for (int u = 0; u < kRun; ++u)
          *reinterpret_cast<Two<float>*>(sums + places[u] * kTile + 2 * site.pair) = {
              skip[0] * value_of(ahead.x[u], 0), skip[1] * value_of(ahead.x[u], 1)};
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) own.decay[c] = fast_exp2(total[c] * parameters.rate[c]);
      if (first + site.warps < site.chunks)
        ahead.load(a, site, k, first + site.warps + site.warp, {notes_of_warp + ((turn + 1) & 1) * Notes::kFloats});

      const Stretch before = runs_before<false>(site, own, &all);
      if (site.run == kRuns - 1)
        *handover.stretch(site, turn, site.warp) = {all.decay[0], all.end[0], all.decay[1], all.end[1]};
      __syncthreads();
      float state[2];
      handover.start_of_warp(site, turn, state);
      if (a.p.chunk && site.run == 0 && site.active && first + site.warp < site.chunks) {
        const int32_t boundary = down ? chunk.first + kChunk : chunk.first;
        if (boundary > 0 && boundary < a.length) {
          const int64_t row = (site.batch * a.p.routes + k) * saved_states(a.length, kChunk) + boundary / kChunk - 1;
          *reinterpret_cast<Two<float>*>(static_cast<float*>(a.p.saved) + row * a.p.channels + site.channel) = {
              state[0], state[1]};
        }
      }
      float C[kRun];
      read_run(notes.outputs(), site.run, C);
      read_run(notes.places(), site.run, places);
#pragma unroll
      for (int c = 0; c < 2; ++c) state[c] = before.decay[c] * state[c] + before.end[c];
      const float start[2] = {state[0], state[1]};
#pragma unroll
      for (int u = 0; u < kRun; ++u) {
        Two<float>* sum = reinterpret_cast<Two<float>*>(sums + places[u] * kTile + 2 * site.pair);
#pragma unroll
        for (int c = 0; c < 2; ++c) state[c] = decay[u][c] * state[c] + inflow[u][c];
        *sum = {sum->of[0] + C[u] * state[0], sum->of[1] + C[u] * state[1]};
      }
      const int32_t behind = down ? kChunk : site.begin + site.count - chunk.first;  // the order of the last position, + 1
      if (a.p.last && site.active && first + site.warp == site.chunks - 1 &&
          site.segment == (down ? 0 : a.segments - 1) && site.run == ((behind < kChunk ? behind : kChunk) - 1) / kRun) {
        float end[2] = {start[0], start[1]};
#pragma unroll
        for (int u = 0; u < kRun; ++u) {
          if (site.run * kRun + u >= behind) break;
#pragma unroll
          for (int c = 0; c < 2; ++c) end[c] = decay[u][c] * end[c] + inflow[u][c];
        }
        float* target = static_cast<float*>(a.p.last) + (site.batch * a.p.routes + k) * a.p.channels + site.channel;
        target[0] = end[0], target[1] = end[1];
      }
      if (site.warp == site.warps - 1 && site.run == kRuns - 1) {
        float* next = handover.state(site, turn + 1);
        next[0] = state[0], next[1] = state[1];
      }
    }
    __syncthreads();
  }
  write_pair_sums<T>(a, site, sums, a.p.y);
}

}  // namespace

int one_state_forward_cuda(const RouteScanParams& p, const RouteScanPlan& plan, void* stream) {
  const int64_t shared = one_state_floats(p, plan.segment, plan.warps) * int64_t(sizeof(float));
  return for_one_state<false>(p, plan, stream, [&](const OneStateArguments& a, int64_t blocks) {
#define SSM_SCAN(T, FACTORED) \
  launch_blocks(one_state_forward<T, FACTORED>, a, blocks, int(plan.warps* kWarp), shared, stream)
    SSM_DISPATCH_ONE_STATE(p.dtype, p.rank, SSM_SCAN)
#undef SSM_SCAN
  });
}

}  // namespace cuda_ops
