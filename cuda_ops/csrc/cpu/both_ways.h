// The route scan of lines from both ends with the same inputs, on the CPU: what depends on the pixel alone, and the
// decays above all, is computed once for both. Included by the kernel that is compiled once per capability.
#pragma once

#include "route_gradients.h"
#include "route_tile.h"

namespace cuda_ops {
namespace SSM_CPU_CAPABILITY {
namespace {

template <class T, class S, int Units>
class BothWaysForward : ScanTile<T, S, Units> {
  using Base = ScanTile<T, S, Units>;
  using Base::D_, Base::kAhead, Base::kLanes, Base::kMaxVectors, Base::lanes, Base::p_, Base::item_, Base::A_log2e_,
      Base::state_, Base::states_, Base::vectors;
  using typename Base::V;

 public:
  // Code for each width of a tile, in the types that train: half precision on a CPU is rare.
  static constexpr bool kUnrolls = std::is_same_v<T, S>;

  BothWaysForward(const RouteScanParams& p, const WorkItem& item)
      : Base(p, item),
        length_(int(route_shape(p.route[0], p.per_line, p.height, p.width).length)),
        inflow_(length_ * vectors()),
        output_(length_ * vectors()),
        decay_(int64_t(length_) * vectors() * states_) {}

  void run() {
    this->load_parameters(0);
    const RouteShape shape = route_shape(p_.route[0], p_.per_line, p_.height, p_.width);
    Place ahead{item_.first_line, 0, this->pixel(0, item_.first_line, 0)};
    for (int i = 0; i < kAhead; ++i) this->advance_over_lines(0, shape, ahead);
    for (int64_t line = item_.first_line; line < item_.end_line; ++line) {
      this->clear_state();
      for (int i = 0; i < length_; ++i) {
        if (ahead.line < item_.end_line) {
          this->prefetch_inputs(0, ahead.pixel);
          this->prefetch(this->per_map(p_.y, ahead.pixel));
          this->advance_over_lines(0, shape, ahead);
        }
        there(i, this->pixel(0, line, i));
      }
      this->clear_state();
      for (int i = length_ - 1; i >= 0; --i) back(i, this->pixel(0, line, i));
    }
  }

 private:
  void there(int i, Pixel pixel) {
    const int vectors = this->vectors();
    const T* x = pixel_pointer<T>(p_.x, item_.batch, pixel, 0, 0) + item_.channel;
    const T* B = p_.B.data ? pixel_pointer<T>(p_.B, item_.batch, pixel, 0, item_.group) : nullptr;
    const T* C = p_.C.data ? pixel_pointer<T>(p_.C, item_.batch, pixel, 0, item_.group) : nullptr;
    V delta[kMaxVectors], inflow[kMaxVectors], output[kMaxVectors];
    this->load_delta(0, pixel, delta);
    for (int v = 0; v < vectors; ++v) {
      const V u = load(x + v * kLanes, lanes(v));
      if (p_.delta_softplus) delta[v] = softplus(delta[v]).value;
      inflow[v] = delta[v] * u;
      const V skip = D_[v] * u;
      output[v] = skip + skip;
    }
    V* decays = decay_.data() + int64_t(i) * states_ * vectors;
    for (int n = 0; n < states_; ++n) {
      const S B_n = B ? scalar(B + n) : S(1), C_n = C ? scalar(C + n) : S(1);
      for (int v = 0; v < vectors; ++v) {
        const int s = n * vectors + v;
        V& h = state_.data()[s];
        const V decay = exp2(delta[v] * A_log2e_.data()[s]);
        decays[s] = decay;
        h = decay * h + B_n * inflow[v];
        output[v] += C_n * h;
      }
    }
    for (int v = 0; v < vectors; ++v) {
      inflow_.data()[i * vectors + v] = inflow[v];
      output_.data()[i * vectors + v] = output[v];
    }
  }

  void back(int i, Pixel pixel) {
    const int vectors = this->vectors();
    const T* B = p_.B.data ? pixel_pointer<T>(p_.B, item_.batch, pixel, 0, item_.group) : nullptr;
    const T* C = p_.C.data ? pixel_pointer<T>(p_.C, item_.batch, pixel, 0, item_.group) : nullptr;
    V inflow[kMaxVectors], output[kMaxVectors];
    for (int v = 0; v < vectors; ++v) {
      inflow[v] = inflow_.data()[i * vectors + v];
      output[v] = output_.data()[i * vectors + v];
    }
    const V* decays = decay_.data() + int64_t(i) * states_ * vectors;
    for (int n = 0; n < states_; ++n) {
      const S B_n = B ? scalar(B + n) : S(1), C_n = C ? scalar(C + n) : S(1);
      for (int v = 0; v < vectors; ++v) {
        const int s = n * vectors + v;
        V& h = state_.data()[s];
        h = decays[s] * h + B_n * inflow[v];
        output[v] += C_n * h;
      }
    }
    S* y = this->per_map(p_.y, pixel);
    for (int v = 0; v < vectors; ++v) store(y + v * kLanes, output[v], lanes(v));
  }

  const int length_;
  Scratch<S> inflow_, output_;  // [position][v]
  Scratch<S> decay_;            // [position][n][v]
};

template <class T, class S, int Units>
class BothWaysBackward : GradientTile<T, S, Units> {
  using Base = GradientTile<T, S, Units>;
  using Base::decay, Base::delta_, Base::delta_slope_, Base::grad_state_, Base::item_, Base::kAhead, Base::kBlock,
      Base::state, Base::states_, Base::vectors;
  using typename Base::Position;
  using typename Base::Step;
  using typename Base::V;

 public:
  static constexpr bool kUnrolls = std::is_same_v<T, S>;

  BothWaysBackward(const RouteScanParams& p, const WorkItem& item)
      : Base(p, item, line_length(p)),
        length_(int(line_length(p))),
        exponent_(length_ * vectors()),
        inflow_(length_ * vectors()) {}

  void run() {
    this->load_parameters(0);
    this->clear_sums();
    const int count = states_ * vectors();
    // What there is beyond the ends leaves the gradients as they are, and comes with no state.
    for (int s = 0; s < count; ++s) decay(-1)[s] = decay(length_)[s] = splat(S(1));
    for (int64_t line = item_.first_line; line < item_.end_line; ++line) {
      for (int s = 0; s < count; ++s) state(-1)[s] = V{};
      for (int i = 0; i < length_ && i < kAhead; ++i) this->prefetch_inputs(0, this->pixel(0, line, i));
      for (int i = 0; i < length_; ++i) {
        if (i + kAhead < length_) this->prefetch_inputs(0, this->pixel(0, line, i + kAhead));
        const Pixel pixel = this->pixel(0, line, i);
        this->prefetch_gradients(0, pixel);
        this->template compute_states<0>(0, pixel, i);
      }
      for (int s = 0; s < count; ++s) state(length_)[s] = grad_state_.data()[s] = V{};
      for (int i = length_ - 1; i >= 0; --i) {
        differentiate_there(i, this->pixel(0, line, i));
        if (i % kBlock == 0) this->add_block_to_totals();
      }
      for (int s = 0; s < count; ++s) grad_state_.data()[s] = V{};
      for (int i = 0; i < length_; ++i) {
        differentiate_back(i, this->pixel(0, line, i));
        if (i % kBlock == kBlock - 1) this->add_block_to_totals();
      }
      this->add_block_to_totals();
    }
    this->store_parameter_gradients(0);
  }

 private:
  static int64_t line_length(const RouteScanParams& p) {
    return route_shape(p.route[0], p.per_line, p.height, p.width).length;
  }

  // Differentiates the scan from the line's first end, on the way back from its last one, and computes the states of
  // the other scan: each takes the place of the state after the position, which is not needed any more.
  void differentiate_there(int i, Pixel pixel) {
    Position position(*this, 0, pixel, delta_.data() + i * vectors());
    this->template differentiate_states<0, false>(Step{decay(i), decay(i + 1), state(i - 1), state(i)}, position);
    for (int n = 0; n < states_; ++n) {
      const S B_n = position.B ? scalar(position.B + n) : S(1);
      for (int v = 0; v < vectors(); ++v) {
        const int s = n * vectors() + v;
        state(i)[s] = decay(i)[s] * state(i + 1)[s] + B_n * position.inflow[v];
      }
    }
    for (int v = 0; v < vectors(); ++v) {
      exponent_.data()[i * vectors() + v] = position.grad_exponent[v];
      inflow_.data()[i * vectors() + v] = position.through_inflow[v];
    }
  }

  // Differentiates the scan from the line's last end, and adds its gradients to the other's.
  void differentiate_back(int i, Pixel pixel) {
    Position position(*this, 0, pixel, delta_.data() + i * vectors());
    for (int v = 0; v < vectors(); ++v) {
      position.grad_exponent[v] = exponent_.data()[i * vectors() + v];
      position.through_inflow[v] = inflow_.data()[i * vectors() + v];
    }
    this->template differentiate_states<0, true>(Step{decay(i), decay(i - 1), state(i + 1), state(i)}, position);
    this->template store_position<2>(0, pixel, position, delta_slope_.data() + i * vectors());
  }

  const int length_;
  Scratch<S> exponent_, inflow_;  // [position][v]; gradients of the exponents and inflows in the first direction
};

}  // namespace
}  // namespace SSM_CPU_CAPABILITY
}  // namespace cuda_ops
