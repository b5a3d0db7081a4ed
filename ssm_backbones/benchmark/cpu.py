"""Comparisons of backbones and scans in float32, as data; they are for the CPU first, and most run on GPUs as well."""

from __future__ import annotations

from functools import partial

import torch

import cuda_ops
from ssm_backbones.benchmark import scans
from ssm_backbones.benchmark.backbones import backbone_call
from ssm_backbones.benchmark.baselines import WavefrontByDiagonals, cross_scan_by_loop
from ssm_backbones.benchmark.comparison import Comparison, Pair, passes
from ssm_backbones.benchmark.roofline import wavefront_scan_work
from ssm_backbones.benchmark.scans import Shape
from ssm_backbones.benchmark.timing import Call


def backbone_comparisons(
    name: str,
    forward: float | None = None,
    training: float | None = None,
    against: tuple[str, ...] = ('swin-tiny', 'convnext-tiny'),
) -> list[Comparison]:
    """Compare a backbone with others at 224x224, with target ratios to the first of them.

    Args:
        name: Key of :data:`~ssm_backbones.benchmark.backbones.BACKBONES`.
        forward: Target of the forward pass, at batch 1 and 4.
        training: Target of forward and backward pass together, at batch 4.
        against: Keys of the others.
    """
    comparisons = []
    for batch, train in ((1, False), (4, False), (4, True)):
        entries = {entry: partial(backbone_call, entry, batch, 224, train) for entry in (name, *against)}
        pairs = (Pair(name, against[0], training if train else forward), *(Pair(name, each) for each in against[1:]))
        comparisons.append(
            Comparison(
                f'{name}/{passes(train)}/batch-{batch}',
                f'{passes(train)} at 224x224, batch {batch}',
                entries,
                pairs,
                images=batch,
            )
        )
    return comparisons


def bfloat16_comparison(name: str, batch: int = 4, size: int = 224) -> Comparison:
    """Compare a backbone's forward and backward pass in bfloat16 autocast with that in float32.

    Args:
        name: Key of :data:`~ssm_backbones.benchmark.backbones.BACKBONES`.
        batch: Batch size.
        size: Side of the images.
    """
    return Comparison(
        f'bfloat16/{name}/{passes(True)}/batch-{batch}',
        f'{passes(True)} at {size}x{size}, batch {batch}, bfloat16 autocast and float32',
        {
            'bfloat16': partial(backbone_call, name, batch, size, True, amp=True),
            'float32': partial(backbone_call, name, batch, size, True),
        },
        (Pair('bfloat16', 'float32', 1.2),),
        devices=('cpu',),
        images=batch,
    )


def cross_scan_comparisons(states: int, shape: Shape = (1, 56, 56, 96)) -> list[Comparison]:
    """Compare the cross scan with the loop and with a copy of its inputs and outputs, its lower bound."""

    def scan(function, train: bool, device: torch.device) -> Call:
        return scans.scan_call(function, scans.cross_scan_inputs(shape, states, device), train)

    def copy(train: bool, device: torch.device) -> Call:
        return scans.copy_call(scans.cross_scan_inputs(shape, states, device), train)

    comparisons = []
    for train in (False, True):
        entries = {
            'cuda_ops': partial(scan, cuda_ops.cross_selective_scan, train),
            'loop': partial(scan, cross_scan_by_loop, train),
            'copy': partial(copy, train),
        }
        pairs = (Pair('cuda_ops', 'loop'), Pair('cuda_ops', 'copy'))
        comparisons.append(
            Comparison(
                f'cross-scan/{passes(train)}/n{states}', f'{passes(train)} at {shape}, N={states}', entries, pairs
            )
        )
    return comparisons


def wavefront_comparisons(states: int, shape: Shape = (1, 56, 56, 64), target: float | None = None) -> list[Comparison]:
    """Compare the wavefront scan with a copy, a loop over diagonals, and the exponentials it must compute.

    Args:
        states: State size N.
        shape: Shape of the map.
        target: Target of the forward pass relative to its exponentials.
    """
    height, width = shape[1:3]

    def scan(train: bool, device: torch.device) -> Call:
        return scans.scan_call(cuda_ops.wavefront_scan, scans.wavefront_inputs(shape, states, device), train)

    def by_diagonals(train: bool, device: torch.device) -> Call:
        function = WavefrontByDiagonals(height, width, device, compiled=False)
        return scans.scan_call(function, scans.wavefront_inputs(shape, states, device), train)

    def copy(train: bool, device: torch.device) -> Call:
        return scans.copy_call(scans.wavefront_inputs(shape, states, device), train)

    def exponentials(train: bool, device: torch.device) -> Call:
        forward, backward = wavefront_scan_work(shape, states, itemsize=4)
        return scans.exponentials_call(forward.exponentials + (backward.exponentials if train else 0), device)

    comparisons = []
    for train in (False, True):
        entries = {
            'cuda_ops': partial(scan, train),
            'exponentials': partial(exponentials, train),
            'diagonals': partial(by_diagonals, train),
            'copy': partial(copy, train),
        }
        pairs = (
            Pair('cuda_ops', 'exponentials', None if train else target),
            Pair('cuda_ops', 'diagonals'),
            Pair('cuda_ops', 'copy'),
        )
        comparisons.append(
            Comparison(
                f'wavefront/{passes(train)}/n{states}',
                f'{passes(train)} at {shape}, N={states}',
                entries,
                pairs,
                devices=('cpu',),
            )
        )
    return comparisons
