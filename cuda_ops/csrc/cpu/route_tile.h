// What both passes of the route scan on the CPU share: the items of work, and the scan of a tile of channels. Included
// by the kernel that is compiled once per capability.
#pragma once

#include "../route_scan.h"
#include "scratch.h"
#include "simd.h"

namespace cuda_ops {
namespace SSM_CPU_CAPABILITY {
namespace {

// An image, a tile of one group's channels, and a range of lines.
struct WorkItem {
  int64_t batch;
  int64_t group;
  int64_t tile;
  int64_t part;
  int64_t channel;  // first of the tile, counted over all groups
  int channels;     // of the tile
  int64_t first_line;
  int64_t end_line;
};

// The work items of a scan.
class WorkItems {
 public:
  explicit WorkItems(const RouteScanParams& p) : p_(p), split_(route_scan_split(p)) {
    lines_ = route_shape(p.route[0], p.per_line, p.height, p.width).lines;
    lines_per_part_ = ceil_div(lines_, split_.parts);
  }
  int64_t count() const { return p_.batch * p_.groups * split_.tiles * split_.parts; }

  WorkItem operator[](int64_t index) const {
    WorkItem item;
    item.part = index % split_.parts;
    index /= split_.parts;
    item.tile = index % split_.tiles;
    index /= split_.tiles;
    item.group = index % p_.groups;
    item.batch = index / p_.groups;
    const int64_t group_channels = p_.channels / p_.groups;
    const int64_t units = ceil_div(group_channels, kCpuChannelUnit);
    const int64_t begin = units * item.tile / split_.tiles * kCpuChannelUnit;
    const int64_t end = min_of(units * (item.tile + 1) / split_.tiles * kCpuChannelUnit, group_channels);
    item.channel = item.group * group_channels + begin;
    item.channels = int(end - begin);
    item.first_line = min_of(item.part * lines_per_part_, lines_);
    item.end_line = min_of(item.first_line + lines_per_part_, lines_);
    return item;
  }

 private:
  static int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

  const RouteScanParams& p_;
  const RouteScanSplit split_;
  int64_t lines_;
  int64_t lines_per_part_;
};

// Where a scan is: a position of a line, and its pixel.
struct Place {
  int64_t line;
  int64_t position;
  Pixel pixel;
};

template <class T>
T* pixel_pointer(const GridTensor& tensor, int64_t batch, Pixel pixel, int64_t route, int64_t group) {
  return static_cast<T*>(tensor.data) + batch * tensor.batch + pixel.row * tensor.row + pixel.column * tensor.column +
         route * tensor.route + group * tensor.group;
}

// Scans one tile of channels: what both passes share. T is the element type of the map, S that of the state. Units is
// the width of a tile of whole channel units, so that the compiler can unroll the loops over vectors; 0 supports any
// width.
template <class T, class S, int Units>
class ScanTile {
 public:
  static constexpr int kLanes = Vector<S>::kLanes;
  static constexpr int kVectors = Units * int(kCpuChannelUnit) / kLanes;
  static constexpr int kCacheLine = 64;  // bytes
  static constexpr int kAhead = 8;       // positions from a prefetch to the use
  static constexpr int kMaxVectors = kVectors ? kVectors : (int(kMaxCpuTileChannels) + kLanes - 1) / kLanes;
  using V = Vec<S>;

  ScanTile(const RouteScanParams& p, const WorkItem& item)
      : p_(p),
        item_(item),
        states_(int(p.states)),
        any_vectors_(int(ceil_div(item.channels, kLanes))),
        A_log2e_(p.states * vectors()),
        dt_weight_(p.dt_rank * vectors()),
        state_(p.states * vectors()) {}

 protected:
  int vectors() const { return kVectors ? kVectors : any_vectors_; }

  // Channels in a vector: all its lanes, except in the last vector of a tile.
  int lanes(int v) const {
    if (kVectors) return kLanes;
    const int rest = item_.channels - v * kLanes;
    return rest < kLanes ? rest : kLanes;
  }
  const S* parameter(const void* data, int64_t k) const {
    return static_cast<const S*>(data) + k * p_.channels + item_.channel;
  }

  void load_parameters(int64_t k) {
    const S* A = static_cast<const S*>(p_.A) + (k * p_.channels + item_.channel) * states_;
    for (int n = 0; n < states_; ++n) {
      for (int v = 0; v < vectors(); ++v) {
        V value{};
        for (int lane = 0; lane < lanes(v); ++lane) value[lane] = A[(v * kLanes + lane) * states_ + n];
        A_log2e_.data()[n * vectors() + v] = value * S(kLog2E);
      }
    }
    for (int v = 0; v < vectors(); ++v) {
      D_[v] = p_.D ? load(parameter(p_.D, k) + v * kLanes, lanes(v)) : V{};
      bias_[v] = p_.delta_bias ? load(parameter(p_.delta_bias, k) + v * kLanes, lanes(v)) : V{};
    }
    if (!p_.dt_rank) return;
    const S* weight = static_cast<const S*>(p_.dt_weight) + (k * p_.channels + item_.channel) * p_.dt_rank;
    for (int v = 0; v < vectors(); ++v) {
      for (int lane = 0; lane < kLanes; ++lane)
        for (int64_t r = 0; r < p_.dt_rank; ++r)
          dt_weight_.data()[r * vectors() + v][lane] =
              lane < lanes(v) ? weight[(v * kLanes + lane) * p_.dt_rank + r] : S(0);
    }
  }

  // Delta of a position and its bias: as it is given, or the product of the low-rank dt.
  SSM_ALWAYS_INLINE void load_delta(int64_t k, Pixel pixel, V* biased) const {
    const T* source = pixel_pointer<T>(p_.delta, item_.batch, pixel, k, 0);
    if (!p_.dt_rank) {
      for (int v = 0; v < vectors(); ++v) biased[v] = load(source + item_.channel + v * kLanes, lanes(v)) + bias_[v];
      return;
    }
    V sums[kMaxVectors];
    for (int v = 0; v < vectors(); ++v) sums[v] = bias_[v];
    const V* weight = dt_weight_.data();
    for (int64_t r = 0; r < p_.dt_rank; ++r, weight += vectors()) {
      const S dt = scalar(source + r);
      for (int v = 0; v < vectors(); ++v) sums[v] += dt * weight[v];
    }
    for (int v = 0; v < vectors(); ++v) biased[v] = sums[v];
  }

  void clear_state() {
    for (int i = 0; i < states_ * vectors(); ++i) state_.data()[i] = V{};
  }

  Pixel pixel(int64_t k, int64_t line, int64_t position) const {
    return route_pixel(p_.route[k], p_.per_line, p_.height, p_.width, line, position);
  }

  // Moves to the next pixel of a line, without a division.
  void advance(int64_t k, Pixel& pixel) const {
    const bool columns = runs_along_columns(p_.route[k]);
    int64_t& inner = columns ? pixel.row : pixel.column;
    int64_t& outer = columns ? pixel.column : pixel.row;
    const int64_t end = columns ? p_.height : p_.width;
    if (is_reversed(p_.route[k])) {
      if (--inner < 0) {
        inner = end - 1;
        --outer;
      }
    } else if (++inner == end) {
      inner = 0;
      ++outer;
    }
  }

  // Moves to the next position, or to the next line's first; beyond the last line a place's pixel is none of the map.
  void advance_over_lines(int64_t k, RouteShape shape, Place& place) const {
    if (++place.position < shape.length) return advance(k, place.pixel);
    place = {place.line + 1, 0, pixel(k, place.line + 1, 0)};
  }

  // Asks for a tile's values before they are needed: processors do not foresee where the next pixel's begins, which is
  // far from this one's.
  template <class E>
  void prefetch(const E* values) const {
    const char* bytes = reinterpret_cast<const char*>(values);
    const int count = vectors() * kLanes * int(sizeof(E));
    for (int offset = 0; offset < count; offset += kCacheLine) __builtin_prefetch(bytes + offset);
  }
  void prefetch_inputs(int64_t k, Pixel pixel) const {
    prefetch(pixel_pointer<T>(p_.x, item_.batch, pixel, 0, 0) + item_.channel);
    if (!p_.dt_rank) prefetch(pixel_pointer<T>(p_.delta, item_.batch, pixel, k, 0) + item_.channel);
  }

  // What the way back needs, while the way there is computed.
  void prefetch_gradients(int64_t k, Pixel pixel) const {
    prefetch(pixel_pointer<T>(p_.grad_y, item_.batch, pixel, 0, 0) + item_.channel);
    prefetch(per_map(p_.grad_x, pixel));
    prefetch(pixel_pointer<T>(p_.grad_delta, item_.batch, pixel, k, 0) + item_.channel);
  }

  S* saved(int64_t k, RouteShape shape, int64_t line, int64_t chunk) const {
    const int64_t count = saved_state_count(shape.length, p_.chunk);
    const int64_t index = ((item_.batch * p_.routes + k) * shape.lines + line) * count + chunk;
    return static_cast<S*>(p_.saved_states) + index * p_.states * p_.channels + item_.channel;
  }

  S* per_map(void* data, Pixel pixel) const {
    const int64_t index = (item_.batch * p_.height + pixel.row) * p_.width + pixel.column;
    return static_cast<S*>(data) + index * p_.channels + item_.channel;
  }

  // Writes the first route's share of an output, and adds those of the others.
  static void accumulate(S* target, V value, int count, bool first) {
    store(target, first ? value : value + load(target, count), count);
  }

  const RouteScanParams& p_;
  const WorkItem& item_;
  const int states_, any_vectors_;
  Scratch<S> A_log2e_;    // A * log2(e), [n][v]
  Scratch<S> dt_weight_;  // [r][v], with a low-rank dt
  Scratch<S> state_;      // [n][v]
  V D_[kMaxVectors], bias_[kMaxVectors];
};

}  // namespace
}  // namespace SSM_CPU_CAPABILITY
}  // namespace cuda_ops
