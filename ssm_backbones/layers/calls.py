"""Call PyTorch's own linear and convolutional layers on channel-last maps (B, H, W, C), fast.

The layers are plain ``nn.Linear``, ``nn.Conv2d`` and ``nn.Conv1d``, with weights in PyTorch's default layout, so that
adapters, pruning, quantisation, sharding, tracing and counters find them. What kernels prefer is made at run time.

A layer that nothing observes may be computed from its weights instead of being called, where that is faster:
:func:`is_unobserved` says when the two cannot be told apart but by rounding.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_backbones.utils.processor import is_mkl_tuned
from ssm_backbones.utils.torch_compat import (
    has_any_global_hook,
    is_compiling,
    is_exporting,
    is_intercepted,
    keep_gradient_contiguous,
)

# Evaluated once, because torch.compile cannot trace these calls.
_HAS_ONEDNN = torch.backends.mkldnn.is_available()
_IS_BLAS_TUNED = torch.backends.mkl.is_available() and is_mkl_tuned()
_PLAIN = (nn.Parameter, Tensor)
_PLAIN_OR_NONE = (*_PLAIN, type(None))
_ORIGINALS = (nn.Module.__call__, nn.Linear.forward, nn.Conv1d.forward, F.linear, F.conv1d)
# A hidden map of an MLP up to this size is made whole, a larger one in parts of about the other, which caches hold.
_WHOLE_BYTES, _PART_BYTES = 32 * 2**20, 8 * 2**20
_GELU, _GELU_IN_PLACE = F.gelu, torch.ops.aten.gelu_


def is_unobserved(layer: Any, kind: type[nn.Module]) -> bool:
    """Return whether a layer may be replaced by functions of its weights without anyone noticing.

    It may if it is exactly of PyTorch's type ``kind``, has plain weights, no hook and no ``forward`` of its own, and
    neither ``torch.jit.trace`` records its calls nor somebody has replaced the functions that it would run. Then it is
    no adapter, quantised layer, parametrisation, or shard.
    """
    if type(layer) is not kind:
        return False
    # Read from the dict, since a lookup by nn.Module's __getattr__ would cost as much as a small layer.
    own = layer.__dict__
    if 'forward' in own:
        return False
    hooks = own['_forward_hooks'] or own['_forward_pre_hooks'] or own['_backward_hooks'] or own['_backward_pre_hooks']
    # Counters set hooks before they trace. They are to count causal convolutions as they run.
    if hooks and not (kind is nn.Conv1d and torch.jit.is_tracing()):
        return False
    weights = own['_parameters']
    if type(weights.get('weight')) not in _PLAIN or type(weights.get('bias')) not in _PLAIN_OR_NONE:
        return False
    if is_compiling() or kind is nn.Conv1d:
        return True
    return not (
        torch.jit.is_tracing()
        or has_any_global_hook()
        or _ORIGINALS != (nn.Module.__call__, nn.Linear.forward, nn.Conv1d.forward, F.linear, F.conv1d)
    )


def apply_linear(layer: Any, x: Tensor) -> Tensor:
    """Apply a linear layer to the channels of a map, (B, H, W, C_in) -> (B, H, W, C_out)."""
    if isinstance(x, Tensor) and _suits_onednn(x) and is_unobserved(layer, nn.Linear):
        return _pointwise(x, layer.weight, layer.bias)
    return layer(x)


def apply_linear_gelu(layer: Any, x: Tensor) -> Tensor:
    """Apply a linear layer and the exact GELU to the channels of a map, (B, H, W, C_in) -> (B, H, W, C_out).

    While no gradients are recorded, and nothing observes the layer, GELU overwrites the layer's output: filling new
    memory takes as long as the function on a CPU, where the system has to provide the pages first.
    """
    # Asked before the call, since a hook may remove itself.
    overwrites = _runs_unseen() and is_unobserved(layer, nn.Linear)
    y = apply_linear(layer, x)
    return _GELU_IN_PLACE(y) if overwrites and type(y) is Tensor else F.gelu(y)


def apply_mlp(first: Any, second: Any, x: Tensor) -> Tensor:
    """Apply a linear layer, the exact GELU and another linear layer to a map, (B, H, W, C_in) -> (B, H, W, C_out).

    While no gradients are recorded, and nothing observes the layers, a large hidden map is never made whole on a CPU:
    that of some pixels at a time stays in the processor's caches.
    """
    if not _suits_parts(first, second, x):
        return apply_linear(second, apply_linear_gelu(first, x))
    pixels = max(1, _PART_BYTES // (first.weight.shape[0] * x.element_size()))
    parts = x.reshape(1, 1, -1, x.shape[-1]).split(pixels, dim=2)
    outputs = [apply_linear(second, apply_linear_gelu(first, part)) for part in parts]
    return torch.cat(outputs, dim=2).view(*x.shape[:-1], -1)


def _suits_parts(first: Any, second: Any, x: Tensor) -> bool:
    if type(x) not in _PLAIN or x.device.type != 'cpu' or not _runs_unseen():
        return False
    if not (is_unobserved(first, nn.Linear) and is_unobserved(second, nn.Linear)):
        return False
    return x[..., 0].numel() * first.weight.shape[0] * x.element_size() > _WHOLE_BYTES


def _runs_unseen() -> bool:
    """Return whether operators run at once, without gradients, and nobody's mode or function sees or changes them."""
    seen = is_compiling() or is_intercepted() or torch._C._len_torch_function_stack() or F.gelu is not _GELU
    return not (torch.is_grad_enabled() or seen)


def apply_linear_halves(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Apply a linear layer without bias to a map, and split its output: (B, H, W, C_in) -> two (B, H, W, C_out / 2).

    The halves of one product are strided, and convolutions copy them; so there are two products where possible.
    """
    if isinstance(x, Tensor) and is_unobserved(layer, nn.Linear):
        first, second = layer.weight.chunk(2)
        product: Any = _pointwise if _suits_onednn(x) else F.linear
        return product(x, first), product(x, second)
    first, second = layer(x).chunk(2, dim=-1)
    return first, second


def _suits_onednn(x: Tensor) -> bool:
    # An exported program is to be the same whichever processor exports it.
    return (
        x.device.type == 'cpu' and x.dtype == torch.float32 and _HAS_ONEDNN and (not _IS_BLAS_TUNED or is_exporting())
    )


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``F.linear`` by oneDNN, as a 1x1 convolution of the channels-last view.

    In float32 that is two to five times as fast as the BLAS of ``F.linear``, MKL, on a processor with AVX-512 of
    another maker than Intel. Elsewhere ``F.linear`` trains faster and is as fast forward: oneDNN reorders the weight at
    each call, which on small maps takes as long as the product.
    """
    keep_gradient_contiguous(x)
    return F.conv2d(x.permute(0, 3, 1, 2), weight[:, :, None, None], bias).permute(0, 2, 3, 1).contiguous()


def conv2d(*args: Any, **kwargs: Any) -> nn.Conv2d:
    """Build an ``nn.Conv2d`` to be called by :func:`apply_conv`.

    A weight with one input channel is in the default and in the channels-last layout at once, but for the stride of
    that single channel. It is given the stride that the gradients of channels-last convolutions have: reducers of
    distributed training and fused optimizers compare all strides.
    """
    conv = nn.Conv2d(*args, **kwargs)
    if conv.in_channels == conv.groups:
        size = conv.weight.shape
        strides = (size[2] * size[3], 1, size[3], 1)
        conv.weight.data = conv.weight.data.as_strided(size, strides)
    return conv


def apply_conv(layer: Any, x: Tensor) -> Tensor:
    """Apply a 2-D convolution to a map, (B, H, W, C_in) -> (B, H', W', C_out).

    The layer is given a channels-last view, (B, C_in, H, W). On a CPU a weight much larger than the map is not
    reordered to match it: the map is copied to the weight's layout.
    """
    images = x.permute(0, 3, 1, 2)
    keep_gradient_contiguous(x)
    if type(layer) is nn.Conv2d and isinstance(x, Tensor) and not is_compiling():
        if x.device.type == 'cpu' and layer.weight.is_contiguous() and layer.weight.numel() >= 8 * x.numel():
            images = images.contiguous()
    # A backend may return another layout; otherwise contiguous() costs nothing.
    return layer(images).permute(0, 2, 3, 1).contiguous()


def apply_causal_conv(layer: Any, x: Tensor, axis: str, reverse: bool = False) -> Tensor:
    """Apply a causal depthwise 1-D convolution along rows or columns of a map, (B, H, W, C) -> the same.

    Args:
        layer: An ``nn.Conv1d`` of C groups, padded by its length less one. The last weight is the pixel's own.
        x: The map.
        axis: 'row' (along W) or 'column' (along H). The edge is padded with zeros.
        reverse: See the following pixels instead of the preceding ones.
    """
    rows = axis == 'row'
    if isinstance(x, Tensor) and is_unobserved(layer, nn.Conv1d):
        return _causal_conv(x, layer.weight, layer.bias, rows, reverse)
    along = 2 if rows else 1
    lines = x.flip(along) if reverse else x
    lines = lines if rows else lines.transpose(1, 2)
    # Sequences (N, C, L); the padding behind the end adds outputs, which are dropped.
    y = layer(lines.flatten(0, 1).transpose(1, 2))[..., : lines.shape[2]].transpose(1, 2)
    y = y.unflatten(0, lines.shape[:2])
    y = y if rows else y.transpose(1, 2)
    return (y.flip(along) if reverse else y).contiguous()


def _causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, rows: bool, reverse: bool) -> Tensor:
    # Padding the kernel with zeros makes the window symmetric, for which oneDNN's backward is six times as fast as
    # for a shorter, one-sided one; but only along columns, so rows are viewed as columns.
    ahead = weight.shape[2] - 1
    # Flattened, since the gradient of a (C, 1, L) view would not have the strides of the parameter.
    weight = F.pad(weight.flatten(1), (0, ahead))
    weight = (weight.flip(1) if reverse else weight)[:, None, :, None]
    columns = x.flatten(0, 1).unsqueeze(2) if rows else x
    y = F.conv2d(columns.permute(0, 3, 1, 2), weight, bias, padding=(ahead, 0), groups=weight.shape[0])
    return y.permute(0, 2, 3, 1).reshape(x.shape)
