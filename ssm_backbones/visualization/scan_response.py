"""The response of a pixel to every other one through a scan: the attention of a state-space model.

With delta, B and C fixed at their values for an image, a scan is linear in its input u and acts on each channel
separately, so each pixel of its output is a weighted sum of pixels of u, as in attention::

    y_e(p) = sum_q w_e(p <- q) * u_e(q)

For a scan along a route, ``w_e(p <- q) = C_p^T (product of exp(d_l * A) over l after q, up to p) d_q * B_q`` if the
route visits q before p, 0 if it visits q after p, plus D at q = p. The weights are computed by the compiled operators
themselves: all weights that a pixel reads by one backward pass, all that it feeds by one forward pass.

Source of the view: Ali et al., "The Hidden Attention of Mamba Models" (arXiv 2403.01590); VMamba (arXiv 2401.10166),
appendix on activation maps of SS2D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import cuda_ops
from cuda_ops.route_reference import COLUMN, COLUMN_REVERSED, ROW_REVERSED, low_rank_delta
from ssm_backbones.backbones.base import SSMBackbone
from ssm_backbones.layers.calls import apply_causal_conv, apply_conv
from ssm_backbones.layers.mamba2d_mixer import ScanMixer
from ssm_backbones.layers.ss2d import ROUTES, SS2D
from ssm_backbones.layers.v2m_mixer import HierarchicalV2MMixer, PlainV2MMixer, V2MMixer
from ssm_backbones.visualization.stages import check_image, evaluating, resolve_block, resolve_stage, runs_of

SENSES = ('reads', 'feeds')
_ROUTE_NAMES = ('row by row', 'column by column', 'row by row, reversed', 'column by column, reversed')
_CORNERS = {
    'upper left': (False, False),
    'upper right': (True, False),
    'lower left': (False, True),
    'lower right': (True, True),
}

# Maps (1, H, W, E) to the same, linearly.
Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ScanResponse:
    """The weights between one pixel of a scan's map and all others.

    Attributes:
        names: Names of the K paths: routes, corners or directions.
        paths: float64 (K, h, w): ``sum_e |w_e|`` of each path alone.
        total: float64 (h, w): ``sum_e |sum over paths of w_e|``, at most the sum of ``paths``.
        point: Row and column of the pixel in the map.
        sense: ``'reads'``: the weights of all pixels in this one's output; ``'feeds'``: the weights of this pixel in
            all others' outputs.
        stage: Number of the stage.
        block: Number of the block in it.
    """

    names: tuple[str, ...]
    paths: np.ndarray
    total: np.ndarray
    point: tuple[int, int]
    sense: str
    stage: int
    block: int


def scan_stages(model: SSMBackbone) -> list[int]:
    """List the stages whose blocks mix by scans; Mamba2D's later ones do so by attention."""
    return [i for i, stage in enumerate(model.stages) if _scans(stage.blocks[0].mixer)]


def default_scan_stage(model: SSMBackbone) -> int:
    """Choose the stage to show by default: the second that scans (stride 8), or the last block of one resolution.

    Raises:
        ValueError: If no stage scans.
    """
    stages = scan_stages(model)
    if not stages:
        raise ValueError(f'no stage of the {type(model).__name__} mixes by a scan.')
    one_resolution = len(set(model.stage_strides)) == 1
    return stages[-1] if one_resolution else stages[min(1, len(stages) - 1)]


def scan_response(
    model: SSMBackbone,
    image: Tensor,
    stage: int | None = None,
    block: int | None = None,
    pixel: tuple[int, int] | None = None,
    sense: str = 'reads',
) -> ScanResponse:
    """Compute the weights between a pixel and all others through a block's scan; see the module's docstring.

    VMamba's paths are its four routes, V2M's its four corners (row scan, gate, column scan; in the plain layout with
    the convolution between them, and its SiLU as a gate held as it is), Mamba2D's the one direction of the block. The
    sum over V2M's corners is not halved, as it is in the model.

    Args:
        model: The backbone.
        image: One preprocessed image, (1, in_channels, H, W) or (in_channels, H, W).
        stage: Number of the stage, negative ones counted from the end; None is :func:`default_scan_stage`.
        block: Number of the block in the stage, negative ones counted from the end; None is the last one.
        pixel: Row and column of a pixel of the image; the pixel of the stage's map is the one whose square of
            ``stride`` pixels it lies in. None is (h // 2, w // 2) of the map.
        sense: ``'reads'`` or ``'feeds'``, see :class:`ScanResponse`.

    Raises:
        ValueError: If there is no such stage, block or pixel, or the stage mixes by attention.
    """
    check_image(image)
    if sense not in SENSES:
        raise ValueError(f'sense is one of {", ".join(SENSES)}, got {sense!r}.')
    number = default_scan_stage(model) if stage is None else resolve_stage(model, stage)
    block_number = resolve_block(model, number, block)
    mixer = model.stages[number].blocks[block_number].mixer
    if not _scans(mixer):
        raise ValueError(
            f'stage {number} mixes by {type(mixer).__name__}, which has no scan; '
            f'stages that scan: {", ".join(map(str, scan_stages(model)))}.'
        )
    height, width = image.shape[-2:]
    if pixel is not None and not (0 <= pixel[0] < height and 0 <= pixel[1] < width):
        raise ValueError(
            f'row {pixel[0]}, column {pixel[1]} lie outside the image as the model is given it, '
            f'which has {height} rows and {width} columns.'
        )
    with evaluating(model), torch.no_grad():
        x = runs_of(model, image.reshape(1, *image.shape[-3:]), {'mixer': mixer})['mixer'].given
        paths, channels = scan_paths(mixer, x)
        cells = _cells(model, x.shape[1], x.shape[2], x.device)
    if pixel is None:
        row, column = (size // 2 for size in cells.shape)
    else:
        # A map may not cover an odd image's last pixels.
        row, column = (
            min(index // model.stage_strides[number], size - 1) for index, size in zip(pixel, cells.shape, strict=True)
        )
    probe = x.new_zeros(x.shape[1] * x.shape[2], channels)
    probe[cells[row, column]] = 1
    probe = probe.view(1, *x.shape[1:3], channels)
    weights = torch.stack([_weights(path, probe, sense) for path in paths.values()]).flatten(1, 3)[:, cells]
    return ScanResponse(
        tuple(paths),
        weights.abs().sum(-1).cpu().numpy(),
        weights.sum(0).abs().sum(-1).cpu().numpy(),
        (row, column),
        sense,
        number,
        block_number,
    )


def scan_paths(mixer: nn.Module, x: Tensor) -> tuple[dict[str, Linear], int]:
    """Return the linear functions that a mixer's scans are for its input x (1, H, W, C), and their channels E.

    Raises:
        TypeError: If the mixer has no scan.
    """
    if isinstance(mixer, SS2D):
        (scan,) = _held_scans(lambda: mixer(x))
        return {name: scan.path(k) for k, name in enumerate(_ROUTE_NAMES)}, scan.channels
    if isinstance(mixer, ScanMixer):
        (scan,) = _held_scans(lambda: mixer(x))
        return {'from the ' + ('lower right' if mixer.reverse else 'upper left'): scan}, scan.channels
    if isinstance(mixer, V2MMixer):
        u, gate = mixer.project_in(x)
        if isinstance(mixer, HierarchicalV2MMixer):
            u = F.silu(apply_conv(mixer.conv, u))
        corners = {f'from the {name}': _corner(mixer, u, gate, *ends) for name, ends in _CORNERS.items()}
        return corners, gate.shape[3]
    raise TypeError(f'a {type(mixer).__name__} has no scan.')


def _scans(mixer: nn.Module) -> bool:
    return isinstance(mixer, SS2D | ScanMixer | V2MMixer)


def _corner(mixer: Any, u: Tensor, gate: Tensor, from_right: bool, from_bottom: bool) -> Linear:
    rows, columns = _held_scans(lambda: mixer.corner(u, gate, from_right, from_bottom))
    if not isinstance(mixer, PlainV2MMixer):
        return lambda v: columns(gate * rows(v))
    bias: Any = mixer.column_conv.bias

    def conv(s: Tensor) -> Tensor:
        return apply_causal_conv(mixer.column_conv, s, 'column', from_bottom)

    # Between the scans lies SiLU(conv(s)), that is conv(s) times a gate; the bias is no part of the weights.
    between = torch.sigmoid(conv(gate * rows(rows.given)))
    return lambda v: columns(between * (conv(gate * rows(v)) - bias))


def _cells(model: SSMBackbone, height: int, width: int, device: torch.device) -> Tensor:
    """Find each map pixel's (h, w) place in the flattened grid, which may hold class tokens too."""
    cells = torch.arange(height * width, device=device).view(1, height, width, 1)
    return model.drop_class_tokens(cells)[0, :, :, 0]


def _weights(path: Linear, probe: Tensor, sense: str) -> Tensor:
    """Compute every w_e between the probed pixel and the others, float64 (1, H, W, E)."""
    if sense == 'feeds':
        with torch.no_grad():
            return path(probe).double()
    with torch.enable_grad():
        u = torch.zeros_like(probe, requires_grad=True)
        return torch.autograd.grad(path(u), u, probe)[0].double()


class _RouteScan:
    """A route scan as it ran for an image, as a function of its input alone.

    Attributes:
        given: The input that it ran with, (1, H, W, E).
        channels: E.
    """

    def __init__(
        self,
        x: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Any,
        C: Any,
        D: Any,
        delta_bias: Any,
        routes: list[int],
        per_line: bool,
        softplus: bool,
        chunk: int,
        delta_weight: Any = None,
    ) -> None:
        self.given, self.channels = x, x.shape[3]
        if delta_weight is not None:
            delta = low_rank_delta(delta, delta_weight)
        # The operator knows groups of channels with a B and C of their own; here there is one.
        B, C = (None if value is None else value.squeeze(4) for value in (B, C))
        self.held: tuple[Any, ...] = (delta, A, B, C, D, delta_bias)
        self.routes, self.per_line, self.softplus = routes, per_line, softplus

    def __call__(self, u: Tensor) -> Tensor:
        delta, A, B, C, D, bias = self.held
        if not self.per_line:
            return cuda_ops.cross_selective_scan(u, delta, A, B, C, D, bias, self.softplus)
        B, C = (None if value is None else value.squeeze(3) for value in (B, C))
        D, bias = (None if value is None else value[0] for value in (D, bias))
        route = self.routes[0]
        return cuda_ops.line_scan(
            u,
            delta.squeeze(3),
            A[0],
            B,
            C,
            D,
            bias,
            self.softplus,
            axis='column' if route in (COLUMN, COLUMN_REVERSED) else 'row',
            reverse=route in (ROW_REVERSED, COLUMN_REVERSED),
        )

    def path(self, k: int) -> Linear:
        """Return one of SS2D's routes as a function of the input, with C of the other routes set to zero."""
        delta, A, B, C, D, bias = self.held
        only = torch.zeros(ROUTES, 1, dtype=torch.bool, device=C.device)
        only[k] = True
        return lambda u: cuda_ops.cross_selective_scan(u, delta, A, B, C * only, D * only, bias, self.softplus)


class _WavefrontScan:
    """A recorded wavefront scan as a function of its input only; see :class:`_RouteScan`."""

    def __init__(self, x: Tensor, *held: Any) -> None:
        self.given, self.channels = x, x.shape[3]
        *self.held, self.reverse, _ = held

    def __call__(self, u: Tensor) -> Tensor:
        return cuda_ops.wavefront_scan(u, *self.held, reverse=self.reverse)


class _Recorder(TorchDispatchMode):
    """Dispatch mode that records the arguments of the scans."""

    def __init__(self) -> None:
        super().__init__()
        self.scans: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.cuda_ops.route_scan.default:
            self.scans.append(_RouteScan(*args))
        elif func is torch.ops.cuda_ops.wavefront_scan.default:
            self.scans.append(_WavefrontScan(*args))
        return func(*args, **(kwargs or {}))


def _held_scans(run: Callable[[], Any]) -> list[Any]:
    """Return the scans that ``run`` calls, in order, with all but their inputs held."""
    with torch.no_grad(), _Recorder() as recorder:
        run()
    return recorder.scans
