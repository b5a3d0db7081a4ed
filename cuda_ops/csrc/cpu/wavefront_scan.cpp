// Wavefront scan on the CPU. Pixels follow each other row by row, which keeps to the order of the wavefronts: states lie
// in a buffer of one row, in which each pixel replaces the one above it. Vectors run over channels, the pool's threads
// over images and channels. Compiled once for each capability; scan_dispatch.cpp chooses at run time.
#include <utility>

#include "../wavefront_scan.h"
#include "scratch.h"
#include "simd.h"

namespace cuda_ops {
namespace SSM_CPU_CAPABILITY {
namespace {

template <class T>
T* at(const GridTensor& tensor, int64_t batch, int64_t row, int64_t column) {
  return static_cast<T*>(tensor.data) + batch * tensor.batch + row * tensor.row + column * tensor.column;
}

// Which of the neighbours a pixel's state comes from.
enum class From { kAbove, kBefore, kBoth };

// A unit of channels of one image. States lie as [column][n][vector], `column_` vectors for each pixel.
// T is the map's element type, S the state's.
template <class T, class S>
class UnitScan {
 public:
  using V = Vec<S>;
  static constexpr int kLanes = Vector<S>::kLanes;
  static constexpr int kVectors = int(kTileUnit) / kLanes;

  UnitScan(const WavefrontScanParams& p, int64_t batch, int64_t channel)
      : p_(p),
        batch_(batch),
        channel_(channel),
        channels_(int(p.channels - channel < kTileUnit ? p.channels - channel : kTileUnit)),
        states_(int(p.states)),
        column_(p.states * kVectors),
        rate_above_(column_),
        rate_before_(column_),
        zeros_(column_),
        projections_(ceil_div(3 * p.states, kLanes)) {
    load_rates(p.above.A, rate_above_.data());
    load_rates(p.before.A, rate_before_.data());
    clear(zeros_.data(), column_);
    for (int v = 0; v < kVectors; ++v)
      D_[v] = p.D ? load(static_cast<const S*>(p.D) + channel + v * kLanes, lanes(v)) : V{};
  }

 protected:
  // Channels in a vector: all of its lanes but at the map's last channels.
  int lanes(int v) const {
    const int rest = channels_ - v * kLanes;
    return rest >= kLanes ? kLanes : rest > 0 ? rest : 0;
  }
  static void clear(V* target, int64_t vectors) {
    for (int64_t i = 0; i < vectors; ++i) target[i] = V{};
  }

  void load_rates(const void* data, V* rate) const {
    const S* A = static_cast<const S*>(data) + channel_ * p_.states;
    for (int n = 0; n < states_; ++n) {
      for (int v = 0; v < kVectors; ++v) {
        V value{};
        for (int lane = 0; lane < lanes(v); ++lane) value[lane] = A[(v * kLanes + lane) * p_.states + n];
        rate[n * kVectors + v] = value * S(kLog2E);
      }
    }
  }

  // A pixel's row of N projections as state scalars: where it lies, or widened into the given third of the scratch.
  const S* projection(const GridTensor& tensor, int64_t row, int64_t column, int third) const {
    const T* source = at<T>(tensor, batch_, row, column);
    if constexpr (sizeof(T) == sizeof(S)) {
      return reinterpret_cast<const S*>(source);
    } else {
      S* target = reinterpret_cast<S*>(projections_.data()) + third * p_.states;
      for (int n = 0; n < states_; n += kLanes) {
        const int count = states_ - n < kLanes ? states_ - n : kLanes;
        store(target + n, load(source + n, count), count);
      }
      return target;
    }
  }

  const T* channels_of(const GridTensor& tensor, int64_t row, int64_t column) const {
    return at<T>(tensor, batch_, row, column) + channel_;
  }

  S* saved(int64_t chunk, int64_t column) const {
    const int64_t count = saved_states(p_.height, p_.chunk);
    return static_cast<S*>(p_.saved) +
           ((batch_ * count + chunk) * p_.width + column) * p_.states * p_.channels + channel_;
  }

  // With both neighbours each contributes half: a factor on the inflow, one less in the decay's exponent.
  template <From from>
  static constexpr S weight() {
    return from == From::kBoth ? S(0.5) : S(1);
  }
  template <From from>
  static constexpr S exponent_shift() {
    return from == From::kBoth ? S(-1) : S(0);
  }

  // The states of one pixel from its neighbours' states, and its output where `y` is wanted. `here` may be `above`.
  template <From from, bool WithOutput>
  void step(int64_t row, int64_t column, const V* above, const V* before, V* here) {
    constexpr bool kAbove = from != From::kBefore, kBefore = from != From::kAbove;
    const T* x = channels_of(p_.x, row, column);
    const T* delta_above = channels_of(p_.above.delta, row, column);
    const T* delta_before = channels_of(p_.before.delta, row, column);
    const S* B_above = kAbove ? projection(p_.above.B, row, column, 0) : nullptr;
    const S* B_before = kBefore ? projection(p_.before.B, row, column, 1) : nullptr;
    const S* C = WithOutput ? projection(p_.C, row, column, 2) : nullptr;
    V d_above[kVectors], d_before[kVectors], inflow_above[kVectors], inflow_before[kVectors], output[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const V u = load(x + v * kLanes, lanes(v));
      d_above[v] = kAbove ? load(delta_above + v * kLanes, lanes(v)) : V{};
      d_before[v] = kBefore ? load(delta_before + v * kLanes, lanes(v)) : V{};
      inflow_above[v] = d_above[v] * u * weight<from>();
      inflow_before[v] = d_before[v] * u * weight<from>();
      output[v] = D_[v] * u;
    }
    const V* rate_above = rate_above_.data();
    const V* rate_before = rate_before_.data();
    for (int n = 0; n < states_; ++n) {
      for (int v = 0; v < kVectors; ++v) {
        const int s = n * kVectors + v;
        V h{};
        if constexpr (kAbove)
          h += exp2(d_above[v] * rate_above[s] + exponent_shift<from>()) * above[s] + B_above[n] * inflow_above[v];
        if constexpr (kBefore)
          h += exp2(d_before[v] * rate_before[s] + exponent_shift<from>()) * before[s] + B_before[n] * inflow_before[v];
        here[s] = h;
        if constexpr (WithOutput) output[v] += C[n] * h;
      }
    }
    if constexpr (WithOutput) {
      T* y = at<T>(p_.y, batch_, row, column) + channel_;
      for (int v = 0; v < kVectors; ++v) store(y + v * kLanes, output[v], lanes(v));
    }
  }

  // A row from the states of the one above it; `here` may be `above`.
  template <bool WithOutput>
  void run_row(int64_t row, const V* above, V* here) {
    if (row > 0) {
      step<From::kAbove, WithOutput>(row, 0, above, nullptr, here);
    } else if (p_.starts_from_above) {
      step<From::kAbove, WithOutput>(0, 0, zeros_.data(), nullptr, here);
    } else {
      step<From::kBefore, WithOutput>(0, 0, nullptr, zeros_.data(), here);
    }
    for (int64_t column = 1; column < p_.width; ++column) {
      above += column_;
      const V* before = here;
      here += column_;
      if (row > 0) {
        step<From::kBoth, WithOutput>(row, column, above, before, here);
      } else {
        step<From::kBefore, WithOutput>(0, column, nullptr, before, here);
      }
    }
  }

  const WavefrontScanParams& p_;
  const int64_t batch_, channel_;
  const int channels_, states_;
  const int64_t column_;
  Scratch<S> rate_above_, rate_before_;  // A * log2(e), [n][v]
  Scratch<S> zeros_;                     // the states outside the map
  Scratch<S> projections_;               // three rows of N scalars
  V D_[kVectors];
};

template <class T, class S>
class UnitForward : UnitScan<T, S> {
  using Base = UnitScan<T, S>;
  using Base::p_, Base::states_, Base::column_, Base::kVectors, Base::kLanes, Base::lanes;

 public:
  UnitForward(const WavefrontScanParams& p, int64_t batch, int64_t channel)
      : Base(p, batch, channel), row_(p.width * column_) {}

  void run() {
    int64_t until_saved = p_.chunk ? p_.chunk : p_.height;
    int64_t chunk = 0;
    for (int64_t row = 0; row < p_.height; ++row) {
      this->template run_row<true>(row, row_.data(), row_.data());
      if (--until_saved == 0 && row + 1 < p_.height) {
        save(chunk++);
        until_saved = p_.chunk;
      }
    }
  }

 private:
  void save(int64_t chunk) {
    for (int64_t column = 0; column < p_.width; ++column) {
      S* target = this->saved(chunk, column);
      for (int n = 0; n < states_; ++n, target += p_.channels)
        for (int v = 0; v < kVectors; ++v)
          store(target + v * kLanes, row_.data()[column * column_ + n * kVectors + v], lanes(v));
    }
  }

  Scratch<S> row_;
};

template <class T, class S>
class UnitBackward : UnitScan<T, S> {
  using Base = UnitScan<T, S>;
  using typename Base::V;
  using Base::batch_, Base::channel_, Base::p_, Base::states_, Base::column_, Base::kVectors, Base::kLanes, Base::lanes,
      Base::rate_above_, Base::rate_before_, Base::zeros_, Base::D_;

 public:
  // The first unit of a tile writes the tile's gradients of B and C, the others add theirs.
  UnitBackward(const WavefrontScanParams& p, int64_t batch, int64_t tile, int64_t channel, bool first)
      : Base(p, batch, channel),
        tile_(tile),
        first_(first),
        rows_((chunk_rows(p) + 1) * p.width * column_),
        carry_up_(p.width * column_),
        carry_back_(column_),
        grad_rates_(4 * column_),
        products_(3 * ceil_div(p.states, kLanes) * kLanes) {}

  void run() {
    Base::clear(carry_up_.data(), p_.width * column_);
    Base::clear(grad_rates_.data(), 4 * column_);
    Base::clear(products_.data(), 3 * padded_states());
    for (int v = 0; v < kVectors; ++v) grad_D_[v] = V{};
    const int64_t step_rows = chunk_rows(p_);
    for (int64_t chunk = (p_.height - 1) / step_rows; chunk >= 0; --chunk) {
      const int64_t begin = chunk * step_rows;
      const int64_t end = begin + step_rows < p_.height ? begin + step_rows : p_.height;
      if (chunk > 0) load_saved(chunk - 1);
      for (int64_t row = begin; row < end; ++row)
        this->template run_row<false>(row, row_states(row - begin), row_states(row - begin + 1));
      for (int64_t row = end - 1; row >= begin; --row) run_row_backward(row, row - begin + 1);
    }
    store_parameter_gradients();
  }

 private:
  static int64_t chunk_rows(const WavefrontScanParams& p) { return p.height < p.chunk ? p.height : p.chunk; }
  int padded_states() const { return int(ceil_div(states_, kLanes)) * kLanes; }

  // The states of a chunk's rows, from 1; slot 0 is the row above the chunk.
  V* row_states(int64_t slot) const { return rows_.data() + slot * p_.width * column_; }

  void load_saved(int64_t chunk) {
    for (int64_t column = 0; column < p_.width; ++column) {
      const S* source = this->saved(chunk, column);
      for (int n = 0; n < states_; ++n, source += p_.channels)
        for (int v = 0; v < kVectors; ++v)
          rows_.data()[column * column_ + n * kVectors + v] = load(source + v * kLanes, lanes(v));
    }
  }

  void run_row_backward(int64_t row, int64_t slot) {
    Base::clear(carry_back_.data(), column_);
    const V* here = row_states(slot);
    const V* above = row_states(slot - 1);
    for (int64_t column = p_.width - 1; column > 0; --column) {
      const int64_t offset = column * column_;
      if (row > 0) {
        step_backward<From::kBoth>(row, column, above + offset, here + offset - column_, here + offset);
      } else {
        step_backward<From::kBefore>(0, column, nullptr, here + offset - column_, here + offset);
      }
    }
    if (row > 0) {
      step_backward<From::kAbove>(row, 0, above, nullptr, here);
    } else if (p_.starts_from_above) {
      step_backward<From::kAbove>(0, 0, zeros_.data(), nullptr, here);
    } else {
      step_backward<From::kBefore>(0, 0, nullptr, zeros_.data(), here);
    }
    add_row_sums();
  }

  // The gradient of a pixel's states is what its own output, the pixel behind and the pixel below ask for.
  template <From from>
  void step_backward(int64_t row, int64_t column, const V* above, const V* before, const V* here) {
    constexpr bool kAbove = from != From::kBefore, kBefore = from != From::kAbove;
    const T* x = this->channels_of(p_.x, row, column);
    const T* grad_y = this->channels_of(p_.grad_y, row, column);
    const T* delta_above = this->channels_of(p_.above.delta, row, column);
    const T* delta_before = this->channels_of(p_.before.delta, row, column);
    const S* B_above = this->projection(p_.above.B, row, column, 0);
    const S* B_before = this->projection(p_.before.B, row, column, 1);
    const S* C = this->projection(p_.C, row, column, 2);
    V u[kVectors], dy[kVectors], d_above[kVectors], d_before[kVectors];
    V inflow_above[kVectors], inflow_before[kVectors];
    V decay_above[kVectors], decay_before[kVectors], input_above[kVectors], input_before[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      u[v] = load(x + v * kLanes, lanes(v));
      dy[v] = load(grad_y + v * kLanes, lanes(v));
      d_above[v] = load(delta_above + v * kLanes, lanes(v));
      d_before[v] = load(delta_before + v * kLanes, lanes(v));
      inflow_above[v] = d_above[v] * u[v] * Base::template weight<from>();
      inflow_before[v] = d_before[v] * u[v] * Base::template weight<from>();
      decay_above[v] = decay_before[v] = input_above[v] = input_before[v] = V{};
      grad_D_[v] += dy[v] * u[v];
    }
    const V* rate_above = rate_above_.data();
    const V* rate_before = rate_before_.data();
    V* carry_up = carry_up_.data() + column * column_;
    V* carry_back = carry_back_.data();
    V* row_sum_above = grad_rates_.data();
    V* row_sum_before = grad_rates_.data() + column_;
    V* products = products_.data();
    for (int n = 0; n < states_; ++n) {
      V product_above{}, product_before{}, product_C{};
      for (int v = 0; v < kVectors; ++v) {
        const int s = n * kVectors + v;
        const V g = carry_up[s] + carry_back[s] + C[n] * dy[v];
        product_C += dy[v] * here[s];
        if constexpr (kAbove) {
          const V carried =
              g * exp2(d_above[v] * rate_above[s] + Base::template exponent_shift<from>());
          const V through_decay = carried * above[s];
          carry_up[s] = carried;
          decay_above[v] += through_decay * rate_above[s];
          row_sum_above[s] += through_decay * d_above[v];
          input_above[v] += B_above[n] * g;
          product_above += g * inflow_above[v];
        }
        if constexpr (kBefore) {
          const V carried =
              g * exp2(d_before[v] * rate_before[s] + Base::template exponent_shift<from>());
          const V through_decay = carried * before[s];
          carry_back[s] = carried;
          decay_before[v] += through_decay * rate_before[s];
          row_sum_before[s] += through_decay * d_before[v];
          input_before[v] += B_before[n] * g;
          product_before += g * inflow_before[v];
        }
      }
      products[n] = product_C;
      products[padded_states() + n] = product_above;
      products[2 * padded_states() + n] = product_before;
    }
    S* grad_C = projection_gradient(p_.grad_C, row, column);
    S* grad_B_above = projection_gradient(p_.above.grad_B, row, column);
    S* grad_B_before = projection_gradient(p_.before.grad_B, row, column);
    sum_channels(products, grad_C);
    sum_channels(products + padded_states(), grad_B_above);
    sum_channels(products + 2 * padded_states(), grad_B_before);
    T* grad_x = at<T>(p_.grad_x, batch_, row, column) + channel_;
    T* grad_above = at<T>(p_.above.grad_delta, batch_, row, column) + channel_;
    T* grad_before = at<T>(p_.before.grad_delta, batch_, row, column) + channel_;
    for (int v = 0; v < kVectors; ++v) {
      // rate is A * log2(e), so the part that went through the exponent is scaled back.
      const V through_above = input_above[v] * Base::template weight<from>();
      const V through_before = input_before[v] * Base::template weight<from>();
      store(grad_above + v * kLanes, decay_above[v] * S(kLn2) + through_above * u[v], lanes(v));
      store(grad_before + v * kLanes, decay_before[v] * S(kLn2) + through_before * u[v], lanes(v));
      store(grad_x + v * kLanes, through_above * d_above[v] + through_before * d_before[v] + D_[v] * dy[v], lanes(v));
    }
  }

  S* projection_gradient(const GridTensor& tensor, int64_t row, int64_t column) const {
    return at<S>(tensor, batch_, row, column) + tile_ * tensor.route;
  }

  void sum_channels(const V* products, S* target) const {
    for (int n = 0; n < states_; n += kLanes) {
      const int count = states_ - n < kLanes ? states_ - n : kLanes;
      const V sums = sum_each<S>(products + n);
      store(target + n, first_ ? sums : sums + load(target + n, count), count);
    }
  }

  // Sums over a row are added up on their own first: a map's pixels may be too many for one float32 sum.
  void add_row_sums() {
    V* sums = grad_rates_.data();
    for (int64_t s = 0; s < 2 * column_; ++s) {
      sums[2 * column_ + s] += sums[s];
      sums[s] = V{};
    }
  }

  void store_parameter_gradients() {
    const V* total = grad_rates_.data() + 2 * column_;
    for (void* grad_A : {p_.above.grad_A, p_.before.grad_A}) {
      S* target = static_cast<S*>(grad_A) + (batch_ * p_.channels + channel_) * p_.states;
      for (int n = 0; n < states_; ++n)
        for (int c = 0; c < this->channels_; ++c)
          target[c * p_.states + n] = total[n * kVectors + c / kLanes][c % kLanes];
      total += column_;
    }
    if (!p_.grad_D) return;
    S* grad_D = static_cast<S*>(p_.grad_D) + batch_ * p_.channels + channel_;
    for (int v = 0; v < kVectors; ++v) store(grad_D + v * kLanes, grad_D_[v], lanes(v));
  }

  static constexpr double kLn2 = 0.6931471805599453;
  const int64_t tile_;
  const bool first_;
  Scratch<S> rows_;        // [slot][column][n][v]
  Scratch<S> carry_up_;    // [column][n][v]: gradients that the row below hands to the one above it
  Scratch<S> carry_back_;  // [n][v]: that the next pixel of the row hands back
  Scratch<S> grad_rates_;  // [2 * (sums over a row), 2 * totals][n][v]
  Scratch<S> products_;    // [C, B_above, B_before][n], to be summed over the lanes
  V grad_D_[kVectors];
};

template <class T, class S>
void forward_task(const WavefrontScanParams& p, int64_t index) {
  const int64_t units = ceil_div(p.channels, kTileUnit);
  UnitForward<T, S>(p, index / units, index % units * kTileUnit).run();
}

template <class T, class S>
void backward_task(const WavefrontScanParams& p, int64_t index) {
  const int64_t units = ceil_div(p.channels, kTileUnit), tiles = wavefront_scan_tiles(p);
  const int64_t tile = index % tiles, first = units * tile / tiles, end = units * (tile + 1) / tiles;
  for (int64_t unit = first; unit < end; ++unit)
    UnitBackward<T, S>(p, index / tiles, tile, unit * kTileUnit, unit == first).run();
}

using Task = void (*)(const WavefrontScanParams&, int64_t);

void run_tasks(const WavefrontScanParams& p, int64_t count, Task task, ParallelFor parallel_for) {
  struct Context {
    const WavefrontScanParams& p;
    Task task;
  } context{p, task};
  const int64_t updates = p.batch * p.height * p.width * p.channels * p.states;
  const int64_t grain = ceil_div(kGrain * count, updates > 0 ? updates : 1);
  parallel_for(
      count, grain,
      [](int64_t begin, int64_t end, const void* opaque) {
        const Context& context = *static_cast<const Context*>(opaque);
        for (int64_t index = begin; index < end; ++index) context.task(context.p, index);
      },
      &context);
}

}  // namespace

void wavefront_scan_forward(const WavefrontScanParams& p, ParallelFor parallel_for) {
  const int64_t count = p.batch * ceil_div(p.channels, kTileUnit);
  switch (p.dtype) {
    case DataType::kFloat32: return run_tasks(p, count, forward_task<float, float>, parallel_for);
    case DataType::kBFloat16: return run_tasks(p, count, forward_task<BFloat16, float>, parallel_for);
    case DataType::kFloat16: return run_tasks(p, count, forward_task<Float16, float>, parallel_for);
    case DataType::kFloat64: return run_tasks(p, count, forward_task<double, double>, parallel_for);
  }
}

void wavefront_scan_backward(const WavefrontScanParams& p, ParallelFor parallel_for) {
  const int64_t count = p.batch * wavefront_scan_tiles(p);
  switch (p.dtype) {
    case DataType::kFloat32: return run_tasks(p, count, backward_task<float, float>, parallel_for);
    case DataType::kBFloat16: return run_tasks(p, count, backward_task<BFloat16, float>, parallel_for);
    case DataType::kFloat16: return run_tasks(p, count, backward_task<Float16, float>, parallel_for);
    case DataType::kFloat64: return run_tasks(p, count, backward_task<double, double>, parallel_for);
  }
}

}  // namespace SSM_CPU_CAPABILITY
}  // namespace cuda_ops
