"""Backbones under ``torch.compile``: ours against others, and each against itself without it."""

from __future__ import annotations

import statistics
from functools import partial

import torch
from torch import nn

from ssm_backbones.benchmark.backbones import backbone_call
from ssm_backbones.benchmark.comparison import Comparison, DetailedCall, Pair, passes
from ssm_backbones.benchmark.timing import measure_interleaved, seconds
from ssm_backbones.utils.torch_compat import set_recompile_limit

OURS = ('vmamba-tiny', 'mamba2d-tiny', 'v2m-hier-small')
# The largest ratios of VMamba-T's forward pass aimed at.
OTHERS = {'swin-tiny': 0.85, 'convnext-tiny-timm': 1.0, 'mambaout-tiny': 1.0}
# Calls by which the faster of a backbone's two programs is found.
_TRIALS = 3


def compiled_comparisons(
    ours: tuple[str, ...] = OURS, others: tuple[str, ...] = tuple(OTHERS), batch: int = 4, size: int = 224
) -> list[Comparison]:
    """Compare compiled backbones in one run, forward and then forward and backward.

    Args:
        ours: Keys of :data:`~ssm_backbones.benchmark.backbones.BACKBONES`, each compared with all of the others.
        others: Keys of the others.
        batch: Batch size.
        size: Side of the images.
    """
    names = (*ours, *others)
    comparisons = []
    for train in (False, True):
        pairs = [
            Pair(_compiled(name), _compiled(other), OTHERS.get(other) if name == 'vmamba-tiny' and not train else None)
            for name in ours
            for other in others
        ]
        pairs += [Pair(_compiled(name), name) for name in names]
        comparisons.append(
            Comparison(
                f'compiled/{passes(train)}/batch-{batch}',
                f'{passes(train)} at {size}x{size}, batch {batch}, torch.compile with the faster of two options',
                {
                    **{_compiled(name): partial(compiled_call, name, batch, size, train) for name in names},
                    **{name: partial(backbone_call, name, batch, size, train) for name in names},
                },
                tuple(pairs),
                devices=('cpu',),
                images=batch,
            )
        )
    return comparisons


def compiled_call(name: str, batch: int, size: int, train: bool, device: torch.device) -> DetailedCall:
    """Prepare a backbone's pass as :func:`backbone_call` does, compiled.

    It is compiled with and without Inductor's layout optimization, which slows down what keeps its maps (B, H, W, C),
    and the faster program is measured. The details are those of this one; its first call is what compiles it.
    """
    # By default the ninth program of a function is not compiled, without a word; here all share one entry point.
    set_recompile_limit(256)
    calls, details = {}, {}
    for optimization in (True, False):
        label = f'layout_optimization={optimization}'
        compile_it = partial(nn.Module.compile, options={'layout_optimization': optimization})
        calls[label] = backbone_call(name, batch, size, train, device, change=compile_it)
        breaks = _graph_breaks()
        details[label] = {'compile s': round(seconds(calls[label], 1, device), 1)}
        details[label]['graph breaks'] = _graph_breaks() - breaks
    times = measure_interleaved(calls, _TRIALS, device, loops=dict.fromkeys(calls, 1))
    medians = {label: statistics.median(values) for label, values in times.items()}
    chosen, other = sorted(medians, key=medians.__getitem__)
    ratio = round(medians[other] / medians[chosen], 2)
    return DetailedCall(calls[chosen], {'option': chosen, **details[chosen], 'other option / this': ratio})


def _compiled(name: str) -> str:
    return f'{name} compiled'


def _graph_breaks() -> int:
    return sum(torch._dynamo.utils.counters['graph_break'].values())
