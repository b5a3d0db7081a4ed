// Route scan on the CPU. Vectors run over channels, threads over images, tiles of channels and parts of the lines.
// Compiled once per capability; scan_dispatch.cpp chooses at run time.
#include <memory>

#include "both_ways.h"
#include "route_gradients.h"
#include "route_tile.h"

namespace cuda_ops {
namespace SSM_CPU_CAPABILITY {
namespace {

template <class T, class S, int Units>
class ForwardTile : ScanTile<T, S, Units> {
  using Base = ScanTile<T, S, Units>;
  using Base::D_, Base::kAhead, Base::kLanes, Base::kMaxVectors, Base::lanes, Base::p_, Base::item_, Base::A_log2e_,
      Base::state_, Base::states_, Base::vectors;
  using typename Base::V;

 public:
  static constexpr bool kUnrolls = true;

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
class BackwardTile : GradientTile<T, S, Units> {
  using Base = GradientTile<T, S, Units>;
  using Base::decay, Base::delta_, Base::delta_slope_, Base::grad_state_, Base::item_, Base::kAhead, Base::kBlock,
      Base::kLanes, Base::lanes, Base::p_, Base::state, Base::states_, Base::vectors;
  using typename Base::Position;
  using typename Base::Step;
  using typename Base::V;

 public:
  static constexpr bool kUnrolls = true;

  BackwardTile(const RouteScanParams& p, const WorkItem& item)
      : Base(p, item, chunk_length(p)), pixels_(new Pixel[chunk_length(p)]) {}

  void run() {
    for (int64_t k = 0; k < p_.routes; ++k) {
      this->load_parameters(k);
      this->clear_sums();
      const RouteShape shape = route_shape(p_.route[k], p_.per_line, p_.height, p_.width);
      for (int64_t line = item_.first_line; line < item_.end_line; ++line) run_line(k, shape, line);
      this->store_parameter_gradients(k);
    }
  }

 private:
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
      for (int s = 0; s < states_ * vectors(); ++s) decay(count)[s] = chunk == last ? splat(S(1)) : decay(0)[s];
      Pixel pixel = this->pixel(k, line, begin);
      for (int i = 0; i < count; ++i, this->advance(k, pixel)) {
        pixels_[i] = pixel;
        if (i < kAhead) this->prefetch_inputs(k, pixel);
      }
      for (int i = 0; i < count; ++i) {
        if (i + kAhead < count) this->prefetch_inputs(k, pixels_[i + kAhead]);
        this->prefetch_gradients(k, pixels_[i]);
        if (states_ == 1) {
          this->template compute_states<1>(k, pixels_[i], i);
        } else {
          this->template compute_states<0>(k, pixels_[i], i);
        }
      }
      for (int i = count - 1; i >= 0; --i) {
        if (states_ == 1) {
          differentiate_position<1>(k, i);
        } else {
          differentiate_position<0>(k, i);
        }
        if (i % kBlock == 0) this->add_block_to_totals();
      }
    }
  }

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
        state(-1)[n * vectors() + v] = source ? load(source + n * p_.channels + v * kLanes, lanes(v)) : V{};
  }

  template <int States>
  void differentiate_position(int64_t k, int i) {
    Position position(*this, k, pixels_[i], delta_.data() + i * vectors());
    this->template differentiate_states<States, false>(Step{decay(i), decay(i + 1), state(i - 1), state(i)}, position);
    this->template store_position<1>(k, pixels_[i], position, delta_slope_.data() + i * vectors());
  }

  std::unique_ptr<Pixel[]> pixels_;
};

template <template <class, class, int> class Tile, class T, class S>
void run_item(const RouteScanParams& p, const WorkItem& item) {
  // Narrow vectors do not profit from unrolling.
  constexpr bool kUnroll = kVectorBytes > 16 && sizeof(S) == 4 && Tile<T, S, 0>::kUnrolls;
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

void route_scan_forward(const RouteScanParams& p, ParallelFor parallel_for) {
  p.both_ways ? run<BothWaysForward>(p, parallel_for) : run<ForwardTile>(p, parallel_for);
}
void route_scan_backward(const RouteScanParams& p, ParallelFor parallel_for) {
  p.both_ways ? run<BothWaysBackward>(p, parallel_for) : run<BackwardTile>(p, parallel_for);
}

}  // namespace SSM_CPU_CAPABILITY
}  // namespace cuda_ops
