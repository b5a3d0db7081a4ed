"""timm's interface: what its own generic tests call, for a small model of each family."""

import pytest
import torch

from ssm_backbones import create_backbone, list_backbones
from ssm_backbones.checkpoints.published import published_classifier

timm = pytest.importorskip('timm', reason="timm is not installed (pip install 'ssm-backbones[timm]')")

from timm.models._manipulate import group_parameters  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402

import ssm_backbones.timm  # noqa: E402

NAMES = ['vmamba_test', 'v2m_test', 'v2m_test_hier', 'mamba2d_test']
IMAGES = (1, 3, 64, 96)


def build(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, **options).eval()


@pytest.fixture
def images():
    return torch.randn(IMAGES)


def test_every_backbone_has_a_name_and_default_config():
    names = {name.replace('-', '_') for name in list_backbones()}
    assert (
        names | set(NAMES) == set(ssm_backbones.timm.MODELS) == set(timm.list_models()) & set(ssm_backbones.timm.MODELS)
    )
    for name, (family, arch) in ssm_backbones.timm.MODELS.items():
        url = published_classifier(family, arch)
        assert timm.is_model_pretrained(name) == bool(url)
        assert timm.get_pretrained_cfg(f'{name}.in1k' if url else name).url == url
        with torch.device('meta'):
            model = timm.create_model(name)
        layers = dict(model.named_modules())
        assert isinstance(layers[model.default_cfg['first_conv']], torch.nn.Conv2d)
        assert layers[model.default_cfg['classifier']] is model.get_classifier()
        assert model.get_classifier().out_features == model.num_classes == 1000


@pytest.mark.parametrize('name', NAMES)
def test_default_config_and_heads(name, images):
    model = build(name)
    maps = model.forward_features(images)
    pooled = model.forward_head(maps, pre_logits=True)
    stride = model.feature_info[-1]['reduction']
    assert maps.shape == (1, model.num_features, 64 // stride, 96 // stride)
    assert [224 // stride] * 2 == list(model.default_cfg['pool_size'])
    assert pooled.shape == (1, model.head_hidden_size)
    assert model(images).shape == (1, 1000)
    torch.testing.assert_close(model(images), model.forward_head(maps))
    model.reset_classifier(0)
    torch.testing.assert_close(model(images), pooled)
    model.reset_classifier(0, '')
    torch.testing.assert_close(model(images), maps)
    model.reset_classifier(7, 'max')
    assert model(images).shape == (1, 7)
    assert model.num_classes == 7
    bare = timm.create_model(name, num_classes=0, global_pool='', in_chans=2).eval()
    assert bare(torch.randn(1, 2, 64, 96)).shape == maps.shape


@pytest.mark.parametrize('name', NAMES)
def test_every_parameter_gets_a_gradient(name, images):
    model = build(name, num_classes=42, drop_path_rate=0.1, drop_rate=0.1).train()
    model.set_grad_checkpointing()
    out = model(torch.cat([images, images]))
    assert out.shape == (2, 42)
    out.square().mean().backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize('name', NAMES)
def test_intermediates(name, images):
    model = build(name)
    last, maps = model.forward_intermediates(images)
    torch.testing.assert_close(last, model.forward_features(images))
    info = timm.models.FeatureInfo(model.feature_info, len(model.feature_info))
    assert info.channels() == [each.shape[1] for each in maps]
    assert info.reduction() == [64 // each.shape[2] for each in maps] == [96 // each.shape[3] for each in maps]
    (normed,) = model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
    torch.testing.assert_close(normed, last)
    early = model.forward_intermediates(images, [0], stop_early=True, output_fmt='NHWC', intermediates_only=True)
    torch.testing.assert_close(early[0].permute(0, 3, 1, 2), maps[0])
    with pytest.raises(ValueError, match='output_fmt'):
        model.forward_intermediates(images, output_fmt='NLC')
    assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
    (pruned,) = model.forward_intermediates(images, [1], intermediates_only=True)
    torch.testing.assert_close(pruned, maps[1])
    assert not any('stages.2' in key for key in model.state_dict())
    wrapped = build(name, features_only=True, feature_cls='getter', out_indices=(0, 1))
    assert [each.shape for each in wrapped(images)] == [each.shape for each in maps[:2]]


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('out_indices', [None, (0, 2), (-1,), 2])
def test_feature_maps_are_those_of_the_backbone(name, out_indices, images):
    model = build(name, features_only=True, out_indices=out_indices, in_chans=3)
    indices = [item['index'] for item in model.feature_info.get_dicts()]
    torch.manual_seed(0)
    backbone = create_backbone(name.replace('_', '-'), out_indices=indices).eval()
    assert backbone.state_dict().keys() == model.backbone.state_dict().keys()
    expected = backbone(images)
    found = model(images)
    assert len(found) == {None: 3 if name == 'v2m_test' else 4, (0, 2): 2, (-1,): 1, 2: 2}[out_indices]
    assert all(map(torch.equal, found, expected))
    assert model.feature_info.channels() == backbone.feature_info.channels()
    assert model.feature_info.reduction() == backbone.feature_info.reduction()
    assert model.feature_info.module_name() == [f'backbone.{module}' for module in backbone.feature_info.module_name()]
    model.train().set_grad_checkpointing()
    assert all(map(torch.equal, model(images), expected))
    assert 'classifier' not in model.default_cfg and model.default_cfg['first_conv']


def test_levels_of_a_pyramid(images):
    model = build('v2m_test', features_only=True, pyramid='multi', out_indices=(0, 3))
    assert model.feature_info.reduction() == [4, 32]
    assert model.feature_info.channels() == [4, 16]
    assert [each.shape for each in model(images)] == [(1, 4, 16, 24), (1, 16, 2, 3)]


@pytest.mark.parametrize('name', NAMES)
def test_parameter_groups(name):
    model = build(name)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    backbone = model.backbone
    for key in groups:
        layer, layers = backbone.get_layer_depth(key, 'backbone.')
        assert groups[key] == layer, key
    assert max(groups.values()) == layers - 1
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert max(coarse.values()) == len(backbone.stages) + 1
    spared = model.no_weight_decay()
    assert {key.rpartition('.')[2] for key in spared} >= {'A_log', 'D', 'dt_bias'}
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=0.1, layer_decay=0.5)
    scale = {group['lr_scale'] for group in optimizer.param_groups}
    assert min(scale) == 0.5 ** (layers - 1) and max(scale) == 1.0
    parameters = dict(model.named_parameters())
    decayed = {id(each) for group in optimizer.param_groups if group['weight_decay'] for each in group['params']}
    assert not any(id(parameters[key]) in decayed for key in spared)
    assert id(parameters['backbone.stages.0.blocks.0.mixer.out_proj.weight']) in decayed


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match='takes no pyramid; features_only=True takes pyramid'):
        timm.create_model('v2m_test', pyramid='multi')
    with pytest.raises(ValueError, match='takes no cls_token'):
        timm.create_model('v2m_test', cls_token='corner')
    with pytest.raises(ValueError, match="global_pool 'avg', 'max', 'avgmax' or '', got 'catavgmax'"):
        timm.create_model('mamba2d_test', global_pool='catavgmax')
    with pytest.raises(TypeError, match='output_stride'):
        timm.create_model('vmamba_test', features_only=True, output_stride=8)
