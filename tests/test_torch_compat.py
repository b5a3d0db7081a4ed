"""What stands in for newer functions of PyTorch; both ways are taken with whichever version is installed."""

import argparse
import os
import pickle
import re
from collections import OrderedDict
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ssm_backbones.layers.common import ConvStem, pad_to_multiple
from ssm_backbones.layers.simple_pyramid import SimplePyramid
from ssm_backbones.utils import torch_compat
from ssm_backbones.utils.torch_compat import allow_in_checkpoints, load_weights
from tests.versions import RELEASE, since_torch_2_4

ROOT = Path(__file__).resolve().parents[1]


class Stored:
    """A class that a checkpoint holds under the name of another module."""

    def __init__(self) -> None:
        self.value = 3


class Users:
    """A class that only the user allows."""


def add_one(value: int) -> int:
    return value + 1


class Call:
    def __reduce__(self):
        return add_one, (4,)


@pytest.fixture(params=[True, False], ids=['names', 'no names'])
def takes_names(request, monkeypatch) -> bool:
    """Whether ``add_safe_globals`` takes names, as from torch 2.6 on."""
    if request.param and not torch_compat._takes_names():
        pytest.skip('this torch takes no names')
    monkeypatch.setattr(torch_compat, '_takes_names', lambda: request.param)
    return request.param


def test_checkpoints_read_under_other_names(takes_names, tmp_path) -> None:
    other = f'other{takes_names:d}'
    path, changed = tmp_path / 'a.pth', tmp_path / 'b.pth'
    torch.save({'object': Stored(), 'call': Call()}, path, _use_new_zipfile_serialization=False)
    changed.write_bytes(path.read_bytes().replace(__name__.encode(), other.encode()))
    with pytest.raises(Exception, match=f'{other}.Stored'):
        load_weights(changed)
    allow_in_checkpoints({f'{other}.Stored': Stored, f'{other}.add_one': add_one})
    loaded = load_weights(changed)
    assert isinstance(loaded['object'], Stored) and loaded['object'].value == 3
    assert loaded['call'] == 5
    if RELEASE < (2, 4):
        return
    # What the user allows is found as before.
    torch.save(Users(), path)
    torch.serialization.add_safe_globals([Users])
    assert isinstance(torch.load(path, weights_only=True), Users)


def test_settings_of_the_authors_are_read_within_another_reading(tmp_path) -> None:
    """``load_from`` and ``init_cfg`` may both name such a file; one is read while the other is."""
    from ssm_backbones.checkpoints.files import read_checkpoint

    path = tmp_path / 'a.pth'
    torch.save({'config': argparse.Namespace(drop=0.2), 'model': OrderedDict(a=torch.ones(1))}, path)
    for _ in range(2):
        assert read_checkpoint(path)['config'].drop == 0.2
        assert load_weights(path)['config'].drop == 0.2


@pytest.mark.parametrize('newer', [True, False])
def test_checkpoints_of_runners_are_read_and_those_with_code_are_not(newer, tmp_path, monkeypatch) -> None:
    """By torch's own reading and by what serves before torch 2.6."""
    logging = pytest.importorskip('mmengine.logging')
    if newer and torch_compat.release() < (2, 6):
        pytest.skip('this torch reads too little')
    monkeypatch.setattr(torch_compat, 'release', lambda: (2, 6) if newer else (2, 5))
    path = tmp_path / 'a.pth'
    for legacy in (False, True):
        state = {'hub': logging.HistoryBuffer([2.0], [1]), 'array': np.arange(3), 'weight': torch.ones(2)}
        torch.save(state, path, _use_new_zipfile_serialization=not legacy)
        loaded = load_weights(path)
        assert loaded['hub'].mean() == 2 and loaded['array'].tolist() == [0, 1, 2] and loaded['weight'].sum() == 2
        torch.save({'code': os.getcwd, 'weight': torch.ones(2)}, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(pickle.UnpicklingError, match='getcwd'):
            load_weights(path)


class Padded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return pad_to_multiple(x, 2)


@since_torch_2_4
@pytest.mark.parametrize('newer', [True, False])
def test_sizes_stay_open_when_exporting(newer, monkeypatch) -> None:
    if not newer:
        monkeypatch.setattr(torch_compat, '_is_exporting', None)
    elif torch_compat._is_exporting is None:
        pytest.skip('this torch has no torch.compiler.is_exporting')
    assert not torch_compat.is_exporting()
    # torch.compile may ask for sizes, and then adds nothing where nothing is needed.
    compiled = torch.compile(Padded(), dynamic=True, fullgraph=True, backend='eager')
    assert compiled(torch.ones(1, 5, 7, 2)).shape == (1, 6, 8, 2)
    if torch_compat.release() < (2, 6):
        pytest.skip('before torch 2.6 its own padding settles sizes')
    open_height = {1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Padded(), (torch.ones(1, 5, 7, 2),), dynamic_shapes=(open_height,), strict=False)
    for size, padded in ((5, 6), (6, 6), (11, 12)):
        assert program.module()(torch.ones(1, size, 7, 2)).shape == (1, padded, 8, 2)


def test_limit_of_graphs() -> None:
    config = torch._dynamo.config
    name = 'recompile_limit' if hasattr(config, 'recompile_limit') else 'cache_size_limit'
    with config.patch({name: 8}):
        torch_compat.set_recompile_limit(17)
        assert getattr(config, name) == 17


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_rms_norm_of_small_values(dtype) -> None:
    """Where torch computes in x's dtype, the gradient of float16 is NaN here."""
    generator = torch.Generator().manual_seed(1)
    values = 1e-3 * torch.randn(5, 16, generator=generator)
    exact = values.double().requires_grad_()
    expected = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected.square().sum().backward()
    for kind in (torch_compat.RMSNorm, torch_compat.Float32RMSNorm):
        x = values.to(dtype, copy=True).requires_grad_()
        out = kind(16, eps=1e-5, dtype=dtype)(x)
        assert out.dtype == dtype
        out.float().square().sum().backward()
        tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
        scale = exact.grad.abs().max()
        torch.testing.assert_close(x.grad / scale, (exact.grad / scale).to(dtype), rtol=0, atol=4 * tolerance)


def test_newer_functions_are_used_here_alone() -> None:
    newer = re.compile(
        r'(torch|nn)\.(compiler\.is_(exporting|compiling)|OutOfMemoryError|serialization\.(add_|get_)?safe_globals'
        r'|_dynamo\.config\.recompile_limit|library\.register_fake|get_autocast_dtype|RMSNorm)'
    )
    files = [path for folder in ('ssm_backbones', 'cuda_ops', 'tools') for path in (ROOT / folder).rglob('*.py')]
    # ONNX export needs torch 2.6 as a whole.
    files = [path for path in files if path.parent.name != 'onnx_export']
    assert len(files) > 100
    found = {path.name for path in files if newer.search(path.read_text(encoding='utf-8'))}
    assert found == {'torch_compat.py', '_torch_compat.py'}


@pytest.mark.parametrize('needed', [None, True])
def test_gradients_through_gelu_are_right_before_convolutions(monkeypatch, needed) -> None:
    """Torch 2.1 reads the gradient that a convolution gives in the order of another layout."""
    if needed is not None:
        monkeypatch.setattr(torch_compat, '_GELU_NEEDS_CONTIGUOUS', needed)
    for module in (ConvStem(3, 16), SimplePyramid(16).levels[0]):
        inputs = torch.randn(1, 3, 5, 7) if isinstance(module, ConvStem) else torch.randn(1, 1, 2, 16)
        grads = []
        for dtype in (torch.float32, torch.float64):
            copy = deepcopy(module).to(dtype)
            copy(inputs.to(dtype)).square().sum().backward()
            grads.append([each.grad.float() for each in copy.parameters()])
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)
