"""Quantisation by torchao."""

import importlib

import pytest
import torch
from torch import nn

from tests.pytorch_tools.models import FAMILIES, build, images

torchao = pytest.importorskip('torchao.quantization', reason='runs by `make tools`')


def check(name, config, tolerance, dtype=torch.float32):
    model, expected = build(name).eval().to(dtype), build(name).eval().to(dtype)
    x = images().to(dtype)
    plain = {key: type(module.weight) for key, module in model.named_modules() if type(module) is nn.Linear}
    torchao.quantize_(model, config)
    changed = [key for key, kind in plain.items() if type(model.get_submodule(key).weight) is not kind]
    with torch.no_grad():
        for found, wanted in zip(model(x), expected(x), strict=True):
            # Output norms give a deviation of 1.
            assert 0 < (found - wanted).float().square().mean().sqrt() < tolerance
    return plain, changed


@pytest.mark.parametrize('kind', ['Int8WeightOnlyConfig', 'Int8DynamicActivationInt8WeightConfig'])
@pytest.mark.parametrize('name', FAMILIES)
def test_int8(name, kind):
    plain, changed = check(name, getattr(torchao, kind)(), 0.1)
    assert changed == list(plain)


@pytest.mark.parametrize('name', FAMILIES)
def test_int4(name):
    granularity = importlib.import_module('torchao.quantization.granularity').PerGroup(32)
    config = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity)
    plain, changed = check(name, config, 0.2)
    assert changed == list(plain)


def test_int4_for_gpus_names_the_library_that_it_needs():
    with pytest.raises(ImportError, match='mslk'):
        torchao.quantize_(build('vmamba').eval().bfloat16(), torchao.Int4WeightOnlyConfig())
