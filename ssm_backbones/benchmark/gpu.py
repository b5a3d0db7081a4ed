"""Comparisons for GPUs, as data: scans at the models' own sizes, and whole backbones, all in bfloat16.

Scans are compared with their lower bound and with the families' public implementations, in time and (wavefront scan)
peak memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import cuda_ops
from cuda_ops.route_reference import low_rank_delta
from ssm_backbones.benchmark import scans
from ssm_backbones.benchmark.backbones import backbone_call, use_fused_attention
from ssm_backbones.benchmark.baselines import (
    WavefrontByDiagonals,
    cross_scan_by_indexing,
    mamba_layout,
    mamba_selective_scan,
)
from ssm_backbones.benchmark.comparison import Comparison, LowerBound, Pair, passes
from ssm_backbones.benchmark.roofline import Work, lower_bound, measure_rates, route_scan_work, wavefront_scan_work
from ssm_backbones.benchmark.scans import Inputs, Shape
from ssm_backbones.benchmark.timing import Call

# Batch, height and width, the most telling first: a run that is cut short by the clock has them. Maps of stage 1 have
# a stride of 4, those of stage 2 of 8.
IMAGES = {
    '224/batch-128': (128, 224, 224),
    '1280x800/batch-2': (2, 800, 1280),
    '2048/batch-1': (1, 2048, 2048),
    '224/batch-64': (64, 224, 224),
    '1024/batch-1': (1, 1024, 1024),
}
STRIDES = {'stage1': 4, 'stage2': 8}
# Target of a pass, relative to its lower bound.
FORWARD, TRAINING = 2.0, 3.0


@dataclass(frozen=True)
class ScanJob:
    """A model's scan.

    Attributes:
        op: Name of the operator.
        model: Name of the model.
        channels: Channels of the scan in stage 1; twice as many in stage 2.
        states: State size N.
    """

    op: str
    model: str
    channels: int
    states: int


JOBS = (
    ScanJob('cross-scan', 'vmamba-tiny', 96, 1),
    ScanJob('wavefront', 'mamba2d-tiny', 64, 16),
    ScanJob('cross-scan', 'vmamba-base', 256, 1),
    ScanJob('wavefront', 'mamba2d-small', 96, 16),
    ScanJob('cross-scan', 'vmamba-tiny-v0', 192, 16),
    ScanJob('line-scan', 'v2m-hier-small', 96, 4),
)


def backbone_comparisons(name: str, against: str = 'swin-tiny', target: float = 1.0) -> list[Comparison]:
    """Compare two backbones at 224x224, batch 128, bfloat16, channels-last, in inference and training."""

    def entry(backbone: str, train: bool, device: torch.device) -> Call:
        change = use_fused_attention if backbone == against else None
        return backbone_call(backbone, 128, 224, train, device, amp=True, channels_last=True, change=change)

    return [
        Comparison(
            f'gpu/{name}/{passes(train)}',
            f'{passes(train)} at 224x224, batch 128, bfloat16',
            {each: partial(entry, each, train) for each in (name, against)},
            (Pair(name, against, target),),
            devices=('cuda',),
            images=128,
        )
        for train in (False, True)
    ]


def scan_comparisons(job: ScanJob, image: str, stage: str) -> list[Comparison]:
    """Compare a model's scan in a stage, forward and then forward and backward.

    Args:
        job: The scan.
        image: Key of :data:`IMAGES`.
        stage: Key of :data:`STRIDES`.
    """
    batch, height, width = IMAGES[image]
    stride = STRIDES[stage]
    shape = (batch, height // stride, width // stride, job.channels * stride // 4)
    comparisons = []
    for train in (False, True):
        entries: dict[str, Callable[[torch.device], Call | LowerBound]] = {
            'cuda_ops': partial(_ours, job.op, shape, job.states, train),
            'lower bound': partial(_lower_bound, job.op, shape, job.states, train),
        }
        pairs = [Pair('cuda_ops', 'lower bound', TRAINING if train else FORWARD)]
        if job.op == 'cross-scan':
            entries['mamba-ssm'] = partial(_by_mamba, shape, job.states, train)
            pairs.append(Pair('cuda_ops', 'mamba-ssm', 1 / 3 if train else None))
        elif job.op == 'wavefront':
            entries['diagonals'] = partial(_by_diagonals, shape, job.states, train)
            # No states are stored without a backward pass.
            pairs.append(Pair('cuda_ops', 'diagonals', 1 / 5, memory_target=1 / 8 if train else None))
        comparisons.append(
            Comparison(
                f'gpu/{job.op}/{job.model}/{stage}/{image}/{passes(train)}',
                f'{passes(train)} at {shape}, N={job.states}, bfloat16',
                entries,
                tuple(pairs),
                devices=('cuda',),
            )
        )
    return comparisons


def _rows(x: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return cuda_ops.line_scan(x, delta, A, B, None, axis='row')


_SCANS: dict[str, tuple[Callable[..., Tensor], Callable[..., Inputs]]] = {
    'cross-scan': (cuda_ops.cross_selective_scan, scans.cross_scan_inputs),
    'line-scan': (_rows, scans.line_scan_inputs),
    'wavefront': (cuda_ops.wavefront_scan, scans.wavefront_inputs),
}


def _inputs(op: str, shape: Shape, states: int, device: torch.device) -> Inputs:
    return _SCANS[op][1](shape, states, device, torch.bfloat16)


def _ours(op: str, shape: Shape, states: int, train: bool, device: torch.device) -> Call:
    return scans.scan_call(_SCANS[op][0], _inputs(op, shape, states, device), train)


def _by_mamba(shape: Shape, states: int, train: bool, device: torch.device) -> Call:
    scan = partial(cross_scan_by_indexing, selective_scan=mamba_selective_scan())
    return scans.scan_call(scan, mamba_layout(*_inputs('cross-scan', shape, states, device)), train)


def _by_diagonals(shape: Shape, states: int, train: bool, device: torch.device) -> Call:
    scan = WavefrontByDiagonals(*shape[1:3], device, compiled=True)
    return scans.scan_call(scan, _inputs('wavefront', shape, states, device), train)


def work(op: str, shape: Shape, states: int) -> tuple[Work, Work]:
    """Return the work of the forward and the backward pass of a scan in bfloat16."""
    if op == 'wavefront':
        return wavefront_scan_work(shape, states, itemsize=2)
    routes, projections = (4, 2) if op == 'cross-scan' else (1, 1)
    return route_scan_work(shape, routes, states, itemsize=2, projections=projections)


def _lower_bound(op: str, shape: Shape, states: int, train: bool, device: torch.device) -> LowerBound:
    forward, backward = work(op, shape, states)
    return lower_bound((forward, backward) if train else (forward,), measure_rates(device))


def low_rank_delta_comparisons(shape: Shape, rank: int) -> list[Comparison]:
    """Compare a cross scan of low-rank dt with a matrix product that computes delta before the scan.

    Args:
        shape: Shape of the map, (B, H, W, E).
        rank: Rank R of dt.
    """
    return [
        Comparison(
            f'gpu/cross-scan-low-rank/{"x".join(map(str, shape))}/rank-{rank}/{passes(train)}',
            f'{passes(train)} at {shape}, N=1, dt of rank {rank}, bfloat16',
            {
                'in the scan': partial(_low_rank_call, _scan_of_dt, shape, rank, train),
                'before': partial(_low_rank_call, _scan_after_product, shape, rank, train),
            },
            (Pair('in the scan', 'before', 1.0, memory_target=1.0),),
            devices=('cuda',),
        )
        for train in (False, True)
    ]


def _scan_of_dt(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor, weight: Tensor
) -> Tensor:
    return cuda_ops.cross_selective_scan(x, dt, A, B, C, D, bias, delta_weight=weight)


def _scan_after_product(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor, weight: Tensor
) -> Tensor:
    return cuda_ops.cross_selective_scan(x, low_rank_delta(dt, weight), A, B, C, D, bias)


def _low_rank_call(scan: Callable[..., Tensor], shape: Shape, rank: int, train: bool, device: torch.device) -> Call:
    x, _, *others = _inputs('cross-scan', shape, 1, device)
    # As SS2D has them: beside the projections of their route.
    dt = torch.randn(*shape[:3], 4, rank + 2, device=device, dtype=torch.bfloat16)[..., :rank]
    weight = torch.randn(4, shape[3], rank, device=device) / rank**0.5
    return scans.scan_call(scan, (x, dt, *others, weight), train)


COMPARISONS: list[Comparison] = [
    *(each for name in ('vmamba-tiny', 'mamba2d-tiny') for each in backbone_comparisons(name)),
    *(each for image in IMAGES for stage in STRIDES for job in JOBS for each in scan_comparisons(job, image, stage)),
    *low_rank_delta_comparisons((128, 56, 56, 96), 6),
    *low_rank_delta_comparisons((128, 28, 28, 192), 12),
]
