"""Layers shared by the families. All maps are channel-last, (B, H, W, C)."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_backbones.layers.calls import apply_conv, apply_linear, apply_mlp, conv2d
from ssm_backbones.utils.torch_compat import is_exporting
from ssm_backbones.utils.tracing import as_one_node


class ConvNorm(nn.Module):
    """A convolution and a LayerNorm over the channels, (B, H, W, C_in) -> (B, H', W', C_out)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, padding: int = 0) -> None:
        super().__init__()
        self.conv = conv2d(in_channels, out_channels, kernel_size, stride, padding)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(apply_conv(self.conv, x))


class ConvStem(nn.Module):
    """Two 3x3 convolutions of stride 2: an image (B, C_in, H, W) -> (B, ceil(H/4), ceil(W/4), embed_dims).

    Source: VMamba (arXiv 2401.10166), second version.
    """

    def __init__(self, in_channels: int, embed_dims: int) -> None:
        super().__init__()
        self.first = ConvNorm(in_channels, embed_dims // 2, kernel_size=3, stride=2, padding=1)
        self.second = ConvNorm(embed_dims // 2, embed_dims, kernel_size=3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1).contiguous()
        return self.second(F.gelu(self.first(x)))


class PatchEmbed(nn.Module):
    """Non-overlapping patches: an image (B, C_in, H, W) -> (B, ceil(H/patch), ceil(W/patch), embed_dims).

    They are followed by a LayerNorm unless ``norm`` is False. Incomplete patches are padded with zeros at the bottom
    and right, as in mmpretrain's own patch embedding by default.
    """

    def __init__(self, in_channels: int, embed_dims: int, patch_size: int, norm: bool = True) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.normed = norm
        projection: Any = ConvNorm if norm else conv2d
        self.projection = projection(in_channels, embed_dims, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(x.permute(0, 2, 3, 1), self.patch_size).contiguous()
        return self.projection(x) if self.normed else apply_conv(self.projection, x)


class PatchMerging(nn.Module):
    """Patch merging: the four pixels of each 2x2 square are concatenated; LayerNorm; a linear layer without bias.

    (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), C_out); odd sides are padded with zeros at the bottom or right, as in
    Swin. The pixels are concatenated in the order (0,0), (1,0), (0,1), (1,1) of (row, column).
    Source: Swin (arXiv 2103.14030).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * in_channels)
        self.reduction = nn.Linear(4 * in_channels, out_channels, bias=False)
        init_linear(self.reduction)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(x, 2)
        batch, height, width, channels = x.shape
        squares = x.view(batch, height // 2, 2, width // 2, 2, channels).permute(0, 1, 3, 4, 2, 5)
        return apply_linear(self.reduction, self.norm(squares.reshape(batch, height // 2, width // 2, 4 * channels)))


class MLP(nn.Module):
    """Linear, exact GELU, Linear, on the channels of a map (B, H, W, C)."""

    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden_channels)
        self.fc2 = nn.Linear(hidden_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return apply_mlp(self.fc1, self.fc2, x)


class Residual(nn.Module):
    """``x + branch``, where training drops the branch of a whole sample with probability ``drop_prob``.

    A kept branch is scaled by ``1 / (1 - drop_prob)``. Source: stochastic depth (arXiv 1603.09382).
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x + branch
        keep_prob = 1.0 - self.drop_prob
        return torch.addcmul(x, branch, kept_samples(branch, keep_prob), value=1.0 / keep_prob)

    def extra_repr(self) -> str:
        return f'drop_prob={self.drop_prob:.3g}'


@as_one_node
def kept_samples(x: Tensor, keep_prob: float) -> Tensor:
    """Draw 1 with probability ``keep_prob``, else 0, for each sample of a map: (B, H, W, C) -> (B, 1, 1, 1)."""
    return x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob)


class FeatureMap(nn.Module):
    """:func:`feature_map` as a module, for hooks: its output is the map that a backbone returns."""

    def forward(self, x: Tensor) -> Tensor:
        return feature_map(x)


def feature_map(x: Tensor) -> Tensor:
    """Convert a channel-last map to the (B, C, H, W) map that a backbone returns.

    It is copied to PyTorch's default layout, because mmcv's RoIAlign and other compiled operators of the host libraries
    ignore strides and silently return wrong results for channels-last maps.
    """
    return x.permute(0, 3, 1, 2).contiguous()


@as_one_node
def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad (B, H, W, C) with zeros at the bottom and right until ``multiple`` divides both sides."""
    # No %, which torch.compile cannot trace when floats are computed from dynamic sizes.
    # No -(-size // multiple): PyTorch's ONNX exporter rounds quotients of negative numbers towards zero.
    bottom, right = ((size + multiple - 1) // multiple * multiple - size for size in x.shape[1:3])
    needed = is_unknown(bottom, right) or bottom or right
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if needed else x


def is_unknown(*sizes: Any) -> bool:
    """Return whether a size is dynamic in ``torch.export``, where reading its value would fix it for the program."""
    return is_exporting() and any(isinstance(size, torch.SymInt) for size in sizes)


def init_linear(*layers: nn.Linear) -> None:
    """Draw the weights from a truncated normal of standard deviation 0.02 and zero the biases, as VMamba does.

    The layers are given explicitly, because ``x_proj`` (a plain parameter in the authors' code) and the layers of
    Mamba2D and V2M keep PyTorch's default initialisation.
    """
    for layer in layers:
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def init_lecun_normal(conv: nn.Conv2d) -> None:
    """Draw the weight from a truncated normal of standard deviation 1/sqrt(fan_in) and zero the bias.

    Source: LeCun et al., "Efficient BackProp", 1998; truncated as JAX and timm do.
    """
    # Standard deviation of a standard normal truncated at two standard deviations.
    remaining = 0.87962566103423978
    std = conv.weight[0].numel() ** -0.5 / remaining
    nn.init.trunc_normal_(conv.weight, std=std, a=-2 * std, b=2 * std)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


@torch.no_grad()
def init_scan_parameters(
    A_log: Tensor,
    D: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    dt_min: float = 1e-3,
    dt_max: float = 1e-1,
    dt_floor: float = 1e-4,
) -> None:
    """Initialise a recurrence's parameters as Mamba does (arXiv 2312.00752, section 3.6).

    ``A = -(1..N)``, ``D = 1``, and dt biases whose softplus is log-uniform in [dt_min, dt_max].

    Args:
        A_log: Logarithm of -A, (..., E, N).
        D: Skip weights (..., E).
        dt_weight: Weight of delta's projection (..., E, R), with R the rank of dt.
        dt_bias: Bias of delta (..., E).
        dt_min: Lower bound of the distribution of delta.
        dt_max: Upper bound of the distribution of delta.
        dt_floor: Minimum to which delta is clamped.
    """
    A_log.copy_(torch.arange(1, A_log.shape[-1] + 1, dtype=A_log.dtype, device=A_log.device).log().expand_as(A_log))
    D.fill_(1.0)
    bound = dt_weight.shape[-1] ** -0.5
    dt_weight.uniform_(-bound, bound)
    delta = torch.empty_like(dt_bias).uniform_(math.log(dt_min), math.log(dt_max)).exp_().clamp_(min=dt_floor)
    # The inverse of softplus, in a form without cancellation for small delta.
    dt_bias.copy_(delta + torch.log(-torch.expm1(-delta)))


@as_one_node
def negative_exp(A_log: Tensor) -> Tensor:
    """Compute A = -exp(A_log), in at least float32 whatever the parameters' dtype."""
    return -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))
