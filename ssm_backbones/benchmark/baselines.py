"""Baselines of the scans: other implementations of the same recurrences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ssm_backbones.benchmark.unavailable import Unavailable
from ssm_backbones.utils.torch_compat import set_recompile_limit


def cross_scan_by_loop(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> Tensor:
    """Compute ``cuda_ops.cross_selective_scan`` in plain PyTorch, by a loop over positions."""
    batch, height, width, channels = x.shape
    u = _in_order_of_routes(x.unsqueeze(3).expand(-1, -1, -1, 4, -1))
    d = nn.functional.softplus(_in_order_of_routes(delta) + delta_bias)
    h = x.new_zeros(batch, 4, channels, A.shape[2])
    outputs = []
    projections = (_in_order_of_routes(B).unsqueeze(3), _in_order_of_routes(C).unsqueeze(3))
    along = (d.unsqueeze(-1), u.unsqueeze(-1), *projections)
    for step, value, b, c in zip(*(each.unbind(1) for each in along), strict=True):
        h = torch.exp(step * A) * h + step * b * value
        outputs.append((h * c).sum(-1))
    y = torch.stack(outputs, dim=1) + D * u
    rows = (y[:, :, 0] + y[:, :, 2].flip(1)).view(x.shape)
    columns = (y[:, :, 1] + y[:, :, 3].flip(1)).view(batch, width, height, channels)
    return rows + columns.transpose(1, 2)


def _in_order_of_routes(grid: Tensor) -> Tensor:
    """Reorder (B, H, W, 4, ...) along the routes, (B, H*W, 4, ...)."""
    rows, columns = grid.flatten(1, 2), grid.transpose(1, 2).flatten(1, 2)
    return torch.stack([rows[:, :, 0], columns[:, :, 1], rows[:, :, 2].flip(1), columns[:, :, 3].flip(1)], dim=2)


MambaInputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def mamba_layout(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> MambaInputs:
    """Convert the cross scan's arguments to the layout of VMamba's public code: channel-first, along the routes.

    Its projections are made from the indexed map, so their order costs no time of its own and none is counted.

    Returns:
        X (B, E, H, W), delta (B, 4*E, L), A (4*E, N), B and C (B, 4, N, L), D and delta_bias (4*E).
    """

    def channel_first(grid: Tensor) -> Tensor:
        return _in_order_of_routes(grid).permute(0, 2, 3, 1).contiguous()

    return (
        x.permute(0, 3, 1, 2).contiguous(),
        channel_first(delta).flatten(1, 2),
        A.flatten(0, 1),
        channel_first(B),
        channel_first(C),
        D.flatten(),
        delta_bias.flatten(),
    )


def cross_scan_by_indexing(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    *,
    selective_scan: Callable[..., Tensor],
) -> Tensor:
    """Compute the cross scan like VMamba's public code: four copies of the map, one scan of them, and the sum.

    Args:
        x, delta, A, B, C, D, delta_bias: From :func:`mamba_layout`.
        selective_scan: With the interface of mamba-ssm's ``selective_scan_fn``.

    Returns:
        (B, E, H, W).
    """
    batch, channels, height, width = x.shape
    forward = torch.stack([x.flatten(2), x.transpose(2, 3).flatten(2)], dim=1)
    u = torch.cat([forward, forward.flip(-1)], dim=1).flatten(1, 2)
    y = selective_scan(u, delta, A, B, C, D, None, delta_bias, True).view(batch, 4, channels, height * width)
    y = y[:, :2] + y[:, 2:].flip(-1)
    rows, columns = y[:, 0].view(x.shape), y[:, 1].view(batch, channels, width, height)
    return rows + columns.transpose(2, 3)


def mamba_selective_scan() -> Callable[..., Tensor]:
    """Return mamba-ssm's compiled selective scan.

    Raises:
        Unavailable: If it is not installed.
    """
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except Exception as error:
        # A package that was built for another torch or GPU fails with whatever its loader raises.
        raise Unavailable(
            f'mamba-ssm cannot be imported ({type(error).__name__}: {error}); '
            'pip install --no-build-isolation mamba-ssm'
        ) from error
    return selective_scan_fn


class WavefrontByDiagonals:
    """The wavefront scan one anti-diagonal at a time, with the states of all pixels kept for the backward pass.

    That is the scheme of Mamba2D's public code, in PyTorch's operators. The inputs are brought into the order of the
    diagonals once; then a step takes a diagonal's states from those of the one before. With ``compiled`` a step is
    fused by torch.compile, so that it is about one launch forward, and keeps only its states for its backward pass.

    Args:
        height: Height of the map.
        width: Width of the map.
        device: Device of the inputs.
        compiled: Whether to fuse the steps.
    """

    def __init__(self, height: int, width: int, device: torch.device, compiled: bool) -> None:
        rows, columns = torch.arange(height).view(-1, 1), torch.arange(width).view(1, -1)
        diagonal = rows + columns
        # Sorted by diagonal, and in each by row.
        order = (diagonal * height + rows).flatten().argsort()
        self.order = order.to(device)
        self.back = order.argsort().to(device)
        # What counts of the top neighbour and of the left: half each, all on the border where the other is missing.
        top = torch.where(columns == 0, 1.0, 0.5) * (rows > 0)
        left = torch.where(rows == 0, 1.0, 0.5) * ((columns > 0) | (rows == 0))
        self.weights = [each.flatten()[order].view(-1, 1, 1).to(device) for each in (top, left)]
        self.lengths = torch.bincount(diagonal.flatten()).tolist()
        # Where a diagonal's left neighbours end among the states of the one before, which lie between rows of zeros;
        # counted so that it is never 0 or 1, for which torch.compile would compile separate graphs.
        shifts = [0] + [int(s >= width) for s in range(1, height + width - 1)]
        self.ends = [shift + 1 + count for shift, count in zip(shifts, self.lengths, strict=True)]
        self.step = _diagonal
        if compiled:
            # A few graphs for each pass and for a batch of one; over all sizes of a run they pass the usual limit.
            set_recompile_limit(64)
            self.step = torch.compile(_diagonal, dynamic=True, fullgraph=True)

    def __call__(
        self,
        x: Tensor,
        delta_top: Tensor,
        delta_left: Tensor,
        A_top: Tensor,
        A_left: Tensor,
        B_top: Tensor,
        B_left: Tensor,
        C: Tensor,
        D: Tensor,
    ) -> Tensor:
        """Takes and returns what ``cuda_ops.wavefront_scan`` does, without its options."""
        maps = [each.flatten(1, 2)[:, self.order] for each in (x, delta_top, delta_left, B_top, B_left, C)]
        along = [each.split(self.lengths, dim=1) for each in maps]
        weights = [each.split(self.lengths) for each in self.weights]
        states = A_top.new_zeros(x.shape[0], 2, *A_top.shape)
        outputs = []
        for end, *pixels in zip(self.ends, *along, *weights, strict=True):
            # As for a single pixel: a graph of its own for the two corners is not worth compiling.
            step = self.step if pixels[0].shape[1] > 1 else _diagonal
            states, y = step(states, end, A_top, A_left, D, *pixels)
            outputs.append(y)
        return torch.cat(outputs, dim=1)[:, self.back].view(x.shape)


def _diagonal(
    before: Tensor,
    end: int,
    A_top: Tensor,
    A_left: Tensor,
    D: Tensor,
    x: Tensor,
    delta_top: Tensor,
    delta_left: Tensor,
    B_top: Tensor,
    B_left: Tensor,
    C: Tensor,
    weight_top: Tensor,
    weight_left: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute the states (B, K + 2, E, N) of a diagonal of K pixels between rows of zeros, and outputs (B, K, E)."""
    count = x.shape[1]
    u = x.to(A_top.dtype)
    share = []
    for states, delta, A, B, weight in (
        (before[:, end - 1 - count : end - 1], delta_top, A_top, B_top, weight_top),
        (before[:, end - count : end], delta_left, A_left, B_left, weight_left),
    ):
        d = delta.to(A.dtype)
        inflow = (d * u).unsqueeze(-1) * B.to(A.dtype).unsqueeze(2)
        share.append(weight.to(A.dtype) * (torch.exp(d.unsqueeze(-1) * A) * states + inflow))
    h = share[0] + share[1]
    y = (h * C.to(A_top.dtype).unsqueeze(2)).sum(-1) + D * u
    return nn.functional.pad(h, (0, 0, 0, 0, 1, 1)), y.to(x.dtype)
