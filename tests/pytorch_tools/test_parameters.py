"""Parameters and layers are what they seem: for savers, optimizers, pruning, parametrisations and quantisation."""

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parameters_to_vector, parametrizations, prune, vector_to_parameters

from ssm_backbones import create_backbone
from tests.pytorch_tools.models import FAMILIES, LAYERS, build, images, layers, loss


@pytest.mark.parametrize('name', FAMILIES)
def test_parameters_are_contiguous_and_layers_are_pytorchs_own(name):
    model = build(name)
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    named = layers(model)
    assert {type(layer) for layer in named.values()} <= set(LAYERS)
    called = set()
    for layer_name, layer in named.items():
        layer.register_forward_hook(lambda *_, layer_name=layer_name: called.add(layer_name))
    expected = build(name)(images())
    torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-4)
    assert called == set(named)


@pytest.mark.parametrize('name', FAMILIES)
def test_state_dicts_go_through_safetensors(name, tmp_path):
    model = build(name)
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    other = build(name, seed=1)
    other.load_state_dict(load_file(tmp_path / 'model.safetensors'))
    torch.testing.assert_close(other(images()), model(images()))


@pytest.mark.parametrize('name', FAMILIES)
def test_weights_saved_channels_last_load(name, tmp_path):
    """As version 0.1.0 stored those of convolutions."""
    model = build(name)
    state = {
        key: value.to(memory_format=torch.channels_last) if value.ndim == 4 else value
        for key, value in model.state_dict().items()
    }
    torch.save(state, tmp_path / 'old.pth')
    other = build(name, seed=1)
    other.load_state_dict(torch.load(tmp_path / 'old.pth', weights_only=True))
    assert all(parameter.is_contiguous() for parameter in other.parameters())
    torch.testing.assert_close(other(images()), model(images()))


@pytest.mark.parametrize('name', FAMILIES)
def test_optimizers_that_flatten_or_fuse(name):
    model = build(name)
    vector_to_parameters(parameters_to_vector(model.parameters()) * 1.0, model.parameters())
    lbfgs = torch.optim.LBFGS(model.parameters(), lr=1e-3, max_iter=2)
    before = loss(model).item()

    def closure():
        lbfgs.zero_grad()
        value = loss(model)
        value.backward()
        return value

    lbfgs.step(closure)
    assert loss(model).item() < before

    stepped = []
    for kind in ('for-loop', 'foreach', 'fused'):
        twin = build(name)
        options = {} if kind == 'for-loop' else {kind: True}
        optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3, foreach=options.pop('foreach', False), **options)
        loss(twin).backward()
        # Fused kernels refuse or copy parameters and gradients of different strides.
        assert [p.grad.stride() for p in twin.parameters()] == [p.stride() for p in twin.parameters()]
        optimizer.step()
        stepped.append(list(twin.parameters()))
    for other in stepped[1:]:
        torch.testing.assert_close(other, stepped[0])


@pytest.mark.parametrize('name', FAMILIES)
def test_averaged_weights(name):
    model = build(name)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(model)
    for parameter in model.parameters():
        parameter.data.add_(1.0)
    averaged.update_parameters(model)
    for mean, parameter in zip(averaged.module.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mean, parameter - 0.5)


def step(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loss(model).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize('name', FAMILIES)
def test_pruned_layers_train_and_keep_their_mask(name):
    model = build(name)
    before = model(images())[-1]
    for layer in layers(model).values():
        prune.l1_unstructured(layer, 'weight', 0.5)
    assert not torch.allclose(model(images())[-1], before)
    for _ in range(2):
        step(model)
    pruned = model(images())
    for layer in layers(model).values():
        assert (layer.weight == 0).float().mean() >= 0.45
        assert layer.weight_orig.grad is None
        prune.remove(layer, 'weight')
    torch.testing.assert_close(model(images()), pruned, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', FAMILIES)
@pytest.mark.parametrize('parametrisation', [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrised_layers_train(name, parametrisation):
    model = build(name)
    before = model(images())
    for layer in layers(model).values():
        parametrisation(layer, 'weight')
    if parametrisation is parametrizations.weight_norm:
        torch.testing.assert_close(model(images()), before, rtol=1e-4, atol=1e-4)
    loss(model).backward()
    for key, parameter in model.named_parameters():
        if 'parametrizations' in key:
            assert parameter.grad is not None and parameter.grad.any(), key


@pytest.mark.parametrize('name', FAMILIES)
def test_dynamic_quantisation_finds_every_linear_layer(name):
    model = build(name).eval()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, torch.qint8)
    assert not any(type(module) is nn.Linear for module in quantised.modules())
    with torch.no_grad():
        for found, expected in zip(quantised(images()), model(images()), strict=True):
            # Output norms give a deviation of 1.
            assert 0 < (found - expected).square().mean().sqrt() < 0.1


def test_torch_compile_takes_changed_layers():
    model = build('v2m-hier')
    for layer in layers(model).values():
        prune.l1_unstructured(layer, 'weight', 0.5)
    torch.compiler.reset()
    torch.testing.assert_close(
        torch.compile(model, backend='aot_eager')(images()), model(images()), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize('suffix', ['safetensors'])
def test_create_backbone_reads(suffix, tmp_path):
    model = create_backbone('vmamba-test')
    save_file({f'backbone.{key}': value for key, value in model.state_dict().items()}, tmp_path / f'model.{suffix}')
    loaded = create_backbone('vmamba-test', pretrained=tmp_path / f'model.{suffix}')
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
