// The two scans on contiguous float32 arrays, for libraries of other runtimes than PyTorch: checks, and the parameters
// of the CPU kernels in csrc/cpu.
//
// An input of RouteScan or WavefrontScan is either as large as the map or of size 1 along batch, height and width.
#pragma once

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "route_scan.h"
#include "wavefront_scan.h"

namespace ssm_runtimes {

constexpr const char* kDomain = "ssm_backbones";

using Shape = std::vector<int64_t>;

struct Array {
  const float* data;
  Shape shape;
};

inline std::string to_string(const Shape& shape) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < shape.size(); ++i) text << (i ? ", " : "") << shape[i];
  text << ")";
  return text.str();
}

// `first` is the dimension from which on sizes have to agree; before it, 1 is taken too.
inline void check_shape(const char* name, const Array& array, const Shape& expected, size_t first = 0) {
  bool fits = array.shape.size() == expected.size();
  for (size_t i = 0; fits && i < expected.size(); ++i)
    fits = array.shape[i] == expected[i] || (i < first && array.shape[i] == 1);
  if (!fits)
    throw std::invalid_argument(std::string(name) + " must have shape " + to_string(expected) + ", got " +
                                to_string(array.shape));
}

// A (batch, height, width, ...) array of `inner` elements a pixel, which is repeated where its size is 1.
inline cuda_ops::GridTensor grid(const Array& array, int64_t inner) {
  cuda_ops::GridTensor tensor;
  tensor.data = const_cast<float*>(array.data);
  tensor.column = array.shape[2] > 1 ? inner : 0;
  tensor.row = array.shape[1] > 1 ? inner * array.shape[2] : 0;
  tensor.batch = array.shape[0] > 1 ? inner * array.shape[2] * array.shape[1] : 0;
  return tensor;
}

struct RouteScan {
  static constexpr const char* kName = "RouteScan";
  enum Input { kX, kDelta, kA, kB, kC, kD, kDeltaBias, kInputs };

  std::vector<int64_t> routes;
  int64_t per_line = 0;  // flags, as integers, which ONNX has
  int64_t delta_softplus = 1;

  // Runs from x (B, H, W, E), delta (K, B, H, W, E), A (K, E, N), B and C (B, H, W, K, N), D and delta_bias (K, E) to y
  // (B, H, W, E).
  void run(const std::vector<Array>& inputs, float* y, cuda_ops::ParallelFor parallel_for) const {
    const Array &x = inputs[kX], &delta = inputs[kDelta], &A = inputs[kA];
    if (x.shape.size() != 4 || A.shape.size() != 3)
      throw std::invalid_argument("x must be (batch, height, width, channels) and A (routes, channels, states), got " +
                                  to_string(x.shape) + " and " + to_string(A.shape));
    const int64_t K = int64_t(routes.size()), E = x.shape[3], N = A.shape[2];
    if (K < 1 || K > cuda_ops::kMaxRoutes || (per_line && K != 1))
      throw std::invalid_argument("1 to 4 routes are served, or one with per_line, got " + to_string(routes));
    const Shape projected{x.shape[0], x.shape[1], x.shape[2], K, N};
    check_shape("delta", delta, {K, x.shape[0], x.shape[1], x.shape[2], E});
    check_shape("A", A, {K, E, N});
    check_shape("B", inputs[kB], projected, 3);
    check_shape("C", inputs[kC], projected, 3);
    check_shape("D", inputs[kD], {K, E});
    check_shape("delta_bias", inputs[kDeltaBias], {K, E});

    cuda_ops::RouteScanParams p{};
    p.dtype = cuda_ops::DataType::kFloat32;
    p.batch = x.shape[0];
    p.height = x.shape[1];
    p.width = x.shape[2];
    p.routes = K;
    p.groups = 1;
    p.channels = E;
    p.states = N;
    for (int64_t k = 0; k < K; ++k) {
      if (routes[k] < cuda_ops::kRow || routes[k] > cuda_ops::kColumnReversed)
        throw std::invalid_argument("routes are 0 to 3, got " + to_string(routes));
      p.route[k] = int32_t(routes[k]);
    }
    p.per_line = per_line;
    p.delta_softplus = delta_softplus;
    p.x = grid(x, E);
    p.delta = grid({delta.data, {x.shape}}, E);
    p.delta.route = p.batch * p.height * p.width * E;
    p.B = grid(inputs[kB], K * N);
    p.C = grid(inputs[kC], K * N);
    p.B.route = p.C.route = N;
    p.A = A.data;
    p.D = inputs[kD].data;
    p.delta_bias = inputs[kDeltaBias].data;
    p.y = y;
    if (p.batch && p.height && p.width && E) cuda_ops::route_scan_forward_cpu(p, parallel_for);
  }
};

struct WavefrontScan {
  static constexpr const char* kName = "WavefrontScan";
  enum Input { kX, kDeltaTop, kDeltaLeft, kATop, kALeft, kBTop, kBLeft, kC, kD, kInputs };

  int64_t reverse = 0;

  // Runs from x and deltas (B, H, W, E), rates (E, N), projections (B, H, W, N) and D (E) to y (B, H, W, E).
  void run(const std::vector<Array>& inputs, float* y, cuda_ops::ParallelFor parallel_for) const {
    const Array &x = inputs[kX], &A = inputs[kATop];
    if (x.shape.size() != 4 || A.shape.size() != 2)
      throw std::invalid_argument("x must be (batch, height, width, channels) and A_top (channels, states), got " +
                                  to_string(x.shape) + " and " + to_string(A.shape));
    const int64_t E = x.shape[3], N = A.shape[1];
    const Shape projected{x.shape[0], x.shape[1], x.shape[2], N};
    check_shape("delta_top", inputs[kDeltaTop], x.shape);
    check_shape("delta_left", inputs[kDeltaLeft], x.shape);
    check_shape("A_top", A, {E, N});
    check_shape("A_left", inputs[kALeft], {E, N});
    check_shape("B_top", inputs[kBTop], projected, 3);
    check_shape("B_left", inputs[kBLeft], projected, 3);
    check_shape("C", inputs[kC], projected, 3);
    check_shape("D", inputs[kD], {E});

    // The kernels' rows are the shorter lines of the map.
    const int64_t height = x.shape[1], width = x.shape[2];
    const bool transposed = width > height;
    const auto oriented = [&](const Array& array, int64_t inner) {
      cuda_ops::GridTensor tensor = grid(array, inner);
      if (reverse) {
        tensor.data = static_cast<float*>(tensor.data) + (height - 1) * tensor.row + (width - 1) * tensor.column;
        tensor.row = -tensor.row;
        tensor.column = -tensor.column;
      }
      if (transposed) std::swap(tensor.row, tensor.column);
      return tensor;
    };
    cuda_ops::WavefrontScanParams p{};
    p.dtype = cuda_ops::DataType::kFloat32;
    p.batch = x.shape[0];
    p.height = std::max(height, width);
    p.width = std::min(height, width);
    p.channels = E;
    p.states = N;
    p.starts_from_above = transposed;
    p.x = oriented(x, E);
    p.C = oriented(inputs[kC], N);
    p.D = inputs[kD].data;
    p.y = oriented({y, x.shape}, E);
    cuda_ops::Neighbour& top = transposed ? p.before : p.above;
    cuda_ops::Neighbour& left = transposed ? p.above : p.before;
    top.delta = oriented(inputs[kDeltaTop], E);
    top.B = oriented(inputs[kBTop], N);
    top.A = A.data;
    left.delta = oriented(inputs[kDeltaLeft], E);
    left.B = oriented(inputs[kBLeft], N);
    left.A = inputs[kALeft].data;
    if (p.batch && height && width && E) cuda_ops::wavefront_scan_forward_cpu(p, parallel_for);
  }
};

}  // namespace ssm_runtimes
