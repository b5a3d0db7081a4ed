// Route scan on the CPU. Vectors run over channels, the pool's threads over images, tiles of channels and parts of the
// lines. Compiled once for each capability; scan_dispatch.cpp chooses at run time.
#include <memory>

#include "../route_scan.h"
#include "scratch.h"
#include "simd.h"

namespace cuda_ops {
namespace SSM_CPU_CAPABILITY {
namespace {

// The piece of work of one task: an image, a tile of one group's channels, and a range of lines.
struct Piece {
  int64_t batch, group, tile, part;
  int64_t channel;   // first of the tile, counted over all groups
  int channels;      // of the tile
  int64_t first_line, end_line;
};

struct Division {
  RouteScanWork work;
  int64_t lines_per_part;

  explicit Division(const RouteScanParams& p) : work(route_scan_work(p)) {
    const int64_t lines = route_shape(p.route[0], p.per_line, p.height, p.width).lines;
    lines_per_part = ceil_div(lines, work.parts);
  }
  int64_t count(const RouteScanParams& p) const { return p.batch * p.groups * work.tiles * work.parts; }

  Piece piece(const RouteScanParams& p, int64_t index) const {
    Piece piece;
    piece.part = index % work.parts;
    index /= work.parts;
    piece.tile = index % work.tiles;
    index /= work.tiles;
    piece.group = index % p.groups;
    piece.batch = index / p.groups;
    const int64_t group_channels = p.channels / p.groups;
    const int64_t units = ceil_div(group_channels, kTileUnit);
    const int64_t begin = units * piece.tile / work.tiles * kTileUnit;
    const int64_t end = min_of(units * (piece.tile + 1) / work.tiles * kTileUnit, group_channels);
    piece.channel = piece.group * group_channels + begin;
    piece.channels = int(end - begin);
    const int64_t lines = route_shape(p.route[0], p.per_line, p.height, p.width).lines;
    piece.first_line = min_of(piece.part * lines_per_part, lines);
    piece.end_line = min_of(piece.first_line + lines_per_part, lines);
    return piece;
  }
  static int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
};

template <class T>
T* at(const GridTensor& tensor, int64_t batch, Pixel pixel, int64_t route, int64_t group) {
  return static_cast<T*>(tensor.data) + batch * tensor.batch + pixel.row * tensor.row + pixel.column * tensor.column +
         route * tensor.route + group * tensor.group;
}

// Everything about one route that does not depend on the position, for one tile of channels.
// T is the map's element type, S the state's. Units is the tile's width where it holds whole units of channels, so that the
// compiler can unroll the loops over vectors; 0 serves any width.
template <class T, class S, int Units>
class TileScan {
 public:
  static constexpr int kLanes = Vector<S>::kLanes;
  static constexpr int kVectors = Units * int(kTileUnit) / kLanes;
  static constexpr int kMaxVectors = kVectors ? kVectors : (int(kTileChannels) + kLanes - 1) / kLanes;
  using V = Vec<S>;

  TileScan(const RouteScanParams& p, const Piece& piece)
      : p_(p),
        piece_(piece),
        states_(int(p.states)),
        any_vectors_(int(ceil_div(piece.channels, kLanes))),
        rate_(p.states * vectors()),
        state_(p.states * vectors()) {}

 protected:
  int vectors() const { return kVectors ? kVectors : any_vectors_; }

  // Channels in a vector: all of its lanes but for the last one of a tile.
  int lanes(int v) const {
    if (kVectors) return kLanes;
    const int rest = piece_.channels - v * kLanes;
    return rest < kLanes ? rest : kLanes;
  }
  const S* parameter(const void* data, int64_t k) const {
    return static_cast<const S*>(data) + k * p_.channels + piece_.channel;
  }

  void load_parameters(int64_t k) {
    const S* A = static_cast<const S*>(p_.A) + (k * p_.channels + piece_.channel) * states_;
    for (int n = 0; n < states_; ++n) {
      for (int v = 0; v < vectors(); ++v) {
        V rate{};
        for (int lane = 0; lane < lanes(v); ++lane) rate[lane] = A[(v * kLanes + lane) * states_ + n];
        rate_.data()[n * vectors() + v] = rate * S(kLog2E);
      }
    }
    for (int v = 0; v < vectors(); ++v) {
      D_[v] = p_.D ? load(parameter(p_.D, k) + v * kLanes, lanes(v)) : V{};
      bias_[v] = p_.delta_bias ? load(parameter(p_.delta_bias, k) + v * kLanes, lanes(v)) : V{};
    }
  }

  void clear_state() {
    for (int i = 0; i < states_ * vectors(); ++i) state_.data()[i] = V{};
  }

  Pixel pixel(int64_t k, int64_t line, int64_t position) const {
    return route_pixel(p_.route[k], p_.per_line, p_.height, p_.width, line, position);
  }

  // The next pixel of a line without a division.
  void advance(int64_t k, Pixel& pixel) const {
    const bool columns = runs_along_columns(p_.route[k]);
    int64_t& inner = columns ? pixel.row : pixel.column;
    int64_t& outer = columns ? pixel.column : pixel.row;
    const int64_t end = columns ? p_.height : p_.width;
    if (runs_backwards(p_.route[k])) {
      if (--inner < 0) {
        inner = end - 1;
        --outer;
      }
    } else if (++inner == end) {
      inner = 0;
      ++outer;
    }
  }

  S* saved(int64_t k, RouteShape shape, int64_t line, int64_t chunk) const {
    const int64_t count = saved_states(shape.length, p_.chunk);
    const int64_t index = ((piece_.batch * p_.routes + k) * shape.lines + line) * count + chunk;
    return static_cast<S*>(p_.saved) + index * p_.states * p_.channels + piece_.channel;
  }

  S* per_map(void* data, Pixel pixel) const {
    const int64_t index = (piece_.batch * p_.height + pixel.row) * p_.width + pixel.column;
    return static_cast<S*>(data) + index * p_.channels + piece_.channel;
  }

  // The first route writes its share of an output, the others add theirs.
  static void accumulate(S* target, V value, int count, bool first) {
    store(target, first ? value : value + load(target, count), count);
  }

  const RouteScanParams& p_;
  const Piece& piece_;
  const int states_, any_vectors_;
  Scratch<S> rate_;   // A * log2(e), [n][v]
  Scratch<S> state_;  // [n][v]
  V D_[kMaxVectors], bias_[kMaxVectors];
};

template <class T, class S, int Units>
class TileForward : TileScan<T, S, Units> {
  using Base = TileScan<T, S, Units>;
  using typename Base::V;
  using Base::bias_, Base::D_, Base::kLanes, Base::kMaxVectors, Base::lanes, Base::p_, Base::piece_, Base::rate_,
      Base::state_, Base::states_, Base::vectors;

 public:
  using Base::Base;

  void run() {
    for (int64_t k = 0; k < p_.routes; ++k) {
      this->load_parameters(k);
      const RouteShape shape = route_shape(p_.route[k], p_.per_line, p_.height, p_.width);
      for (int64_t line = piece_.first_line; line < piece_.end_line; ++line) run_line(k, shape, line);
      if (p_.last) save_last(k);
    }
  }

 private:
  void run_line(int64_t k, RouteShape shape, int64_t line) {
    this->clear_state();
    Pixel pixel = this->pixel(k, line, 0);
    int64_t until_saved = p_.chunk ? p_.chunk : shape.length;
    int64_t chunk = 0;
    for (int64_t position = 0; position < shape.length; ++position, this->advance(k, pixel)) {
      if (states_ == 1) {
        step<1>(k, pixel);
      } else {
        step<0>(k, pixel);
      }
      if (--until_saved == 0 && position + 1 < shape.length) {
        S* target = this->saved(k, shape, line, chunk++);
        for (int n = 0; n < states_; ++n, target += p_.channels)
          for (int v = 0; v < vectors(); ++v) store(target + v * kLanes, state_.data()[n * vectors() + v], lanes(v));
        until_saved = p_.chunk;
      }
    }
  }

  // One position. States is the number of states where known when compiling, else 0.
  template <int States>
  void step(int64_t k, Pixel pixel) {
    const int states = States ? States : states_, vectors = this->vectors();
    const T* x = at<T>(p_.x, piece_.batch, pixel, 0, 0) + piece_.channel;
    const T* delta = at<T>(p_.delta, piece_.batch, pixel, k, 0) + piece_.channel;
    const T* B = p_.B.data ? at<T>(p_.B, piece_.batch, pixel, k, piece_.group) : nullptr;
    const T* C = p_.C.data ? at<T>(p_.C, piece_.batch, pixel, k, piece_.group) : nullptr;
    S* y = this->per_map(p_.y, pixel);
    V d[kMaxVectors], inflow[kMaxVectors], output[kMaxVectors];
    for (int v = 0; v < vectors; ++v) {
      const V raw = load(delta + v * kLanes, lanes(v)) + bias_[v];
      const V u = load(x + v * kLanes, lanes(v));
      d[v] = p_.delta_softplus ? softplus(raw).value : raw;
      inflow[v] = d[v] * u;
      output[v] = D_[v] * u;
    }
    for (int n = 0; n < states; ++n) {
      const S B_n = B ? scalar(B + n) : S(1), C_n = C ? scalar(C + n) : S(1);
      for (int v = 0; v < vectors; ++v) {
        V& h = state_.data()[n * vectors + v];
        h = exp2(d[v] * rate_.data()[n * vectors + v]) * h + B_n * inflow[v];
        output[v] += C_n * h;
      }
    }
    for (int v = 0; v < vectors; ++v) this->accumulate(y + v * kLanes, output[v], lanes(v), k == 0);
  }

  void save_last(int64_t k) {
    S* last = static_cast<S*>(p_.last) +
              ((piece_.batch * p_.routes + k) * p_.channels + piece_.channel) * int64_t(states_);
    for (int n = 0; n < states_; ++n)
      for (int c = 0; c < piece_.channels; ++c)
        last[c * states_ + n] = state_.data()[n * vectors() + c / kLanes][c % kLanes];
  }
};

template <class T, class S, int Units>
class TileBackward : TileScan<T, S, Units> {
  using Base = TileScan<T, S, Units>;
  using typename Base::V;
  using Base::bias_, Base::D_, Base::kLanes, Base::kMaxVectors, Base::lanes, Base::p_, Base::piece_, Base::rate_,
      Base::state_, Base::states_, Base::vectors;

 public:
  TileBackward(const RouteScanParams& p, const Piece& piece)
      : Base(p, piece),
        chunk_(chunk_length(p)),
        pixels_(new Pixel[chunk_]),
        step_(chunk_ * vectors()),
        slope_(chunk_ * vectors()),
        decay_(chunk_ * vectors() * states_),
        states_of_((chunk_ + 1) * vectors() * states_),
        carry_(vectors() * states_),
        grad_rate_(vectors() * states_),
        total_rate_(vectors() * states_) {}

  void run() {
    for (int64_t k = 0; k < p_.routes; ++k) {
      this->load_parameters(k);
      for (int i = 0; i < vectors() * states_; ++i) grad_rate_.data()[i] = total_rate_.data()[i] = V{};
      for (int v = 0; v < vectors(); ++v) grad_D_[v] = total_D_[v] = grad_bias_[v] = total_bias_[v] = V{};
      const RouteShape shape = route_shape(p_.route[k], p_.per_line, p_.height, p_.width);
      for (int64_t line = piece_.first_line; line < piece_.end_line; ++line) run_line(k, shape, line);
      store_parameter_gradients(k);
    }
  }

 private:
  static int64_t chunk_length(const RouteScanParams& p) {
    const int64_t length = route_shape(p.route[0], p.per_line, p.height, p.width).length;
    return length < p.chunk ? length : p.chunk;
  }

  void run_line(int64_t k, RouteShape shape, int64_t line) {
    start_carry(k);
    for (int64_t chunk = saved_states(shape.length, p_.chunk); chunk >= 0; --chunk) {
      const int64_t begin = chunk * p_.chunk;
      const int64_t rest = shape.length - begin;
      const int count = int(rest < p_.chunk ? rest : p_.chunk);
      load_state(k, shape, line, chunk);
      Pixel pixel = this->pixel(k, line, begin);
      for (int i = 0; i < count; ++i, this->advance(k, pixel)) {
        pixels_[i] = pixel;
        if (states_ == 1) {
          recompute<1>(k, i);
        } else {
          recompute<0>(k, i);
        }
      }
      for (int i = count - 1; i >= 0; --i) {
        if (states_ == 1) {
          step<1>(k, i);
        } else {
          step<0>(k, i);
        }
      }
      add_chunk_to_totals();
    }
  }

  // Sums over positions are taken chunk by chunk: one long sum would lose precision with the length.
  void add_chunk_to_totals() {
    for (int i = 0; i < vectors() * states_; ++i) {
      total_rate_.data()[i] += grad_rate_.data()[i];
      grad_rate_.data()[i] = V{};
    }
    for (int v = 0; v < vectors(); ++v) {
      total_D_[v] += grad_D_[v];
      total_bias_[v] += grad_bias_[v];
      grad_D_[v] = grad_bias_[v] = V{};
    }
  }

  void start_carry(int64_t k) {
    for (int i = 0; i < vectors() * states_; ++i) carry_.data()[i] = V{};
    if (!p_.grad_last) return;
    const S* grad = static_cast<const S*>(p_.grad_last) +
                    ((piece_.batch * p_.routes + k) * p_.channels + piece_.channel) * int64_t(states_);
    for (int n = 0; n < states_; ++n)
      for (int c = 0; c < piece_.channels; ++c)
        carry_.data()[n * vectors() + c / kLanes][c % kLanes] = grad[c * states_ + n];
  }

  // The state before the chunk.
  void load_state(int64_t k, RouteShape shape, int64_t line, int64_t chunk) {
    const S* source = chunk ? this->saved(k, shape, line, chunk - 1) : nullptr;
    for (int n = 0; n < states_; ++n)
      for (int v = 0; v < vectors(); ++v)
        states_of_.data()[n * vectors() + v] = source ? load(source + n * p_.channels + v * kLanes, lanes(v)) : V{};
  }

  template <int States>
  void recompute(int64_t k, int i) {
    const int states = States ? States : states_, vectors = this->vectors();
    const Pixel pixel = pixels_[i];
    const T* x = at<T>(p_.x, piece_.batch, pixel, 0, 0) + piece_.channel;
    const T* delta = at<T>(p_.delta, piece_.batch, pixel, k, 0) + piece_.channel;
    const T* B = p_.B.data ? at<T>(p_.B, piece_.batch, pixel, k, piece_.group) : nullptr;
    V inflow[kMaxVectors];
    V* d = step_.data() + i * vectors;
    V* slope = slope_.data() + i * vectors;
    for (int v = 0; v < vectors; ++v) {
      const V raw = load(delta + v * kLanes, lanes(v)) + bias_[v];
      if (p_.delta_softplus) {
        const Softplus<S> result = softplus(raw);
        d[v] = result.value;
        slope[v] = result.derivative;
      } else {
        d[v] = raw;
        slope[v] = splat(S(1));
      }
      inflow[v] = d[v] * load(x + v * kLanes, lanes(v));
    }
    V* decay = decay_.data() + int64_t(i) * states * vectors;
    const V* before = states_of_.data() + int64_t(i) * states * vectors;
    V* after = states_of_.data() + int64_t(i + 1) * states * vectors;
    for (int n = 0; n < states; ++n) {
      const S B_n = B ? scalar(B + n) : S(1);
      for (int v = 0; v < vectors; ++v) {
        const int s = n * vectors + v;
        decay[s] = exp2(d[v] * rate_.data()[s]);
        after[s] = decay[s] * before[s] + B_n * inflow[v];
      }
    }
  }

  template <int States>
  void step(int64_t k, int i) {
    const int states = States ? States : states_, vectors = this->vectors();
    const Pixel pixel = pixels_[i];
    const T* x = at<T>(p_.x, piece_.batch, pixel, 0, 0) + piece_.channel;
    const T* grad_y = at<T>(p_.grad_y, piece_.batch, pixel, 0, 0) + piece_.channel;
    const T* B = p_.B.data ? at<T>(p_.B, piece_.batch, pixel, k, piece_.group) : nullptr;
    const T* C = p_.C.data ? at<T>(p_.C, piece_.batch, pixel, k, piece_.group) : nullptr;
    S* grad_B = p_.grad_B ? projection_gradient(p_.grad_B, k, pixel) : nullptr;
    S* grad_C = p_.grad_C ? projection_gradient(p_.grad_C, k, pixel) : nullptr;
    const V* d = step_.data() + i * vectors;
    V u[kMaxVectors], dy[kMaxVectors], inflow[kMaxVectors], through_input[kMaxVectors], grad_d[kMaxVectors];
    for (int v = 0; v < vectors; ++v) {
      u[v] = load(x + v * kLanes, lanes(v));
      dy[v] = load(grad_y + v * kLanes, lanes(v));
      inflow[v] = d[v] * u[v];
      through_input[v] = grad_d[v] = V{};
    }
    const V* decay = decay_.data() + int64_t(i) * states * vectors;
    const V* before = states_of_.data() + int64_t(i) * states * vectors;
    const V* after = states_of_.data() + int64_t(i + 1) * states * vectors;
    for (int n = 0; n < states; ++n) {
      const S B_n = B ? scalar(B + n) : S(1), C_n = C ? scalar(C + n) : S(1);
      V sum_B{}, sum_C{};
      for (int v = 0; v < vectors; ++v) {
        const int s = n * vectors + v;
        const V g = carry_.data()[s] + C_n * dy[v];
        const V carried = g * decay[s];
        const V through_decay = carried * before[s];
        carry_.data()[s] = carried;
        grad_d[v] += through_decay * rate_.data()[s];
        grad_rate_.data()[s] += through_decay * d[v];
        through_input[v] += B_n * g;
        sum_B += g * inflow[v];
        sum_C += dy[v] * after[s];
      }
      if (grad_B) grad_B[n] = sum_lanes<S>(sum_B);
      if (grad_C) grad_C[n] = sum_lanes<S>(sum_C);
    }
    S* grad_x = this->per_map(p_.grad_x, pixel);
    T* grad_delta = at<T>(p_.grad_delta, piece_.batch, pixel, k, 0) + piece_.channel;
    const V* slope = slope_.data() + i * vectors;
    for (int v = 0; v < vectors; ++v) {
      // rate is A * log2(e), so the part that went through the exponent is scaled back.
      const V grad_raw = (grad_d[v] * S(kLn2) + through_input[v] * u[v]) * slope[v];
      store(grad_delta + v * kLanes, grad_raw, lanes(v));
      grad_bias_[v] += grad_raw;
      grad_D_[v] += dy[v] * u[v];
      this->accumulate(grad_x + v * kLanes, through_input[v] * d[v] + D_[v] * dy[v], lanes(v), k == 0);
    }
  }

  S* projection_gradient(void* data, int64_t k, Pixel pixel) const {
    int64_t index = piece_.tile * p_.batch + piece_.batch;
    index = (index * p_.height + pixel.row) * p_.width + pixel.column;
    return static_cast<S*>(data) + ((index * p_.routes + k) * p_.groups + piece_.group) * int64_t(states_);
  }

  void store_parameter_gradients(int64_t k) {
    const int64_t row = ((piece_.part * p_.batch + piece_.batch) * p_.routes + k) * p_.channels + piece_.channel;
    S* grad_A = static_cast<S*>(p_.grad_A) + row * states_;
    for (int n = 0; n < states_; ++n)
      for (int c = 0; c < piece_.channels; ++c)
        grad_A[c * states_ + n] = total_rate_.data()[n * vectors() + c / kLanes][c % kLanes];
    for (int v = 0; v < vectors(); ++v) {
      if (p_.grad_D) store(static_cast<S*>(p_.grad_D) + row + v * kLanes, total_D_[v], lanes(v));
      if (p_.grad_delta_bias) store(static_cast<S*>(p_.grad_delta_bias) + row + v * kLanes, total_bias_[v], lanes(v));
    }
  }

  static constexpr double kLn2 = 0.6931471805599453;
  const int64_t chunk_;
  std::unique_ptr<Pixel[]> pixels_;
  Scratch<S> step_, slope_;       // [position][v]
  Scratch<S> decay_, states_of_;  // [position][n][v]; states_of_ starts with the state before the chunk
  Scratch<S> carry_;                      // [n][v]
  Scratch<S> grad_rate_, total_rate_;     // [n][v]; of the chunk, and of the chunks behind it
  V grad_D_[kMaxVectors], total_D_[kMaxVectors], grad_bias_[kMaxVectors], total_bias_[kMaxVectors];
};

template <template <class, class, int> class Tile, class T, class S>
void run_piece(const RouteScanParams& p, const Piece& piece) {
  // Narrow vectors gain nothing from more code.
  constexpr bool kUnroll = kVectorBytes > 16 && sizeof(S) == 4;
  if (kUnroll && piece.channels % kTileUnit == 0) {
    switch (piece.channels / kTileUnit) {
      case 1: return Tile<T, S, kUnroll ? 1 : 0>(p, piece).run();
      case 2: return Tile<T, S, kUnroll ? 2 : 0>(p, piece).run();
      case 3: return Tile<T, S, kUnroll ? 3 : 0>(p, piece).run();
      case 4: return Tile<T, S, kUnroll ? 4 : 0>(p, piece).run();
    }
  }
  Tile<T, S, 0>(p, piece).run();
}

template <template <class, class, int> class Tile, class T, class S>
void run_typed(const RouteScanParams& p, ParallelFor parallel_for) {
  struct Context {
    const RouteScanParams& p;
    Division division;
  } context{p, Division(p)};
  const int64_t count = context.division.count(p);
  const int64_t updates = p.batch * p.height * p.width * p.routes * p.channels * p.states;
  const int64_t grain = count ? ceil_div(kGrain * count, updates > 0 ? updates : 1) : 1;
  parallel_for(
      count, grain,
      [](int64_t begin, int64_t end, const void* opaque) {
        const Context& context = *static_cast<const Context*>(opaque);
        for (int64_t index = begin; index < end; ++index) {
          run_piece<Tile, T, S>(context.p, context.division.piece(context.p, index));
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

void route_scan_forward(const RouteScanParams& p, ParallelFor parallel_for) { run<TileForward>(p, parallel_for); }
void route_scan_backward(const RouteScanParams& p, ParallelFor parallel_for) { run<TileBackward>(p, parallel_for); }

}  // namespace SSM_CPU_CAPABILITY
}  // namespace cuda_ops
