"""V2M's token mixers: a 2-D state-space model as a scan along rows and then along columns, from four corners.

With g the horizontal and v the vertical state, for the upper left corner and one channel (V2M, arXiv 2410.10382)::

    g(i,j)[n] = exp(d1 * A1[n]) * g(i,j-1)[n] + d1 * B1(i,j)[n] * x(i,j)
    s(i,j) = sum_n g(i,j)[n] + D1 * x(i,j)
    v(i,j)[n] = exp(d2 * A2[n]) * v(i-1,j)[n] + d2 * s'(i,j)
    y(i,j) = sum_n C2(i,j)[n] * v(i,j)[n] + D2 * s'(i,j)

where s' is s times the gate, and d the softplus of delta. The other corners mirror the directions with the same
weights. Their outputs are added in image order, halved, and gated again. Maps are channel-last throughout; no corner
flips, transposes or copies one.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_backbones.layers.calls import apply_causal_conv, apply_conv, apply_linear, apply_linear_halves, conv2d
from ssm_backbones.layers.common import init_scan_parameters, negative_exp
from ssm_backbones.layers.scans import LineScan, module_inputs

PASSES = 2
ROW, COLUMN = range(PASSES)


class V2MMixer(nn.Module):
    """Base class of the mixers of both layouts: projections into and out of the scans, and the scans' parameters.

    Args:
        channels: Width C of the input and output.
        inner_channels: Width E at which the scans run.
        d_state: State size N for each channel.
        dt_rank: Rank R of delta's projection.
        depth: Blocks of the backbone. The initial ``out_proj`` is PyTorch's default divided by sqrt(depth), so that the
            sum of all blocks' branches has the scale of one branch, as in the authors' code (after GPT-2).
    """

    def __init__(self, channels: int, inner_channels: int, d_state: int, dt_rank: int, depth: int = 1) -> None:
        super().__init__()
        self.d_state = d_state
        self.dt_rank = dt_rank
        self.in_proj = nn.Linear(channels, 2 * inner_channels, bias=False)
        self.dt_weight = nn.Parameter(torch.empty(PASSES, inner_channels, dt_rank))
        self.dt_bias = nn.Parameter(torch.empty(PASSES, inner_channels))
        self.A_log = nn.Parameter(torch.empty(PASSES, inner_channels, d_state))
        self.D = nn.Parameter(torch.empty(PASSES, inner_channels))
        self.row_scan = LineScan('row')
        self.column_scan = LineScan('column')
        self.out_proj = nn.Linear(inner_channels, channels, bias=False)
        with torch.no_grad():
            self.out_proj.weight.div_(math.sqrt(depth))
        # Both passes are initialised alike. The authors' code does so for the first pass only and leaves the second
        # dt_bias at 0, a delta of 0.69 that halves even the slowest state at every pixel.
        init_scan_parameters(self.A_log, self.D, self.dt_weight, self.dt_bias)

    @property
    def A(self) -> Tensor:
        """A of both scans, (2, E, N), negative, in at least float32."""
        return negative_exp(self.A_log)

    def project_in(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Project a map (B, H, W, C) to the scans' input and the gate SiLU(z), both (B, H, W, E)."""
        x, z = apply_linear_halves(self.in_proj, x)
        return x, F.silu(z)

    def scan_rows(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, from_right: bool | None) -> Tensor:
        """Compute s of the module's equations, along W from the left or right edge, or (None) the sum of both.

        A is that of both passes, and dt (B, H, W, R).
        """
        return self.row_scan(x, dt, A[ROW], B, None, *self.scan_parameters(ROW), *directions(from_right))

    def scan_columns(self, x: Tensor, dt: Tensor, A: Tensor, C: Tensor, from_bottom: bool | None) -> Tensor:
        """Compute y of the module's equations, along H from the top or bottom edge, or (None) the mean of both."""
        D, *delta_parameters = self.scan_parameters(COLUMN)
        if from_bottom is None:
            # The scan is linear in both, and both are smaller than the map.
            C, D = 0.5 * C, 0.5 * D
        return self.column_scan(x, dt, A[COLUMN], None, C, D, *delta_parameters, *directions(from_bottom))

    def scan_parameters(self, which: int) -> tuple[Tensor, ...]:
        """Return a pass's D, bias of delta and weight of delta, as a scan takes them."""
        return module_inputs(self.D[which], self.dt_bias[which], self.dt_weight[which])


def directions(from_end: bool | None) -> tuple[bool, bool]:
    """Return a line scan's ``reverse`` and ``both_ways``. By position, since hooks of counters see no keywords."""
    return bool(from_end), from_end is None


class PlainV2MMixer(V2MMixer):
    """Mixer of the plain layout: a causal convolution and a projection before each scan.

    ``in_proj`` to (x, z); causal depthwise convolution along W, SiLU, scan along W, times SiLU(z); causal depthwise
    convolution along H, SiLU, scan along H, times SiLU(z); ``out_proj``. A convolution is causal in its scan's own
    direction. The corners at one side share their scan along W, so that two scans along W and four along H are run.

    Args:
        channels, inner_channels, d_state, dt_rank, depth: See :class:`V2MMixer`.
        d_conv: Length of the causal convolutions.
    """

    def __init__(
        self, channels: int, inner_channels: int, d_state: int, dt_rank: int, depth: int = 1, d_conv: int = 4
    ) -> None:
        super().__init__(channels, inner_channels, d_state, dt_rank, depth)
        self.row_conv = nn.Conv1d(inner_channels, inner_channels, d_conv, padding=d_conv - 1, groups=inner_channels)
        self.column_conv = nn.Conv1d(inner_channels, inner_channels, d_conv, padding=d_conv - 1, groups=inner_channels)
        self.x_proj = nn.ModuleList(nn.Linear(inner_channels, dt_rank + d_state, bias=False) for _ in range(PASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map (B, H, W, C) into one of the same shape."""
        x, gate = self.project_in(x)
        A = self.A
        left = self.first_pass(x, gate, A, from_right=False)
        left = self.second_pass(left, A, from_bottom=False) + self.second_pass(left, A, from_bottom=True)
        right = self.first_pass(x, gate, A, from_right=True)
        right = self.second_pass(right, A, from_bottom=False) + self.second_pass(right, A, from_bottom=True)
        return apply_linear(self.out_proj, torch.lerp(left, right, 0.5) * gate)

    def corner(self, x: Tensor, gate: Tensor, from_right: bool, from_bottom: bool) -> Tensor:
        """Compute one corner's y from the outputs of :meth:`project_in`; all maps are (B, H, W, E)."""
        A = self.A
        return self.second_pass(self.first_pass(x, gate, A, from_right), A, from_bottom)

    def first_pass(self, x: Tensor, gate: Tensor, A: Tensor, from_right: bool) -> Tensor:
        """Compute s', the gated scan along W from one side."""
        x = F.silu(apply_causal_conv(self.row_conv, x, 'row', from_right))
        dt, B = self.project(ROW, x)
        return gate * self.scan_rows(x, dt, A, B, from_right)

    def second_pass(self, s: Tensor, A: Tensor, from_bottom: bool) -> Tensor:
        """Compute y, the scan of s' along H from the top or bottom."""
        s = F.silu(apply_causal_conv(self.column_conv, s, 'column', from_bottom))
        dt, C = self.project(COLUMN, s)
        return self.scan_columns(s, dt, A, C, from_bottom)

    def project(self, which: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return a pass's dt (B, H, W, R), and its B or C (B, H, W, N)."""
        return apply_linear(self.x_proj[which], x).split((self.dt_rank, self.d_state), dim=-1)


class HierarchicalV2MMixer(V2MMixer):
    """Mixer of the hierarchical layout: VMamba's SS2D with the 2-D state-space model as its scan.

    ``in_proj`` to (x, z) -> depthwise 3x3 convolution of x -> SiLU -> scans along W, times SiLU(z), scans along H
    -> LayerNorm -> times SiLU(z) -> ``out_proj``. Delta, B and C of both passes depend on x at the pixel. They are
    then the same for all corners, the second scan is linear in the first one's result, and the sum of the four corners
    is a scan along W from both sides and one along H from both ends.

    Args:
        channels, inner_channels, d_state, dt_rank, depth: See :class:`V2MMixer`.
    """

    def __init__(self, channels: int, inner_channels: int, d_state: int, dt_rank: int, depth: int = 1) -> None:
        super().__init__(channels, inner_channels, d_state, dt_rank, depth)
        self.conv = conv2d(inner_channels, inner_channels, 3, padding=1, groups=inner_channels, bias=False)
        self.x_proj = nn.Linear(inner_channels, PASSES * (dt_rank + d_state), bias=False)
        self.norm = nn.LayerNorm(inner_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map (B, H, W, C) into one of the same shape."""
        x, gate = self.project_in(x)
        x = F.silu(apply_conv(self.conv, x))
        A = self.A
        dt, B, C = self.project(x)
        s = gate * self.scan_rows(x, dt[ROW], A, B, from_right=None)
        y = self.scan_columns(s, dt[COLUMN], A, C, from_bottom=None)
        return apply_linear(self.out_proj, self.norm(y) * gate)

    def corner(self, x: Tensor, gate: Tensor, from_right: bool, from_bottom: bool) -> Tensor:
        """Compute one corner's y from x after the convolution and SiLU, and the gate; all maps are (B, H, W, E)."""
        A = self.A
        dt, B, C = self.project(x)
        s = gate * self.scan_rows(x, dt[ROW], A, B, from_right)
        return self.scan_columns(s, dt[COLUMN], A, C, from_bottom)

    def project(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """Return dt of both passes, each (B, H, W, R), B of the first and C of the second (B, H, W, N)."""
        sizes = [self.dt_rank] * PASSES + [self.d_state] * PASSES
        # As many names as there are parts: symbolic tracing knows no star.
        dt_row, dt_column, B, C = apply_linear(self.x_proj, x).split(sizes, dim=-1)
        return (dt_row, dt_column), B, C
