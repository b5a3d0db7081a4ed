"""Structural pruning by Torch-Pruning."""

import pytest
import torch
from torch import nn

from ssm_backbones import create_backbone
from tests.pytorch_tools.models import FAMILIES, blocks, build, images, loss

pruning = pytest.importorskip('torch_pruning', reason='runs by `make tools`')
pytestmark = pytest.mark.filterwarnings('ignore:Unwrapped parameters detected')

PRUNED = [0, 1, 5]


def graph_of(model):
    return pruning.DependencyGraph().build_dependency(model, example_inputs=images())


def kept(channels):
    return [i for i in range(channels) if i not in PRUNED]


def feed_forwards(model):
    """Pairs of linear layers, the second of which takes what the first gives."""
    parts = [part for part in model.modules() if hasattr(part, 'fc1') and hasattr(part, 'fc2')]
    return [(part.fc1, part.fc2) for part in parts]


@pytest.mark.parametrize('name', [name for name in FAMILIES if feed_forwards(build(name))])
def test_mlps_are_narrowed(name):
    model = build(name).eval()
    layer, following = feed_forwards(model)[0]
    width = layer.out_features
    graph_of(model).get_pruning_group(layer, pruning.prune_linear_out_channels, idxs=list(PRUNED)).prune()
    assert layer.out_features == following.in_features == width - 3
    assert all(torch.isfinite(m).all() for m in model(images()))


@pytest.mark.parametrize('name', FAMILIES)
def test_channels_of_a_stage_are_pruned_from_all_that_take_or_give_them(name):
    model, whole = build(name).eval(), build(name).eval()
    graph = graph_of(model)
    root = [module for module in model.patch_embed.modules() if isinstance(module, nn.Conv2d)][-1]
    width = model.num_features[0]
    graph.get_pruning_group(root, pruning.prune_conv_out_channels, idxs=list(PRUNED)).prune()
    assert [m.shape[1] for m in model(images())][0] == width - 3
    loss(model).backward()
    changed = 0
    for (key, found), original in zip(model.named_parameters(), whole.parameters(), strict=True):
        expected = original
        for dimension, (now, before) in enumerate(zip(found.shape, original.shape, strict=True)):
            if now != before:
                # Patch merging takes the channels of four pixels.
                assert before in (width, 4 * width)
                indices = [start + i for start in range(0, before, width) for i in kept(width)]
                expected = expected.index_select(dimension, torch.tensor(indices))
        assert torch.equal(found, expected), key
        assert found.grad is None or found.grad.shape == found.shape
        changed += found.shape != original.shape
    assert changed > 3 * len(model.stages[0].blocks)


@pytest.mark.parametrize('name', FAMILIES)
def test_whole_models_are_pruned_and_trained(name):
    model = build(name)
    before = sum(parameter.numel() for parameter in model.parameters())
    pruner = pruning.pruner.BasePruner(
        model, images(), importance=pruning.importance.MagnitudeImportance(p=2), pruning_ratio=0.25
    )
    pruner.step()
    assert sum(parameter.numel() for parameter in model.parameters()) < 0.85 * before
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3)
    first = loss(model)
    first.backward()
    assert all(parameter.grad is not None for block in blocks(model) for parameter in block.parameters())
    optimizer.step()
    assert loss(model) < first


@pytest.mark.parametrize('name', FAMILIES)
def test_inner_channels_of_mixers_are_refused(name):
    """Without the package's patch, Torch-Pruning's search for what belongs to them does not end."""
    model = build(name).eval()
    graph, mixer = graph_of(model), blocks(model)[0].mixer
    before = {key: value.shape for key, value in model.state_dict().items()}
    for layer in mixer.modules():
        if isinstance(layer, nn.Linear) and layer not in mixer_ends(mixer):
            with pytest.raises(ValueError, match='inner channels of a mixer'):
                graph.get_pruning_group(layer, pruning.prune_linear_out_channels, idxs=list(PRUNED))
    with pytest.raises(ValueError, match='inner channels of a mixer'):
        graph.get_pruning_group(mixer.out_proj, pruning.prune_linear_in_channels, idxs=list(PRUNED))
    assert before == {key: value.shape for key, value in model.state_dict().items()}


def mixer_ends(mixer):
    """Layers that give a mixer's outputs; the local path's hidden channels are its own."""
    local = list(mixer.local.modules()) if hasattr(mixer, 'local') else []
    return [mixer.out_proj, *local]


@pytest.mark.parametrize(
    ('options', 'remedy'), [(dict(cls_token='corner'), "cls_token='mean'"), (dict(pyramid='single'), 'pyramid=None')]
)
def test_maps_whose_rows_would_be_taken_for_channels_are_refused(options, remedy):
    with pytest.raises(ValueError, match=remedy):
        graph_of(create_backbone('v2m-test', **options))
