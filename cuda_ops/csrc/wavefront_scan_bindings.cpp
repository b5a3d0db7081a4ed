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
    if (reverse && tensor.numel()) {
      const int64_t last = (height - 1) * grid.row + (width - 1) * grid.column;
      grid.data = static_cast<char*>(grid.data) + last * int64_t(tensor.element_size());
      grid.row = -grid.row;
      grid.column = -grid.column;
    }
    if (transposed) std::swap(grid.row, grid.column);
    return grid;
  }

  // A (parts, B, H, W, N) tensor in the same way; `route` is the stride between parts.
  GridTensor in_parts(const Tensor& tensor) const {
    GridTensor grid = (*this)(tensor.select(0, 0));
    grid.route = tensor.stride(0);
    return grid;
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
    TORCH_CHECK_VALUE(x_.dim() == 4, "x must be (batch, height, width, channels), got ", x_.sizes());
    TORCH_CHECK_VALUE(A_top_.dim() == 2, "A_top must be (channels, states), got ", A_top_.sizes());
    TORCH_CHECK_VALUE(chunk >= 0, "chunk must not be negative, got ", chunk);
    const int64_t batch = x_.size(0);
    const int64_t height = x_.size(1);
    const int64_t width = x_.size(2);
    const int64_t channels = x_.size(3);
    const int64_t states = A_top_.size(1);
    TORCH_CHECK_VALUE(height >= 1 && width >= 1, "x must have height and width of at least 1, got ", x_.sizes());
    const auto type = x_.scalar_type();
    const auto state = state_type(x_);
    const auto device = x_.device();
    WavefrontScanParams& p = params;
    p.dtype = data_type(x_);
    check_shape("delta_top", delta_top_, x_.sizes(), type, device);
    check_shape("delta_left", delta_left_, x_.sizes(), type, device);
    check_shape("A_top", A_top_, {channels, states}, state, device);
    check_shape("A_left", A_left_, {channels, states}, state, device);
    check_shape("B_top", B_top_, {batch, height, width, states}, type, device);
    check_shape("B_left", B_left_, {batch, height, width, states}, type, device);
    check_shape("C", C_, {batch, height, width, states}, type, device);
    check_shape("D", D_, {channels}, state, device);

    x = last_contiguous(x_);
    delta_top = last_contiguous(delta_top_);
    delta_left = last_contiguous(delta_left_);
    B_top = last_contiguous(B_top_);
    B_left = last_contiguous(B_left_);
    C = last_contiguous(C_);
    A_top = A_top_.contiguous();
    A_left = A_left_.contiguous();
    D = contiguous(D_);
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
    const auto state = x.options().dtype(at::kFloat);
    boundary_row = at::empty({p.batch, p.width, p.states, p.channels}, state);
    if (plan.grouped) group_sums = at::empty({backward ? 3 : 1, p.batch, p.height, p.width, p.channels}, state);
    counters =
        at::zeros({wavefront_counter_count(plan.strips, p.batch * plan.tiles, backward)}, x.options().dtype(at::kLong));
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
  Tensor y = at::empty(x.sizes(), x.options());
  const auto state = x.options().dtype(state_type(x));
  Tensor saved = at::empty(inputs.saved_sizes(), state);
  Tensor checkpoints = at::empty(inputs.checkpoint_sizes(cuda), state);
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
      : result(at::empty_like(tensor)),
        rows(has_unit_stride(result) ? result : at::empty_like(tensor, at::MemoryFormat::Contiguous)) {}

  Tensor finish() const {
    if (!rows.is_same(result)) result.copy_(rows);
    return result;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> wavefront_scan_backward(
    const Tensor& grad_output, const Tensor& x, const Tensor& delta_top, const Tensor& delta_left, const Tensor& A_top,
    const Tensor& A_left, const Tensor& B_top, const Tensor& B_left, const Tensor& C, const OptionalTensor& D,
    const Tensor& states, const Tensor& fronts, bool reverse, int64_t chunk) {
  TORCH_CHECK_VALUE(chunk >= 1, "the backward pass needs the states saved with a chunk of at least 1, got ", chunk);
  const Cuda cuda(x);
  Inputs inputs(x, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D, reverse, chunk);
  WavefrontScanParams& p = inputs.params;
  const Orientation& oriented = inputs.oriented;
  const auto type = x.scalar_type();
  const auto state = x.options().dtype(state_type(x));
  check_shape("grad_output", grad_output, x.sizes(), type, x.device());
  check_shape("states", states, inputs.saved_sizes(), state_type(x), x.device());
  check_shape("fronts", fronts, inputs.checkpoint_sizes(cuda), state_type(x), x.device());
  const Tensor grad_y = last_contiguous(grad_output);
  const Tensor saved = states.contiguous();
  Tensor checkpoints = fronts.contiguous();
  // The kernels load 16 bytes at a time.
  if (reinterpret_cast<uintptr_t>(checkpoints.data_ptr()) % 16) checkpoints = checkpoints.clone();

  Tensor grad_x = at::empty(x.sizes(), x.options());
  const Gradient grad_delta_top(delta_top);
  const Gradient grad_delta_left(delta_left);
  std::optional<CudaScratch> scratch;
  if (cuda) scratch.emplace(cuda, p, x, true);
  const int64_t parts =
      cuda ? ceil_div(scratch->plan.tiles, kTilesPerPart) : wavefront_scan_tiles(p, kMinBackwardItems);
  // On CUDA, each strip has its own sums.
  const int64_t maps = p.batch * (cuda ? scratch->plan.strips : 1);
  const std::vector<int64_t> projections{parts, p.batch, x.size(1), x.size(2), p.states};
  Tensor grad_B_top = at::empty(projections, state);
  Tensor grad_B_left = at::empty(projections, state);
  Tensor grad_C = at::empty(projections, state);
  Tensor grad_A_top = at::empty({maps, p.channels, p.states}, state);
  Tensor grad_A_left = at::empty_like(grad_A_top);
  Tensor grad_D = D ? at::empty({maps, p.channels}, state) : Tensor();

  p.saved_rows = saved.data_ptr();
  p.checkpoints = checkpoints.data_ptr();
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
    return (parts == 1 ? in_parts.squeeze(0) : in_parts.sum(0)).to(type);
  };
  return {grad_x,
          grad_delta_top.finish(),
          grad_delta_left.finish(),
          grad_A_top.sum(0),
          grad_A_left.sum(0),
          per_projection(grad_B_top),
          per_projection(grad_B_left),
          per_projection(grad_C),
          D ? grad_D.sum(0) : at::empty({0}, state)};
}

}  // namespace
}  // namespace cuda_ops

TORCH_LIBRARY_IMPL(SSM_OPS_NAMESPACE, CPU, library) {
  library.impl("wavefront_scan", cuda_ops::wavefront_scan);
  library.impl("wavefront_scan_backward", cuda_ops::wavefront_scan_backward);
}

#if defined(SSM_WITH_CUDA)
TORCH_LIBRARY_IMPL(cuda_ops, CUDA, library) {
  library.impl("wavefront_scan", cuda_ops::wavefront_scan);
  library.impl("wavefront_scan_backward", cuda_ops::wavefront_scan_backward);
}
#endif
