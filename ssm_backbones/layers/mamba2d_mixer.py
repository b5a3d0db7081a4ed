"""Mamba2D's token mixers: a native 2-D scan with a local path beside it, and self-attention with rotary positions.

Source: Baty et al., "Mamba2D: A Natively Multi-Dimensional State-Space Model for Vision Tasks", arXiv 2412.16146.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_backbones.layers.calls import apply_conv, apply_linear, conv2d
from ssm_backbones.layers.common import init_scan_parameters, negative_exp
from ssm_backbones.layers.scans import DotProductAttention, WavefrontScan, module_inputs
from ssm_backbones.utils.tracing import as_one_node


class Neighbour(nn.Module):
    """Parameters of the wavefront scan towards one of a pixel's two neighbours: delta's projection and A.

    Args:
        channels: Width C of the scan.
        d_state: State size N for each channel.
        dt_rank: Rank R of delta's projection.
        D: The skip weights (C), which both neighbours share and this initialises as well.
    """

    def __init__(self, channels: int, d_state: int, dt_rank: int, D: Tensor) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(channels, d_state))
        self.dt_weight = nn.Parameter(torch.empty(channels, dt_rank))
        self.dt_bias = nn.Parameter(torch.empty(channels))
        init_scan_parameters(self.A_log, D, self.dt_weight, self.dt_bias)

    def forward(self, dt: Tensor) -> tuple[Tensor, Tensor]:
        """Compute delta (B, H, W, C) from the low-rank dt (B, H, W, R), and A (C, N)."""
        return self.delta(dt), self.A

    def delta(self, dt: Tensor) -> Tensor:
        """Compute delta (B, H, W, C), after softplus, from the low-rank dt (B, H, W, R)."""
        projected = torch.addmm(self.dt_bias, dt.flatten(0, 2), self.dt_weight.t())
        return F.softplus(projected).unflatten(0, dt.shape[:3])

    @property
    def A(self) -> Tensor:
        """A of the scan for this neighbour, (C, N), negative, in at least float32."""
        return negative_exp(self.A_log)


class StarReLU(nn.Module):
    """``scale * relu(v)**2 + bias`` with learned scalars. Source: MetaFormer baselines (arXiv 2210.13452)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, F.relu(x).square(), self.scale)


class LocalPath(nn.Module):
    """Local path of the mixer, on a map (B, H, W, C).

    LayerNorm -> Linear to 2C -> StarReLU -> depthwise 3x3 convolution -> StarReLU -> Linear to C, all without biases.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, 2 * channels, bias=False)
        self.act1 = StarReLU()
        self.conv = conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels, bias=False)
        self.act2 = StarReLU()
        self.reduce = nn.Linear(2 * channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = apply_conv(self.conv, self.act1(apply_linear(self.expand, self.norm(x))))
        return apply_linear(self.reduce, self.act2(x))


class ScanMixer(nn.Module):
    """Mixer of a wavefront scan over a channel-last map (B, H, W, C) and a local path.

    ``in_proj -> GELU -> scan -> GELU -> out_proj``, plus :class:`LocalPath` of the same input. dt, B and C come from
    one projection of the scan's input; the operator takes them as strided views of it.

    Args:
        channels: Width C, of the scan too.
        d_state: State size N for each channel.
        dt_rank: Rank R of delta's projections.
        reverse: Scan from the bottom right corner instead of the upper left one.
    """

    def __init__(self, channels: int, d_state: int, dt_rank: int, *, reverse: bool = False) -> None:
        super().__init__()
        self.d_state = d_state
        self.dt_rank = dt_rank
        self.reverse = reverse
        self.in_proj = nn.Linear(channels, channels)
        self.x_proj = nn.Linear(channels, 2 * dt_rank + 3 * d_state, bias=False)
        self.D = nn.Parameter(torch.empty(channels))
        self.top = Neighbour(channels, d_state, dt_rank, self.D)
        self.left = Neighbour(channels, d_state, dt_rank, self.D)
        with torch.no_grad():
            # dt_bias is initialised alike for both neighbours, as in the authors' code.
            self.left.dt_bias.copy_(self.top.dt_bias)
        self.scan = WavefrontScan(reverse)
        self.out_proj = nn.Linear(channels, channels)
        self.local = LocalPath(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map (B, H, W, C) into one of the same shape."""
        u = F.gelu(apply_linear(self.in_proj, x))
        dt_top, dt_left, B_top, B_left, C = apply_linear(self.x_proj, u).split(
            (self.dt_rank, self.dt_rank, self.d_state, self.d_state, self.d_state), dim=-1
        )
        delta_top, A_top = self.top(dt_top)
        delta_left, A_left = self.left(dt_left)
        y = self.scan(u, delta_top, delta_left, A_top, A_left, B_top, B_left, C, *module_inputs(self.D))
        return apply_linear(self.out_proj, F.gelu(y)) + self.local(x)


class RotaryAttention(nn.Module):
    """Self-attention over all pixels of a channel-last map (B, H, W, C), with 2-D rotary position embedding.

    Queries and keys are rotated and then pass a LayerNorm over the width of a head; there are no other biases.

    Args:
        channels: Width C, a multiple of ``head_dim``.
        head_dim: Channels of each head, a multiple of 4.
    """

    def __init__(self, channels: int, head_dim: int = 32) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.q_norm = nn.LayerNorm(head_dim)
        self.k_norm = nn.LayerNorm(head_dim)
        self.attend = DotProductAttention()
        self.proj = nn.Linear(channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map (B, H, W, C) into one of the same shape."""
        batch, height, width, _ = x.shape
        qkv = apply_linear(self.qkv, x)
        # Not those of x, of which some may have been pruned.
        channels = qkv.shape[-1] // 3
        q, k, v = qkv.view(batch, height * width, 3, channels // self.head_dim, self.head_dim).unbind(2)
        cosine, sine = rotary_angles(height, width, self.head_dim, q)
        q, k = self.q_norm(rotate_pairs(q, cosine, sine)), self.k_norm(rotate_pairs(k, cosine, sine))
        y = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return apply_linear(self.proj, y.transpose(1, 2).reshape(batch, height, width, channels))


@as_one_node
def rotary_angles(height: int, width: int, head_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (H * W, 1, head_dim / 2) of the rotation angles, in ``like``'s dtype.

    Rows rotate the first half of the channel pairs, columns the second; pair i of n by
    ``position * 10000**(-i / n)``, where the position is the pixel's index. Source: RoFormer (arXiv 2104.09864), along
    two axes.
    """
    pairs = head_dim // 4
    speeds = 10000 ** (-torch.arange(pairs, device=like.device, dtype=torch.float32) / pairs)
    rows, columns = (torch.arange(size, device=like.device)[:, None] * speeds for size in (height, width))
    angles = torch.cat([rows[:, None].expand(-1, width, -1), columns.expand(height, -1, -1)], dim=-1)
    angles = angles.view(height * width, 1, 2 * pairs)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate_pairs(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate each pair of neighbouring channels of (..., heads, head_dim) by its angle."""
    a, b = x.unflatten(-1, (x.shape[-1] // 2, 2)).unbind(-1)
    return torch.stack([a * cosine - b * sine, b * cosine + a * sine], dim=-1).flatten(-2)
