// Wavefront scan on the CPU. Pixels are visited row by row, which respects the order of the wavefronts: a buffer holds
// the states of one row, and each pixel replaces the one above it. Vectors run over channels, threads over images and
// channels. Compiled once per capability; scan_dispatch.cpp chooses at run time.
#include <memory>
#include <vector>

#include "../wavefront_scan.h"
#include "scratch.h"
#include "simd.h"

namespace cuda_ops {
namespace SSM_CPU_CAPABILITY {
namespace {

template <class T>
T* pixel_pointer(const GridTensor& tensor, int64_t batch, int64_t row, int64_t column) {
  return static_cast<T*>(tensor.data) + batch * tensor.batch + row * tensor.row + column * tensor.column;
}

// The neighbours that a pixel has.
enum class Neighbours { kAbove, kBefore, kBoth };

// Scans a unit of channels of one image: what both passes share. States are stored as [column][n][vector],
// `column_vectors_` vectors per pixel. T is the element type of the map, S that of the state.
template <class T, class S>
class ScanUnit {
 public:
  using V = Vec<S>;
  static constexpr int kLanes = Vector<S>::kLanes;
  static constexpr int kVectors = int(kCpuChannelUnit) / kLanes;

  ScanUnit(const WavefrontScanParams& p, int64_t batch, int64_t channel)
      : p_(p),
        batch_(batch),
        channel_(channel),
        channels_(int(p.channels - channel < kCpuChannelUnit ? p.channels - channel : kCpuChannelUnit)),
        states_(int(p.states)),
        column_vectors_(p.states * kVectors),
        A_log2e_above_(column_vectors_),
        A_log2e_before_(column_vectors_),
        zeros_(column_vectors_),
        projections_(ceil_div(3 * p.states, kLanes)) {
    load_A(p.above.A, A_log2e_above_.data());
    load_A(p.before.A, A_log2e_before_.data());
    clear(zeros_.data(), column_vectors_);
    for (int v = 0; v < kVectors; ++v)
      D_[v] = p.D ? load(static_cast<const S*>(p.D) + channel + v * kLanes, lanes(v)) : V{};
  }

 protected:
  // Channels in a vector: all its lanes, except at the last channels of the map.
  int lanes(int v) const {
    const int rest = channels_ - v * kLanes;
    return rest >= kLanes ? kLanes : rest > 0 ? rest : 0;
  }
  static void clear(V* target, int64_t vectors) {
    for (int64_t i = 0; i < vectors; ++i) target[i] = V{};
  }

  void load_A(const void* data, V* rate) const {
    const S* A = static_cast<const S*>(data) + channel_ * p_.states;
    for (int n = 0; n < states_; ++n) {
      for (int v = 0; v < kVectors; ++v) {
        V value{};
        for (int lane = 0; lane < lanes(v); ++lane) value[lane] = A[(v * kLanes + lane) * p_.states + n];
        rate[n * kVectors + v] = value * S(kLog2E);
      }
    }
  }

  // Pointers to a pixel's inputs: the unit's channels, and all projections.
  struct Pixel {
    const T *x, *delta_above, *delta_before, *B_above, *B_before, *C;
  };

  Pixel pixel(int64_t row, int64_t column) const {
    return {pixel_pointer<T>(p_.x, batch_, row, column) + channel_,
            pixel_pointer<T>(p_.above.delta, batch_, row, column) + channel_,
            pixel_pointer<T>(p_.before.delta, batch_, row, column) + channel_,
            pixel_pointer<T>(p_.above.B, batch_, row, column),
            pixel_pointer<T>(p_.before.B, batch_, row, column),
            pixel_pointer<T>(p_.C, batch_, row, column)};
  }

  void advance(Pixel& pixel, int64_t columns) const {
    pixel.x += columns * p_.x.column;
    pixel.delta_above += columns * p_.above.delta.column;
    pixel.delta_before += columns * p_.before.delta.column;
    pixel.B_above += columns * p_.above.B.column;
    pixel.B_before += columns * p_.before.B.column;
    pixel.C += columns * p_.C.column;
  }

  // A pixel's N projections as state scalars: in place, or widened into the given third of the scratch memory.
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
    const int64_t count = saved_state_count(p_.height, p_.chunk);
    return static_cast<S*>(p_.saved_rows) + ((batch_ * count + chunk) * p_.width + column) * p_.states * p_.channels +
           channel_;
  }

  // With both neighbours, each contributes half: a factor of the inflow, and -1 in the decay's exponent.
  template <Neighbours neighbours>
  static constexpr S weight() {
    return neighbours == Neighbours::kBoth ? S(0.5) : S(1);
  }
  template <Neighbours neighbours>
  static constexpr S exponent_shift() {
    return neighbours == Neighbours::kBoth ? S(-1) : S(0);
  }

  // Computes the states of one pixel from its neighbours' states, and its output. `here` may be `above`.
  template <Neighbours neighbours, bool WithOutput>
  void scan_pixel(const Pixel& pixel, T* y, const V* above, const V* before, V* here) {
    constexpr bool kAbove = neighbours != Neighbours::kBefore, kBefore = neighbours != Neighbours::kAbove;
    const S* B_above = kAbove ? projection(pixel.B_above, 0) : nullptr;
    const S* B_before = kBefore ? projection(pixel.B_before, 1) : nullptr;
    const S* C = WithOutput ? projection(pixel.C, 2) : nullptr;
    V delta_above[kVectors], delta_before[kVectors], inflow_above[kVectors], inflow_before[kVectors], output[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const V u = load(pixel.x + v * kLanes, lanes(v));
      delta_above[v] = kAbove ? load(pixel.delta_above + v * kLanes, lanes(v)) : V{};
      delta_before[v] = kBefore ? load(pixel.delta_before + v * kLanes, lanes(v)) : V{};
      inflow_above[v] = delta_above[v] * u * weight<neighbours>();
      inflow_before[v] = delta_before[v] * u * weight<neighbours>();
      output[v] = D_[v] * u;
    }
    const V* A_above = A_log2e_above_.data();
    const V* A_before = A_log2e_before_.data();
    for (int n = 0; n < states_; ++n) {
      for (int v = 0; v < kVectors; ++v) {
        const int s = n * kVectors + v;
        V h = kAbove ? B_above[n] * inflow_above[v] : B_before[n] * inflow_before[v];
        if constexpr (neighbours == Neighbours::kBoth) h += B_before[n] * inflow_before[v];
        if constexpr (kAbove) h += exp2(delta_above[v] * A_above[s] + exponent_shift<neighbours>()) * above[s];
        if constexpr (kBefore) h += exp2(delta_before[v] * A_before[s] + exponent_shift<neighbours>()) * before[s];
        here[s] = h;
        if constexpr (WithOutput) output[v] += C[n] * h;
      }
    }
    if constexpr (WithOutput)
      for (int v = 0; v < kVectors; ++v) store(y + v * kLanes, output[v], lanes(v));
  }

  // Scans a row from the states of the row above; `here` may be `above`.
  template <bool WithOutput>
  void scan_row(int64_t row, const V* above, V* here) {
    Pixel pixel = this->pixel(row, 0);
    T* y = WithOutput ? pixel_pointer<T>(p_.y, batch_, row, 0) + channel_ : nullptr;
    if (row > 0) {
      scan_pixel<Neighbours::kAbove, WithOutput>(pixel, y, above, nullptr, here);
      scan_pixels<Neighbours::kBoth, WithOutput>(pixel, y, above, here);
    } else {
      if (p_.starts_from_above) {
        scan_pixel<Neighbours::kAbove, WithOutput>(pixel, y, zeros_.data(), nullptr, here);
      } else {
        scan_pixel<Neighbours::kBefore, WithOutput>(pixel, y, nullptr, zeros_.data(), here);
      }
      scan_pixels<Neighbours::kBefore, WithOutput>(pixel, y, above, here);
    }
  }

  // Scans a row after its first pixel, to which the arguments point.
  template <Neighbours neighbours, bool WithOutput>
  void scan_pixels(Pixel pixel, T* y, const V* above, V* here) {
    for (int64_t column = 1; column < p_.width; ++column) {
      advance(pixel, 1);
      if constexpr (WithOutput) y += p_.y.column;
      above += column_vectors_;
      const V* before = here;
      here += column_vectors_;
      scan_pixel<neighbours, WithOutput>(pixel, y, above, before, here);
    }
  }

  const WavefrontScanParams& p_;
  const int64_t batch_, channel_;
  const int channels_, states_;
  const int64_t column_vectors_;
  Scratch<S> A_log2e_above_, A_log2e_before_;  // A * log2(e), [n][v]
  Scratch<S> zeros_;                           // the states outside the map
  Scratch<S> projections_;                     // three rows of N scalars
  V D_[kVectors];
};

template <class T, class S>
class ForwardUnit : ScanUnit<T, S> {
  using Base = ScanUnit<T, S>;
  using Base::p_, Base::states_, Base::column_vectors_, Base::kVectors, Base::kLanes, Base::lanes;

 public:
  ForwardUnit(const WavefrontScanParams& p, int64_t batch, int64_t channel)
      : Base(p, batch, channel), row_(p.width * column_vectors_) {}

  void run(int64_t row) {
    this->template scan_row<true>(row, row_.data(), row_.data());
    if (p_.chunk && (row + 1) % p_.chunk == 0 && row + 1 < p_.height) save(row / p_.chunk);
  }

 private:
  void save(int64_t chunk) {
    for (int64_t column = 0; column < p_.width; ++column) {
      S* target = this->saved(chunk, column);
      for (int n = 0; n < states_; ++n, target += p_.channels)
        for (int v = 0; v < kVectors; ++v)
          store(target + v * kLanes, row_.data()[column * column_vectors_ + n * kVectors + v], lanes(v));
    }
  }

  Scratch<S> row_;
};

template <class T, class S>
class BackwardUnit : ScanUnit<T, S> {
  using Base = ScanUnit<T, S>;
  using Base::advance, Base::batch_, Base::channel_, Base::column_vectors_, Base::D_, Base::kLanes, Base::kVectors,
      Base::lanes, Base::p_, Base::A_log2e_above_, Base::A_log2e_before_, Base::states_, Base::zeros_;
  using typename Base::Pixel;
  using typename Base::V;

 public:
  // The first unit of a tile writes the tile's gradients of B and C; the others add theirs.
  BackwardUnit(const WavefrontScanParams& p, int64_t batch, int64_t tile, int64_t channel, bool first)
      : Base(p, batch, channel),
        tile_(tile),
        first_(first),
        carry_up_(p.width * column_vectors_),
        carry_back_(column_vectors_),
        grad_A_(4 * column_vectors_),
        products_(3 * ceil_div(p.states, kLanes) * kLanes) {
    Base::clear(carry_up_.data(), p_.width * column_vectors_);
    Base::clear(grad_A_.data(), 4 * column_vectors_);
    Base::clear(products_.data(), 3 * padded_states());
    for (int v = 0; v < kVectors; ++v) grad_D_[v] = total_D_[v] = V{};
  }

  // Scratch memory for the states of a chunk's rows and of the row above it. The units of a tile share it.
  static Scratch<S> rows_of_chunk(const WavefrontScanParams& p) {
    return Scratch<S>((chunk_rows(p) + 1) * p.width * p.states * kVectors);
  }

  static int64_t chunks(const WavefrontScanParams& p) { return ceil_div(p.height, chunk_rows(p)); }

  // To be called for each chunk, from the last to the first.
  void run(int64_t chunk, const Scratch<S>& rows) {
    rows_ = rows.data();
    const int64_t begin = chunk * chunk_rows(p_);
    const int64_t end = begin + chunk_rows(p_) < p_.height ? begin + chunk_rows(p_) : p_.height;
    if (chunk > 0) load_saved_row(chunk - 1);
    for (int64_t row = begin; row < end; ++row)
      this->template scan_row<false>(row, row_states(row - begin), row_states(row - begin + 1));
    for (int64_t row = end - 1; row >= begin; --row) differentiate_row(row, row - begin + 1);
    if (chunk == 0) store_parameter_gradients();
  }

 private:
  static int64_t chunk_rows(const WavefrontScanParams& p) { return p.height < p.chunk ? p.height : p.chunk; }
  int padded_states() const { return int(ceil_div(states_, kLanes)) * kLanes; }

  // The states of a row of the chunk: slot 0 is the row above the chunk, slot 1 the first row.
  V* row_states(int64_t slot) const { return rows_ + slot * p_.width * column_vectors_; }

  void load_saved_row(int64_t chunk) {
    for (int64_t column = 0; column < p_.width; ++column) {
      const S* source = this->saved(chunk, column);
      for (int n = 0; n < states_; ++n, source += p_.channels)
        for (int v = 0; v < kVectors; ++v)
          rows_[column * column_vectors_ + n * kVectors + v] = load(source + v * kLanes, lanes(v));
    }
  }

  // Pointers to a pixel's gradients.
  struct Gradients {
    const T* y;
    T *x, *delta_above, *delta_before;
    S *B_above, *B_before, *C;
  };

  void differentiate_row(int64_t row, int64_t slot) {
    Base::clear(carry_back_.data(), column_vectors_);
    const V* here = row_states(slot);
    const V* above = row_states(slot - 1);
    Pixel pixel = this->pixel(row, 0);
    Gradients grads = gradients(row, 0);
    if (row > 0) {
      differentiate_pixels<Neighbours::kBoth>(pixel, grads, above, here);
      differentiate_pixel<Neighbours::kAbove>(pixel, grads, 0, above, nullptr, here);
    } else {
      differentiate_pixels<Neighbours::kBefore>(pixel, grads, above, here);
      if (p_.starts_from_above) {
        differentiate_pixel<Neighbours::kAbove>(pixel, grads, 0, zeros_.data(), nullptr, here);
      } else {
        differentiate_pixel<Neighbours::kBefore>(pixel, grads, 0, nullptr, zeros_.data(), here);
      }
    }
    add_row_sums();
  }

  // Differentiates a row from its last pixel to its second; the arguments point to the first.
  template <Neighbours neighbours>
  void differentiate_pixels(Pixel pixel, Gradients grads, const V* above, const V* here) {
    advance(pixel, p_.width - 1);
    advance(grads, p_.width - 1);
    for (int64_t column = p_.width - 1; column > 0; --column) {
      const int64_t offset = column * column_vectors_;
      differentiate_pixel<neighbours>(pixel, grads, column, above + offset, here + offset - column_vectors_,
                                      here + offset);
      advance(pixel, -1);
      advance(grads, -1);
    }
  }

  Gradients gradients(int64_t row, int64_t column) const {
    return {pixel_pointer<T>(p_.grad_y, batch_, row, column) + channel_,
            pixel_pointer<T>(p_.grad_x, batch_, row, column) + channel_,
            pixel_pointer<T>(p_.above.grad_delta, batch_, row, column) + channel_,
            pixel_pointer<T>(p_.before.grad_delta, batch_, row, column) + channel_,
            pixel_pointer<S>(p_.above.grad_B, batch_, row, column) + tile_ * p_.above.grad_B.route,
            pixel_pointer<S>(p_.before.grad_B, batch_, row, column) + tile_ * p_.before.grad_B.route,
            pixel_pointer<S>(p_.grad_C, batch_, row, column) + tile_ * p_.grad_C.route};
  }

  void advance(Gradients& grads, int64_t columns) const {
    grads.y += columns * p_.grad_y.column;
    grads.x += columns * p_.grad_x.column;
    grads.delta_above += columns * p_.above.grad_delta.column;
    grads.delta_before += columns * p_.before.grad_delta.column;
    grads.B_above += columns * p_.above.grad_B.column;
    grads.B_before += columns * p_.before.grad_B.column;
    grads.C += columns * p_.grad_C.column;
  }

  // Differentiates one pixel. The gradient of its states comes from its output, from the next pixel of the row and from
  // the pixel below.
  template <Neighbours neighbours>
  void differentiate_pixel(const Pixel& pixel, const Gradients& grads, int64_t column, const V* above, const V* before,
                           const V* here) {
    constexpr bool kAbove = neighbours != Neighbours::kBefore, kBefore = neighbours != Neighbours::kAbove;
    const S* B_above = this->projection(pixel.B_above, 0);
    const S* B_before = this->projection(pixel.B_before, 1);
    const S* C = this->projection(pixel.C, 2);
    V u[kVectors], dy[kVectors], delta_above[kVectors], delta_before[kVectors];
    V inflow_above[kVectors], inflow_before[kVectors];
    V exponent_above[kVectors], exponent_before[kVectors], input_above[kVectors], input_before[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      u[v] = load(pixel.x + v * kLanes, lanes(v));
      dy[v] = load(grads.y + v * kLanes, lanes(v));
      delta_above[v] = kAbove ? load(pixel.delta_above + v * kLanes, lanes(v)) : V{};
      delta_before[v] = kBefore ? load(pixel.delta_before + v * kLanes, lanes(v)) : V{};
      inflow_above[v] = delta_above[v] * u[v] * Base::template weight<neighbours>();
      inflow_before[v] = delta_before[v] * u[v] * Base::template weight<neighbours>();
      exponent_above[v] = exponent_before[v] = input_above[v] = input_before[v] = V{};
      grad_D_[v] += dy[v] * u[v];
    }
    const V* A_above = A_log2e_above_.data();
    const V* A_before = A_log2e_before_.data();
    V* carry_up = carry_up_.data() + column * column_vectors_;
    V* carry_back = carry_back_.data();
    V* grad_A_above = grad_A_.data();
    V* grad_A_before = grad_A_.data() + column_vectors_;
    V* products = products_.data();
    for (int n = 0; n < states_; ++n) {
      V product_above{}, product_before{}, product_C{};
      for (int v = 0; v < kVectors; ++v) {
        const int s = n * kVectors + v;
        const V grad_state = carry_up[s] + carry_back[s] + C[n] * dy[v];
        product_C += dy[v] * here[s];
        if constexpr (kAbove) {
          const V carry = grad_state * exp2(delta_above[v] * A_above[s] + Base::template exponent_shift<neighbours>());
          const V through_decay = carry * above[s];
          carry_up[s] = carry;
          exponent_above[v] += through_decay * A_above[s];
          grad_A_above[s] += through_decay * delta_above[v];
          input_above[v] += B_above[n] * grad_state;
          product_above += grad_state * inflow_above[v];
        }
        if constexpr (kBefore) {
          const V carry =
              grad_state * exp2(delta_before[v] * A_before[s] + Base::template exponent_shift<neighbours>());
          const V through_decay = carry * before[s];
          carry_back[s] = carry;
          exponent_before[v] += through_decay * A_before[s];
          grad_A_before[s] += through_decay * delta_before[v];
          input_before[v] += B_before[n] * grad_state;
          product_before += grad_state * inflow_before[v];
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
      const V weighted_above = input_above[v] * Base::template weight<neighbours>();
      const V weighted_before = input_before[v] * Base::template weight<neighbours>();
      // A_log2e contains log2(e), so the exponent's gradient is scaled back. The delta of a missing neighbour has no
      // gradient, even if x is infinite.
      store(grads.delta_above + v * kLanes, kAbove ? exponent_above[v] * S(kLn2) + weighted_above * u[v] : V{},
            lanes(v));
      store(grads.delta_before + v * kLanes, kBefore ? exponent_before[v] * S(kLn2) + weighted_before * u[v] : V{},
            lanes(v));
      store(grads.x + v * kLanes, weighted_above * delta_above[v] + weighted_before * delta_before[v] + D_[v] * dy[v],
            lanes(v));
    }
  }

  void sum_channels(const V* products, S* target) const {
    for (int n = 0; n < states_; n += kLanes) {
      const int count = states_ - n < kLanes ? states_ - n : kLanes;
      const V sums = sum_each<S>(products + n);
      store(target + n, first_ ? sums : sums + load(target + n, count), count);
    }
  }

  // Sums over pixels are accumulated per row: a map may have too many pixels for a single float32 sum.
  void add_row_sums() {
    V* sums = grad_A_.data();
    for (int64_t s = 0; s < 2 * column_vectors_; ++s) {
      sums[2 * column_vectors_ + s] += sums[s];
      sums[s] = V{};
    }
    for (int v = 0; v < kVectors; ++v) {
      total_D_[v] += grad_D_[v];
      grad_D_[v] = V{};
    }
  }

  void store_parameter_gradients() {
    const V* total = grad_A_.data() + 2 * column_vectors_;
    for (void* grad_A : {p_.above.grad_A, p_.before.grad_A}) {
      S* target = static_cast<S*>(grad_A) + (batch_ * p_.channels + channel_) * p_.states;
      for (int n = 0; n < states_; ++n)
        for (int c = 0; c < this->channels_; ++c)
          target[c * p_.states + n] = total[n * kVectors + c / kLanes][c % kLanes];
      total += column_vectors_;
    }
    if (!p_.grad_D) return;
    S* grad_D = static_cast<S*>(p_.grad_D) + batch_ * p_.channels + channel_;
    for (int v = 0; v < kVectors; ++v) store(grad_D + v * kLanes, total_D_[v], lanes(v));
  }

  static constexpr double kLn2 = 0.6931471805599453;
  const int64_t tile_;
  const bool first_;
  V* rows_ = nullptr;                       // [slot][column][n][v]
  Scratch<S> carry_up_;                     // [column][n][v]: gradients of the states from the row below
  Scratch<S> carry_back_;                   // [n][v]: gradients of the states from the next pixel of the row
  Scratch<S> grad_A_;                       // [2 * (sums over a row), 2 * totals][n][v]
  Scratch<S> products_;                     // [C, B_above, B_before][n], to be summed over the lanes
  V grad_D_[kVectors], total_D_[kVectors];  // of a row, and of the rows after it
};

// A tile of an image: some units of its channels. They advance together, row by row or chunk by chunk, so that what one
// loads of a pixel stays in the cache for the others.
struct WorkItem {
  int64_t batch;
  int64_t tile;
  int64_t first_unit;
  int64_t end_unit;

  WorkItem(const WavefrontScanParams& p, int64_t index, int64_t tiles) : batch(index / tiles), tile(index % tiles) {
    const int64_t units = ceil_div(p.channels, kCpuChannelUnit);
    first_unit = units * tile / tiles;
    end_unit = units * (tile + 1) / tiles;
  }
};

template <class T, class S>
void forward_items(const WavefrontScanParams& p, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const WorkItem item(p, index, wavefront_scan_tiles(p, kMinForwardItems));
    std::vector<std::unique_ptr<ForwardUnit<T, S>>> units;
    for (int64_t unit = item.first_unit; unit < item.end_unit; ++unit)
      units.push_back(std::make_unique<ForwardUnit<T, S>>(p, item.batch, unit * kCpuChannelUnit));
    for (int64_t row = 0; row < p.height; ++row)
      for (auto& unit : units) unit->run(row);
  }
}

template <class T, class S>
void backward_items(const WavefrontScanParams& p, int64_t begin, int64_t end) {
  using Unit = BackwardUnit<T, S>;
  const auto rows = Unit::rows_of_chunk(p);
  for (int64_t index = begin; index < end; ++index) {
    const WorkItem item(p, index, wavefront_scan_tiles(p, kMinBackwardItems));
    std::vector<std::unique_ptr<Unit>> units;
    for (int64_t unit = item.first_unit; unit < item.end_unit; ++unit)
      units.push_back(
          std::make_unique<Unit>(p, item.batch, item.tile, unit * kCpuChannelUnit, unit == item.first_unit));
    for (int64_t chunk = Unit::chunks(p) - 1; chunk >= 0; --chunk)
      for (auto& unit : units) unit->run(chunk, rows);
  }
}

using RunItems = void (*)(const WavefrontScanParams&, int64_t begin, int64_t end);

void run(const WavefrontScanParams& p, int64_t count, RunItems run_items, ParallelFor parallel_for) {
  struct Context {
    const WavefrontScanParams& p;
    RunItems run_items;
  } context{p, run_items};
  const int64_t updates = p.batch * p.height * p.width * p.channels * p.states;
  const int64_t grain = ceil_div(kMinUpdatesPerThread * count, updates > 0 ? updates : 1);
  parallel_for(
      count, grain,
      [](int64_t begin, int64_t end, const void* opaque) {
        const Context& context = *static_cast<const Context*>(opaque);
        context.run_items(context.p, begin, end);
      },
      &context);
}

}  // namespace

void wavefront_scan_forward(const WavefrontScanParams& p, ParallelFor parallel_for) {
  const int64_t count = p.batch * wavefront_scan_tiles(p, kMinForwardItems);
  switch (p.dtype) {
    case DataType::kFloat32: return run(p, count, forward_items<float, float>, parallel_for);
    case DataType::kBFloat16: return run(p, count, forward_items<BFloat16, float>, parallel_for);
    case DataType::kFloat16: return run(p, count, forward_items<Float16, float>, parallel_for);
    case DataType::kFloat64: return run(p, count, forward_items<double, double>, parallel_for);
  }
}

void wavefront_scan_backward(const WavefrontScanParams& p, ParallelFor parallel_for) {
  const int64_t count = p.batch * wavefront_scan_tiles(p, kMinBackwardItems);
  switch (p.dtype) {
    case DataType::kFloat32: return run(p, count, backward_items<float, float>, parallel_for);
    case DataType::kBFloat16: return run(p, count, backward_items<BFloat16, float>, parallel_for);
    case DataType::kFloat16: return run(p, count, backward_items<Float16, float>, parallel_for);
    case DataType::kFloat64: return run(p, count, backward_items<double, double>, parallel_for);
  }
}

}  // namespace SSM_CPU_CAPABILITY
}  // namespace cuda_ops
