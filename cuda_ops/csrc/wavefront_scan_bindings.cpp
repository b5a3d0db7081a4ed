// The wavefront scan for PyTorch, on CPU and CUDA: checks, allocation, and the orientation in which the kernels see
// the map. Allocation follows the shape functions in wavefront_scan.py, which serve fake tensors.
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
  bool reverse, transposed;
  int64_t height, width;  // of the map

  // The (B, H, W, ...) tensor as the kernels step through it.
  GridTensor operator()(const Tensor& tensor) const {
    GridTensor grid = grid_tensor(tensor);
    if (reverse && tensor.numel()) {
      const int64_t last = (height - 1) * grid.row + (width - 1) * grid.column;
      grid.data = static_cast<char*>(grid.data) + last * int64_t(tensor.element_size());
      grid.row = -grid.row, grid.column = -grid.column;
    }
    if (transposed) std::swap(grid.row, grid.column);
    return grid;
  }

  // The (parts, B, H, W, N) tensor likewise, with the stride between parts for its route.
  GridTensor in_parts(const Tensor& tensor) const {
    GridTensor grid = (*this)(tensor.select(0, 0));
    grid.route = tensor.stride(0);
    return grid;
  }
};

// What the forward and the backward pass share: inputs checked, made addressable, and kept alive.
struct Inputs {
  Tensor x, delta_top, delta_left, A_top, A_left, B_top, B_left, C;
  OptionalTensor D;
  Orientation oriented;
  WavefrontScanParams params{};

  Inputs(const Tensor& x_, const Tensor& delta_top_, const Tensor& delta_left_, const Tensor& A_top_,
         const Tensor& A_left_, const Tensor& B_top_, const Tensor& B_left_, const Tensor& C_, const OptionalTensor& D_,
         bool reverse, int64_t chunk) {
    TORCH_CHECK_VALUE(x_.dim() == 4, "x must be (batch, height, width, channels), got ", x_.sizes());
    TORCH_CHECK_VALUE(A_top_.dim() == 2, "A_top must be (channels, states), got ", A_top_.sizes());
    TORCH_CHECK_VALUE(chunk >= 0, "chunk must not be negative, got ", chunk);
    const int64_t batch = x_.size(0), height = x_.size(1), width = x_.size(2), channels = x_.size(3);
    const int64_t states = A_top_.size(1);
    TORCH_CHECK_VALUE(height >= 1 && width >= 1, "x must have height and width of at least 1, got ", x_.sizes());
    const auto type = x_.scalar_type(), state = state_type(x_);
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

    x = last_contiguous(x_), delta_top = last_contiguous(delta_top_), delta_left = last_contiguous(delta_left_);
    B_top = last_contiguous(B_top_), B_left = last_contiguous(B_left_), C = last_contiguous(C_);
    A_top = A_top_.contiguous(), A_left = A_left_.contiguous(), D = contiguous(D_);
    check_decay_rates("A_top", A_top);
    check_decay_rates("A_left", A_left);

    // Rows are the shorter lines: the forward pass keeps the states of one row, the backward pass those of one chunk.
    oriented = {reverse, width > height, height, width};
    p.batch = batch, p.channels = channels, p.states = states, p.chunk = chunk;
    p.height = std::max(height, width), p.width = std::min(height, width);
    p.starts_from_above = oriented.transposed;
    p.x = oriented(x), p.C = oriented(C), p.D = address(D);
    top().delta = oriented(delta_top), top().B = oriented(B_top), top().A = A_top.const_data_ptr();
    left().delta = oriented(delta_left), left().B = oriented(B_left), left().A = A_left.const_data_ptr();
  }

  Neighbour& top() { return oriented.transposed ? params.before : params.above; }
  Neighbour& left() { return oriented.transposed ? params.above : params.before; }

  std::vector<int64_t> saved_sizes() const {
    return {params.batch, saved_states(params.height, params.chunk), params.width, params.states, params.channels};
  }
  std::vector<int64_t> fronts_sizes(const Cuda& cuda) const {
    if (!cuda || !params.chunk) return {0};
    const WavefrontScanParams& p = params;
    const int64_t rows = std::min(p.chunk, p.height), group = states_at_a_time(p.states);
    return {p.batch, ceil_div(p.height, rows), wavefront_fronts(p.width, rows), ceil_div(p.channels, kWavefrontTile),
            ceil_div(p.states, group) * group, rows, kWavefrontTile};
  }
};

// What the CUDA kernels need beside inputs and outputs: from PyTorch's allocator, so that graphs can be captured.
struct CudaScratch {
  WavefrontScanPlan plan{};
  Tensor edge, partial, counters;

  CudaScratch(const Cuda& cuda, WavefrontScanParams& p, const Tensor& x, bool backward) {
    plan.strips = plan.tiles = 1;
    if (!x.numel()) return;
    cuda.check(cuda->wavefront_scan_plan(p, backward, &plan), "cuda_ops::wavefront_scan");
    const auto state = x.options().dtype(at::kFloat);
    edge = at::empty({p.batch, p.width, p.states, p.channels}, state);
    if (plan.grouped) partial = at::empty({backward ? 3 : 1, p.batch, p.height, p.width, p.channels}, state);
    counters = at::zeros({wavefront_counters(plan.strips, p.batch * plan.tiles, backward)}, x.options().dtype(at::kLong));
    p.edge = edge.data_ptr(), p.counters = counters.data_ptr();
    p.partial = plan.grouped ? partial.data_ptr() : nullptr;
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
  Tensor saved = at::empty(inputs.saved_sizes(), state), fronts = at::empty(inputs.fronts_sizes(cuda), state);
  p.y = inputs.oriented(y), p.saved = saved.data_ptr(), p.fronts = fronts.numel() ? fronts.data_ptr() : nullptr;
  if (cuda) {
    const CudaScratch scratch(cuda, p, x, false);
    if (x.numel()) cuda.check(cuda->wavefront_scan_forward(p, scratch.plan, cuda.stream()), "cuda_ops::wavefront_scan");
  } else {
    wavefront_scan_forward_cpu(p, parallel_for);
  }
  return {y, saved, fronts};
}

// A gradient in the strides of what it belongs to, for the kernel to write where channels have unit stride.
struct Gradient {
  Tensor result, rows;

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
    const Tensor& saved_states_, const Tensor& fronts_, bool reverse, int64_t chunk) {
  TORCH_CHECK_VALUE(chunk >= 1, "the backward pass needs the states saved with a chunk of at least 1, got ", chunk);
  const Cuda cuda(x);
  Inputs inputs(x, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D, reverse, chunk);
  WavefrontScanParams& p = inputs.params;
  const Orientation& oriented = inputs.oriented;
  const auto type = x.scalar_type();
  const auto state = x.options().dtype(state_type(x));
  check_shape("grad_output", grad_output, x.sizes(), type, x.device());
  check_shape("states", saved_states_, inputs.saved_sizes(), state_type(x), x.device());
  check_shape("fronts", fronts_, inputs.fronts_sizes(cuda), state_type(x), x.device());
  const Tensor grad_y = last_contiguous(grad_output), saved = saved_states_.contiguous();
  Tensor fronts = fronts_.contiguous();
  if (reinterpret_cast<uintptr_t>(fronts.data_ptr()) % 16) fronts = fronts.clone();  // they are read 16 bytes at a time

  Tensor grad_x = at::empty(x.sizes(), x.options());
  const Gradient grad_delta_top(delta_top), grad_delta_left(delta_left);
  std::optional<CudaScratch> scratch;
  if (cuda) scratch.emplace(cuda, p, x, true);
  const int64_t parts = cuda ? ceil_div(scratch->plan.tiles, kSummedTiles) : wavefront_scan_tiles(p, kBackwardTasks);
  // Each strip has sums of its own on CUDA.
  const int64_t maps = p.batch * (cuda ? scratch->plan.strips : 1);
  const std::vector<int64_t> projections{parts, p.batch, x.size(1), x.size(2), p.states};
  Tensor grad_B_top = at::empty(projections, state), grad_B_left = at::empty(projections, state);
  Tensor grad_C = at::empty(projections, state);
  Tensor grad_A_top = at::empty({maps, p.channels, p.states}, state), grad_A_left = at::empty_like(grad_A_top);
  Tensor grad_D = D ? at::empty({maps, p.channels}, state) : Tensor();

  p.saved = saved.data_ptr(), p.fronts = fronts.data_ptr();
  p.grad_y = oriented(grad_y), p.grad_x = oriented(grad_x);
  p.grad_C = oriented.in_parts(grad_C), p.grad_D = D ? grad_D.data_ptr() : nullptr;
  inputs.top().grad_delta = oriented(grad_delta_top.rows), inputs.left().grad_delta = oriented(grad_delta_left.rows);
  inputs.top().grad_B = oriented.in_parts(grad_B_top), inputs.left().grad_B = oriented.in_parts(grad_B_left);
  inputs.top().grad_A = grad_A_top.data_ptr(), inputs.left().grad_A = grad_A_left.data_ptr();
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

Tensor exp2_repeatedly(const Tensor& x, int64_t repeats) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, "x must be float32, got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.device().is_cpu() && x.is_contiguous(), "x must be contiguous and on the CPU");
  TORCH_CHECK_VALUE(x.numel() % 1024 == 0, "x must hold whole blocks of 1024 values, got ", x.numel());
  TORCH_CHECK_VALUE(repeats >= 1, "repeats must be at least 1, got ", repeats);
  Tensor y = at::empty_like(x);
  exp2_repeatedly_cpu(x.const_data_ptr<float>(), y.mutable_data_ptr<float>(), x.numel(), repeats, parallel_for);
  return y;
}

}  // namespace
}  // namespace cuda_ops

TORCH_LIBRARY_FRAGMENT(cuda_ops, library) { library.def("exp2_repeatedly(Tensor x, int repeats) -> Tensor"); }

TORCH_LIBRARY_IMPL(cuda_ops, CPU, library) {
  library.impl("wavefront_scan", cuda_ops::wavefront_scan);
  library.impl("wavefront_scan_backward", cuda_ops::wavefront_scan_backward);
  library.impl("exp2_repeatedly", cuda_ops::exp2_repeatedly);
}

#if defined(SSM_WITH_CUDA)
TORCH_LIBRARY_IMPL(cuda_ops, CUDA, library) {
  library.impl("wavefront_scan", cuda_ops::wavefront_scan);
  library.impl("wavefront_scan_backward", cuda_ops::wavefront_scan_backward);
}
#endif
