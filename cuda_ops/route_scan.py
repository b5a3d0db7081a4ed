"""Route scans: the selective scan along routes over a grid, as registered operators and public functions.

One operator, ``cuda_ops::route_scan``, serves the public functions of this module and of ``sequence_scan``. A route
visits every pixel row by row, column by column, or in the reverse of either; several routes are summed in image order
without being materialised. The state may run through the whole image (VMamba), or start from zero at every line (V2M).
A sequence is a grid of height 1 (Mamba).

The equations, for one route with positions l and one channel, in float32 (float64 for float64 input)::

    d_l = softplus(delta_l + delta_bias)                                (without softplus: delta_l + delta_bias)
    h_l[n] = exp(d_l * A[n]) * h_{l-1}[n] + d_l * B_l[n] * u_l          h_0 = 0
    y_l = sum_n C_l[n] * h_l[n] + D * u_l

All of them have gradients, forward mode (dual numbers, ``torch.func.jvp``) and the transforms of ``torch.func``,
``torch.vmap`` among them, under ``torch.compile`` too. Tangents are computed by PyTorch operations which store the
states of every position; a vmap over parameters, and one over a backward pass, calls the kernels once for each sample.
Second derivatives need :func:`cuda_ops.use_reference`; elsewhere they are refused with NotImplementedError, but for
gradients of tangents.

Source: Gu and Dao, "Mamba", arXiv 2312.00752; the four routes: Liu et al., "VMamba", arXiv 2401.10166.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cuda_ops import _autograd, _checks, _library, _reference_mode, _torch_compat, route_reference
from cuda_ops.route_reference import COLUMN, COLUMN_REVERSED, ROW, ROW_REVERSED, state_dtype

_LIBRARY = torch.library.Library('cuda_ops', 'FRAGMENT')
_library.define(
    _LIBRARY,
    'route_scan(Tensor x, Tensor delta, Tensor A, Tensor? B, Tensor? C, Tensor? D, '
    'Tensor? delta_bias, int[] routes, bool per_line, bool delta_softplus, int chunk, '
    'Tensor? delta_weight=None) -> (Tensor, Tensor, Tensor)',
)
# B and C are (B, H, W, K, N), or (B, H, W, K, G, N) with G groups of channels that have their own.
# With per_line there is one route, or a route and its reverse, which share what is given for one, K = 1.
# With delta_weight, the argument delta is the low-rank dt, and the backward operator returns the gradient of the full
# delta: those of dt and weight are matrix products of it.
_library.define(
    _LIBRARY,
    'route_scan_backward(Tensor grad_output, Tensor? grad_last, Tensor x, Tensor delta, '
    'Tensor A, Tensor? B, Tensor? C, Tensor? D, Tensor? delta_bias, Tensor states, int[] routes, '
    'bool per_line, bool delta_softplus, int chunk, Tensor? delta_weight=None) '
    '-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
)

CROSS_ROUTES = [ROW, COLUMN, ROW_REVERSED, COLUMN_REVERSED]
_AXES = {'row': ROW, 'column': COLUMN}
# The dt_rank up to which the scan gains by computing delta: measured on CPUs, counted for GPUs (docs/kernels.md), whose
# kernels take up to 16.
_MAX_DT_RANK_CPU = 32
_MAX_DT_RANK_GPU = 8
# The positions of a line times the states up to which the CPU scans lines both ways at once: it keeps the decays of a
# line of 64 channels, 2 MB then, in the processor's caches.
_MAX_BOTH_WAYS = 8192
# The chunk of lines scanned both ways, along which nothing is saved: a constant, since a size would make a compiled
# program serve that size alone.
_WHOLE_LINE = 2**31 - 1


def _on_gpu(x: Tensor) -> bool:
    """Whether CUDA kernels serve a map."""
    return x.device.type == 'cuda' and 'cuda' in _library.STATUS.devices


def _takes_low_rank(x: Tensor, states: int, rank: int, per_line: bool = False) -> bool:
    """Whether a scan of (B, H, W, E) with N states projects dt of this rank to delta itself, and gains by it.

    Where it does not, a matrix product before the scan is the better way; the results are the same but for rounding.
    """
    if _on_gpu(x):
        return not per_line and states == 1 and x.shape[3] % 2 == 0 and rank % 2 == 0 and 2 <= rank <= _MAX_DT_RANK_GPU
    served = x.device.type == 'cpu' and 'cpu' in _library.STATUS.devices
    # In half precision a product may use the processor's instructions for it, which the scan does not.
    return served and x.dtype in (torch.float32, torch.float64) and rank <= _MAX_DT_RANK_CPU


def _takes_both_ways(x: Tensor, states: int, axis: str) -> bool:
    """Whether the operator scans the lines of a map (B, H, W, E) both ways at once; if not, two scans do.

    Not in programs of ``torch.export``, whose sizes may be open, and not in a trace: either may go to other devices.
    """
    if _on_gpu(x) or x.device.type != 'cpu' or 'cpu' not in _library.STATUS.devices:
        return False
    if _torch_compat.is_exporting() or torch.jit.is_tracing():
        return False
    if _torch_compat.is_compiling():
        # Such a program serves lines of any length. Before torch 2.7 it may be one of torch.export.
        return _torch_compat.TELLS_EXPORTING
    return x.shape[2 if axis == 'row' else 1] * states <= _MAX_BOTH_WAYS


def _chunk_length(states: int, device_type: str) -> int:
    """Positions between two saved states: what a chunk's recomputation needs stays in a core's cache, or in a GPU's
    shared memory."""
    if device_type == 'cpu':
        return 64 if states <= 4 else 32
    if states == 1 and _library.KERNEL_CONSTANTS:
        return _library.KERNEL_CONSTANTS['route_n1_chunk']
    return 32 if states <= 2 else 16


def _saved_chunks(x: Tensor, routes: Sequence[int], per_line: bool, chunk: int) -> tuple[int, int]:
    """Lines a route consists of, and the states saved along each; the last chunk's end needs none."""
    height, width = x.shape[1], x.shape[2]
    if not per_line:
        return 1, (height * width - 1) // chunk
    lines, length = (width, height) if routes[0] in (COLUMN, COLUMN_REVERSED) else (height, width)
    return lines, (length - 1) // chunk


def _empty_outputs(
    x: Tensor, A: Tensor, routes: Sequence[int], per_line: bool, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the output, the last states and the saved states (none where ``chunk`` is 0)."""
    batch, (given, channels, states) = x.shape[0], A.shape
    dtype = state_dtype(x.dtype)
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    last = x.new_empty((0 if per_line else batch, given, channels, states), dtype=dtype)
    lines, saved = _saved_chunks(x, routes, per_line, chunk) if chunk else (1, 0)
    return output, last, x.new_empty((batch, given, lines, saved, states, channels), dtype=dtype)


def _empty_gradients(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_weight: Tensor | None,
) -> tuple[Tensor, ...]:
    """Allocate the gradients in the operator's order; an input that was not given has an empty one."""
    dtype = state_dtype(x.dtype)

    def like(value: Tensor | None, value_dtype: torch.dtype) -> Tensor:
        if value is None:
            return x.new_empty((0,), dtype=value_dtype)
        return torch.empty_like(value, dtype=value_dtype, memory_format=torch.contiguous_format)

    # Delta is by far the largest: its gradient keeps the strides it came with, so that its producer need not copy.
    if delta_weight is None:
        grad_delta = torch.empty_like(delta)
    else:
        grad_delta = x.new_empty((delta.shape[3], *x.shape)).permute(1, 2, 3, 0, 4)
    return (
        like(x, x.dtype),
        grad_delta,
        like(A, dtype),
        like(B, x.dtype),
        like(C, x.dtype),
        like(D, dtype),
        like(delta_bias, dtype),
    )


@_torch_compat.register_fake(_LIBRARY, 'route_scan')
def _(x, delta, A, B, C, D, delta_bias, routes, per_line, delta_softplus, chunk, delta_weight=None):
    return _empty_outputs(x, A, routes, per_line, chunk)


@_torch_compat.register_fake(_LIBRARY, 'route_scan_backward')
def _(
    grad_output,
    grad_last,
    x,
    delta,
    A,
    B,
    C,
    D,
    delta_bias,
    states,
    routes,
    per_line,
    delta_softplus,
    chunk,
    delta_weight=None,
):
    return _empty_gradients(x, delta, A, B, C, D, delta_bias, delta_weight)


def _reference_forward(x, delta, A, B, C, D, delta_bias, routes, per_line, delta_softplus, chunk, delta_weight=None):
    _checks.decay_rates(A)
    if delta_weight is not None:
        delta = route_reference.low_rank_delta(delta, delta_weight)
    outputs = _empty_outputs(x, A, routes, per_line, 0)
    y, last = route_reference.route_scan(x, delta, A, B, C, D, delta_bias, routes, per_line, delta_softplus)
    return y, last, outputs[2] if not chunk else _empty_outputs(x, A, routes, per_line, chunk)[2].zero_()


def _reference_backward(
    grad_output,
    grad_last,
    x,
    delta,
    A,
    B,
    C,
    D,
    delta_bias,
    states,
    routes,
    per_line,
    delta_softplus,
    chunk,
    delta_weight=None,
):
    outputs = _empty_gradients(x, delta, A, B, C, D, delta_bias, delta_weight)
    if delta_weight is not None:
        delta = route_reference.low_rank_delta(delta, delta_weight)
    grads = route_reference.route_scan_backward(
        grad_output, grad_last, x, delta, A, B, C, D, delta_bias, routes, per_line, delta_softplus
    )
    for name, output in zip(('x', 'delta', 'A', 'B', 'C', 'D', 'delta_bias'), outputs, strict=True):
        if name in grads:
            output.copy_(grads[name])
    return outputs


def _differentiable_reference(
    x, delta, A, B, C, D, delta_bias, routes, per_line, delta_softplus, chunk, delta_weight=None
):
    """The operator by PyTorch operations; no states are saved, since autograd keeps what it needs itself."""
    if delta_weight is not None:
        delta = route_reference.low_rank_delta(delta, delta_weight)
    y, last = route_reference.route_scan(x, delta, A, B, C, D, delta_bias, routes, per_line, delta_softplus)
    return y, last, _empty_outputs(x, A, routes, per_line, 0)[2]


def _checked_reference(x, delta, A, *arguments):
    _checks.decay_rates(A)
    return _differentiable_reference(x, delta, A, *arguments)


def _with_chunk(arguments: Sequence[Any]) -> Sequence[Any]:
    """Have states saved for a backward pass, at a distance that suits the device unless one was asked for."""
    x, A, routes, per_line, chunk = arguments[0], arguments[2], *arguments[7:9], arguments[10]
    if not chunk and per_line and len(routes) == 2:
        chunk = _WHOLE_LINE
    return (*arguments[:10], chunk or _chunk_length(A.shape[2], x.device.type), *arguments[11:])


def _save_for_backward(ctx, inputs, output) -> None:
    x, delta, A, B, C, D, delta_bias, routes, per_line, delta_softplus, chunk, delta_weight = inputs
    ctx.save_for_backward(x, delta, A, B, C, D, delta_bias, output[2], delta_weight)
    ctx.options = (routes, per_line, delta_softplus, chunk)
    # There are no last states of lines.
    ctx.mark_non_differentiable(*output[1 if per_line else 2 :])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, grad_last, _grad_states):
    *tensors, states, delta_weight = ctx.saved_tensors
    x, delta = tensors[:2]
    if grad_output is None:
        grad_output = torch.zeros_like(x)
    grads = list(
        _library.call(
            torch.ops.cuda_ops.route_scan_backward,
            grad_output,
            grad_last,
            *tensors,
            states,
            *ctx.options,
            delta_weight,
        )
    )
    grad_weight = None
    if delta_weight is not None:
        grads[1], grad_weight = _low_rank_delta_backward(grads[1], delta, delta_weight)
    given = [grad.to(tensor.dtype) if tensor is not None else None for grad, tensor in zip(grads, tensors, strict=True)]
    return *given, None, None, None, None, grad_weight


def _low_rank_delta_backward(grad_delta: Tensor, dt: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`cuda_ops.route_reference.low_rank_delta` in dt (B, H, W, K, R) and weight (K, E, R)."""
    batch, height, width, routes, channels = grad_delta.shape
    # By reshape: flatten has no rule for the vmap of torch.autograd.grad(is_grads_batched=True).
    products = grad_delta.reshape(-1, routes, channels).transpose(0, 1)
    grad_dt = torch.bmm(products, weight.to(products.dtype)).view(routes, batch, height, width, weight.shape[2])
    # The long dimension is summed; in this order MKL takes half the time that the transposed product takes.
    grad_weight = torch.bmm(dt.reshape(-1, routes, dt.shape[4]).permute(1, 2, 0), products).transpose(1, 2)
    return grad_dt.permute(1, 2, 3, 0, 4), grad_weight.to(weight.dtype)


def _save_for_second_backward(ctx, inputs, output) -> None:
    _, grad_last, *tensors = inputs[:9]
    ctx.save_for_backward(*tensors, inputs[14])
    ctx.options, ctx.with_last = inputs[10:13], grad_last is not None
    ctx.set_materialize_grads(False)


def _second_backward(ctx, *grads):
    *tensors, delta_weight = ctx.saved_tensors
    if delta_weight is not None:
        # The gradient is that of the full delta.
        tensors[1] = route_reference.low_rank_delta(tensors[1], delta_weight)
    tangents = [
        None if grad is None or tensor is None else grad.to(tensor.dtype)
        for grad, tensor in zip(grads, tensors, strict=True)
    ]
    if all(tangent is None for tangent in tangents):
        return None, None
    y, last, _ = _autograd.push_forward(_differentiable_reference, (*tensors, *ctx.options, 0), tangents)
    return y, last if ctx.with_last else None


_autograd.register(
    _LIBRARY,
    'route_scan',
    save=_save_for_backward,
    backward=_backward,
    prepare=_with_chunk,
    forward_mode=_autograd.reference_tangents(_differentiable_reference),
)
_autograd.register_linear(_LIBRARY, 'route_scan_backward', 2, save=_save_for_second_backward, backward=_second_backward)
_autograd.register_vmap('route_scan', maps=(0, 1, 3, 4), parameters=(2, 5, 6, 11))
_autograd.register_vmap('route_scan_backward', maps=(), parameters=range(15))
_library.serve(_LIBRARY, {'route_scan': _reference_forward, 'route_scan_backward': _reference_backward})
_reference_mode.serve('route_scan', _checked_reference)


def route_scan_flops(
    x_shape: Sequence[int], delta_shape: Sequence[int], A_shape: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    """Count the operator's FLOPs from its arguments' shapes as the field does: a multiply-add counts once.

    They are 9 * L * E * N for each route and image; with a low-rank dt of rank R another L * E * R, for its projection.
    ``torch.utils.flop_counter`` counts a multiply-add twice, and gets twice this.
    """
    batch, height, width, channels = x_shape
    given, _, states = A_shape
    # By position: the routes are the operator's eighth argument, and the weight is its twelfth.
    routes = len(args[4]) if len(args) > 4 and args[4] is not None else given
    weight_shape = args[8] if len(args) > 8 else None
    rank = delta_shape[4] if weight_shape is not None else 0
    return batch * height * width * channels * (9 * states * routes + rank * given)


_library.count_flops('route_scan', route_scan_flops)


def grouped(*projections: Tensor | None) -> list[Tensor | None]:
    """Add the axis of one group to projections (B, H, W, K, N).

    Not in programs of ``torch.export``: what takes them may know five dimensions at most.
    """
    return [value if value is None or _torch_compat.is_exporting() else value.unsqueeze(4) for value in projections]


def scan_routes(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None,
    delta_bias: Tensor | None,
    routes: list[int],
    per_line: bool,
    delta_softplus: bool,
    delta_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Call the operator on checked inputs, with parameters in the state dtype; return the output and last states."""
    dtype = state_dtype(x.dtype)
    A = A.to(dtype)
    D, delta_bias, delta_weight = (
        None if value is None else value.to(dtype) for value in (D, delta_bias, delta_weight)
    )
    # A chunk of 0 saves no states: the Autograd kernel sets one, by _with_chunk, if a backward pass may follow.
    arguments = (x, delta, A, B, C, D, delta_bias, routes, per_line, delta_softplus, 0, delta_weight)
    output, last, _ = _library.call(torch.ops.cuda_ops.route_scan, *arguments)
    return output, last


def cross_selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    delta_weight: Tensor | None = None,
) -> Tensor:
    """SS2D's core: four selective scans over the grid, summed in image order.

    The routes are, in this order along every dimension of size 4: row-major, column-major, row-major reversed,
    column-major reversed. See the module's docstring for the equations.

    Args:
        x: (B, H, W, E) map; float32, bfloat16 or float16 (float64 on CPU). H and W are at least 1.
        delta: (B, H, W, 4, E), before bias and softplus, in x's dtype; with ``delta_weight`` the low-rank dt,
            (B, H, W, 4, R) with dt_rank R of at least 1.
        A: (4, E, N) decay rates, finite and not positive (checked on CPU; a GPU would have to wait for the answer).
        B: (B, H, W, 4, N) input projections, in x's dtype.
        C: (B, H, W, 4, N) output projections, in x's dtype.
        D: (4, E) skip weights, or None for no skip.
        delta_bias: (4, E), or None.
        delta_softplus: whether delta + delta_bias passes a softplus.
        delta_weight: (4, E, R), or None. With it the scan's delta is ``delta_weight[k] @ delta[..., k, :]``. Where that
            gains, on CPUs in float32 for a dt_rank of up to 32 and on GPUs with one state and a small dt_rank, the scan
            computes it itself, in the state's dtype, and never stores it; elsewhere a matrix product in x's dtype does.

    Returns:
        (B, H, W, E) in x's dtype. Differentiable once, in every floating input, in all the ways that the module's
        docstring names. Under autocast, x, delta, B and C are cast to autocast's dtype; states are float32 all the
        same.

    Raises:
        ValueError: a shape does not fit, or A is positive or not finite.
        TypeError: dtypes are mixed or not supported.
    """
    _checks.tensors(x=x, delta=delta, A=A, B=B, C=C)
    _checks.tensors_or_none(D=D, delta_bias=delta_bias, delta_weight=delta_weight)
    _checks.ndim('x', x, 4, '(batch, height, width, channels)')
    batch, height, width, channels = x.shape
    _checks.ndim('A', A, 3, '(4, channels, states)')
    states = A.shape[2]
    if delta_weight is None:
        _checks.shape('delta', delta, (batch, height, width, 4, channels), '(batch, height, width, 4, channels)')
    else:
        _checks.ndim('delta_weight', delta_weight, 3, '(4, channels, rank)')
        rank = delta_weight.shape[2]
        _checks.shape('delta_weight', delta_weight, (4, channels, rank), '(4, channels, rank)')
        _checks.rank(delta_weight)
        _checks.shape('delta', delta, (batch, height, width, 4, rank), '(batch, height, width, 4, rank)')
    _checks.shape('A', A, (4, channels, states), '(4, channels, states)')
    for name, projection in (('B', B), ('C', C)):
        _checks.shape(name, projection, (batch, height, width, 4, states), '(batch, height, width, 4, states)')
    for name, parameter in (('D', D), ('delta_bias', delta_bias)):
        _checks.shape(name, parameter, (4, channels), '(4, channels)')
    _checks.grid(x)
    _checks.states(A)
    x, delta, B, C = _checks.autocast(x, delta, B, C)
    _checks.same_dtype_and_device(x=x, delta=delta, B=B, C=C)
    _checks.same_device(x, A=A, D=D, delta_bias=delta_bias, delta_weight=delta_weight)
    if delta_weight is not None and not _takes_low_rank(x, states, delta_weight.shape[2]):
        delta, delta_weight = route_reference.low_rank_delta(delta, delta_weight), None
    B_grouped, C_grouped = grouped(B, C)
    return scan_routes(
        x, delta, A, B_grouped, C_grouped, D, delta_bias, CROSS_ROUTES, False, delta_softplus, delta_weight
    )[0]


def line_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    delta_weight: Tensor | None = None,
    *,
    axis: str,
    reverse: bool = False,
    both_ways: bool = False,
) -> Tensor:
    """A selective scan along every row or every column, each from a zero state.

    See the module's docstring for the equations. The map is neither flipped, transposed nor copied in any direction.

    Args:
        x: (B, H, W, E) map; float32, bfloat16 or float16 (float64 on CPU). H and W are at least 1.
        delta: (B, H, W, E), before bias and softplus, in x's dtype; with ``delta_weight`` the low-rank dt, (B, H, W, R)
            with dt_rank R of at least 1.
        A: (E, N) decay rates, finite and not positive (checked on CPU).
        B: (B, H, W, N) input projections in x's dtype, or None, meaning ones.
        C: (B, H, W, N) output projections in x's dtype, or None, meaning ones: the states are summed.
        D: (E) skip weights, or None for no skip.
        delta_bias: (E), or None.
        delta_softplus: whether delta + delta_bias passes a softplus.
        delta_weight: (E, R), or None. With it the scan's delta is ``delta_weight @ delta``, which the scan computes
            itself on CPUs in float32 for a dt_rank of up to 32; elsewhere a matrix product does.
        axis: 'row' scans along W within each row, 'column' along H within each column.
        reverse: start from the right (or the bottom) end.
        both_ways: return the sum of both directions' scans, D's share twice. On CPUs, for lines of up to 8192 / N
            pixels, one pass computes what depends on the pixel alone, exponentials above all, once for both; elsewhere,
            in traces and in exported programs it takes two scans.

    Returns:
        (B, H, W, E) in x's dtype. Differentiable once, in every floating input.

    Raises:
        ValueError: a shape or the axis does not fit, ``reverse`` is set with ``both_ways``, or A is positive or not
            finite.
        TypeError: dtypes are mixed or not supported.
    """
    if reverse and both_ways:
        raise ValueError('reverse=True chooses one direction and both_ways=True asks for both: set one of them')
    if axis not in _AXES:
        raise ValueError(f"axis must be 'row' (along W) or 'column' (along H), got {axis!r}")
    _checks.tensors(x=x, delta=delta, A=A)
    _checks.tensors_or_none(B=B, C=C, D=D, delta_bias=delta_bias, delta_weight=delta_weight)
    _checks.ndim('x', x, 4, '(batch, height, width, channels)')
    batch, height, width, channels = x.shape
    _checks.ndim('A', A, 2, '(channels, states)')
    states = A.shape[1]
    if delta_weight is None:
        _checks.shape('delta', delta, (batch, height, width, channels), '(batch, height, width, channels)')
    else:
        _checks.ndim('delta_weight', delta_weight, 2, '(channels, rank)')
        rank = delta_weight.shape[1]
        _checks.shape('delta_weight', delta_weight, (channels, rank), '(channels, rank)')
        _checks.rank(delta_weight)
        _checks.shape('delta', delta, (batch, height, width, rank), '(batch, height, width, rank)')
    _checks.shape('A', A, (channels, states), '(channels, states)')
    for name, value in (('B', B), ('C', C)):
        _checks.shape(name, value, (batch, height, width, states), '(batch, height, width, states)')
    for name, value in (('D', D), ('delta_bias', delta_bias)):
        _checks.shape(name, value, (channels,), '(channels,)')
    _checks.grid(x)
    _checks.states(A)
    x, delta, B, C = _checks.autocast(x, delta, B, C)
    _checks.same_dtype_and_device(x=x, delta=delta, B=B, C=C)
    _checks.same_device(x, A=A, D=D, delta_bias=delta_bias, delta_weight=delta_weight)
    delta, A = delta.unsqueeze(3), A.unsqueeze(0)
    B, C = grouped(*(None if value is None else value.unsqueeze(3) for value in (B, C)))
    D, delta_bias, delta_weight = (
        None if value is None else value.unsqueeze(0) for value in (D, delta_bias, delta_weight)
    )
    route = _AXES[axis] | (ROW_REVERSED if reverse else ROW)
    back = route | ROW_REVERSED
    at_once = both_ways and _takes_both_ways(x, states, axis)
    in_scan = delta_weight is not None and _takes_low_rank(x, states, delta_weight.shape[2], per_line=True)
    # Two scans that project dt each would do so twice.
    if delta_weight is not None and (not in_scan or (both_ways and not at_once)):
        delta, delta_weight = route_reference.low_rank_delta(delta, delta_weight), None

    def scan(*routes: int) -> Tensor:
        return scan_routes(x, delta, A, B, C, D, delta_bias, list(routes), True, delta_softplus, delta_weight)[0]

    if at_once:
        return scan(route, back)
    return scan(route) + scan(back) if both_ways else scan(route)
