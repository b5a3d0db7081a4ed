"""The drop-in against mamba-ssm's and causal-conv1d's own references, from their source packages."""

import importlib
import importlib.util
import itertools
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.slow

PACKAGES = ('mamba-ssm==2.3.2.post1', 'causal-conv1d==1.7.0')
BATCH, CHANNELS, STATES = 2, 4, 8


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def theirs(tmp_path_factory) -> SimpleNamespace:
    """Their Python files, over this package's compiled functions: neither of the two is built or installed."""
    pytest.importorskip('einops')
    folder = tmp_path_factory.mktemp('sources')
    environment = {**os.environ, 'MAMBA_SKIP_CUDA_BUILD': 'TRUE', 'CAUSAL_CONV1D_SKIP_CUDA_BUILD': 'TRUE'}
    command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-build-isolation']
    download = subprocess.run(
        [*command, '--no-binary', ':all:', '--dest', folder, *PACKAGES], env=environment, capture_output=True, text=True
    )
    if download.returncode:
        pytest.skip(f'the source packages cannot be downloaded: {download.stderr.strip()[-200:]}')
    for archive in folder.glob('*.tar.gz'):
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter='data')
    mamba, convolution = (next(folder.glob(f'{name}-*/{name}')) for name in ('mamba_ssm', 'causal_conv1d'))
    drop_in = importlib.import_module('cuda_ops.mamba_ssm')
    drop_in.install()
    try:
        ours = SimpleNamespace(**vars(importlib.import_module('mamba_ssm.ops.selective_scan_interface')))
        ours.causal_conv1d_fn = importlib.import_module('causal_conv1d').causal_conv1d_fn
        compiled = importlib.import_module('selective_scan_cuda')
    finally:
        drop_in.uninstall()
    nothing = ModuleType('nothing')
    nothing.__getattr__ = lambda name: None  # type: ignore[method-assign]
    # What their files import: the compiled scan from here, and nothing compiled else.
    stand_ins = {name: nothing for name in ('causal_conv1d', 'causal_conv1d.cpp_functions')}
    stand_ins |= {name: nothing for name in ('mamba_ssm', 'mamba_ssm.utils', 'mamba_ssm.ops', 'mamba_ssm.ops.triton')}
    stand_ins |= {'mamba_ssm.ops.triton.layer_norm': nothing, 'selective_scan_cuda': compiled}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stand_ins.items():
            patch.setitem(sys.modules, name, module)
        patch.setitem(sys.modules, 'mamba_ssm.utils.torch', load('mamba_utils', mamba / 'utils' / 'torch.py'))
        interface = load('their_scan', mamba / 'ops' / 'selective_scan_interface.py')
        convolutions = load('their_convolution', convolution / 'causal_conv1d_interface.py')
    interface.causal_conv1d_fn = convolutions.causal_conv1d_ref
    # Its own reference in place of the kernel, so that mamba_inner_ref is wholly theirs.
    kernel, interface.selective_scan_fn = interface.selective_scan_fn, interface.selective_scan_ref
    return SimpleNamespace(ours=ours, scan=interface, kernel=kernel, convolution=convolutions)


def scan_inputs(dtype, length, variable_B, variable_C, groups, has_D, has_z, has_bias):
    torch.manual_seed(0)
    maps = (BATCH, STATES, length) if groups == 1 else (BATCH, groups, STATES, length)
    return dict(
        u=torch.randn(BATCH, CHANNELS, length).to(dtype),
        delta=(0.5 * torch.rand(BATCH, CHANNELS, length)).to(dtype),
        A=-0.5 * torch.rand(CHANNELS, STATES),
        B=torch.randn(maps).to(dtype) if variable_B else torch.randn(CHANNELS, STATES),
        C=torch.randn(maps).to(dtype) if variable_C else torch.randn(CHANNELS, STATES),
        D=torch.randn(CHANNELS) if has_D else None,
        z=torch.randn(BATCH, CHANNELS, length).to(dtype) if has_z else None,
        delta_bias=0.5 * torch.rand(CHANNELS) if has_bias else None,
    )


def outputs_and_gradients(function, tensors, **options):
    leaves = {name: value if value is None else value.clone().requires_grad_() for name, value in tensors.items()}
    y = function(**leaves, **options)
    rest = ()
    if isinstance(y, tuple):
        y, *rest = y
    (y.float() * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
    return [y, *rest], {name: value.grad for name, value in leaves.items() if value is not None}


def check(found, expected, rtol, atol) -> None:
    for one, other in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol, check_dtype=False)
    for name, grad in expected[1].items():
        scale = float(grad.float().abs().max())
        tolerance = dict(rtol=5 * rtol, atol=atol * max(scale, 1), msg=lambda text, name=name: f'{name}: {text}')
        torch.testing.assert_close(found[1][name].float(), grad.float(), **tolerance)


# The tolerances of their tests.
TOLERANCES = {torch.float32: (6e-4, 2e-3), torch.float16: (3e-3, 5e-3), torch.bfloat16: (3e-2, 5e-2)}


@pytest.mark.parametrize('dtype', TOLERANCES)
@pytest.mark.parametrize('length', [1, 8, 130, 372])
def test_scans(dtype, length, theirs) -> None:
    """Over the flags of their test: constant, variable and grouped B and C, D, z, bias, softplus, last state."""
    flags = [False, True]
    for variable_B, variable_C, (has_D, has_z, has_bias, softplus) in itertools.product(
        flags, flags, itertools.product(flags, repeat=4) if length == 130 else [(True,) * 4, (False,) * 4]
    ):
        for groups in (1, 2) if variable_B or variable_C else (1,):
            tensors = scan_inputs(dtype, length, variable_B, variable_C, groups, has_D, has_z, has_bias)
            options = dict(delta_softplus=softplus, return_last_state=True)
            expected = outputs_and_gradients(theirs.scan.selective_scan_ref, tensors, **options)
            # The second is their autograd function, on this package's selective_scan_cuda.
            for function in (theirs.ours.selective_scan_fn, theirs.kernel):
                check(outputs_and_gradients(function, tensors, **options), expected, *TOLERANCES[dtype])


@pytest.mark.parametrize('variable', [*itertools.product([False, True], repeat=2)])
def test_inner_functions(variable, theirs) -> None:
    torch.manual_seed(0)
    rank, width, length = 3, 6, 128
    tensors = dict(
        xz=torch.randn(BATCH, 2 * CHANNELS, length),
        conv1d_weight=torch.randn(CHANNELS, 1, 3),
        conv1d_bias=torch.randn(CHANNELS),
        x_proj_weight=torch.randn(rank + STATES * sum(variable), CHANNELS),
        delta_proj_weight=torch.randn(CHANNELS, rank) * 0.2,
        out_proj_weight=torch.randn(width, CHANNELS),
        out_proj_bias=torch.randn(width),
        A=-0.5 * torch.rand(CHANNELS, STATES),
        B=None if variable[0] else torch.randn(CHANNELS, STATES),
        C=None if variable[1] else torch.randn(CHANNELS, STATES),
        D=torch.randn(CHANNELS),
        delta_bias=0.5 * torch.rand(CHANNELS),
    )
    expected = outputs_and_gradients(theirs.scan.mamba_inner_ref, tensors, delta_softplus=True)
    check(outputs_and_gradients(theirs.ours.mamba_inner_fn, tensors, delta_softplus=True), expected, 1e-3, 2e-3)


@pytest.mark.parametrize('dtype', TOLERANCES)
@pytest.mark.parametrize('width', [2, 3, 4])
def test_causal_convolutions(dtype, width, theirs) -> None:
    flags = [False, True]
    for length, bias, activation, states in itertools.product([1, 2, 8, 151], flags, [None, 'silu'], flags):
        torch.manual_seed(0)
        tensors = dict(
            x=torch.randn(BATCH, CHANNELS, length).to(dtype),
            weight=torch.randn(CHANNELS, width),
            bias=torch.randn(CHANNELS) if bias else None,
            initial_states=torch.randn(BATCH, CHANNELS, width - 1).to(dtype) if states else None,
        )
        options = dict(activation=activation, return_final_states=states)
        expected = outputs_and_gradients(theirs.convolution.causal_conv1d_ref, tensors, **options)
        found = outputs_and_gradients(theirs.ours.causal_conv1d_fn, tensors, **options)
        check(found, expected, *TOLERANCES[dtype])
