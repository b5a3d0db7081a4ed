"""Counters of FLOPs against ours, with the handles of the scans."""

import importlib

import pytest
import torch
from torch import nn

from ssm_backbones.flops import count_complexity, mmengine_handles, ptflops_handles, thop_handles
from tests.pytorch_tools.models import FAMILIES, build, layers


def counted(name):
    model, image = build(name).eval(), torch.randn(1, 3, 64, 64)
    complexity = count_complexity(model, lambda: model(image))
    return model, image, complexity


@pytest.mark.parametrize('name', FAMILIES)
def test_fvcore(name):
    fvcore = pytest.importorskip('fvcore.nn', reason='runs by `make tools`')
    model, image, expected = counted(name)
    analysis = fvcore.FlopCountAnalysis(model, image).set_op_handle(**mmengine_handles())
    assert analysis.unsupported_ops_warnings(False).total() == pytest.approx(expected.flops, rel=0.02)
    # Causal convolutions are counted as they run, by the mixer.
    uncalled = analysis.uncalled_modules() & set(layers(model))
    assert all(type(model.get_submodule(key)) is nn.Conv1d for key in uncalled)


@pytest.mark.parametrize('name', FAMILIES)
def test_thop(name):
    thop = pytest.importorskip('thop', reason='runs by `make tools`')
    model, image, expected = counted(name)
    flops, _ = thop.profile(model, (image,), custom_ops=thop_handles(), verbose=False)
    assert flops == pytest.approx(expected.flops, rel=0.02)


@pytest.mark.parametrize('name', FAMILIES)
@pytest.mark.parametrize('in_scan', [True, False])
def test_ptflops(name, in_scan, monkeypatch):
    """Whether or not the scans make delta themselves."""
    if not in_scan:
        monkeypatch.setattr(
            importlib.import_module('cuda_ops.route_scan'), '_takes_low_rank', lambda *given, **named: False
        )
    ptflops = pytest.importorskip('ptflops', reason='runs by `make tools`')
    model, image, expected = counted(name)
    flops, _ = ptflops.get_model_complexity_info(
        model,
        tuple(image.shape[1:]),
        as_strings=False,
        print_per_layer_stat=False,
        verbose=False,
        backend='pytorch',
        custom_modules_hooks=ptflops_handles(),
    )
    # It counts biases and the padding of causal convolutions, which is much of a small map.
    assert flops == pytest.approx(expected.flops, rel=0.04 if name == 'v2m-plain' else 0.02)


@pytest.mark.parametrize('name', FAMILIES)
def test_torchinfo_counts_convolutions_right_and_linear_layers_for_one_pixel(name):
    pytest.importorskip('torchinfo', reason='runs by `make tools`')
    torchinfo = importlib.import_module('torchinfo')
    model, image, expected = counted(name)
    found = torchinfo.summary(model, input_data=image, verbose=0)
    convolutions = sum(
        info.macs for info in found.summary_list if info.class_name.startswith('Conv') and info.is_leaf_layer
    )
    # It counts biases, too.
    assert convolutions == pytest.approx(expected.flops_by_operator['convolution'], rel=0.06)
    assert found.total_mult_adds < expected.flops
