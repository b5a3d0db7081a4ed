// Route scan on the CPU. Vectors run over channels, threads over images, tiles of channels and parts of the lines.
// Compiled once per capability; scan_dispatch.cpp chooses at run time.
#include <memory>
#include <type_traits>

#include "route_tile.h"

namespace cuda_ops {
namespace SSM_CPU_CAPABILITY {
namespace {

template <class T, class S, int Units>
class ForwardTile : ScanTile<T, S, Units> {
  using Base = ScanTile<T, S, Units>;
  using Base::bias_, Base::D_, Base::kAhead, Base::kLanes, Base::kMaxVectors, Base::lanes, Base::p_, Base::item_,
      Base::A_log2e_, Base::state_, Base::states_, Base::vectors;
  using typename Base::V;

 public:
  using Base::Base;

  void run() {
    for (int64_t k = 0; k < p_.routes; ++k) {
      this->load_parameters(k);
      const RouteShape shape = route_shape(p_.route[k], p_.per_line, p_.height, p_.width);
      Place ahead{item_.first_line, 0, this->pixel(k, item_.first_line, 0)};
      for (int i = 0; i < kAhead; ++i) this->advance_over_lines(k, shape, ahead);
      for (int64_t line = item_.first_line; line < item_.end_line; ++line) run_line(k, shape, line, ahead);
      if (p_.last_state) store_last_state(k);
    }
  }

 private:
  void run_line(int64_t k, RouteShape shape, int64_t line, Place& ahead) {
    this->clear_state();
    Pixel pixel = this->pixel(k, line, 0);
    int64_t until_saved = p_.chunk ? p_.chunk : shape.length;
    int64_t chunk = 0;
    for (int64_t position = 0; position < shape.length; ++position, this->advance(k, pixel)) {
      if (ahead.line < item_.end_line) {
        this->prefetch_inputs(k, ahead.pixel);
        this->prefetch(this->per_map(p_.y, ahead.pixel));
        this->advance_over_lines(k, shape, ahead);
      }
      if (states_ == 1) {
        scan_position<1>(k, pixel);
      } else {
        scan_position<0>(k, pixel);
      }
      if (--until_saved == 0 && position + 1 < shape.length) {
        S* target = this->saved(k, shape, line, chunk++);
        for (int n = 0; n < states_; ++n, target += p_.channels)
          for (int v = 0; v < vectors(); ++v) store(target + v * kLanes, state_.data()[n * vectors() + v], lanes(v));
        until_saved = p_.chunk;
      }
    }
  }

  // Scans one position. States is the number of states if known at compile time, else 0.
  template <int States>
  void scan_position(int64_t k, Pixel pixel) {
    const int states = States ? States : states_, vectors = this->vectors();
    const T* x = pixel_pointer<T>(p_.x, item_.batch, pixel, 0, 0) + item_.channel;
    const T* B = p_.B.data ? pixel_pointer<T>(p_.B, item_.batch, pixel, k, item_.group) : nullptr;
    const T* C = p_.C.data ? pixel_pointer<T>(p_.C, item_.batch, pixel, k, item_.group) : nullptr;
    S* y = this->per_map(p_.y, pixel);
    V delta[kMaxVectors], inflow[kMaxVectors], output[kMaxVectors];
    this->load_delta(k, pixel, delta);
    for (int v = 0; v < vectors; ++v) {
      const V u = load(x + v * kLanes, lanes(v));
      if (p_.delta_softplus) delta[v] = softplus(delta[v]).value;
      inflow[v] = delta[v] * u;
      output[v] = D_[v] * u;
    }
    for (int n = 0; n < states; ++n) {
      const S B_n = B ? scalar(B + n) : S(1), C_n = C ? scalar(C + n) : S(1);
      for (int v = 0; v < vectors; ++v) {
        V& h = state_.data()[n * vectors + v];
        h = exp2(delta[v] * A_log2e_.data()[n * vectors + v]) * h + B_n * inflow[v];
        output[v] += C_n * h;
      }
    }
    for (int v = 0; v < vectors; ++v) this->accumulate(y + v * kLanes, output[v], lanes(v), k == 0);
  }

  void store_last_state(int64_t k) {
    S* last = static_cast<S*>(p_.last_state) +
              ((item_.batch * p_.routes + k) * p_.channels + item_.channel) * int64_t(states_);
    for (int n = 0; n < states_; ++n)
      for (int c = 0; c < item_.channels; ++c)
        last[c * states_ + n] = state_.data()[n * vectors() + c / kLanes][c % kLanes];
  }
};

template <class T, class S, int Units>
class BackwardTile : ScanTile<T, S, Units> {
  using Base = ScanTile<T, S, Units>;
  using Base::bias_, Base::D_, Base::kAhead, Base::kLanes, Base::kMaxVectors, Base::lanes, Base::p_, Base::item_,
      Base::A_log2e_, Base::state_, Base::states_, Base::vectors;
  using typename Base::V;

 public:
  BackwardTile(const RouteScanParams& p, const WorkItem& item)
      : Base(p, item),
        chunk_(chunk_length(p)),
        pixels_(new Pixel[chunk_]),
        delta_(chunk_ * vectors()),
        delta_slope_(chunk_ * vectors()),
        decay_((chunk_ + 1) * vectors() * states_),
        chunk_states_((chunk_ + 1) * vectors() * states_),
        grad_state_(vectors() * states_),
        grad_A_(vectors() * states_),
        total_A_(vectors() * states_),
        error_A_(vectors() * states_) {}

  void run() {
    for (int64_t k = 0; k < p_.routes; ++k) {
      this->load_parameters(k);
      for (int i = 0; i < vectors() * states_; ++i) {
        grad_A_.data()[i] = total_A_.data()[i] = error_A_.data()[i] = V{};
      }
      for (int v = 0; v < vectors(); ++v) {
        grad_D_[v] = total_D_[v] = error_D_[v] = grad_bias_[v] = total_bias_[v] = error_bias_[v] = V{};
      }
      const RouteShape shape = route_shape(p_.route[k], p_.per_line, p_.height, p_.width);
      for (int64_t line = item_.first_line; line < item_.end_line; ++line) run_line(k, shape, line);
      store_parameter_gradients(k);
    }
  }

 private:
  // Positions whose sum is accumulated plainly.
  static constexpr int kBlock = 32;

  static int64_t chunk_length(const RouteScanParams& p) {
    const int64_t length = route_shape(p.route[0], p.per_line, p.height, p.width).length;
    return length < p.chunk ? length : p.chunk;
  }

  void run_line(int64_t k, RouteShape shape, int64_t line) {
    load_grad_last_state(k);
    const int64_t last = saved_state_count(shape.length, p_.chunk);
    for (int64_t chunk = last; chunk >= 0; --chunk) {
      const int64_t begin = chunk * p_.chunk;
      const int64_t rest = shape.length - begin;
      const int count = int(rest < p_.chunk ? rest : p_.chunk);
      load_saved_state(k, shape, line, chunk);
      // The decay of the position after the chunk; none of the gradient of the last state.
      V* decay_after = decay_.data() + int64_t(count) * states_ * vectors();
      for (int s = 0; s < states_ * vectors(); ++s) decay_after[s] = chunk == last ? splat(S(1)) : decay_.data()[s];
      Pixel pixel = this->pixel(k, line, begin);
      for (int i = 0; i < count; ++i, this->advance(k, pixel)) {
        pixels_[i] = pixel;
        if (i < kAhead) this->prefetch_inputs(k, pixel);
      }
      for (int i = 0; i < count; ++i) {
        if (i + kAhead < count) this->prefetch_inputs(k, pixels_[i + kAhead]);
        // What the way back needs is on its way meanwhile.
        this->prefetch(pixel_pointer<T>(p_.grad_y, item_.batch, pixels_[i], 0, 0) + item_.channel);
        this->prefetch(this->per_map(p_.grad_x, pixels_[i]));
        this->prefetch(pixel_pointer<T>(p_.grad_delta, item_.batch, pixels_[i], k, 0) + item_.channel);
        if (states_ == 1) {
          recompute<1>(k, i);
        } else {
          recompute<0>(k, i);
        }
      }
      for (int i = count - 1; i >= 0; --i) {
        if (states_ == 1) {
          differentiate_position<1>(k, i);
        } else {
          differentiate_position<0>(k, i);
        }
        if (i % kBlock == 0) add_block_to_totals();
      }
    }
  }

  // Sums over positions are accumulated per block, and those of the blocks with their rounding errors: the precision of
  // a single sum would decrease with the length.
  void add_block_to_totals() {
    for (int i = 0; i < vectors() * states_; ++i)
      add_to_total(total_A_.data()[i], error_A_.data()[i], grad_A_.data()[i]);
    for (int v = 0; v < vectors(); ++v) {
      add_to_total(total_D_[v], error_D_[v], grad_D_[v]);
      add_to_total(total_bias_[v], error_bias_[v], grad_bias_[v]);
    }
  }

  // Moves a block's sum to the total; `error` collects what the total loses by rounding (Knuth's TwoSum).
  static void add_to_total(V& total, V& error, V& block) {
    const V sum = total + block;
    const V added = sum - total;
    error += (total - (sum - added)) + (block - added);
    total = sum;
    block = V{};
  }

  // After an overflow the error is NaN, and the total what a plain sum would be.
  static V corrected(V total, V error) { return error == error ? total + error : total; }

  void load_grad_last_state(int64_t k) {
    for (int i = 0; i < vectors() * states_; ++i) grad_state_.data()[i] = V{};
    if (!p_.grad_last_state) return;
    const S* grad = static_cast<const S*>(p_.grad_last_state) +
                    ((item_.batch * p_.routes + k) * p_.channels + item_.channel) * int64_t(states_);
    for (int n = 0; n < states_; ++n)
      for (int c = 0; c < item_.channels; ++c)
        grad_state_.data()[n * vectors() + c / kLanes][c % kLanes] = grad[c * states_ + n];
  }

  // Loads the state before the chunk.
  void load_saved_state(int64_t k, RouteShape shape, int64_t line, int64_t chunk) {
    const S* source = chunk ? this->saved(k, shape, line, chunk - 1) : nullptr;
    for (int n = 0; n < states_; ++n)
      for (int v = 0; v < vectors(); ++v)
        chunk_states_.data()[n * vectors() + v] = source ? load(source + n * p_.channels + v * kLanes, lanes(v)) : V{};
  }

  template <int States>
  void recompute(int64_t k, int i) {
    const int states = States ? States : states_, vectors = this->vectors();
    const Pixel pixel = pixels_[i];
    const T* x = pixel_pointer<T>(p_.x, item_.batch, pixel, 0, 0) + item_.channel;
    const T* B = p_.B.data ? pixel_pointer<T>(p_.B, item_.batch, pixel, k, item_.group) : nullptr;
    V inflow[kMaxVectors];
    V* delta = delta_.data() + i * vectors;
    V* delta_slope = delta_slope_.data() + i * vectors;
    this->load_delta(k, pixel, delta);
    for (int v = 0; v < vectors; ++v) {
      if (p_.delta_softplus) {
        const Softplus<S> result = softplus(delta[v]);
        delta[v] = result.value;
        delta_slope[v] = result.derivative;
      } else {
        delta_slope[v] = splat(S(1));
      }
      inflow[v] = delta[v] * load(x + v * kLanes, lanes(v));
    }
    V* decay = decay_.data() + int64_t(i) * states * vectors;
    const V* before = chunk_states_.data() + int64_t(i) * states * vectors;
    V* after = chunk_states_.data() + int64_t(i + 1) * states * vectors;
    for (int n = 0; n < states; ++n) {
      const S B_n = B ? scalar(B + n) : S(1);
      for (int v = 0; v < vectors; ++v) {
        const int s = n * vectors + v;
        decay[s] = exp2(delta[v] * A_log2e_.data()[s]);
        after[s] = decay[s] * before[s] + B_n * inflow[v];
      }
    }
  }

  template <int States>
  void differentiate_position(int64_t k, int i) {
    const int states = States ? States : states_, vectors = this->vectors();
    const Pixel pixel = pixels_[i];
    const T* x = pixel_pointer<T>(p_.x, item_.batch, pixel, 0, 0) + item_.channel;
    const T* grad_y = pixel_pointer<T>(p_.grad_y, item_.batch, pixel, 0, 0) + item_.channel;
    const T* B = p_.B.data ? pixel_pointer<T>(p_.B, item_.batch, pixel, k, item_.group) : nullptr;
    const T* C = p_.C.data ? pixel_pointer<T>(p_.C, item_.batch, pixel, k, item_.group) : nullptr;
    S* grad_B = p_.grad_B ? projection_gradient(p_.grad_B, k, pixel) : nullptr;
    S* grad_C = p_.grad_C ? projection_gradient(p_.grad_C, k, pixel) : nullptr;
    const V* delta = delta_.data() + i * vectors;
    V u[kMaxVectors], dy[kMaxVectors], inflow[kMaxVectors], through_inflow[kMaxVectors], grad_exponent[kMaxVectors];
    for (int v = 0; v < vectors; ++v) {
      u[v] = load(x + v * kLanes, lanes(v));
      dy[v] = load(grad_y + v * kLanes, lanes(v));
      inflow[v] = delta[v] * u[v];
    }
    const V* decay = decay_.data() + int64_t(i) * states * vectors;
    const V* decay_after = decay_.data() + int64_t(i + 1) * states * vectors;
    const V* before = chunk_states_.data() + int64_t(i) * states * vectors;
    const V* after = chunk_states_.data() + int64_t(i + 1) * states * vectors;
    const V* A = A_log2e_.data();
    V* grad_A = grad_A_.data();
    V* grad_after = grad_state_.data();
    // The first state stores what the others add to: zeros stored before the loop cost more than a state's products.
    const auto differentiate_state = [&](int n, auto is_first) {
      const S B_n = B ? scalar(B + n) : S(1), C_n = C ? scalar(C + n) : S(1);
      V sum_B{}, sum_C{};
      for (int v = 0; v < vectors; ++v) {
        const int s = n * vectors + v;
        // In this order compilers fuse the first product, so that the recurrence rounds once a position.
        const V grad_state = decay_after[s] * grad_after[s] + C_n * dy[v];
        const V through_decay = grad_state * decay[s] * before[s];
        grad_after[s] = grad_state;
        grad_A[s] += through_decay * delta[v];
        if constexpr (decltype(is_first)::value) {
          grad_exponent[v] = through_decay * A[s];
          through_inflow[v] = B_n * grad_state;
        } else {
          grad_exponent[v] += through_decay * A[s];
          through_inflow[v] += B_n * grad_state;
        }
        sum_B += grad_state * inflow[v];
        sum_C += dy[v] * after[s];
      }
      if (grad_B) grad_B[n] = sum_lanes<S>(sum_B);
      if (grad_C) grad_C[n] = sum_lanes<S>(sum_C);
    };
    differentiate_state(0, std::true_type());
    for (int n = 1; n < states; ++n) differentiate_state(n, std::false_type());
    S* grad_x = this->per_map(p_.grad_x, pixel);
    T* grad_delta = pixel_pointer<T>(p_.grad_delta, item_.batch, pixel, k, 0) + item_.channel;
    const V* delta_slope = delta_slope_.data() + i * vectors;
    for (int v = 0; v < vectors; ++v) {
      // A_log2e contains log2(e), so the exponent's gradient is scaled back.
      const V grad_biased = (grad_exponent[v] * S(kLn2) + through_inflow[v] * u[v]) * delta_slope[v];
      store(grad_delta + v * kLanes, grad_biased, lanes(v));
      grad_bias_[v] += grad_biased;
      grad_D_[v] += dy[v] * u[v];
      this->accumulate(grad_x + v * kLanes, through_inflow[v] * delta[v] + D_[v] * dy[v], lanes(v), k == 0);
    }
  }

  S* projection_gradient(void* data, int64_t k, Pixel pixel) const {
    int64_t index = item_.tile * p_.batch + item_.batch;
    index = (index * p_.height + pixel.row) * p_.width + pixel.column;
    return static_cast<S*>(data) + ((index * p_.routes + k) * p_.groups + item_.group) * int64_t(states_);
  }

  void store_parameter_gradients(int64_t k) {
    const int64_t row = ((item_.part * p_.batch + item_.batch) * p_.routes + k) * p_.channels + item_.channel;
    S* grad_A = static_cast<S*>(p_.grad_A) + row * states_;
    for (int n = 0; n < states_; ++n)
      for (int c = 0; c < item_.channels; ++c)
        grad_A[c * states_ + n] = corrected(total_A_.data()[n * vectors() + c / kLanes],
                                            error_A_.data()[n * vectors() + c / kLanes])[c % kLanes];
    for (int v = 0; v < vectors(); ++v) {
      if (p_.grad_D)
        store(static_cast<S*>(p_.grad_D) + row + v * kLanes, corrected(total_D_[v], error_D_[v]), lanes(v));
      if (p_.grad_delta_bias)
        store(static_cast<S*>(p_.grad_delta_bias) + row + v * kLanes, corrected(total_bias_[v], error_bias_[v]),
              lanes(v));
    }
  }

  static constexpr double kLn2 = 0.6931471805599453;
  const int64_t chunk_;
  std::unique_ptr<Pixel[]> pixels_;
  Scratch<S> delta_, delta_slope_;   // [position][v]
  Scratch<S> decay_, chunk_states_;  // [position][n][v]; decay_ ends with the decay of the position after the chunk,
                                     // chunk_states_ starts with the state before it
  Scratch<S> grad_state_;            // [n][v]; of the position after
  Scratch<S> grad_A_, total_A_, error_A_;  // [n][v]; of the block, of the blocks after it, and what that sum lost
  V grad_D_[kMaxVectors], total_D_[kMaxVectors], error_D_[kMaxVectors];
  V grad_bias_[kMaxVectors], total_bias_[kMaxVectors], error_bias_[kMaxVectors];
};

template <template <class, class, int> class Tile, class T, class S>
void run_item(const RouteScanParams& p, const WorkItem& item) {
  // Narrow vectors do not profit from unrolling.
  constexpr bool kUnroll = kVectorBytes > 16 && sizeof(S) == 4;
  if (kUnroll && item.channels % kCpuChannelUnit == 0) {
    switch (item.channels / kCpuChannelUnit) {
      case 1: return Tile<T, S, kUnroll ? 1 : 0>(p, item).run();
      case 2: return Tile<T, S, kUnroll ? 2 : 0>(p, item).run();
      case 3: return Tile<T, S, kUnroll ? 3 : 0>(p, item).run();
      case 4: return Tile<T, S, kUnroll ? 4 : 0>(p, item).run();
    }
  }
  Tile<T, S, 0>(p, item).run();
}

template <template <class, class, int> class Tile, class T, class S>
void run_typed(const RouteScanParams& p, ParallelFor parallel_for) {
  struct Context {
    const RouteScanParams& p;
    WorkItems items;
  } context{p, WorkItems(p)};
  const int64_t count = context.items.count();
  const int64_t updates = p.batch * p.height * p.width * p.routes * p.channels * p.states;
  const int64_t grain = count ? ceil_div(kMinUpdatesPerThread * count, updates > 0 ? updates : 1) : 1;
  parallel_for(
      count, grain,
      [](int64_t begin, int64_t end, const void* opaque) {
        const Context& context = *static_cast<const Context*>(opaque);
        for (int64_t index = begin; index < end; ++index) {
          run_item<Tile, T, S>(context.p, context.items[index]);
        }
      },
      &context);
}

template <template <class, class, int> class Tile>
void run(const RouteScanParams& p, ParallelFor parallel_for) {
  switch (p.dtype) {
    case DataType::kFloat32: return run_typed<Tile, float, float>(p, parallel_for);
    case DataType::kBFloat16: return run_typed<Tile, BFloat16, float>(p, parallel_for);
    case DataType::kFloat16: return run_typed<Tile, Float16, float>(p, parallel_for);
    case DataType::kFloat64: return run_typed<Tile, double, double>(p, parallel_for);
  }
}

}  // namespace

void route_scan_forward(const RouteScanParams& p, ParallelFor parallel_for) { run<ForwardTile>(p, parallel_for); }
void route_scan_backward(const RouteScanParams& p, ParallelFor parallel_for) { run<BackwardTile>(p, parallel_for); }

}  // namespace SSM_CPU_CAPABILITY
}  // namespace cuda_ops
