"""The wavefront scan: a two-neighbour recurrence over a map, as a registered operator and a public function.

The state of a pixel comes from its top and its left neighbour's. In float32 (float64 for float64 input), for row i and
column j, one channel and its states n::

    aT = exp(deltaT * AT[n])   aL = exp(deltaL * AL[n])   bT = deltaT * BT[n] * x   bL = deltaL * BL[n] * x
    h(0,0) = bL
    h(0,j) = aL * h(0,j-1) + bL
    h(i,0) = aT * h(i-1,0) + bT
    h(i,j) = 0.5 * (aL * h(i,j-1) + bL + aT * h(i-1,j) + bT)
    y(i,j) = sum_n C(i,j)[n] * h(i,j)[n] + D * x(i,j)

Source: Baty et al., "Mamba2D", arXiv 2412.16146.

The states are never stored whole. The forward pass keeps those of one line in a chunk of lines, along the map's shorter
side; the backward pass recomputes a chunk of them at a time from there. On a GPU the lines of a chunk advance together,
each one pixel behind the line before it: the forward pass also keeps the states of every 8th of these wavefronts
(``checkpoints``), and the backward pass recomputes at most 8 of them at a time.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cuda_ops import _autograd, _checks, _library, _reference_mode, _torch_compat, wavefront_reference
from cuda_ops.route_reference import state_dtype

_LIBRARY = torch.library.Library('cuda_ops', 'FRAGMENT')
_INPUTS = (
    'Tensor x, Tensor delta_top, Tensor delta_left, Tensor A_top, Tensor A_left, Tensor B_top, Tensor B_left, '
    'Tensor C, Tensor? D'
)
_library.define(_LIBRARY, f'wavefront_scan({_INPUTS}, bool reverse, int chunk) -> (Tensor, Tensor, Tensor)')
_library.define(
    _LIBRARY,
    f'wavefront_scan_backward(Tensor grad_output, {_INPUTS}, Tensor states, Tensor checkpoints, '
    'bool reverse, int chunk) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
)
_NAMES = ('x', 'delta_top', 'delta_left', 'A_top', 'A_left', 'B_top', 'B_left', 'C', 'D')

# Recomputed states of a channel, so that those of 16 fill half of a core's own cache of 512 KiB, and the fewest lines
# between two saved ones. A sixteenth of all states is the most that is saved then.
_CACHED_STATES, _MIN_CHUNK = 4096, 16


def _chunk_lines(height: int, width: int, states: int, device_type: str) -> int:
    """Return the lines of a chunk, of whose last line states are saved; chunks are of about equal length.

    Lines are parallel to the map's shorter side. A GPU's chunk is a strip of its kernels. Where a size is open, the
    chunk is a constant: a compiled program would serve the size alone that the chunk follows from.
    """
    on_cpu = device_type == 'cpu' or not _library.KERNEL_CONSTANTS
    most = _MIN_CHUNK if on_cpu else _library.KERNEL_CONSTANTS['wavefront_strip_rows']
    if isinstance(height, torch.SymInt) or isinstance(width, torch.SymInt):
        return most
    lines, length = max(height, width), min(height, width)
    if on_cpu:
        most = max(most, _CACHED_STATES // (length * max(states, 1)))
    chunks = -(-lines // most)
    return -(-lines // chunks)


def _checkpoints_shape(x: Tensor, states: int, chunk: int) -> tuple[int, ...]:
    """(B, strips, checkpoints, channel tiles, states, rows, tile channels): the CUDA kernels' saved wavefronts."""
    batch, height, width, channels = x.shape
    lines, length = max(height, width), min(height, width)
    rows = min(chunk, lines)
    steps, tile, group = (
        _library.KERNEL_CONSTANTS[name]
        for name in ('wavefront_checkpoint_steps', 'wavefront_tile_channels', 'state_group')
    )
    padded = states if states in _library.SPECIALIZED_STATES else -(-states // group) * group
    return batch, -(-lines // rows), (length + rows - 2) // steps, -(-channels // tile), padded, rows, tile


def _empty_outputs(x: Tensor, A_top: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the output, and the saved states of lines and of wavefronts (none where ``chunk`` is 0)."""
    batch, height, width, channels = x.shape
    states = A_top.shape[1]
    # Not by Python's max and min: a program of open sizes would hold which side of the example was the longer one.
    saved = (torch.sym_max(height, width) - 1) // chunk if chunk else 0
    kept = chunk and x.device.type == 'cuda' and _library.KERNEL_CONSTANTS
    checkpoints = _checkpoints_shape(x, states, chunk) if kept else (0,)
    dtype = state_dtype(x.dtype)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty((batch, saved, torch.sym_min(height, width), states, channels), dtype=dtype),
        x.new_empty(checkpoints, dtype=dtype),
    )


def _empty_gradients(
    x: Tensor,
    delta_top: Tensor,
    delta_left: Tensor,
    A_top: Tensor,
    A_left: Tensor,
    B_top: Tensor,
    B_left: Tensor,
    C: Tensor,
    D: Tensor | None,
) -> tuple[Tensor, ...]:
    """Allocate the gradients in the operator's order; that of a D that was not given is empty."""

    def contiguous(value: Tensor) -> Tensor:
        return torch.empty_like(value, memory_format=torch.contiguous_format)

    # The deltas' gradients have the strides of the deltas, so that what produced them need not copy.
    return (
        contiguous(x),
        torch.empty_like(delta_top),
        torch.empty_like(delta_left),
        contiguous(A_top),
        contiguous(A_left),
        contiguous(B_top),
        contiguous(B_left),
        contiguous(C),
        x.new_empty((0,), dtype=state_dtype(x.dtype)) if D is None else contiguous(D),
    )


@_torch_compat.register_fake(_LIBRARY, 'wavefront_scan')
def _(x, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D, reverse, chunk):
    return _empty_outputs(x, A_top, chunk)


@_torch_compat.register_fake(_LIBRARY, 'wavefront_scan_backward')
def _(grad_output, x, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D, states, checkpoints, reverse, chunk):
    return _empty_gradients(x, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D)


def _reference_forward(x, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D, reverse, chunk):
    for name, A in (('A_top', A_top), ('A_left', A_left)):
        _checks.decay_rates(A, name)
    y = wavefront_reference.wavefront_scan(x, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D, reverse)
    _, states, checkpoints = _empty_outputs(x, A_top, chunk)
    return y, states.zero_(), checkpoints.zero_()


def _reference_backward(
    grad_output, x, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D, states, checkpoints, reverse, chunk
):
    inputs = (x, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D)
    grads = wavefront_reference.wavefront_scan_backward(grad_output, *inputs, reverse)
    outputs = _empty_gradients(*inputs)
    for name, output in zip(_NAMES, outputs, strict=True):
        if name in grads:
            output.copy_(grads[name])
    return outputs


def _differentiable_reference(x, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D, reverse, chunk):
    """The operator by PyTorch operations; no states are saved, since autograd keeps what it needs itself."""
    y = wavefront_reference.wavefront_scan(x, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D, reverse)
    return y, *_empty_outputs(x, A_top, 0)[1:]


def _checked_reference(x, delta_top, delta_left, A_top, A_left, *arguments):
    for name, A in (('A_top', A_top), ('A_left', A_left)):
        _checks.decay_rates(A, name)
    return _differentiable_reference(x, delta_top, delta_left, A_top, A_left, *arguments)


def _with_chunk(arguments: Sequence[Any]) -> Sequence[Any]:
    """Have states saved for a backward pass, at a distance that suits the device unless one was asked for."""
    x, A_top, chunk = arguments[0], arguments[3], arguments[10]
    _, height, width, _ = x.shape
    return (*arguments[:10], chunk or _chunk_lines(height, width, A_top.shape[1], x.device.type))


def _save_for_backward(ctx, inputs, output) -> None:
    *tensors, reverse, chunk = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.options = (reverse, chunk)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, _grad_states, _grad_checkpoints):
    *tensors, states, checkpoints = ctx.saved_tensors
    if grad_output is None:
        return (None,) * (len(tensors) + 2)
    grads = _library.call(
        torch.ops.cuda_ops.wavefront_scan_backward, grad_output, *tensors, states, checkpoints, *ctx.options
    )
    given = [None if tensor is None else grad for grad, tensor in zip(grads, tensors, strict=True)]
    return *given, None, None


def _save_for_second_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:10])
    ctx.reverse = inputs[12]
    ctx.set_materialize_grads(False)


def _second_backward(ctx, *grads):
    tensors = ctx.saved_tensors
    tangents = [None if tensor is None else grad for grad, tensor in zip(grads, tensors, strict=True)]
    if all(tangent is None for tangent in tangents):
        return (None,)
    return _autograd.push_forward(_differentiable_reference, (*tensors, ctx.reverse, 0), tangents)[:1]


_autograd.register(
    _LIBRARY,
    'wavefront_scan',
    save=_save_for_backward,
    backward=_backward,
    prepare=_with_chunk,
    forward_mode=_autograd.reference_tangents(_differentiable_reference),
)
_autograd.register_linear(
    _LIBRARY, 'wavefront_scan_backward', 1, save=_save_for_second_backward, backward=_second_backward
)
_autograd.register_vmap('wavefront_scan', maps=(0, 1, 2, 5, 6, 7), parameters=(3, 4, 8))
_autograd.register_vmap('wavefront_scan_backward', maps=(), parameters=range(14))
_library.serve(_LIBRARY, {'wavefront_scan': _reference_forward, 'wavefront_scan_backward': _reference_backward})
_reference_mode.serve('wavefront_scan', _checked_reference)


def wavefront_scan_flops(
    x_shape: Sequence[int],
    delta_top_shape: Sequence[int],
    delta_left_shape: Sequence[int],
    A_top_shape: Sequence[int],
    *args: object,
    **kwargs: object,
) -> int:
    """Count two selective scans, one for each neighbour: 2 * 9 * L * E * N an image (see ``route_scan_flops``)."""
    batch, height, width, channels = x_shape
    return 2 * 9 * batch * height * width * channels * A_top_shape[1]


_library.count_flops('wavefront_scan', wavefront_scan_flops)


def wavefront_scan(
    x: Tensor,
    delta_top: Tensor,
    delta_left: Tensor,
    A_top: Tensor,
    A_left: Tensor,
    B_top: Tensor,
    B_left: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    reverse: bool = False,
) -> Tensor:
    """Mamba2D's scan: the state of each pixel comes from its top and its left neighbour's.

    See the module's docstring for the equations, the borders among them.

    Args:
        x: (B, H, W, E) map; float32, bfloat16 or float16 (float64 on CPU). H, W and E are at least 1.
        delta_top: (B, H, W, E), for the top neighbour, after softplus, in x's dtype.
        delta_left: (B, H, W, E), for the left neighbour, after softplus, in x's dtype.
        A_top: (E, N) decay rates from the top neighbour, finite and not positive (checked on CPU; a GPU would have to
            wait for the answer). N is at least 1.
        A_left: (E, N) decay rates from the left neighbour, likewise.
        B_top: (B, H, W, N) input projections for the top neighbour's share, in x's dtype.
        B_left: (B, H, W, N) input projections for the left neighbour's share, in x's dtype.
        C: (B, H, W, N) output projections, in x's dtype.
        D: (E) skip weights, or None for no skip.
        reverse: start from the bottom right corner: the neighbours are those at the bottom and on the right.

    Returns:
        (B, H, W, E) in x's dtype. Differentiable once, in every floating input, in all the ways that
        :mod:`cuda_ops.route_scan` names. Under autocast, x, the deltas, B and C are cast to autocast's dtype; states
        are float32 all the same.

    Raises:
        ValueError: a shape does not fit, or a decay rate is positive or not finite.
        TypeError: dtypes are mixed or not supported.
    """
    _checks.tensors(
        x=x, delta_top=delta_top, delta_left=delta_left, A_top=A_top, A_left=A_left, B_top=B_top, B_left=B_left, C=C
    )
    _checks.tensors_or_none(D=D)
    _checks.ndim('x', x, 4, '(batch, height, width, channels)')
    batch, height, width, channels = x.shape
    _checks.ndim('A_top', A_top, 2, '(channels, states)')
    states = A_top.shape[1]
    for name, value in (('delta_top', delta_top), ('delta_left', delta_left)):
        _checks.shape(name, value, (batch, height, width, channels), '(batch, height, width, channels)')
    for name, value in (('A_top', A_top), ('A_left', A_left)):
        _checks.shape(name, value, (channels, states), '(channels, states)')
    for name, value in (('B_top', B_top), ('B_left', B_left), ('C', C)):
        _checks.shape(name, value, (batch, height, width, states), '(batch, height, width, states)')
    _checks.shape('D', D, (channels,), '(channels,)')
    _checks.grid(x)
    _checks.states(A_top, 'A_top')
    if channels < 1:
        raise ValueError(f'x must have at least one channel, got shape {tuple(x.shape)}')
    x, delta_top, delta_left, B_top, B_left, C = _checks.autocast(x, delta_top, delta_left, B_top, B_left, C)
    _checks.same_dtype_and_device(x=x, delta_top=delta_top, delta_left=delta_left, B_top=B_top, B_left=B_left, C=C)
    _checks.same_device(x, A_top=A_top, A_left=A_left, D=D)
    dtype = state_dtype(x.dtype)
    A_top, A_left, D = A_top.to(dtype), A_left.to(dtype), None if D is None else D.to(dtype)
    # A chunk of 0 saves no states: the Autograd kernel sets one, by _with_chunk, if a backward pass may follow.
    tensors = (x, delta_top, delta_left, A_top, A_left, B_top, B_left, C, D)
    return _library.call(torch.ops.cuda_ops.wavefront_scan, *tensors, reverse, 0)[0]
