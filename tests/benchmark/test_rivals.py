"""Other people's scans, and backbones compiled, in bfloat16 and beside a busy core: each comparison at a tiny size."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

import cuda_ops
from ssm_backbones.benchmark import Comparison, Settings, backbones, compiled, rivals, scans
from ssm_backbones.benchmark.comparison import measure_comparison
from ssm_backbones.benchmark.cpu import bfloat16_comparison
from ssm_backbones.benchmark.loaded import busy_core, loaded_comparison, parallel_regions
from ssm_backbones.benchmark.rivals import RIVALS, Rival, sequence_scan_comparisons

CPU = torch.device('cpu')
QUICK = {'associative_scan', "llama.cpp's way"}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    """A backbone that takes no time."""
    for name in ('small', 'other'):
        monkeypatch.setitem(backbones.BACKBONES, name, dict(type='VMamba', arch='test', out_indices=(3,)))
    return 'small'


def measured(comparison: Comparison, *labels: str) -> dict:
    """Measure some of a comparison's entries once; skip where one is not available, and fail where one fails."""
    entries = {label: comparison.entries[label] for label in labels}
    result = measure_comparison(dataclasses.replace(comparison, entries=entries), Settings(repeats=1))
    if result['skipped']:
        pytest.skip(str(result['skipped']))
    assert not result['failed']
    return result['entries']


@pytest.mark.parametrize('states', (1, 3))
@pytest.mark.parametrize(
    'label', [pytest.param(each, marks=() if each in QUICK else pytest.mark.slow) for each in RIVALS]
)
def test_rivals_compute_the_scan(label: str, states: int) -> None:
    for comparison in sequence_scan_comparisons(states, (2, 5, 6)):
        if label in comparison.entries:
            assert measured(comparison, label)[label]['median_s'] > 0
        else:
            assert not RIVALS[label].trains and 'backward' in comparison.name


def test_a_rival_that_computes_something_else_is_not_measured() -> None:
    def load():
        return lambda *inputs: cuda_ops.selective_scan(*inputs[:6], delta_bias=inputs[6], delta_softplus=True) * 1.002

    for train, message in ((False, 'its output differs'), (True, 'its gradient of u differs')):
        with pytest.raises(RuntimeError, match=message):
            rivals._checked_call(Rival(load, channels_last=True), (1, 4, 3), 2, train, CPU)


def test_the_layouts_hold_the_same_sequences() -> None:
    first, last = (scans.sequence_scan_inputs((2, 5, 3), 4, CPU, channels_last=each) for each in (False, True))
    for one, other in zip(first, last, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert first[0].stride() == (15, 5, 1) and last[0].stride() == (15, 1, 3)


def test_the_faster_option_is_measured(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = []
    # Importing torch's compiler takes a second.
    monkeypatch.setattr(compiled, 'set_recompile_limit', lambda limit: None)
    monkeypatch.setattr(compiled, '_graph_breaks', lambda: 0)
    monkeypatch.setattr(compiled, 'backbone_call', lambda *given, change: options.append(change.keywords) or int)
    times = {'layout_optimization=True': [3.0, 3.0, 9.0], 'layout_optimization=False': [2.0, 8.0, 2.0]}
    monkeypatch.setattr(compiled, 'measure_interleaved', lambda *given, **options: times)
    details = compiled.compiled_call(small, 1, 32, False, CPU).details
    assert details['option'] == 'layout_optimization=False' and details['other option / this'] == 1.5
    assert options == [{'options': {'layout_optimization': each}} for each in (True, False)]


@pytest.mark.slow
@pytest.mark.parametrize('train', (False, True))
def test_compiled_backbones(monkeypatch: pytest.MonkeyPatch, train: bool) -> None:
    arch = dict(layout='plain', embed_dims=8, depth=1, d_state=2)
    monkeypatch.setitem(backbones.BACKBONES, 'small', dict(type='V2M', arch=arch))
    comparison = compiled.compiled_comparisons(('small',), (), 1, 32)[train]
    entries = measured(comparison, 'small', 'small compiled')
    details = entries['small compiled']['details']
    assert details['compile s'] > 0 and details['graph breaks'] == 0
    assert set(entries) == set(comparison.entries)


@pytest.mark.slow
@pytest.mark.parametrize('name', ('convnext-tiny-timm', 'mambaout-tiny'))
def test_backbones_of_timm(name: str) -> None:
    meta = torch.device('meta')
    with meta:
        try:
            model = backbones.build_backbone(name, meta)
        except backbones.Unavailable as error:
            pytest.skip(str(error))
        (y,) = model(torch.empty(2, 3, 224, 224))
    assert y.shape[0] == 2 and y[0].numel() in (7 * 7 * 768, 7 * 7 * 576)


def test_bfloat16_and_float32(small: str) -> None:
    comparison = bfloat16_comparison(small, 1, 32)
    assert set(measured(comparison, 'bfloat16', 'float32')) == {'bfloat16', 'float32'}


def test_a_busy_core() -> None:
    with pytest.raises(ZeroDivisionError), busy_core() as process:
        assert os.sched_getaffinity(process) == {max(os.sched_getaffinity(0))}
        raise ZeroDivisionError
    assert not Path(f'/proc/{process}').exists()


def test_a_training_step_beside_a_busy_core(small: str) -> None:
    comparison = loaded_comparison(small, 'other', 1, 32)
    details = measured(comparison, *comparison.entries)[small]['details']
    # A block has one scan, and a scan one backward pass.
    assert details['parallel regions of its scans'] == 2 * sum([1, 1, 2, 1])
    assert 0 < details['smallest, state updates'] <= details['largest, state updates']


@pytest.mark.parametrize(
    ('scan', 'inputs', 'routes'),
    [
        (cuda_ops.cross_selective_scan, scans.cross_scan_inputs, 4),
        (cuda_ops.wavefront_scan, scans.wavefront_inputs, 1),
    ],
)
def test_parallel_regions_are_counted(scan, inputs, routes: int) -> None:
    call = scans.scan_call(scan, inputs((2, 4, 5, 6), 3, CPU), True)
    assert parallel_regions(call) == [2 * 4 * 5 * 6 * 3 * routes] * 2
