// PyTorch binding of the route scan for CPU and CUDA: checks and allocation. Shapes must agree with those of the fake
// kernels in route_scan.py.
#include "bindings.h"

#include <tuple>
#include <vector>

#include "route_scan.h"

namespace cuda_ops {
namespace {

// Inputs of both passes: checks them, makes their strides supported, and keeps them alive.
struct Inputs {
  Tensor x;
  Tensor delta;
  Tensor A;
  OptionalTensor B;
  OptionalTensor C;
  OptionalTensor D;
  OptionalTensor delta_bias;
  OptionalTensor dt_weight;  // delta_weight of the operator
  RouteScanParams params{};

  Inputs(const Tensor& x_, const Tensor& delta_, const Tensor& A_, const OptionalTensor& B_, const OptionalTensor& C_,
         const OptionalTensor& D_, const OptionalTensor& delta_bias_, at::IntArrayRef routes, bool per_line,
         bool delta_softplus, int64_t chunk, const OptionalTensor& delta_weight_) {
    TORCH_CHECK_VALUE(x_.dim() == 4, "x must be (batch, height, width, channels), got ", x_.sizes());
    TORCH_CHECK_VALUE(A_.dim() == 3, "A must be (routes, channels, states), got ", A_.sizes());
    const int64_t count = int64_t(routes.size());
    TORCH_CHECK_VALUE(count >= 1 && count <= kMaxRoutes && (!per_line || count == 1), "1 to ", kMaxRoutes,
                      " routes are served, or one with per_line, got ", routes);
    RouteScanParams& p = params;
    p.dtype = data_type(x_);
    p.batch = x_.size(0);
    p.height = x_.size(1);
    p.width = x_.size(2);
    p.channels = x_.size(3);
    TORCH_CHECK_VALUE(p.height >= 1 && p.width >= 1, "x must have height and width of at least 1, got ", x_.sizes());
    TORCH_CHECK_VALUE(chunk >= 0, "chunk must not be negative, got ", chunk);
    p.routes = count;
    p.states = A_.size(2);
    p.chunk = chunk;
    p.per_line = per_line;
    p.delta_softplus = delta_softplus;
    for (int64_t k = 0; k < count; ++k) {
      TORCH_CHECK_VALUE(routes[k] >= kRow && routes[k] <= kColumnReversed, "routes are 0 to 3, got ", routes);
      p.route[k] = int32_t(routes[k]);
    }
    const OptionalTensor& projection = B_ ? B_ : C_;
    TORCH_CHECK_VALUE(!projection || projection->dim() == 6,
                      "B and C must be (batch, height, width, routes, groups, "
                      "states), got ",
                      projection ? projection->sizes() : at::IntArrayRef{});
    p.groups = projection ? projection->size(4) : 1;
    TORCH_CHECK_VALUE(p.groups >= 1 && p.channels % p.groups == 0, "the ", p.groups, " groups must divide the ",
                      p.channels, " channels");
    const auto type = x_.scalar_type();
    const auto state = state_type(x_);
    const std::vector<int64_t> projected{p.batch, p.height, p.width, count, p.groups, p.states};
    const auto device = x_.device();
    TORCH_CHECK_VALUE(!delta_weight_ || (delta_weight_->dim() == 3 && delta_weight_->size(2) >= 1),
                      "delta_weight must be (routes, channels, rank), the rank at least 1, got ",
                      delta_weight_ ? delta_weight_->sizes() : at::IntArrayRef{});
    p.dt_rank = delta_weight_ ? delta_weight_->size(2) : 0;
    check_shape("delta", delta_, {p.batch, p.height, p.width, count, delta_weight_ ? p.dt_rank : p.channels}, type,
                device);
    check_shape("delta_weight", delta_weight_, {count, p.channels, p.dt_rank}, state, device);
    check_shape("A", A_, {count, p.channels, p.states}, state, device);
    check_shape("B", B_, projected, type, device);
    check_shape("C", C_, projected, type, device);
    check_shape("D", D_, {count, p.channels}, state, device);
    check_shape("delta_bias", delta_bias_, {count, p.channels}, state, device);

    x = last_contiguous(x_);
    delta = last_contiguous(delta_);
    A = A_.contiguous();
    B = last_contiguous(B_);
    C = last_contiguous(C_);
    D = contiguous(D_);
    delta_bias = contiguous(delta_bias_);
    dt_weight = contiguous(delta_weight_);
    check_decay_rates("A", A);
    p.x = grid_tensor(x);
    p.delta = grid_tensor(delta);
    p.B = grid_tensor(B);
    p.C = grid_tensor(C);
    p.A = A.const_data_ptr();
    p.D = address_of(D);
    p.delta_bias = address_of(delta_bias);
    p.dt_weight = address_of(dt_weight);
  }

  // Computes delta = dt @ dt_weight^T, for kernels that do not.
  void project_dt() {
    if (!dt_weight) return;
    const c10::impl::ExcludeDispatchKeyGuard plain(c10::autocast_dispatch_keyset);
    const RouteScanParams& p = params;
    delta = at::bmm(delta.flatten(0, 2).transpose(0, 1), dt_weight->to(delta.scalar_type()).transpose(1, 2))
                .view({p.routes, p.batch, p.height, p.width, p.channels})
                .permute({1, 2, 3, 0, 4});
    dt_weight.reset();
    params.delta = grid_tensor(delta);
    params.dt_weight = nullptr;
    params.dt_rank = 0;
  }
};

// Scratch memory of the CUDA kernels, from PyTorch's allocator, so that graphs can be captured.
struct CudaScratch {
  RouteScanPlan plan{};
  Tensor result;
  Tensor axis_sums;
  Tensor segment_deltas;
  Tensor segment_states;

  CudaScratch(const Cuda& cuda, Inputs& inputs, bool backward) {
    RouteScanParams& p = inputs.params;
    const Tensor& x = inputs.x;
    result = at::empty(x.sizes(), x.options());
    if (!x.numel()) return;
    cuda.check(cuda->route_scan_plan(p, backward, &plan), "cuda_ops::route_scan");
    if (p.dt_rank && !plan.n1) {
      inputs.project_dt();
      cuda.check(cuda->route_scan_plan(p, backward, &plan), "cuda_ops::route_scan");
    }
    const auto state = x.options().dtype(at::kFloat);
    const int64_t lines = route_shape(p.route[0], p.per_line, p.height, p.width).lines;
    if (plan.needs_axis_sums) axis_sums = x.scalar_type() == at::kFloat ? result : at::empty(x.sizes(), state);
    if (plan.segments > 1) {
      segment_deltas = at::empty({p.batch, p.routes, lines, plan.segments, p.channels}, state);
      segment_states = at::empty({p.batch, p.routes, lines, plan.segments, p.states, p.channels}, state);
      p.segment_deltas = segment_deltas.data_ptr();
      p.segment_states = segment_states.data_ptr();
    }
    p.result = result.data_ptr();
  }
  void* axis_sums_data() const { return axis_sums.defined() ? axis_sums.data_ptr() : nullptr; }
};

std::tuple<Tensor, Tensor, Tensor> route_scan(const Tensor& x, const Tensor& delta, const Tensor& A,
                                              const OptionalTensor& B, const OptionalTensor& C, const OptionalTensor& D,
                                              const OptionalTensor& delta_bias, at::IntArrayRef routes, bool per_line,
                                              bool delta_softplus, int64_t chunk, const OptionalTensor& delta_weight) {
  const Cuda cuda(x);
  Inputs inputs(x, delta, A, B, C, D, delta_bias, routes, per_line, delta_softplus, chunk, delta_weight);
  RouteScanParams& p = inputs.params;
  const auto state = x.options().dtype(state_type(x));
  const RouteShape shape = route_shape(p.route[0], per_line, p.height, p.width);
  Tensor last = at::empty({per_line ? 0 : p.batch, p.routes, p.channels, p.states}, state);
  Tensor saved = at::empty(
      {p.batch, p.routes, chunk ? shape.lines : 1, saved_state_count(shape.length, chunk), p.states, p.channels},
      state);
  p.saved_states = saved.data_ptr();
  p.last_state = per_line ? nullptr : last.data_ptr();
  if (cuda) {
    CudaScratch scratch(cuda, inputs, false);
    p.y = scratch.axis_sums_data();
    if (x.numel()) cuda.check(cuda->route_scan_forward(p, scratch.plan, cuda.stream()), "cuda_ops::route_scan");
    return {scratch.result, last, saved};
  }
  inputs.project_dt();
  Tensor y = at::empty(x.sizes(), state);
  p.y = y.data_ptr();
  route_scan_forward_cpu(p, parallel_for);
  return {y.to(x.scalar_type()), last, saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> route_scan_backward(
    const Tensor& grad_output, const OptionalTensor& grad_last, const Tensor& x, const Tensor& delta, const Tensor& A,
    const OptionalTensor& B, const OptionalTensor& C, const OptionalTensor& D, const OptionalTensor& delta_bias,
    const Tensor& states, at::IntArrayRef routes, bool per_line, bool delta_softplus, int64_t chunk,
    const OptionalTensor& delta_weight) {
  TORCH_CHECK_VALUE(chunk >= 1, "the backward pass needs the states saved with a chunk of at least 1, got ", chunk);
  const Cuda cuda(x);
  Inputs inputs(x, delta, A, B, C, D, delta_bias, routes, per_line, delta_softplus, chunk, delta_weight);
  RouteScanParams& p = inputs.params;
  const auto type = x.scalar_type();
  const auto state = x.options().dtype(state_type(x));
  const RouteShape shape = route_shape(p.route[0], per_line, p.height, p.width);
  check_shape("grad_output", grad_output, x.sizes(), type, x.device());
  check_shape("states", states,
              {p.batch, p.routes, shape.lines, saved_state_count(shape.length, chunk), p.states, p.channels},
              state_type(x), x.device());
  check_shape("grad_last", grad_last, {per_line ? 0 : p.batch, p.routes, p.channels, p.states}, state_type(x),
              x.device());
  const Tensor grad_y = last_contiguous(grad_output);
  const Tensor saved = states.contiguous();
  const OptionalTensor grad_last_state = per_line ? std::nullopt : contiguous(grad_last);
  // With delta_weight this is the gradient of delta itself: the caller computes those of dt and delta_weight.
  Tensor grad_delta =
      delta_weight
          ? at::empty({p.routes, p.batch, p.height, p.width, p.channels}, delta.options()).permute({1, 2, 3, 0, 4})
          : at::empty_like(delta);
  // The kernel needs unit stride along the channels, which delta usually has.
  Tensor grad_delta_rows =
      has_unit_stride(grad_delta) ? grad_delta : at::empty_like(grad_delta, at::MemoryFormat::Contiguous);
  p.grad_y = grid_tensor(grad_y);
  p.grad_delta = grid_tensor(grad_delta_rows);
  std::optional<CudaScratch> scratch;
  RouteScanSplit split{};
  if (cuda) {
    scratch.emplace(cuda, inputs, true);
    split = {scratch->plan.tiles, shape.lines * scratch->plan.segments};
  } else {
    inputs.project_dt();
    split = route_scan_split(p);
  }

  Tensor grad_x = cuda ? scratch->result : at::empty(x.sizes(), state);
  Tensor grad_A = at::empty({split.parts, p.batch, p.routes, p.channels, p.states}, state);
  auto sums_if = [&](const OptionalTensor& input, at::IntArrayRef sizes) {
    return input ? at::empty(sizes, state) : Tensor();
  };
  const std::vector<int64_t> per_channel{split.parts, p.batch, p.routes, p.channels};
  const std::vector<int64_t> per_pixel{split.tiles, p.batch, p.height, p.width, p.routes, p.groups, p.states};
  Tensor grad_D = sums_if(D, per_channel);
  Tensor grad_bias = sums_if(delta_bias, per_channel);
  Tensor grad_B = sums_if(B, per_pixel);
  Tensor grad_C = sums_if(C, per_pixel);

  auto pointer = [](const Tensor& tensor) { return tensor.defined() ? tensor.data_ptr() : nullptr; };
  p.saved_states = saved.data_ptr();
  p.grad_last_state = address_of(grad_last_state);
  p.grad_x = cuda ? scratch->axis_sums_data() : grad_x.data_ptr();
  p.grad_A = grad_A.data_ptr();
  p.grad_D = pointer(grad_D);
  p.grad_delta_bias = pointer(grad_bias);
  p.grad_B = pointer(grad_B);
  p.grad_C = pointer(grad_C);
  if (!cuda) {
    route_scan_backward_cpu(p, parallel_for);
  } else if (x.numel()) {
    cuda.check(cuda->route_scan_backward(p, scratch->plan, cuda.stream()), "cuda_ops::route_scan_backward");
  }

  if (!grad_delta_rows.is_same(grad_delta)) grad_delta.copy_(grad_delta_rows);
  auto per_parameter = [&](const Tensor& parts) {
    return parts.defined() ? parts.sum(at::IntArrayRef{0, 1}) : at::empty({0}, state);
  };
  auto per_projection = [&](const Tensor& tiles) {
    if (!tiles.defined()) return at::empty({0}, state.dtype(type));
    return (tiles.size(0) == 1 ? tiles.squeeze(0) : tiles.sum(0)).to(type);
  };
  return {grad_x.to(type),         grad_delta,
          per_parameter(grad_A),   per_projection(grad_B),
          per_projection(grad_C),  per_parameter(grad_D),
          per_parameter(grad_bias)};
}

}  // namespace
}  // namespace cuda_ops

TORCH_LIBRARY_IMPL(SSM_OPS_NAMESPACE, CPU, library) {
  library.impl("route_scan", cuda_ops::route_scan);
  library.impl("route_scan_backward", cuda_ops::route_scan_backward);
}

#if defined(SSM_WITH_CUDA)
TORCH_LIBRARY_IMPL(cuda_ops, CUDA, library) {
  library.impl("route_scan", cuda_ops::route_scan);
  library.impl("route_scan_backward", cuda_ops::route_scan_backward);
}
#endif
