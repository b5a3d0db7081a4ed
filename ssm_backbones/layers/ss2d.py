"""SS2D, VMamba's token mixer: a selective scan along four routes over the grid, summed."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_backbones.layers.calls import apply_conv, apply_linear, apply_linear_halves, conv2d
from ssm_backbones.layers.common import init_linear, init_scan_parameters, negative_exp
from ssm_backbones.layers.scans import CrossScan, module_inputs

ROUTES = 4


class SS2D(nn.Module):
    """The 2-D selective scan of VMamba (arXiv 2401.10166, section 4) over a channel-last map.

    ``in_proj -> depthwise 3x3 convolution -> SiLU -> scan -> LayerNorm (-> * SiLU(z) with a gate) -> out_proj``. The
    routes are row-major, column-major, and their reverses, in this order. Delta, B and C of all routes come from one
    pointwise projection of the map, so no route is ever materialised.

    Args:
        channels: Width C of the input and output.
        inner_channels: Width E at which the scan runs.
        d_state: State size N for each channel.
        dt_rank: Rank R of delta's projection.
        gate: Whether a second half of ``in_proj`` gates the output (VMamba's first release).
        conv_bias: Whether the depthwise convolution has a bias.
    """

    def __init__(
        self,
        channels: int,
        inner_channels: int,
        d_state: int,
        dt_rank: int,
        *,
        gate: bool = False,
        conv_bias: bool = False,
    ) -> None:
        super().__init__()
        self.d_state = d_state
        self.dt_rank = dt_rank
        self.gate = gate
        self.in_proj = nn.Linear(channels, inner_channels * (2 if gate else 1), bias=False)
        self.conv = conv2d(inner_channels, inner_channels, 3, padding=1, groups=inner_channels, bias=conv_bias)
        self.x_proj = nn.Linear(inner_channels, ROUTES * (dt_rank + 2 * d_state), bias=False)
        self.dt_weight = nn.Parameter(torch.empty(ROUTES, inner_channels, dt_rank))
        self.dt_bias = nn.Parameter(torch.empty(ROUTES, inner_channels))
        self.A_log = nn.Parameter(torch.empty(ROUTES, inner_channels, d_state))
        self.D = nn.Parameter(torch.empty(ROUTES, inner_channels))
        self.scan = CrossScan()
        self.norm = nn.LayerNorm(inner_channels)
        self.out_proj = nn.Linear(inner_channels, channels, bias=False)
        init_linear(self.in_proj, self.out_proj)
        init_scan_parameters(self.A_log, self.D, self.dt_weight, self.dt_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map (B, H, W, C) into one of the same shape."""
        z = None
        if self.gate:
            x, z = apply_linear_halves(self.in_proj, x)
        else:
            x = apply_linear(self.in_proj, x)
        x = F.silu(apply_conv(self.conv, x))

        dt, B, C = (
            apply_linear(self.x_proj, x)
            .unflatten(-1, (ROUTES, self.dt_rank + 2 * self.d_state))
            .split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        )
        y = self.scan(x, dt, self.A, B, C, *module_inputs(self.D, self.dt_bias, self.dt_weight))

        y = self.norm(y)
        if z is not None:
            y = y * F.silu(z)
        return apply_linear(self.out_proj, y)

    @property
    def A(self) -> Tensor:
        """A of the scan, (4, E, N), negative, in at least float32."""
        return negative_exp(self.A_log)
