"""The functions of ``causal_conv1d``, by PyTorch's convolution."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cuda_ops.route_reference import state_dtype


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute ``y_l = act(bias + sum_k weight[k] * x_{l - W + 1 + k})`` for each channel, in float32.

    Args:
        x: (B, E, L), in any floating dtype.
        weight: (E, W).
        bias: (E) or None.
        seq_idx: (B, L) numbers of the sequences that lie one after another, or None for one. A position reads those of
            its own number alone; the outputs where it is negative are 0.
        initial_states: (B, E, W - 1), the positions before the first, or None for zeros.
        return_final_states: Also return the last W - 1 positions, (B, E, W - 1).
        final_states_out: Where to write those, or None.
        activation: None, 'silu' or 'swish', which are the same.

    Returns:
        (B, E, L) in x's dtype, and the final states if asked for. All floating inputs have gradients.

    Raises:
        NotImplementedError: If the activation is another.
        ValueError: If shapes do not fit, or the final states of several sequences are asked for.
    """
    _check(x, weight, bias, activation)
    batch, channels, length = x.shape
    before = weight.shape[1] - 1
    if initial_states is None:
        padded = F.pad(x, (before, 0))
    else:
        if initial_states.shape != (batch, channels, before):
            raise ValueError(
                f'initial_states must have shape {(batch, channels, before)}, got {tuple(initial_states.shape)}'
            )
        padded = torch.cat([initial_states.to(x.dtype), x], dim=2)
    if seq_idx is None:
        y = _convolve(padded, weight, bias)
    else:
        if return_final_states:
            raise ValueError('return_final_states must be False with seq_idx: there is one state for each sequence')
        if seq_idx.shape != (batch, length):
            raise ValueError(f'seq_idx must have shape {(batch, length)}, got {tuple(seq_idx.shape)}')
        y = _convolve_apart(padded, weight, bias, seq_idx, initial_states is not None)
    y = _activate(y, activation, x.dtype)
    if not return_final_states:
        return y
    final = padded[..., padded.shape[2] - before :]
    return y, final.contiguous() if final_states_out is None else final_states_out.copy_(final)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Compute :func:`causal_conv1d_fn` for the next positions, and move them into the state.

    Args:
        x: (B, E), or (B, E, L) for several positions.
        conv_state: (B, E, S) the last positions, S at least W - 1; changed in place.
        weight: (E, W); bias: (E) or None; activation: None, 'silu' or 'swish'.
        cache_seqlens, conv_state_indices: None.

    Raises:
        NotImplementedError: If cache_seqlens or conv_state_indices is given, or the activation is another.
        ValueError: If shapes do not fit.
    """
    for name, value in (('cache_seqlens', cache_seqlens), ('conv_state_indices', conv_state_indices)):
        if value is not None:
            raise NotImplementedError(f'{name} must be None: cuda_ops.mamba_ssm serves no circular or indexed states')
    positions = x.unsqueeze(2) if x.dim() == 2 else x
    _check(positions, weight, bias, activation)
    if (
        conv_state.shape[:2] != positions.shape[:2]
        or conv_state.dim() != 3
        or conv_state.shape[2] < weight.shape[1] - 1
    ):
        raise ValueError(
            f'conv_state must have shape (batch, channels, positions), positions at least {weight.shape[1] - 1}, for '
            f'x of shape {tuple(x.shape)}, got {tuple(conv_state.shape)}'
        )
    known = torch.cat([conv_state.to(x.dtype), positions], dim=2)
    y = _convolve(known, weight, bias)[..., known.shape[2] - weight.shape[1] + 1 - positions.shape[2] :]
    conv_state.copy_(known[..., known.shape[2] - conv_state.shape[2] :])
    y = _activate(y, activation, x.dtype)
    return y.squeeze(2) if x.dim() == 2 else y


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    if activation not in (None, 'silu', 'swish'):
        raise NotImplementedError(f"activation must be None, 'silu' or 'swish', got {activation!r}")
    if x.dim() != 3:
        raise ValueError(f'x must have 3 dimensions (batch, channels, length), got shape {tuple(x.shape)}')
    if weight.dim() != 2 or weight.shape[0] != x.shape[1] or weight.shape[1] < 1:
        raise ValueError(f'weight must have shape ({x.shape[1]}, width), got {tuple(weight.shape)}')
    if bias is not None and bias.shape != x.shape[1:2]:
        raise ValueError(f'bias must have shape ({x.shape[1]},), got {tuple(bias.shape)}')


def _activate(y: Tensor, activation: str | None, dtype: torch.dtype) -> Tensor:
    return (y if activation is None else F.silu(y)).to(dtype)


def _convolve(padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve (B, E, L + W - 1) to (B, E, L) in the state dtype, whatever autocast would take."""
    dtype = state_dtype(padded.dtype)
    with torch.autocast(padded.device.type, enabled=False):
        return F.conv1d(
            padded.to(dtype),
            weight.to(dtype).unsqueeze(1),
            None if bias is None else bias.to(dtype),
            groups=len(weight),
        )


def _convolve_apart(padded: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor, has_initial: bool) -> Tensor:
    """Convolve as :func:`_convolve`, reading positions of the same sequence alone."""
    dtype, length, before = state_dtype(padded.dtype), seq_idx.shape[1], weight.shape[1] - 1
    # What lies before the first position belongs to its sequence, or to none.
    first = seq_idx[:, :1] if has_initial else seq_idx.new_full((len(seq_idx), 1), -1)
    numbers = torch.cat([first.expand(-1, before), seq_idx], dim=1)
    wide = padded.to(dtype)
    y = wide.new_zeros(wide.shape[0], wide.shape[1], length)
    for k in range(before + 1):
        same = (numbers[:, k : k + length] == seq_idx).unsqueeze(1)
        y = y + torch.where(same, wide[..., k : k + length], 0) * weight[:, k, None].to(dtype)
    if bias is not None:
        y = y + bias[:, None].to(dtype)
    return torch.where((seq_idx < 0).unsqueeze(1), 0, y)
