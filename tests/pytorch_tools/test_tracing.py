"""Symbolic tracing, feature extractors and hooks."""

import pytest
import torch
from torch import nn

from ssm_backbones import V2M
from tests.pytorch_tools.models import FAMILIES, build, images


@pytest.mark.parametrize('name', FAMILIES)
def test_fx_traces_models_for_any_size(name):
    model = build(name, drop_path_rate=0.2).eval()
    traced = torch.fx.symbolic_trace(model)
    for size in ((64, 64), (37, 50)):
        torch.testing.assert_close(traced(images(*size)), model(images(*size)), rtol=1e-4, atol=1e-4)
    layers = [node for node in traced.graph.nodes if node.op == 'call_module']
    linear = [node for node in layers if isinstance(traced.get_submodule(node.target), nn.Linear)]
    assert len(linear) >= sum(type(module) is nn.Linear for module in model.modules())


@pytest.mark.parametrize(
    'options', [dict(pyramid='multi', cls_token='center'), dict(out_type='cls_token', cls_token='corner')]
)
def test_fx_traces_the_plain_layout(options):
    model = V2M('test', **options).eval()
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(images(37, 50)), model(images(37, 50)), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings('ignore:The nodes obtained by tracing')
@pytest.mark.parametrize('name', FAMILIES)
def test_torchvisions_feature_extractor_gives_the_maps(name):
    # After the package, which mends the import of a torchvision for another device.
    from torchvision.models.feature_extraction import create_feature_extractor

    model = build(name).eval()
    maps = {module: f'map {index}' for index, module in model.output_modules.items()}
    found = create_feature_extractor(model, return_nodes=maps)(images())
    for (index, _), expected in zip(model.output_modules.items(), model(images()), strict=True):
        torch.testing.assert_close(found[f'map {index}'], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', FAMILIES)
def test_maps_are_outputs_of_modules(name):
    model = build(name).eval()
    hooked = {}
    for index, module in model.output_modules.items():
        model.get_submodule(module).register_forward_hook(
            lambda m, i, output, index=index: hooked.update({index: output})
        )
    maps = model(images())
    assert all(hooked[index] is expected for index, expected in zip(model.output_modules, maps, strict=True))


@pytest.mark.parametrize('name', FAMILIES)
@pytest.mark.filterwarnings('ignore:.torch.jit.* is deprecated:DeprecationWarning')
def test_torchscript_is_refused_with_the_alternatives(name):
    with pytest.raises(RuntimeError, match=r'TorchScript cannot compile \w+: use torch.compile or torch.export'):
        torch.jit.script(nn.Sequential(build(name)))


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning', 'ignore::UserWarning')
@pytest.mark.parametrize(
    'name', [name if name == 'vmamba-v0' else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_static_quantisation_of_the_traced_model(name):
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    model = build(name).eval()
    with torch.no_grad():
        # Not 'onednn', whose numbers of 8 bits overflow on processors without VNNI: 0.11 to 0.17 off there.
        prepared = prepare_fx(build(name).eval(), get_default_qconfig_mapping('x86'), (images(),))
        prepared(images())
        quantised = convert_fx(prepared)
        assert not any(type(module) is nn.Linear for module in quantised.modules())
        for found, expected in zip(quantised(images()), model(images()), strict=True):
            # Output norms give a deviation of 1.
            assert 0 < (found - expected).square().mean().sqrt() < 0.1
