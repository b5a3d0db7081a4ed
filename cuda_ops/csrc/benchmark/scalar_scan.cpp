// The selective scan of a sequence in the way of llama.cpp's Mamba-1 kernel, as a baseline: threads over channels, each
// walks along the sequence, the states innermost, one exponential of the C library at a time. Compiled by the
// benchmark, not part of the library.
#include <cmath>
#include <cstdint>

namespace {

// Arrays as the exported function has them.
struct Scan {
  const float *x, *delta, *A, *B, *C, *D, *bias;
  float *state, *y;
  int64_t batch, length, channels, states;

  void run(int64_t begin, int64_t end) const {
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t t = b * length; t < (b + 1) * length; ++t)
        for (int64_t c = begin; c < end; ++c) update(b, t, c);
  }

  // One channel's step at position t, counted over all sequences.
  void update(int64_t b, int64_t t, int64_t c) const {
    const float biased = delta[t * channels + c] + bias[c];
    const float dt = biased > 20.f ? biased : log1pf(expf(biased));
    const float u = x[t * channels + c];
    const float inflow = dt * u;
    float* h = state + (b * channels + c) * states;
    float sum = 0;
    for (int64_t n = 0; n < states; ++n) {
      h[n] = h[n] * expf(dt * A[c * states + n]) + B[t * states + n] * inflow;
      sum += h[n] * C[t * states + n];
    }
    y[t * channels + c] = sum + D[c] * u;
  }
};

}  // namespace

// Computes y (batch, length, channels) from x and delta (batch, length, channels), A (channels, states), B and C
// (batch, length, states), D and bias (channels), and moves state (batch, channels, states) on. Contiguous.
extern "C" __attribute__((visibility("default"))) void scalar_scan(const float* x, const float* delta, const float* A,
                                                                   const float* B, const float* C, const float* D,
                                                                   const float* bias, float* state, float* y,
                                                                   int64_t batch, int64_t length, int64_t channels,
                                                                   int64_t states, int threads) {
  const Scan scan{x, delta, A, B, C, D, bias, state, y, batch, length, channels, states};
#pragma omp parallel for num_threads(threads)
  for (int thread = 0; thread < threads; ++thread)
    scan.run(channels * thread / threads, channels * (thread + 1) / threads);
}
