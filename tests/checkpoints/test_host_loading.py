"""What mmengine and PyTorch load into a backbone themselves: converted or refused, never passed over."""

import pytest
import torch
from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint
from torch import nn

from ssm_backbones import V2M, Mamba2D, VMamba
from ssm_backbones.apis.checks import check_init_cfg
from ssm_backbones.checkpoints import CheckpointError, convert_checkpoint
from ssm_backbones.utils.errors import CommandError
from tests.checkpoints.layouts import (
    mamba2d_backbone,
    mamba2d_classifier,
    random_tensors,
    vmamba_classifier,
    vmamba_pyramid,
)
from tests.checkpoints.small import classifier, prefixed, pyramid

SMALL_MAMBA2D = dict(embed_dims=[16, 24, 32, 64], depths=[2, 2, 1, 1])
V0 = dict(embed_dims=16, depths=[1, 1, 1, 1], ssm_ratio=2.0, d_state=2, version='v0')


class Model(nn.Module):
    """A backbone and a head, as the host libraries name them."""

    def __init__(self, backbone=None):
        super().__init__()
        self.backbone = MODELS.build(backbone or dict(type='VMamba', arch='test'))
        self.head = nn.Linear(3, 2)


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def by_mmengine(model, checkpoint, folder):
    torch.save(checkpoint, folder / 'file.pth')
    load_checkpoint(model, str(folder / 'file.pth'), map_location='cpu')


def by_torch(model, checkpoint, folder):
    model.load_state_dict(checkpoint.get('state_dict', checkpoint), strict=True)


def loosely_by_torch(model, checkpoint, folder):
    model.load_state_dict(checkpoint.get('state_dict', checkpoint), strict=False)


LOADERS = [by_mmengine, by_torch, loosely_by_torch]
BACKBONES = {
    'vmamba': (dict(type='VMamba', arch='test'), pyramid),
    'vmamba-v0': (dict(type='VMamba', arch=V0), lambda: random_tensors(vmamba_pyramid(**V0))),
    'vmamba, two stages': (dict(type='VMamba', arch='test', out_indices=(0, 1)), pyramid),
    'mamba2d': (dict(type='Mamba2D', arch='test'), lambda: random_tensors(mamba2d_backbone(**SMALL_MAMBA2D))),
}


@pytest.mark.parametrize('load', LOADERS)
@pytest.mark.parametrize('case', BACKBONES)
def test_the_authors_tensors_in_a_whole_model_are_converted(case, load, tmp_path, log):
    config, make = BACKBONES[case]
    model, official = Model(config), make()
    rest = {f'head.{name}': torch.full_like(tensor, 7.0) for name, tensor in model.head.state_dict().items()}
    load(model, dict(state_dict={**prefixed('backbone.', official), **rest}), tmp_path)
    converted = convert_checkpoint({'state_dict': official}, backbone_only=True)[0]['state_dict']
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, converted[name]), name
    assert model.head.weight.eq(7).all()
    assert any('is converted to our names' in line for line in log)
    assert not any('do not match' in line for line in log)


@pytest.mark.parametrize('load', LOADERS)
@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda t: {name: tensor for name, tensor in t.items() if 'blocks.0.op.Ds' not in name}, 'op.Ds .* is missing'),
        (lambda t: {name: tensor for name, tensor in t.items() if 'outnorm' not in name}, 'has no output norms'),
        (
            lambda t: random_tensors(vmamba_pyramid(embed_dims=16, depths=[1, 1, 3, 1], ssm_ratio=1.0)),
            'does not fit the',
        ),
        (lambda t: random_tensors(mamba2d_backbone(**SMALL_MAMBA2D)), 'is of Mamba2D, .*does not fit the VMamba'),
    ],
)
def test_the_authors_tensors_that_do_not_fit_are_refused(change, message, load, tmp_path):
    model = Model()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=message):
        load(model, dict(state_dict=prefixed('backbone.', change(pyramid()))), tmp_path)
    assert_unchanged(model.backbone, {name.removeprefix('backbone.'): value for name, value in before.items()})


@pytest.mark.parametrize('load', LOADERS)
@pytest.mark.parametrize(
    'wrap',
    [dict, lambda t: {'model': t}, lambda t: {'state_dict': prefixed('backbone.', t)}],
    ids=['bare', 'model', 'detector'],
)
def test_the_authors_tensors_for_a_backbone_alone_are_refused_with_the_type_to_use(wrap, load, tmp_path):
    model = VMamba('test')
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"the VMamba is given the authors' tensors.*type='OfficialPretrained'"):
        load(model, wrap(classifier()), tmp_path)
    assert_unchanged(model, before)


FILES = {
    'official classifier': (lambda own: {'model': classifier()}, r"holds none of the VMamba's tensors.*tools/convert"),
    'foreign': (lambda own: {'state_dict': {'backbone.layer1.weight': torch.ones(2)}}, "none of the VMamba's tensors"),
    'foreign, of like names': (
        lambda own: {
            'state_dict': {
                'backbone.stages.0.blocks.0.norm1.weight': torch.ones(16),
                'backbone.norm3.weight': torch.ones(128),
            }
        },
        r'does not fit the VMamba: patch_embed\..*; and \d+ more\. Build',
    ),
    'a head alone': (lambda own: {'state_dict': {'head.weight': torch.ones(2, 3)}}, "none of the VMamba's tensors"),
    'a bare backbone': (lambda own: {'state_dict': own}, "none of the VMamba's tensors"),
    'another arch': (lambda own: {'state_dict': prefixed('backbone.', VMamba(V0).state_dict())}, 'does not fit the VM'),
    'a deeper one': (
        lambda own: {'state_dict': prefixed('backbone.', {**own, 'stages.2.blocks.2.norm1.weight': torch.ones(64)})},
        'blocks.2.norm1.weight is not exp',
    ),
    'other images': (
        lambda own: {
            'state_dict': prefixed('backbone.', {**own, 'patch_embed.first.conv.weight': torch.ones(8, 4, 3, 3)})
        },
        'adapt_stem',
    ),
    'a quantised one': (
        lambda own: {'state_dict': prefixed('backbone.', {name: (64 * t).to(torch.int8) for name, t in own.items()})},
        'is of torch.int8, expected floating-point',
    ),
}


@pytest.mark.parametrize('case', FILES)
def test_mmengine_does_not_pass_over_a_backbone_that_is_not_there(case, tmp_path):
    change, message = FILES[case]
    model = Model()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=message):
        by_mmengine(model, change(VMamba('test').state_dict()), tmp_path)
    assert_unchanged(model, before)


@pytest.mark.parametrize('prefix', ['_orig_mod.', 'model.', 'module._orig_mod.', 'student.', 'ema.module.'])
def test_mmengine_loads_what_a_wrapper_saved(prefix, tmp_path, log):
    model, source = Model(), Model().state_dict()
    by_mmengine(model, {'state_dict': prefixed(prefix, source) | {'steps': torch.ones(1)}}, tmp_path)
    assert_unchanged(model, source)
    (line,) = (line for line in log if 'taken off' in line)
    assert f'{len(source)} tensors; 1 others are left out: steps.' in line or '_orig_mod.' in prefix
    inserted = {name.replace('backbone.', 'backbone._orig_mod.'): value for name, value in source.items()}
    model = Model()
    by_mmengine(model, {'state_dict': inserted}, tmp_path)
    assert_unchanged(model, source)


def test_pytorch_still_tells_what_does_not_fit_in_its_own_words():
    model = Model()
    assert len(model.load_state_dict({'head.weight': torch.ones(2, 3)}, strict=False).missing_keys) > 50
    with pytest.raises(RuntimeError, match='Missing key') as error:
        model.load_state_dict({'head.weight': torch.ones(2, 3)})
    assert not isinstance(error.value, CheckpointError)


def test_what_a_detector_may_take_from_a_classifier_is_loaded(tmp_path):
    source, model = Model(dict(type='VMamba', arch='test', out_indices=3)), Model()
    by_mmengine(model, dict(state_dict=source.state_dict()), tmp_path)
    assert torch.equal(model.backbone.stages[2].blocks[1].mixer.D, source.backbone.stages[2].blocks[1].mixer.D)
    plain = Model(dict(type='V2M', arch='test', img_size=96, pyramid='single'))
    by_mmengine(plain, dict(state_dict=Model(dict(type='V2M', arch='test', img_size=64)).state_dict()), tmp_path)


def test_files_of_adapters_alone_are_loaded(tmp_path):
    model = Model()
    weight = nn.Parameter(torch.zeros(4, 16))
    model.backbone.stages[0].blocks[0].mixer.in_proj.register_parameter('lora_down', weight)
    by_mmengine(
        model, {'state_dict': {'backbone.stages.0.blocks.0.mixer.in_proj.lora_down': torch.ones(4, 16)}}, tmp_path
    )
    assert weight.eq(1).all()


def test_mamba2d_s_head_takes_no_half_of_the_authors(tmp_path):
    from mmpretrain.registry import MODELS as CLASSIFIERS

    import ssm_backbones.heads  # noqa: F401

    model = CLASSIFIERS.build(
        dict(
            type='mmpretrain.ImageClassifier',
            backbone=dict(type='Mamba2D', arch='test', out_indices=3),
            head=dict(type='Mamba2DClsHead', num_classes=10, in_channels=64),
        )
    )
    official = random_tensors(mamba2d_classifier(**SMALL_MAMBA2D, num_classes=10))
    with pytest.raises(CheckpointError, match="Mamba2DClsHead is given the authors' classifier.*tools/convert"):
        by_mmengine(model, {'state_dict': official}, tmp_path)
    by_mmengine(model, convert_checkpoint({'state_dict': official})[0], tmp_path)
    assert torch.equal(model.head.norm1.weight, official['norm.weight'])


def test_no_name_of_ours_is_one_of_theirs():
    """How the authors' tensors are told from ours."""
    for model, layout in [
        (VMamba('test'), vmamba_pyramid(embed_dims=16, depths=[1, 1, 2, 1])),
        (VMamba(V0), vmamba_pyramid(**V0)),
        (VMamba('test'), vmamba_classifier(embed_dims=16, depths=[1, 1, 2, 1])),
        (Mamba2D('test'), mamba2d_backbone(**SMALL_MAMBA2D)),
    ]:
        assert model.state_dict().keys().isdisjoint(layout)


# Of init_cfg=dict(type='Pretrained', ...): the file, the prefix, and what is said of it.
PRETRAINED = {
    'official names': (lambda own: {'model': classifier()}, None, "type='OfficialPretrained'"),
    'bare official names': (lambda own: classifier(), None, "type='OfficialPretrained'"),
    'official detector': (lambda own: {'state_dict': prefixed('backbone.', pyramid())}, None, "'OfficialPretrained'"),
    'official detector, prefix': (
        lambda own: {'state_dict': prefixed('backbone.', pyramid())},
        'backbone.',
        "'OfficialPretrained'",
    ),
    'another prefix': (
        lambda own: {'state_dict': prefixed('student.backbone.', own)},
        'backbone.',
        "Give prefix='student.backbone.' beside",
    ),
    'a prefix too many': (lambda own: {'state_dict': own}, 'backbone.', 'Leave out the prefix'),
    'a trainer of another kind': (lambda own: {'model': own}, None, "lie under 'model'"),
    'a foreign one': (lambda own: {'state_dict': {'conv1.weight': torch.ones(1)}}, None, 'holds none of the VMamba'),
    'a deeper one': (
        lambda own: {'state_dict': {**own, 'stages.2.blocks.2.norm1.weight': torch.ones(64)}},
        None,
        'stages.2.blocks.2.norm1.weight is not expected',
    ),
    'another arch': (lambda own: {'state_dict': VMamba(V0).state_dict()}, None, 'is missing'),
}


@pytest.mark.parametrize('case', PRETRAINED)
def test_a_pretrained_file_that_fits_in_nothing_is_refused_with_the_remedy(case, tmp_path):
    change, prefix, message = PRETRAINED[case]
    torch.save(change(VMamba('test').state_dict()), tmp_path / 'file.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'file.pth'))
    if prefix:
        init_cfg['prefix'] = prefix
    model = dict(type='Detector', backbone=dict(type='VMamba', arch='test', init_cfg=init_cfg))
    with pytest.raises(CommandError, match=rf'model\.backbone\.init_cfg: .*file\.pth.*{message}') as error:
        check_init_cfg(model)
    assert '\n' not in str(error.value)
    # By the host libraries' own tools, too.
    backbone = MODELS.build(model['backbone'])
    before = snapshot(backbone)
    with pytest.raises((CheckpointError, AssertionError)):
        backbone.init_weights()
    assert_unchanged(backbone, before)


@pytest.mark.parametrize(
    ('make', 'prefix'),
    [
        (lambda: VMamba('test', out_indices=3).state_dict(), None),
        (lambda: prefixed('module.', VMamba('test').state_dict()), None),
        (lambda: prefixed('backbone.', VMamba('test').state_dict()), 'backbone'),
        (lambda: {**VMamba('test').state_dict(), 'head.weight': torch.ones(1)}, None),
        (lambda: prefixed('backbone.', VMamba('test').state_dict()) | {'head.weight': torch.ones(1)}, None),
        (lambda: prefixed('student.backbone._orig_mod.', VMamba('test').state_dict()), None),
    ],
)
def test_a_pretrained_file_that_fits_passes(make, prefix, tmp_path):
    torch.save(dict(state_dict=make()), tmp_path / 'file.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'file.pth'), **(dict(prefix=prefix) if prefix else {}))
    check_init_cfg(dict(backbone=dict(type='VMamba', arch='test', init_cfg=init_cfg)))
    backbone = MODELS.build(dict(type='VMamba', arch='test', init_cfg=init_cfg))
    before = snapshot(backbone)
    backbone.init_weights()
    assert not torch.equal(
        backbone.stages[0].blocks[0].mixer.in_proj.weight, before['stages.0.blocks.0.mixer.in_proj.weight']
    )


def test_pretrained_position_embeddings_of_another_grid_pass_and_other_backbones_are_left_alone(tmp_path, log):
    torch.save(dict(state_dict=V2M('test', img_size=96).state_dict()), tmp_path / 'file.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'file.pth'))
    check_init_cfg(dict(backbone=dict(type='V2M', arch='test', img_size=64, init_cfg=init_cfg)))
    assert not log
    check_init_cfg(dict(backbone=dict(type='ResNet', depth=18, init_cfg=init_cfg)))
    check_init_cfg(dict(backbone=dict(type='VMamba', init_cfg=dict(type='Pretrained', checkpoint='torchvision://x'))))
