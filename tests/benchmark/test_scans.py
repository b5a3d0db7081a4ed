"""The benchmark's scans: what they are compared with computes the same, and the bounds count what must be done."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cuda_ops
from cuda_ops import _build
from ssm_backbones.benchmark import exp_rate, roofline, scans
from ssm_backbones.benchmark.baselines import (
    WavefrontByDiagonals,
    cross_scan_by_indexing,
    cross_scan_by_loop,
    mamba_layout,
)
from ssm_backbones.benchmark.roofline import Rates, Work, route_scan_work, wavefront_scan_work
from ssm_backbones.benchmark.unavailable import Unavailable

CPU = torch.device('cpu')
SHAPE, STATES = (1, 4, 5, 6), 3
INPUTS = {
    'cross': scans.cross_scan_inputs,
    'wavefront': scans.wavefront_inputs,
    'line': scans.line_scan_inputs,
}
SCANS = {
    'cross': cuda_ops.cross_selective_scan,
    'wavefront': cuda_ops.wavefront_scan,
    'line': lambda x, delta, A, B: cuda_ops.line_scan(x, delta, A, B, None, axis='row'),
}


def indexed_scan(*inputs):
    """The baseline of VMamba's public code, with our selective scan for mamba-ssm's, whose interface it has."""
    y = cross_scan_by_indexing(*mamba_layout(*inputs), selective_scan=cuda_ops.selective_scan)
    return y.permute(0, 2, 3, 1)


def diagonals(*inputs):
    """The baseline of Mamba2D's public code, for maps of any size."""
    return WavefrontByDiagonals(*inputs[0].shape[1:3], CPU, compiled=False)(*inputs)


@pytest.mark.parametrize(
    ('kind', 'baseline', 'shape', 'states'),
    [
        ('cross', cross_scan_by_loop, (2, 4, 5, 6), 1),
        ('cross', cross_scan_by_loop, (2, 4, 5, 6), 3),
        ('cross', indexed_scan, (2, 4, 5, 6), 1),
        ('cross', indexed_scan, (2, 5, 3, 6), 3),
        *(
            ('wavefront', diagonals, (2, height, width, 3), 4)
            for height, width in ((1, 1), (1, 5), (4, 1), (2, 2), (5, 3), (3, 7))
        ),
    ],
)
def test_baselines_compute_what_the_scans_compute(kind, baseline, shape, states) -> None:
    inputs = [value.double().requires_grad_() for value in INPUTS[kind](shape, states, CPU)]
    weight = torch.randn(shape, dtype=torch.float64)
    ours, theirs = SCANS[kind](*inputs), baseline(*inputs)
    torch.testing.assert_close(theirs, ours)
    expected = torch.autograd.grad(ours, inputs, weight)
    for gradient, want in zip(torch.autograd.grad(theirs, inputs, weight), expected, strict=True):
        torch.testing.assert_close(gradient, want)


@pytest.mark.parametrize('kind', INPUTS)
@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16))
def test_calls_scan_forward_and_back(kind, dtype) -> None:
    inputs = INPUTS[kind](SHAPE, STATES, CPU, dtype)
    forward = scans.scan_call(SCANS[kind], inputs, False)()
    torch.testing.assert_close(forward, SCANS[kind](*inputs))
    assert forward.dtype == dtype and not forward.requires_grad
    gradients = scans.scan_call(SCANS[kind], inputs, True)()
    assert [each.shape for each in gradients] == [each.shape for each in inputs]
    assert all(torch.isfinite(each).all() for each in gradients)


@pytest.mark.parametrize('train', (False, True))
def test_the_copy_moves_what_the_scan_has_to_touch(train: bool) -> None:
    class Count(TorchDispatchMode):
        copied = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.copy_.default:
                self.copied += args[1].nbytes
            return func(*args, **(kwargs or {}))

    pixels = 4 * 5
    needed = 4 * (pixels * (6 + 4 * 6 + 2 * 4 * STATES + 6) + 4 * 6 * (STATES + 2))
    call = scans.copy_call(scans.cross_scan_inputs(SHAPE, STATES, CPU), train)
    with Count() as count:
        call()
    assert count.copied == needed * (2 if train else 1)


@pytest.mark.parametrize(
    ('kind', 'work'),
    [
        ('cross', partial(route_scan_work, SHAPE, 4, STATES)),
        ('line', partial(route_scan_work, SHAPE, 1, STATES, projections=1)),
        ('wavefront', partial(wavefront_scan_work, SHAPE, STATES)),
    ],
)
def test_lower_bounds_count_the_bytes_of_the_maps(kind, work) -> None:
    inputs = [value.bfloat16() for value in INPUTS[kind](SHAPE, STATES, CPU)]
    # Maps have an entry for every pixel, parameters have not.
    maps = sum(value.nbytes for value in inputs if value.shape[:3] == SHAPE[:3])
    y = SCANS[kind](*[value if value.shape[:3] == SHAPE[:3] else value.float() for value in inputs])
    forward, backward = work(itemsize=2)
    assert forward.bytes == maps + y.nbytes
    assert backward.bytes == 2 * maps + y.nbytes


def test_lower_bounds_count_the_exponentials() -> None:
    pixels = 4 * 5
    assert [each.exponentials for each in route_scan_work(SHAPE, 4, 3, 2)] == [pixels * 4 * 6 * (3 + 2)] * 2
    assert [each.exponentials for each in route_scan_work(SHAPE, 1, 3, 2, softplus=False)] == [pixels * 6 * 3] * 2
    assert [each.exponentials for each in wavefront_scan_work(SHAPE, 3, 2)] == [pixels * 2 * 6 * 3] * 2


@pytest.mark.parametrize(
    ('work', 'megabytes', 'billions', 'microseconds'),
    # Rows of the table in docs/kernels.md.
    [
        (route_scan_work((128, 56, 56, 96), 4, 1, 2), (469, 861), 0.46, (125, 205)),
        (route_scan_work((64, 56, 56, 192), 4, 16, 2), (514, 951), 2.77, (749, 749)),
        (wavefront_scan_work((128, 56, 56, 64), 16, 2), (244, 437), 0.82, (222, 222)),
    ],
)
def test_lower_bounds_are_those_of_the_document(work, megabytes, billions, microseconds) -> None:
    rates = Rates(4.2e12, 132 * 16 * 1.755e9)
    assert tuple(round(each.bytes / 1e6) for each in work) == megabytes
    assert round(work[0].exponentials / 1e9, 2) == billions
    assert tuple(round(roofline.lower_bound([each], rates).seconds * 1e6) for each in work) == microseconds


def test_lower_bound_adds_each_pass_by_what_limits_it() -> None:
    bound = roofline.lower_bound([Work(bytes=60, exponentials=1), Work(bytes=10, exponentials=8)], Rates(10.0, 2.0))
    assert bound.seconds == 6 + 4
    assert bound.details['lower bound']['bytes'] == [60, 10] and bound.details['lower bound']['bytes_per_s'] == 10.0


def test_rates_are_those_of_a_machine() -> None:
    # From a slow core's to beyond any processor's.
    assert 1e8 < roofline.measure_copy_rate(CPU, 2**22, duration=0.02) < 1e13
    # One at a time, no processor computes a thousand million of them a second on a thread.
    assert 2e8 < exp_rate.measure_exp_rate(0.05) / torch.get_num_threads() < 1e12


def test_what_is_measured_is_two_to_the_power() -> None:
    x = torch.linspace(-130, 130, 2048)
    y = exp_rate.exp2_repeatedly(x, 3)
    # Below the smallest normal number, the kernels' exponential stays there.
    expected = torch.exp2(x.double()).clamp(min=2**-126).float()
    torch.testing.assert_close(y, expected, rtol=3e-7, atol=0)
    for wrong, error, message in (
        (x.double(), TypeError, 'float32'),
        (x[:7], ValueError, 'blocks of 1024'),
        (x.view(2, -1).mT, ValueError, 'contiguous'),
    ):
        with pytest.raises(error, match=message):
            exp_rate.exp2_repeatedly(wrong, 1)
    with pytest.raises(ValueError, match='repeats must be at least 1, got 0'):
        exp_rate.exp2_repeatedly(x, 0)


def test_without_sources_or_compiler_the_rate_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('CXX', 'no-such-compiler')
    with pytest.raises(_build.BuildError, match='no C.. compiler found .looked for no-such-compiler'):
        _build.build_benchmark('exp2_repeatedly', tmp_path, 'baseline', environ=os.environ)
    with pytest.raises(_build.BuildError, match='scalar_scan.cpp is not installed; run the benchmark in a checkout'):
        _build.build_benchmark('scalar_scan', tmp_path, 'baseline', csrc=tmp_path)

    def fail(*arguments: object) -> None:
        raise RuntimeError('exp2_repeatedly cannot be compiled: a reason')

    monkeypatch.setattr(exp_rate, 'native_function', fail)
    with pytest.raises(scans.Unavailable, match='a reason'):
        scans.exponentials_call(10, CPU)
    roofline.measure_rates.cache_clear()
    with pytest.raises(Unavailable, match='rate of exponentials of cpu cannot be measured: .*a reason'):
        roofline.measure_rates(CPU)


def test_the_exponentials_are_as_many_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    call = scans.exponentials_call(2 * 56 * 56 * 64 * 16, CPU)
    x, repeats = call.args
    assert x.numel() * repeats == pytest.approx(2 * 56 * 56 * 64 * 16, rel=0.01)
    assert call().shape == x.shape
    with pytest.raises(scans.Unavailable, match='CPU kernels'):
        scans.exponentials_call(10, torch.device('cuda'))


def test_the_source_for_gpus_is_one_that_torch_takes() -> None:
    from torch.cuda.jiterator import _create_jit_fn

    assert _create_jit_fn(exp_rate._GPU_SOURCE).kernel_name == 'exp2_repeatedly'
    assert f'i < {exp_rate._GPU_REPEATS};' in exp_rate._GPU_SOURCE
