// Wavefront scan on the CPU. Pixels follow each other row by row, which keeps to the order of the wavefronts: states
// lie in a buffer of one row, in which each pixel replaces the one above it. Vectors run over channels, the pool's
// threads over images and channels. Compiled once for each capability; scan_dispatch.cpp chooses at run time.
#include <memory>
#include <vector>

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

  // What is read of a pixel: the unit's channels, and all projections.
  struct Pixel {
    const T *x, *delta_above, *delta_before, *B_above, *B_before, *C;
  };

  Pixel pixel(int64_t row, int64_t column) const {
    return {at<T>(p_.x, batch_, row, column) + channel_,
            at<T>(p_.above.delta, batch_, row, column) + channel_,
            at<T>(p_.before.delta, batch_, row, column) + channel_,
            at<T>(p_.above.B, batch_, row, column),
            at<T>(p_.before.B, batch_, row, column),
            at<T>(p_.C, batch_, row, column)};
  }

  void advance(Pixel& pixel, int64_t columns) const {
    pixel.x += columns * p_.x.column;
    pixel.delta_above += columns * p_.above.delta.column, pixel.delta_before += columns * p_.before.delta.column;
    pixel.B_above += columns * p_.above.B.column, pixel.B_before += columns * p_.before.B.column;
    pixel.C += columns * p_.C.column;
  }

  // A pixel's N projections as state scalars: where they lie, or widened into the given third of the scratch.
  const S* projection(const T* source, int third) const {
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

  // The states of one pixel from its neighbours' states, and its output where there is `y`. `here` may be `above`.
  template <From from, bool WithOutput>
  void step(const Pixel& pixel, T* y, const V* above, const V* before, V* here) {
    constexpr bool kAbove = from != From::kBefore, kBefore = from != From::kAbove;
    const S* B_above = kAbove ? projection(pixel.B_above, 0) : nullptr;
    const S* B_before = kBefore ? projection(pixel.B_before, 1) : nullptr;
    const S* C = WithOutput ? projection(pixel.C, 2) : nullptr;
    V d_above[kVectors], d_before[kVectors], inflow_above[kVectors], inflow_before[kVectors], output[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const V u = load(pixel.x + v * kLanes, lanes(v));
      d_above[v] = kAbove ? load(pixel.delta_above + v * kLanes, lanes(v)) : V{};
      d_before[v] = kBefore ? load(pixel.delta_before + v * kLanes, lanes(v)) : V{};
      inflow_above[v] = d_above[v] * u * weight<from>();
      inflow_before[v] = d_before[v] * u * weight<from>();
      output[v] = D_[v] * u;
    }
    const V* rate_above = rate_above_.data();
    const V* rate_before = rate_before_.data();
    for (int n = 0; n < states_; ++n) {
      for (int v = 0; v < kVectors; ++v) {
        const int s = n * kVectors + v;
        V h = kAbove ? B_above[n] * inflow_above[v] : B_before[n] * inflow_before[v];
        if constexpr (from == From::kBoth) h += B_before[n] * inflow_before[v];
        if constexpr (kAbove) h += exp2(d_above[v] * rate_above[s] + exponent_shift<from>()) * above[s];
        if constexpr (kBefore) h += exp2(d_before[v] * rate_before[s] + exponent_shift<from>()) * before[s];
        here[s] = h;
        if constexpr (WithOutput) output[v] += C[n] * h;
      }
    }
    if constexpr (WithOutput)
      for (int v = 0; v < kVectors; ++v) store(y + v * kLanes, output[v], lanes(v));
  }

  // A row from the states of the one above it; `here` may be `above`.
  template <bool WithOutput>
  void run_row(int64_t row, const V* above, V* here) {
    Pixel pixel = this->pixel(row, 0);
    T* y = WithOutput ? at<T>(p_.y, batch_, row, 0) + channel_ : nullptr;
    if (row > 0) {
      step<From::kAbove, WithOutput>(pixel, y, above, nullptr, here);
      run_pixels<From::kBoth, WithOutput>(pixel, y, above, here);
    } else {
      if (p_.starts_from_above) {
        step<From::kAbove, WithOutput>(pixel, y, zeros_.data(), nullptr, here);
      } else {
        step<From::kBefore, WithOutput>(pixel, y, nullptr, zeros_.data(), here);
      }
      run_pixels<From::kBefore, WithOutput>(pixel, y, above, here);
    }
  }

  // A row behind its first pixel, from which the arguments start.
  template <From from, bool WithOutput>
  void run_pixels(Pixel pixel, T* y, const V* above, V* here) {
    for (int64_t column = 1; column < p_.width; ++column) {
      advance(pixel, 1);
      if constexpr (WithOutput) y += p_.y.column;
      above += column_;
      const V* before = here;
      here += column_;
      step<from, WithOutput>(pixel, y, above, before, here);
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

  void run(int64_t row) {
    this->template run_row<true>(row, row_.data(), row_.data());
    if (p_.chunk && (row + 1) % p_.chunk == 0 && row + 1 < p_.height) save(row / p_.chunk);
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
  using typename Base::Pixel;
  using Base::advance, Base::batch_, Base::channel_, Base::column_, Base::D_, Base::kLanes, Base::kVectors, Base::lanes,
      Base::p_, Base::rate_above_, Base::rate_before_, Base::states_, Base::zeros_;

 public:
  // The first unit of a tile writes the tile's gradients of B and C, the others add theirs.
  UnitBackward(const WavefrontScanParams& p, int64_t batch, int64_t tile, int64_t channel, bool first)
      : Base(p, batch, channel),
        tile_(tile),
        first_(first),
        carry_up_(p.width * column_),
        carry_back_(column_),
        grad_rates_(4 * column_),
        products_(3 * ceil_div(p.states, kLanes) * kLanes) {
    Base::clear(carry_up_.data(), p_.width * column_);
    Base::clear(grad_rates_.data(), 4 * column_);
    Base::clear(products_.data(), 3 * padded_states());
    for (int v = 0; v < kVectors; ++v) grad_D_[v] = V{};
  }

  // What the states of one chunk's rows, and of the row above it, take. Units take turns with it.
  static Scratch<S> rows_of_chunk(const WavefrontScanParams& p) {
    return Scratch<S>((chunk_rows(p) + 1) * p.width * p.states * kVectors);
  }

  static int64_t chunks(const WavefrontScanParams& p) { return ceil_div(p.height, chunk_rows(p)); }

  // Chunks come from the last one to the first.
  void run(int64_t chunk, const Scratch<S>& rows) {
    rows_ = rows.data();
    const int64_t begin = chunk * chunk_rows(p_);
    const int64_t end = begin + chunk_rows(p_) < p_.height ? begin + chunk_rows(p_) : p_.height;
    if (chunk > 0) load_saved(chunk - 1);
    for (int64_t row = begin; row < end; ++row)
      this->template run_row<false>(row, row_states(row - begin), row_states(row - begin + 1));
    for (int64_t row = end - 1; row >= begin; --row) run_row_backward(row, row - begin + 1);
    if (chunk == 0) store_parameter_gradients();
  }

 private:
  static int64_t chunk_rows(const WavefrontScanParams& p) { return p.height < p.chunk ? p.height : p.chunk; }
  int padded_states() const { return int(ceil_div(states_, kLanes)) * kLanes; }

  // The states of a chunk's rows, from 1; slot 0 is the row above the chunk.
  V* row_states(int64_t slot) const { return rows_ + slot * p_.width * column_; }

  void load_saved(int64_t chunk) {
    for (int64_t column = 0; column < p_.width; ++column) {
      const S* source = this->saved(chunk, column);
      for (int n = 0; n < states_; ++n, source += p_.channels)
        for (int v = 0; v < kVectors; ++v)
          rows_[column * column_ + n * kVectors + v] = load(source + v * kLanes, lanes(v));
    }
  }

  // Where a pixel's gradients are read and written.
  struct Gradients {
    const T* y;
    T *x, *delta_above, *delta_before;
    S *B_above, *B_before, *C;
  };

  void run_row_backward(int64_t row, int64_t slot) {
    Base::clear(carry_back_.data(), column_);
    const V* here = row_states(slot);
    const V* above = row_states(slot - 1);
    Pixel pixel = this->pixel(row, 0);
    Gradients grads = gradients(row, 0);
    if (row > 0) {
      run_pixels_backward<From::kBoth>(pixel, grads, above, here);
      step_backward<From::kAbove>(pixel, grads, 0, above, nullptr, here);
    } else {
      run_pixels_backward<From::kBefore>(pixel, grads, above, here);
      if (p_.starts_from_above) {
        step_backward<From::kAbove>(pixel, grads, 0, zeros_.data(), nullptr, here);
      } else {
        step_backward<From::kBefore>(pixel, grads, 0, nullptr, zeros_.data(), here);
      }
    }
    add_row_sums();
  }

  // A row from its last pixel to the second; the arguments are those of the first.
  template <From from>
  void run_pixels_backward(Pixel pixel, Gradients grads, const V* above, const V* here) {
    advance(pixel, p_.width - 1);
    advance(grads, p_.width - 1);
    for (int64_t column = p_.width - 1; column > 0; --column) {
      const int64_t offset = column * column_;
      step_backward<from>(pixel, grads, column, above + offset, here + offset - column_, here + offset);
      advance(pixel, -1);
      advance(grads, -1);
    }
  }

  Gradients gradients(int64_t row, int64_t column) const {
    return {at<T>(p_.grad_y, batch_, row, column) + channel_,
            at<T>(p_.grad_x, batch_, row, column) + channel_,
            at<T>(p_.above.grad_delta, batch_, row, column) + channel_,
            at<T>(p_.before.grad_delta, batch_, row, column) + channel_,
            at<S>(p_.above.grad_B, batch_, row, column) + tile_ * p_.above.grad_B.route,
            at<S>(p_.before.grad_B, batch_, row, column) + tile_ * p_.before.grad_B.route,
            at<S>(p_.grad_C, batch_, row, column) + tile_ * p_.grad_C.route};
  }

  void advance(Gradients& grads, int64_t columns) const {
    grads.y += columns * p_.grad_y.column, grads.x += columns * p_.grad_x.column;
    grads.delta_above += columns * p_.above.grad_delta.column;
    grads.delta_before += columns * p_.before.grad_delta.column;
    grads.B_above += columns * p_.above.grad_B.column, grads.B_before += columns * p_.before.grad_B.column;
    grads.C += columns * p_.grad_C.column;
  }

  // The gradient of a pixel's states is what its own output, the pixel behind and the pixel below ask for.
  template <From from>
  void step_backward(const Pixel& pixel, const Gradients& grads, int64_t column, const V* above, const V* before,
                     const V* here) {
    constexpr bool kAbove = from != From::kBefore, kBefore = from != From::kAbove;
    const S* B_above = this->projection(pixel.B_above, 0);
    const S* B_before = this->projection(pixel.B_before, 1);
    const S* C = this->projection(pixel.C, 2);
    V u[kVectors], dy[kVectors], d_above[kVectors], d_before[kVectors];
    V inflow_above[kVectors], inflow_before[kVectors];
    V decay_above[kVectors], decay_before[kVectors], input_above[kVectors], input_before[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      u[v] = load(pixel.x + v * kLanes, lanes(v));
      dy[v] = load(grads.y + v * kLanes, lanes(v));
      d_above[v] = kAbove ? load(pixel.delta_above + v * kLanes, lanes(v)) : V{};
      d_before[v] = kBefore ? load(pixel.delta_before + v * kLanes, lanes(v)) : V{};
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
    sum_channels(products, grads.C);
    sum_channels(products + padded_states(), grads.B_above);
    sum_channels(products + 2 * padded_states(), grads.B_before);
    for (int v = 0; v < kVectors; ++v) {
      // rate is A * log2(e), so the part that went through the exponent is scaled back.
      const V through_above = input_above[v] * Base::template weight<from>();
      const V through_before = input_before[v] * Base::template weight<from>();
      // A step size that the pixel does not take has no gradient, however large the pixel is.
      store(grads.delta_above + v * kLanes, kAbove ? decay_above[v] * S(kLn2) + through_above * u[v] : V{}, lanes(v));
      store(grads.delta_before + v * kLanes, kBefore ? decay_before[v] * S(kLn2) + through_before * u[v] : V{}, lanes(v));
      store(grads.x + v * kLanes, through_above * d_above[v] + through_before * d_before[v] + D_[v] * dy[v], lanes(v));
    }
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
  V* rows_ = nullptr;      // [slot][column][n][v]
  Scratch<S> carry_up_;    // [column][n][v]: gradients that the row below hands to the one above it
  Scratch<S> carry_back_;  // [n][v]: that the next pixel of the row hands back
  Scratch<S> grad_rates_;  // [2 * (sums over a row), 2 * totals][n][v]
  Scratch<S> products_;    // [C, B_above, B_before][n], to be summed over the lanes
  V grad_D_[kVectors];
};

// The work of one task: some units of one image's channels. They keep step, row by row or chunk by chunk: what one
// loads of a pixel, the others find in the cache.
struct Tile {
  int64_t batch, index, first, end;

  Tile(const WavefrontScanParams& p, int64_t task, int64_t tiles) : batch(task / tiles), index(task % tiles) {
    const int64_t units = ceil_div(p.channels, kTileUnit);
    first = units * index / tiles, end = units * (index + 1) / tiles;
  }
};

template <class T, class S>
void forward_tasks(const WavefrontScanParams& p, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const Tile tile(p, task, wavefront_scan_tiles(p, kForwardTasks));
    std::vector<std::unique_ptr<UnitForward<T, S>>> units;
    for (int64_t unit = tile.first; unit < tile.end; ++unit)
      units.push_back(std::make_unique<UnitForward<T, S>>(p, tile.batch, unit * kTileUnit));
    for (int64_t row = 0; row < p.height; ++row)
      for (auto& unit : units) unit->run(row);
  }
}

template <class T, class S>
void backward_tasks(const WavefrontScanParams& p, int64_t begin, int64_t end) {
  using Unit = UnitBackward<T, S>;
  const auto rows = Unit::rows_of_chunk(p);
  for (int64_t task = begin; task < end; ++task) {
    const Tile tile(p, task, wavefront_scan_tiles(p, kBackwardTasks));
    std::vector<std::unique_ptr<Unit>> units;
    for (int64_t unit = tile.first; unit < tile.end; ++unit)
      units.push_back(std::make_unique<Unit>(p, tile.batch, tile.index, unit * kTileUnit, unit == tile.first));
    for (int64_t chunk = Unit::chunks(p) - 1; chunk >= 0; --chunk)
      for (auto& unit : units) unit->run(chunk, rows);
  }
}

using Tasks = void (*)(const WavefrontScanParams&, int64_t begin, int64_t end);

void run_tasks(const WavefrontScanParams& p, int64_t count, Tasks tasks, ParallelFor parallel_for) {
  struct Context {
    const WavefrontScanParams& p;
    Tasks tasks;
  } context{p, tasks};
  const int64_t updates = p.batch * p.height * p.width * p.channels * p.states;
  const int64_t grain = ceil_div(kGrain * count, updates > 0 ? updates : 1);
  parallel_for(
      count, grain,
      [](int64_t begin, int64_t end, const void* opaque) {
        const Context& context = *static_cast<const Context*>(opaque);
        context.tasks(context.p, begin, end);
      },
      &context);
}

}  // namespace

void wavefront_scan_forward(const WavefrontScanParams& p, ParallelFor parallel_for) {
  const int64_t count = p.batch * wavefront_scan_tiles(p, kForwardTasks);
  switch (p.dtype) {
    case DataType::kFloat32: return run_tasks(p, count, forward_tasks<float, float>, parallel_for);
    case DataType::kBFloat16: return run_tasks(p, count, forward_tasks<BFloat16, float>, parallel_for);
    case DataType::kFloat16: return run_tasks(p, count, forward_tasks<Float16, float>, parallel_for);
    case DataType::kFloat64: return run_tasks(p, count, forward_tasks<double, double>, parallel_for);
  }
}

void wavefront_scan_backward(const WavefrontScanParams& p, ParallelFor parallel_for) {
  const int64_t count = p.batch * wavefront_scan_tiles(p, kBackwardTasks);
  switch (p.dtype) {
    case DataType::kFloat32: return run_tasks(p, count, backward_tasks<float, float>, parallel_for);
    case DataType::kBFloat16: return run_tasks(p, count, backward_tasks<BFloat16, float>, parallel_for);
    case DataType::kFloat16: return run_tasks(p, count, backward_tasks<Float16, float>, parallel_for);
    case DataType::kFloat64: return run_tasks(p, count, backward_tasks<double, double>, parallel_for);
  }
}

}  // namespace SSM_CPU_CAPABILITY
}  // namespace cuda_ops
