// PyTorch binding of the wavefront scan for CPU and CUDA: checks, allocation, and the orientation in which the kernels
// see the map. Shapes must agree with those of the fake kernels in wavefront_scan.py.
#include "bindings.h"

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "wavefront_scan.h"

namespace cuda_ops {
namespace {

// The corner at which a scan starts, and whether its rows are the map's columns.
struct Orientation {
  bool reverse;
  bool transposed;
  int64_t height;  // of the map
  int64_t width;

  // A (B, H, W, ...) tensor with the strides that the kernels use.
  GridTensor operator()(const Tensor& tensor) const {
    GridTensor grid = grid_tensor(tensor);
    orient(grid, tensor);
    return grid;
  }

  // A (parts, B, H, W, N) tensor in the same way; `route` is the stride between parts.
  GridTensor in_parts(const Tensor& tensor) const {
    const Sizes strides = tensor.strides();
    GridTensor grid;
    grid.data = tensor.data_ptr();
    grid.batch = strides[1];
    grid.row = strides[2];
    grid.column = strides[3];
    orient(grid, tensor);
    grid.route = strides[0];
    return grid;
  }

 private:
  void orient(GridTensor& grid, const Tensor& tensor) const {
    if (reverse && tensor.numel()) {
      const int64_t last = (height - 1) * grid.row + (width - 1) * grid.column;
      grid.data = static_cast<char*>(grid.data) + last * int64_t(tensor.element_size());
      grid.row = -grid.row;
      grid.column = -grid.column;
    }
    if (transposed) std::swap(grid.row, grid.column);
  }
};

// Inputs of both passes: checks them, makes their strides supported, and keeps them alive.
struct Inputs {
  Tensor x;
  Tensor delta_top;
  Tensor delta_left;
  Tensor A_top;
  Tensor A_left;
  Tensor B_top;
  Tensor B_left;
  Tensor C;
  OptionalTensor D;
  Orientation oriented;
  WavefrontScanParams params{};

  Inputs(const Tensor& x_, const Tensor& delta_top_, const Tensor& delta_left_, const Tensor& A_top_,
         const Tensor& A_left_, const Tensor& B_top_, const Tensor& B_left_, const Tensor& C_, const OptionalTensor& D_,
         bool reverse, int64_t chunk) {
    SSM_CHECK(x_.dim() == 4, "x must be (batch, height, width, channels), got ", x_.sizes());
    SSM_CHECK(A_top_.dim() == 2, "A_top must be (channels, states), got ", A_top_.sizes());
    SSM_CHECK(chunk >= 0, "chunk must not be negative, got ", chunk);
    const int64_t batch = x_.size(0);
    const int64_t height = x_.size(1);
    const int64_t width = x_.size(2);
    const int64_t channels = x_.size(3);
    const int64_t states = A_top_.size(1);
    SSM_CHECK(height >= 1 && width >= 1, "x must have height and width of at least 1, got ", x_.sizes());
    SSM_CHECK(states >= 1, "A_top must hold at least one state for each channel, got ", A_top_.sizes());
    const auto type = x_.scalar_type();
    const auto state = state_type(x_);
    WavefrontScanParams& p = params;
    p.dtype = data_type(x_);
    check_shape("delta_top", delta_top_, x_.sizes(), type, x_);
    check_shape("delta_left", delta_left_, x_.sizes(), type, x_);
    check_shape("A_top", A_top_, {channels, states}, state, x_);
    check_shape("A_left", A_left_, {channels, states}, state, x_);
    check_shape("B_top", B_top_, {batch, height, width, states}, type, x_);
    check_shape("B_left", B_left_, {batch, height, width, states}, type, x_);
    check_shape("C", C_, {batch, height, width, states}, type, x_);
    check_shape("D", D_, {channels}, state, x_);

    x = last_contiguous(x_);
    delta_top = last_contiguous(delta_top_);
    delta_left = last_contiguous(delta_left_);
    B_top = last_contiguous(B_top_);
    B_left = last_contiguous(B_left_);
    C = last_contiguous(C_);
    A_top = ops::contiguous(A_top_);
    A_left = ops::contiguous(A_left_);
    D = ops::contiguous(D_);
    check_decay_rates("A_top", A_top);
    check_decay_rates("A_left", A_left);

    // Rows are the shorter lines: the forward pass keeps the states of one row, the backward pass those of one chunk.
    oriented = {reverse, width > height, height, width};
    p.batch = batch;
    p.channels = channels;
    p.states = states;
    p.chunk = chunk;
    p.height = std::max(height, width);
    p.width = std::min(height, width);
    p.starts_from_above = oriented.transposed;
    p.x = oriented(x);
    p.C = oriented(C);
    p.D = address_of(D);
    top().delta = oriented(delta_top);
    top().B = oriented(B_top);
    top().A = A_top.const_data_ptr();
    left().delta = oriented(delta_left);
    left().B = oriented(B_left);
    left().A = A_left.const_data_ptr();
  }

  Neighbour& top() { return oriented.transposed ? params.before : params.above; }
  Neighbour& left() { return oriented.transposed ? params.above : params.before; }

  std::vector<int64_t> saved_sizes() const {
    return {params.batch, saved_state_count(params.height, params.chunk), params.width, params.states, params.channels};
  }
  std::vector<int64_t> checkpoint_sizes(const Cuda& cuda) const {
    if (!cuda || !params.chunk) return {0};
    const WavefrontScanParams& p = params;
    const int64_t rows = std::min(p.chunk, p.height);
    const int64_t group = states_per_pass(p.states);
    return {p.batch,
            ceil_div(p.height, rows),
            wavefront_checkpoint_count(p.width, rows),
            ceil_div(p.channels, kWavefrontTileChannels),
            ceil_div(p.states, group) * group,
            rows,
            kWavefrontTileChannels};
  }
};

// Scratch memory of the CUDA kernels, from PyTorch's allocator, so that graphs can be captured.
struct CudaScratch {
  WavefrontScanPlan plan{};
  Tensor boundary_row;
  Tensor group_sums;
  Tensor counters;

  CudaScratch(const Cuda& cuda, WavefrontScanParams& p, const Tensor& x, bool backward) {
    plan.strips = 1;
    plan.tiles = 1;
    if (!x.numel()) return;
    cuda.check(cuda->wavefront_scan_plan(p, backward, &plan), "cuda_ops::wavefront_scan");
    const auto state = ScalarType::Float;
    boundary_row = ops::empty(x, {p.batch, p.width, p.states, p.channels}, state);
    if (plan.grouped) group_sums = ops::empty(x, {backward ? 3 : 1, p.batch, p.height, p.width, p.channels}, state);
    counters = ops::zeros(x, {wavefront_counter_count(plan.strips, p.batch * plan.tiles, backward)}, ScalarType::Long);
    p.boundary_row = boundary_row.data_ptr();
    p.counters = counters.data_ptr();
    p.group_sums = plan.grouped ? group_sums.data_ptr() : nullptr;
  }
};

std::tuple<Tensor, Tensor, Tensor> wavefront_scan(const Tensor& x, const Tensor& delta_top, const Tensor& delta_left,
                                                  const Tensor& A_top, const Tensor& A_left, const Tensor& B_top,
                                                  const Tensor& B_left, const Tensor& C, const OptionalTensor& D,
                                                  bool reverse, int64_t chunk) {
  const Cuda cuda(x);
  Inputs inputs(x, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D, reverse, chunk);
  WavefrontScanParams& p = inputs.params;
  Tensor y = ops::empty(x, x.sizes(), x.scalar_type());
  const auto state = state_type(x);
  Tensor saved = ops::empty(x, inputs.saved_sizes(), state);
  Tensor checkpoints = ops::empty(x, inputs.checkpoint_sizes(cuda), state);
  p.y = inputs.oriented(y);
  p.saved_rows = saved.data_ptr();
  p.checkpoints = checkpoints.numel() ? checkpoints.data_ptr() : nullptr;
  if (cuda) {
    const CudaScratch scratch(cuda, p, x, false);
    if (x.numel()) cuda.check(cuda->wavefront_scan_forward(p, scratch.plan, cuda.stream()), "cuda_ops::wavefront_scan");
  } else {
    wavefront_scan_forward_cpu(p, parallel_for);
  }
  return {y, saved, checkpoints};
}

// A gradient with the strides of its tensor. The kernel writes `rows`, which have unit stride along the channels.
struct Gradient {
  Tensor result;
  Tensor rows;

  explicit Gradient(const Tensor& tensor)
      : result(ops::empty_like(tensor)),
        rows(has_unit_stride(result) ? result : ops::empty(tensor, tensor.sizes(), tensor.scalar_type())) {}

  Tensor finish() {
    if (!has_unit_stride(result)) ops::copy(result, rows);
    return result;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> wavefront_scan_backward(
    const Tensor& grad_output, const Tensor& x, const Tensor& delta_top, const Tensor& delta_left, const Tensor& A_top,
    const Tensor& A_left, const Tensor& B_top, const Tensor& B_left, const Tensor& C, const OptionalTensor& D,
    const Tensor& states, const Tensor& checkpoints, bool reverse, int64_t chunk) {
  SSM_CHECK(chunk >= 1, "the backward pass needs the states saved with a chunk of at least 1, got ", chunk);
  const Cuda cuda(x);
  Inputs inputs(x, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D, reverse, chunk);
  WavefrontScanParams& p = inputs.params;
  const Orientation& oriented = inputs.oriented;
  const auto type = x.scalar_type();
  const auto state = state_type(x);
  check_shape("grad_output", grad_output, x.sizes(), type, x);
  check_shape("states", states, inputs.saved_sizes(), state_type(x), x);
  check_shape("checkpoints", checkpoints, inputs.checkpoint_sizes(cuda), state_type(x), x);
  const Tensor grad_y = last_contiguous(grad_output);
  const Tensor saved = ops::contiguous(states);
  Tensor saved_wavefronts = ops::contiguous(checkpoints);
  // The kernels load 16 bytes at a time.
  if (reinterpret_cast<uintptr_t>(saved_wavefronts.data_ptr()) % 16) saved_wavefronts = ops::clone(saved_wavefronts);

  Tensor grad_x = ops::empty(x, x.sizes(), x.scalar_type());
  Gradient grad_delta_top(delta_top);
  Gradient grad_delta_left(delta_left);
  std::optional<CudaScratch> scratch;
  if (cuda) scratch.emplace(cuda, p, x, true);
  const int64_t parts =
      cuda ? ceil_div(scratch->plan.tiles, kTilesPerPart) : wavefront_scan_tiles(p, kMinBackwardItems);
  // On CUDA, each strip has its own sums.
  const int64_t maps = p.batch * (cuda ? scratch->plan.strips : 1);
  const std::vector<int64_t> projections{parts, p.batch, x.size(1), x.size(2), p.states};
  Tensor grad_B_top = ops::empty(x, projections, state);
  Tensor grad_B_left = ops::empty(x, projections, state);
  Tensor grad_C = ops::empty(x, projections, state);
  Tensor grad_A_top = ops::empty(x, {maps, p.channels, p.states}, state);
  Tensor grad_A_left = ops::empty_like(grad_A_top);
  Tensor grad_D = D ? ops::empty(x, {maps, p.channels}, state) : Tensor();

  p.saved_rows = saved.data_ptr();
  p.checkpoints = saved_wavefronts.data_ptr();
  p.grad_y = oriented(grad_y);
  p.grad_x = oriented(grad_x);
  p.grad_C = oriented.in_parts(grad_C);
  p.grad_D = D ? grad_D.data_ptr() : nullptr;
  inputs.top().grad_delta = oriented(grad_delta_top.rows);
  inputs.left().grad_delta = oriented(grad_delta_left.rows);
  inputs.top().grad_B = oriented.in_parts(grad_B_top);
  inputs.left().grad_B = oriented.in_parts(grad_B_left);
  inputs.top().grad_A = grad_A_top.data_ptr();
  inputs.left().grad_A = grad_A_left.data_ptr();
  if (!cuda) {
    wavefront_scan_backward_cpu(p, parallel_for);
  } else if (x.numel()) {
    cuda.check(cuda->wavefront_scan_backward(p, scratch->plan, cuda.stream()), "cuda_ops::wavefront_scan_backward");
  }

  auto per_projection = [&](const Tensor& in_parts) {
    return ops::to(parts == 1 ? ops::squeeze(in_parts, 0) : ops::sum(in_parts, {0}), type);
  };
  return {grad_x,
          grad_delta_top.finish(),
          grad_delta_left.finish(),
          ops::sum(grad_A_top, {0}),
          ops::sum(grad_A_left, {0}),
          per_projection(grad_B_top),
          per_projection(grad_B_left),
          per_projection(grad_C),
          D ? ops::sum(grad_D, {0}) : ops::empty(x, {0}, state)};
}

}  // namespace
}  // namespace cuda_ops

SSM_LIBRARY_IMPL(SSM_OPS_NAMESPACE, CPU, library) {
  SSM_REGISTER(library, wavefront_scan);
  SSM_REGISTER(library, wavefront_scan_backward);
}

#if defined(SSM_WITH_CUDA)
SSM_LIBRARY_IMPL(cuda_ops, CUDA, library) {
  SSM_REGISTER(library, wavefront_scan);
  SSM_REGISTER(library, wavefront_scan_backward);
}
#endif
