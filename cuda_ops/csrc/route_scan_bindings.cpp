// PyTorch binding of the route scan for CPU and CUDA: checks and allocation. Shapes must agree with those of the fake
// kernels in route_scan.py.
#include "bindings.h"

#include <tuple>
#include <vector>

#include "route_scan.h"

namespace cuda_ops {
namespace {

// A contiguous (K, B, H, W, E) tensor.
GridTensor routes_first(const Tensor& tensor, const RouteScanParams& p) {
  GridTensor grid;
  grid.data = tensor.data_ptr();
  grid.column = p.channels;
  grid.row = grid.column * p.width;
  grid.batch = grid.row * p.height;
  grid.route = grid.batch * p.batch;
  return grid;
}

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
  bool grouped = false;      // whether B and C have an axis of groups
  RouteScanParams params{};

  Inputs(const Tensor& x_, const Tensor& delta_, const Tensor& A_, const OptionalTensor& B_, const OptionalTensor& C_,
         const OptionalTensor& D_, const OptionalTensor& delta_bias_, IntList routes, bool per_line,
         bool delta_softplus, int64_t chunk, const OptionalTensor& delta_weight_, const Cuda& cuda) {
    SSM_CHECK(x_.dim() == 4, "x must be (batch, height, width, channels), got ", x_.sizes());
    SSM_CHECK(A_.dim() == 3, "A must be (routes, channels, states), got ", A_.sizes());
    // Lines scanned both ways have one set of inputs.
    params.both_ways = per_line && routes.size() == 2 && routes[1] == (routes[0] ^ 2);
    const int64_t count = params.both_ways ? 1 : int64_t(routes.size());
    SSM_CHECK(count >= 1 && count <= kMaxRoutes && (!per_line || count == 1), "1 to ", kMaxRoutes,
              " routes are served, or with per_line one, or one and its reverse, got ", routes);
    RouteScanParams& p = params;
    p.dtype = data_type(x_);
    p.batch = x_.size(0);
    p.height = x_.size(1);
    p.width = x_.size(2);
    p.channels = x_.size(3);
    SSM_CHECK(p.height >= 1 && p.width >= 1, "x must have height and width of at least 1, got ", x_.sizes());
    SSM_CHECK(chunk >= 0, "chunk must not be negative, got ", chunk);
    p.routes = count;
    p.states = A_.size(2);
    SSM_CHECK(p.states >= 1, "A must hold at least one state for each channel, got ", A_.sizes());
    p.chunk = chunk;
    p.per_line = per_line;
    p.delta_softplus = delta_softplus;
    for (int64_t k = 0; k < count; ++k) {
      SSM_CHECK(routes[k] >= kRow && routes[k] <= kColumnReversed, "routes are 0 to 3, got ", routes);
      p.route[k] = int32_t(routes[k]);
    }
    const int64_t length = route_shape(p.route[0], per_line, p.height, p.width).length;
    SSM_CHECK(!p.both_ways || !cuda, "lines are scanned both ways at once on CPUs alone, got x on ", device_name(x_));
    SSM_CHECK(!p.both_ways || chunk == 0 || chunk >= length, "both ways need a chunk of a whole line, ", length,
              " positions, got ", chunk);
    const OptionalTensor& projection = B_ ? B_ : C_;
    SSM_CHECK(!projection || projection->dim() == 5 || projection->dim() == 6,
              "B and C must be (batch, height, width, routes, states), or with groups before the states, got ",
              projection ? projection->sizes() : Sizes{});
    grouped = projection && projection->dim() == 6;
    p.groups = grouped ? projection->size(4) : 1;
    SSM_CHECK(p.groups >= 1 && p.channels % p.groups == 0, "the ", p.groups, " groups must divide the ", p.channels,
              " channels");
    const auto type = x_.scalar_type();
    const auto state = state_type(x_);
    std::vector<int64_t> projected{p.batch, p.height, p.width, count, p.states};
    if (grouped) projected.insert(projected.end() - 1, p.groups);
    SSM_CHECK(!delta_weight_ || (delta_weight_->dim() == 3 && delta_weight_->size(2) >= 1),
              "delta_weight must be (routes, channels, rank), the rank at least 1, got ",
              delta_weight_ ? delta_weight_->sizes() : Sizes{});
    p.dt_rank = delta_weight_ ? delta_weight_->size(2) : 0;
    check_shape("delta", delta_, {p.batch, p.height, p.width, count, delta_weight_ ? p.dt_rank : p.channels}, type, x_);
    check_shape("delta_weight", delta_weight_, {count, p.channels, p.dt_rank}, state, x_);
    check_shape("A", A_, {count, p.channels, p.states}, state, x_);
    check_shape("B", B_, projected, type, x_);
    check_shape("C", C_, projected, type, x_);
    check_shape("D", D_, {count, p.channels}, state, x_);
    check_shape("delta_bias", delta_bias_, {count, p.channels}, state, x_);

    x = last_contiguous(x_);
    delta = last_contiguous(delta_);
    A = ops::contiguous(A_);
    B = last_contiguous(B_);
    C = last_contiguous(C_);
    D = ops::contiguous(D_);
    delta_bias = ops::contiguous(delta_bias_);
    dt_weight = ops::contiguous(delta_weight_);
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
    const RouteScanParams& p = params;
    const ScalarType type = delta.scalar_type();
    Tensor products = ops::empty(delta, {p.routes, p.batch * p.height * p.width, p.channels}, type);
    // Into a given tensor, because autocast has no say there.
    ops::bmm_out(products, ops::transpose(ops::flatten(delta, 0, 2), 0, 1),
                 ops::transpose(ops::to(*dt_weight, type), 1, 2));
    delta = products;
    dt_weight.reset();
    params.delta = routes_first(delta, params);
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
    result = ops::empty(x, x.sizes(), x.scalar_type());
    if (!x.numel()) return;
    cuda.check(cuda->route_scan_plan(p, backward, &plan), "cuda_ops::route_scan");
    if (p.dt_rank && !plan.n1) {
      inputs.project_dt();
      cuda.check(cuda->route_scan_plan(p, backward, &plan), "cuda_ops::route_scan");
    }
    const auto state = ScalarType::Float;
    const int64_t lines = route_shape(p.route[0], p.per_line, p.height, p.width).lines;
    if (plan.needs_axis_sums)
      axis_sums = x.scalar_type() == ScalarType::Float ? result : ops::empty(x, x.sizes(), state);
    if (plan.segments > 1) {
      segment_deltas = ops::empty(x, {p.batch, p.routes, lines, plan.segments, p.channels}, state);
      segment_states = ops::empty(x, {p.batch, p.routes, lines, plan.segments, p.states, p.channels}, state);
      p.segment_deltas = segment_deltas.data_ptr();
      p.segment_states = segment_states.data_ptr();
    }
    p.result = result.data_ptr();
  }
  void* axis_sums_data() const { return axis_sums.defined() ? axis_sums.data_ptr() : nullptr; }
};

std::tuple<Tensor, Tensor, Tensor> route_scan(const Tensor& x, const Tensor& delta, const Tensor& A,
                                              const OptionalTensor& B, const OptionalTensor& C, const OptionalTensor& D,
                                              const OptionalTensor& delta_bias, IntList routes, bool per_line,
                                              bool delta_softplus, int64_t chunk, const OptionalTensor& delta_weight) {
  const Cuda cuda(x);
  Inputs inputs(x, delta, A, B, C, D, delta_bias, routes, per_line, delta_softplus, chunk, delta_weight, cuda);
  RouteScanParams& p = inputs.params;
  const auto state = state_type(x);
  const RouteShape shape = route_shape(p.route[0], per_line, p.height, p.width);
  Tensor last = ops::empty(x, {per_line ? 0 : p.batch, p.routes, p.channels, p.states}, state);
  Tensor saved = ops::empty(
      x, {p.batch, p.routes, chunk ? shape.lines : 1, saved_state_count(shape.length, chunk), p.states, p.channels},
      state);
  p.saved_states = saved.data_ptr();
  p.last_state = per_line ? nullptr : last.data_ptr();
  if (cuda) {
    CudaScratch scratch(cuda, inputs, false);
    p.y = scratch.axis_sums_data();
    if (x.numel()) cuda.check(cuda->route_scan_forward(p, scratch.plan, cuda.stream()), "cuda_ops::route_scan");
    return {scratch.result, last, saved};
  }
  Tensor y = ops::empty(x, x.sizes(), state);
  p.y = y.data_ptr();
  route_scan_forward_cpu(p, parallel_for);
  return {ops::to(y, x.scalar_type()), last, saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> route_scan_backward(
    const Tensor& grad_output, const OptionalTensor& grad_last, const Tensor& x, const Tensor& delta, const Tensor& A,
    const OptionalTensor& B, const OptionalTensor& C, const OptionalTensor& D, const OptionalTensor& delta_bias,
    const Tensor& states, IntList routes, bool per_line, bool delta_softplus, int64_t chunk,
    const OptionalTensor& delta_weight) {
  SSM_CHECK(chunk >= 1, "the backward pass needs the states saved with a chunk of at least 1, got ", chunk);
  const Cuda cuda(x);
  Inputs inputs(x, delta, A, B, C, D, delta_bias, routes, per_line, delta_softplus, chunk, delta_weight, cuda);
  RouteScanParams& p = inputs.params;
  const auto type = x.scalar_type();
  const auto state = state_type(x);
  const RouteShape shape = route_shape(p.route[0], per_line, p.height, p.width);
  check_shape("grad_output", grad_output, x.sizes(), type, x);
  check_shape("states", states,
              {p.batch, p.routes, shape.lines, saved_state_count(shape.length, chunk), p.states, p.channels},
              state_type(x), x);
  check_shape("grad_last", grad_last, {per_line ? 0 : p.batch, p.routes, p.channels, p.states}, state_type(x), x);
  const Tensor grad_y = last_contiguous(grad_output);
  const Tensor saved = ops::contiguous(states);
  const OptionalTensor grad_last_state = per_line ? OptionalTensor() : ops::contiguous(grad_last);
  // With delta_weight this is the gradient of delta itself: the caller computes those of dt and delta_weight.
  const int64_t line = p.width * p.channels;
  Tensor grad_delta = delta_weight
                          ? ops::empty_strided(x, {p.batch, p.height, p.width, p.routes, p.channels},
                                               {p.height * line, line, p.channels, p.batch * p.height * line, 1}, type)
                          : ops::empty_like(delta);
  // The kernel needs unit stride along the channels, which delta usually has.
  const bool writes_result = has_unit_stride(grad_delta);
  Tensor grad_delta_rows = writes_result ? grad_delta : ops::empty(x, grad_delta.sizes(), type);
  p.grad_y = grid_tensor(grad_y);
  p.grad_delta = grid_tensor(grad_delta_rows);
  std::optional<CudaScratch> scratch;
  RouteScanSplit split{};
  if (cuda) {
    scratch.emplace(cuda, inputs, true);
    split = {scratch->plan.tiles, shape.lines * scratch->plan.segments};
  } else {
    split = route_scan_split(p);
  }

  Tensor grad_x = cuda ? scratch->result : ops::empty(x, x.sizes(), state);
  Tensor grad_A = ops::empty(x, {split.parts, p.batch, p.routes, p.channels, p.states}, state);
  auto sums_if = [&](const OptionalTensor& input, Sizes sizes) {
    return input ? ops::empty(x, sizes, state) : Tensor();
  };
  const std::vector<int64_t> per_channel{split.parts, p.batch, p.routes, p.channels};
  std::vector<int64_t> per_pixel{split.tiles, p.batch, p.height, p.width, p.routes, p.states};
  if (inputs.grouped) per_pixel.insert(per_pixel.end() - 1, p.groups);
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

  if (!writes_result) ops::copy(grad_delta, grad_delta_rows);
  auto per_parameter = [&](const Tensor& parts) {
    return parts.defined() ? ops::sum(parts, {0, 1}) : ops::empty(x, {0}, state);
  };
  auto per_projection = [&](const Tensor& tiles) {
    if (!tiles.defined()) return ops::empty(x, {0}, type);
    return ops::to(tiles.size(0) == 1 ? ops::squeeze(tiles, 0) : ops::sum(tiles, {0}), type);
  };
  return {ops::to(grad_x, type),   grad_delta,
          per_parameter(grad_A),   per_projection(grad_B),
          per_projection(grad_C),  per_parameter(grad_D),
          per_parameter(grad_bias)};
}

}  // namespace
}  // namespace cuda_ops

SSM_LIBRARY_IMPL(SSM_OPS_NAMESPACE, CPU, library) {
  SSM_REGISTER(library, route_scan);
  SSM_REGISTER(library, route_scan_backward);
}

#if defined(SSM_WITH_CUDA)
SSM_LIBRARY_IMPL(cuda_ops, CUDA, library) {
  SSM_REGISTER(library, route_scan);
  SSM_REGISTER(library, route_scan_backward);
}
#endif
