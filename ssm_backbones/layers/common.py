"""Layers that the families share. Maps are channel-last, (B, H, W, C), throughout."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_backbones.utils.torch_compat import is_exporting

# Asked once: torch.compile cannot trace the question.
_HAS_ONEDNN = torch.backends.mkldnn.is_available()


class ChannelLastConv2d(nn.Conv2d):
    """A convolution from (B, H, W, C_in) to (B, H', W', C_out).

    The kernels get the channels-last view of the map, so neither the map nor the result is reordered on a CPU, and the
    weight lies in memory in the order that they read.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        # A backend may answer in another layout; where it does not, contiguous() costs nothing.
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` on a map: (B, H, W, C_in) times weight (C_out, C_in), giving (B, H, W, C_out).

    In float32 on a CPU it is computed as a 1x1 convolution of the channels-last view, which oneDNN serves: two to five
    times as fast as the BLAS behind ``F.linear`` on a processor which that BLAS was not tuned for.
    """
    if x.device.type == 'cpu' and x.dtype == torch.float32 and _HAS_ONEDNN:
        return F.conv2d(x.permute(0, 3, 1, 2), weight[:, :, None, None], bias).permute(0, 2, 3, 1).contiguous()
    return F.linear(x, weight, bias)


class Pointwise(nn.Linear):
    """A linear layer on the channels of a map, (B, H, W, C_in) -> (B, H, W, C_out)."""

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(x, self.weight, self.bias)


class ConvNorm(nn.Module):
    """A convolution and a LayerNorm over the channels, (B, H, W, C_in) -> (B, H', W', C_out)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, padding: int = 0) -> None:
        super().__init__()
        self.conv = ChannelLastConv2d(in_channels, out_channels, kernel_size, stride, padding)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


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

    They pass a LayerNorm unless ``norm`` is False. An image whose sides the patch does not divide gets zeros at the
    bottom and right, as mmpretrain's own patch embedding does by default.
    """

    def __init__(self, in_channels: int, embed_dims: int, patch_size: int, norm: bool = True) -> None:
        super().__init__()
        self.patch_size = patch_size
        projection = ConvNorm if norm else ChannelLastConv2d
        self.projection = projection(in_channels, embed_dims, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(x.permute(0, 2, 3, 1), self.patch_size)
        return self.projection(x.contiguous())


class PatchMerging(nn.Module):
    """Halve a map: the four pixels of each 2x2 square side by side, LayerNorm, a linear layer without bias.

    (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), C_out); odd sides get a row or column of zeros at the bottom or right, as
    in Swin. The pixels are taken in the order (0,0), (1,0), (0,1), (1,1) of (row, column).
    Source: Swin (arXiv 2103.14030).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * in_channels)
        self.reduction = Pointwise(4 * in_channels, out_channels, bias=False)
        init_linear(self.reduction)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(x, 2)
        batch, height, width, channels = x.shape
        squares = x.view(batch, height // 2, 2, width // 2, 2, channels).permute(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(squares.reshape(batch, height // 2, width // 2, 4 * channels)))


class MLP(nn.Module):
    """Linear, exact GELU, Linear, on the channels of a map (B, H, W, C)."""

    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.fc1 = Pointwise(channels, hidden_channels)
        self.fc2 = Pointwise(hidden_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


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
        keep = branch.new_empty((branch.shape[0],) + (1,) * (branch.ndim - 1)).bernoulli_(keep_prob)
        return torch.addcmul(x, branch, keep, value=1.0 / keep_prob)

    def extra_repr(self) -> str:
        return f'drop_prob={self.drop_prob:.3g}'


def feature_map(x: Tensor) -> Tensor:
    """The (B, C, H, W) map that leaves a backbone, from the channel-last one within.

    It is copied into PyTorch's default layout: mmcv's RoIAlign and other compiled operators of the host libraries read
    the memory of a channels-last map as if it were that layout, and silently compute nonsense.
    """
    return x.permute(0, 3, 1, 2).contiguous()


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Zeros at the bottom and right of (B, H, W, C) until ``multiple`` divides both sides; ``x`` itself if it does."""
    # Without %, which torch.compile does not trace where floats are made of sizes that it does not know.
    # And without -(-size // multiple): PyTorch's exporter to ONNX rounds quotients of negative numbers towards zero.
    bottom, right = ((size + multiple - 1) // multiple * multiple - size for size in x.shape[1:3])
    needed = is_unknown(bottom, right) or bottom or right
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if needed else x


def is_unknown(*sizes: Any) -> bool:
    """Whether a size is left open by ``torch.export``: to ask for its value would settle it for the whole program."""
    return is_exporting() and any(isinstance(size, torch.SymInt) for size in sizes)


def init_linear(*layers: nn.Linear) -> None:
    """Draw the weights from a truncated normal of standard deviation 0.02 and zero the biases, as VMamba does.

    The layers are named one by one, because a projection that VMamba's authors keep as a plain parameter (``x_proj``)
    keeps PyTorch's default there, and Mamba2D's and V2M's layers do too.
    """
    for layer in layers:
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def init_lecun_normal(conv: nn.Conv2d) -> None:
    """Draw the weight from a truncated normal of standard deviation 1/sqrt(fan_in) and zero the bias.

    Source: LeCun et al., "Efficient BackProp", 1998; truncated as JAX and timm do.
    """
    # Truncation at two standard deviations leaves this fraction of the deviation.
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

    ``A = -(1..N)``, ``D = 1``, and step sizes whose softplus is log-uniform in [dt_min, dt_max].

    Args:
        A_log: (..., E, N), the logarithm of -A.
        D: (..., E).
        dt_weight: (..., E, R) from the rank of the step sizes' projection.
        dt_bias: (..., E).
        dt_min: smallest step size drawn.
        dt_max: largest step size drawn.
        dt_floor: smallest step size left.
    """
    A_log.copy_(torch.arange(1, A_log.shape[-1] + 1, dtype=A_log.dtype, device=A_log.device).log().expand_as(A_log))
    D.fill_(1.0)
    bound = dt_weight.shape[-1] ** -0.5
    dt_weight.uniform_(-bound, bound)
    step = torch.empty_like(dt_bias).uniform_(math.log(dt_min), math.log(dt_max)).exp_().clamp_(min=dt_floor)
    # The inverse of softplus, in a form that does not cancel for small steps.
    dt_bias.copy_(step + torch.log(-torch.expm1(-step)))


def negative_exp(A_log: Tensor) -> Tensor:
    """A = -exp(A_log), in at least float32 whatever the parameters' type."""
    return -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))
