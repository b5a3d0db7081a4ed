// The backward pass of the route scan on the CPU: what the scan in one direction and that in both ways share. Included
// by the kernel that is compiled once per capability.
#pragma once

#include <type_traits>

#include "route_tile.h"

namespace cuda_ops {
namespace SSM_CPU_CAPABILITY {
namespace {

// A tile of channels whose gradients are computed: the step of one position, and the sums for the parameters.
template <class T, class S, int Units>
class GradientTile : protected ScanTile<T, S, Units> {
  using Base = ScanTile<T, S, Units>;

 protected:
  using Base::kLanes, Base::kMaxVectors, Base::lanes, Base::p_, Base::item_, Base::A_log2e_, Base::states_,
      Base::vectors;
  using typename Base::V;

  // Positions whose sum is accumulated plainly.
  static constexpr int kBlock = 32;
  static constexpr double kLn2 = 0.6931471805599453;

  // Scratch memory for `positions` of a line at a time.
  GradientTile(const RouteScanParams& p, const WorkItem& item, int64_t positions)
      : Base(p, item),
        delta_(positions * vectors()),
        delta_slope_(positions * vectors()),
        decay_((positions + 2) * vectors() * states_),
        line_states_((positions + 2) * vectors() * states_),
        grad_state_(vectors() * states_),
        grad_A_(vectors() * states_),
        total_A_(vectors() * states_),
        error_A_(vectors() * states_) {}

  // Of a position, -1 to the number of them: its decays, and the states there.
  V* decay(int64_t i) const { return decay_.data() + (i + 1) * states_ * vectors(); }
  V* state(int64_t i) const { return line_states_.data() + (i + 1) * states_ * vectors(); }

  // What a direction's states and decays are at a position, as [n][v]; "before" and "after" in the scan's order.
  struct Step {
    const V* decay;
    const V* decay_after;  // that of the next position
    const V* before;       // the state before the position
    const V* after;        // the state after it
  };

  // A position's inputs, and the gradients of its exponents and inflows as summed over the states.
  struct Position {
    SSM_ALWAYS_INLINE Position(const GradientTile& tile, int64_t k, Pixel pixel, const V* delta) : delta(delta) {
      const RouteScanParams& p = tile.p_;
      const int64_t batch = tile.item_.batch, channel = tile.item_.channel, group = tile.item_.group;
      const T* x = pixel_pointer<T>(p.x, batch, pixel, 0, 0) + channel;
      const T* grad_y = pixel_pointer<T>(p.grad_y, batch, pixel, 0, 0) + channel;
      B = p.B.data ? pixel_pointer<T>(p.B, batch, pixel, k, group) : nullptr;
      C = p.C.data ? pixel_pointer<T>(p.C, batch, pixel, k, group) : nullptr;
      grad_B = p.grad_B ? tile.projection_gradient(p.grad_B, k, pixel) : nullptr;
      grad_C = p.grad_C ? tile.projection_gradient(p.grad_C, k, pixel) : nullptr;
      for (int v = 0; v < tile.vectors(); ++v) {
        u[v] = load(x + v * kLanes, tile.lanes(v));
        dy[v] = load(grad_y + v * kLanes, tile.lanes(v));
        inflow[v] = delta[v] * u[v];
      }
    }

    const T *B, *C;
    S *grad_B, *grad_C;
    const V* delta;
    V u[kMaxVectors], dy[kMaxVectors], inflow[kMaxVectors];
    V through_inflow[kMaxVectors], grad_exponent[kMaxVectors];
  };

  void clear_sums() {
    for (int i = 0; i < vectors() * states_; ++i) {
      grad_A_.data()[i] = total_A_.data()[i] = error_A_.data()[i] = V{};
    }
    for (int v = 0; v < vectors(); ++v) {
      grad_D_[v] = total_D_[v] = error_D_[v] = grad_bias_[v] = total_bias_[v] = error_bias_[v] = V{};
    }
  }

  // Computes a position's delta and its derivative, its decays and the states after it. States is the number of states
  // if known at compile time, else 0.
  template <int States>
  SSM_ALWAYS_INLINE void compute_states(int64_t k, Pixel pixel, int i) {
    const int states = States ? States : states_, vectors = this->vectors();
    const T* x = pixel_pointer<T>(p_.x, item_.batch, pixel, 0, 0) + item_.channel;
    const T* B = p_.B.data ? pixel_pointer<T>(p_.B, item_.batch, pixel, k, item_.group) : nullptr;
    V* delta = delta_.data() + i * vectors;
    V* delta_slope = delta_slope_.data() + i * vectors;
    V inflow[kMaxVectors];
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
    V* decay = this->decay(i);
    const V* before = state(i - 1);
    V* after = state(i);
    for (int n = 0; n < states; ++n) {
      const S B_n = B ? scalar(B + n) : S(1);
      for (int v = 0; v < vectors; ++v) {
        const int s = n * vectors + v;
        decay[s] = exp2(delta[v] * A_log2e_.data()[s]);
        after[s] = decay[s] * before[s] + B_n * inflow[v];
      }
    }
  }

  // Moves the gradient of the state back over a position, and sums what it gives to the position's inputs. With Adds,
  // to what another direction gave.
  template <int States, bool Adds>
  SSM_ALWAYS_INLINE void differentiate_states(const Step& step, Position& position) {
    const int states = States ? States : states_, vectors = this->vectors();
    const V* A = A_log2e_.data();
    V* grad_A = grad_A_.data();
    V* grad_after = grad_state_.data();
    // The first state stores what the others add to: zeros stored before the loop cost more than a state's products.
    const auto differentiate_state = [&](int n, auto stores) __attribute__((always_inline)) {
      const S B_n = position.B ? scalar(position.B + n) : S(1), C_n = position.C ? scalar(position.C + n) : S(1);
      V sum_B{}, sum_C{};
      for (int v = 0; v < vectors; ++v) {
        const int s = n * vectors + v;
        // In this order compilers fuse the first product, so that the recurrence rounds once a position.
        const V grad_state = step.decay_after[s] * grad_after[s] + C_n * position.dy[v];
        const V through_decay = grad_state * step.decay[s] * step.before[s];
        grad_after[s] = grad_state;
        grad_A[s] += through_decay * position.delta[v];
        if constexpr (decltype(stores)::value) {
          position.grad_exponent[v] = through_decay * A[s];
          position.through_inflow[v] = B_n * grad_state;
        } else {
          position.grad_exponent[v] += through_decay * A[s];
          position.through_inflow[v] += B_n * grad_state;
        }
        sum_B += grad_state * position.inflow[v];
        sum_C += position.dy[v] * step.after[s];
      }
      if (position.grad_B) store_sum<Adds>(position.grad_B[n], sum_lanes<S>(sum_B));
      if (position.grad_C) store_sum<Adds>(position.grad_C[n], sum_lanes<S>(sum_C));
    };
    differentiate_state(0, std::bool_constant<!Adds>());
    for (int n = 1; n < states; ++n) differentiate_state(n, std::false_type());
  }

  // Stores the gradients of a position's x and delta. Directions is in how many the skip D leads to the output.
  template <int Directions>
  SSM_ALWAYS_INLINE void store_position(int64_t k, Pixel pixel, const Position& position, const V* slope) {
    S* grad_x = this->per_map(p_.grad_x, pixel);
    T* grad_delta = pixel_pointer<T>(p_.grad_delta, item_.batch, pixel, k, 0) + item_.channel;
    for (int v = 0; v < vectors(); ++v) {
      // A_log2e contains log2(e), so the exponent's gradient is scaled back.
      const V grad_biased =
          (position.grad_exponent[v] * S(kLn2) + position.through_inflow[v] * position.u[v]) * slope[v];
      const V grad_D = position.dy[v] * position.u[v], skip = this->D_[v] * position.dy[v];
      store(grad_delta + v * kLanes, grad_biased, lanes(v));
      grad_bias_[v] += grad_biased;
      grad_D_[v] += S(Directions) * grad_D;
      this->accumulate(grad_x + v * kLanes, position.through_inflow[v] * position.delta[v] + S(Directions) * skip,
                       lanes(v), k == 0);
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

  Scratch<S> delta_, delta_slope_;  // [position][v]
  Scratch<S> decay_, line_states_;  // [position][n][v], with what is before the first and behind the last
  Scratch<S> grad_state_;           // [n][v]; of the position after

 private:
  template <bool Adds>
  static void store_sum(S& target, S sum) {
    target = Adds ? target + sum : sum;
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

  S* projection_gradient(void* data, int64_t k, Pixel pixel) const {
    int64_t index = item_.tile * p_.batch + item_.batch;
    index = (index * p_.height + pixel.row) * p_.width + pixel.column;
    return static_cast<S*>(data) + ((index * p_.routes + k) * p_.groups + item_.group) * int64_t(states_);
  }

  Scratch<S> grad_A_, total_A_, error_A_;  // [n][v]; of the block, of the blocks after it, and what that sum lost
  V grad_D_[kMaxVectors], total_D_[kMaxVectors], error_D_[kMaxVectors];
  V grad_bias_[kMaxVectors], total_bias_[kMaxVectors], error_bias_[kMaxVectors];
};

}  // namespace
}  // namespace SSM_CPU_CAPABILITY
}  // namespace cuda_ops
