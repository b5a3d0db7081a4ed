"""Backbones by name, their feature_info, and weights from every kind of file."""

import pytest
import torch

from ssm_backbones import create_backbone, list_backbones
from ssm_backbones.checkpoints import CheckpointError, load_backbone
from tests.checkpoints.small import classifier, pyramid

NAMES = ['vmamba-test', 'v2m-test-hier', 'v2m-test', 'mamba2d-test']


def norms(model):
    return {name for name in model.state_dict() if name.startswith('norm')}


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        *((name, {}) for name in NAMES),
        ('vmamba-test', dict(out_indices=(3, 1))),
        ('v2m-test', dict(pyramid='single')),
        ('v2m-test', dict(pyramid='multi')),
        ('v2m-test', dict(out_indices=(0, 2))),
        ('mamba2d-test', dict(out_indices=-1)),
    ],
)
def test_feature_info_tells_what_comes_out(name, options) -> None:
    model = create_backbone(name, **options).eval()
    maps = model(torch.randn(1, 3, 128, 64))
    info = model.feature_info
    assert info.channels() == [each.shape[1] for each in maps]
    assert info.reduction() == [128 // each.shape[2] for each in maps] == [64 // each.shape[3] for each in maps]
    assert len(info) == len(maps)
    assert info.channels(0) == info[0]['num_chs']
    assert [item['reduction'] for item in info] == info.reduction()
    modules = dict(model.named_modules())
    assert all(name in modules for name in info.module_name())


def test_listed_backbones_are_those_that_can_be_built() -> None:
    names = list_backbones()
    assert {'vmamba-tiny', 'v2m-hier-small', 'mamba2d-nano'} <= set(names)
    assert len(set(names)) == len(names)
    with torch.device('meta'):
        for name in names:
            create_backbone(name)


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('vmamba_tiny', "did you mean 'vmamba-tiny'"),
        ('mamba2d-nanno', "did you mean 'nano'"),
        ('vmamba', 'Known: vmamba-tiny'),
        ('resnet-50', 'Known: vmamba-tiny'),
    ],
)
def test_unknown_name(name, message) -> None:
    with pytest.raises(ValueError, match=message):
        create_backbone(name)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('wrap', ['bare', 'detector', 'training'])
def test_own_weights(name, wrap, tmp_path) -> None:
    source = create_backbone(name)
    state = source.state_dict()
    checkpoint = {
        'bare': state,
        'detector': {'state_dict': {f'backbone.{key}': value for key, value in state.items()}, 'meta': {}},
        'training': {'model': {f'module.{key}': value for key, value in state.items()}},
    }[wrap]
    torch.save(checkpoint, tmp_path / 'weights.pth')
    torch.manual_seed(1)
    loaded = create_backbone(name, tmp_path / 'weights.pth')
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, state[key]), key


PREFIXES = [
    '_orig_mod.',
    'backbone._orig_mod.',
    '_orig_mod.backbone.',
    'model.backbone.',
    'net.',
    'student.backbone.',
    'module._orig_mod.',
    'module.',
    'module.backbone.',
]


@pytest.mark.parametrize('prefix', PREFIXES)
def test_what_stands_before_own_names_is_taken_off_and_logged(prefix, tmp_path, log) -> None:
    state = create_backbone('v2m-test-hier').state_dict()
    held = {f'{prefix}{key}': value for key, value in state.items()}
    if prefix != '_orig_mod.':
        # What lies outside of a prefix is no part of the model.
        held['criterion.weight'] = torch.ones(1)
    torch.save({'state_dict': held}, tmp_path / 'weights.pth')
    loaded = create_backbone('v2m-test-hier', tmp_path / 'weights.pth')
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    (line,) = log
    assert f'taken off the names of {len(state)} tensors' in line
    assert '_orig_mod.' in line or repr(prefix) in line


def test_a_compiled_backbone_takes_and_gives_its_own_names(tmp_path) -> None:
    source, target = create_backbone('vmamba-test'), create_backbone('vmamba-test')
    for model in (source, target):
        model.stages[0].blocks[0] = torch.compile(model.stages[0].blocks[0])
    torch.save(source.state_dict(), tmp_path / 'weights.pth')
    load_backbone(target, tmp_path / 'weights.pth')
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in target.state_dict().items())


def test_fewer_stages_and_other_norms(tmp_path) -> None:
    source = create_backbone('vmamba-test', out_indices=(3,))
    torch.save(source.state_dict(), tmp_path / 'weights.pth')
    loaded = create_backbone('vmamba-test', tmp_path / 'weights.pth', out_indices=(0, 2))
    assert torch.equal(loaded.stages[2].blocks[1].mixer.D, source.stages[2].blocks[1].mixer.D)
    assert norms(loaded) == {'norm0.weight', 'norm0.bias', 'norm2.weight', 'norm2.bias'}
    assert torch.equal(loaded.norm0.weight, torch.ones(16))


def test_official_weights(tmp_path) -> None:
    official = classifier()
    torch.save({'model': official}, tmp_path / 'classifier.pth')
    torch.save({'state_dict': {f'backbone.{name}': value for name, value in pyramid().items()}}, tmp_path / 'det.pth')
    first = create_backbone('vmamba-test', tmp_path / 'classifier.pth', out_indices=(0, 1, 2, 3))
    weight = first.stages[0].blocks[0].mixer.out_proj.weight
    assert torch.equal(weight, official['layers.0.blocks.0.op.out_proj.weight'])
    second = create_backbone('vmamba-test', tmp_path / 'det.pth')
    assert not torch.equal(second.norm0.weight, torch.ones(16))
    grey = create_backbone('vmamba-test', tmp_path / 'classifier.pth', in_channels=1)
    assert torch.allclose(
        grey.patch_embed.first.conv.weight, first.patch_embed.first.conv.weight.sum(1, keepdim=True), atol=1e-6
    )


def test_weights_that_do_not_fit_leave_the_backbone_alone(tmp_path) -> None:
    torch.save(create_backbone('mamba2d-test').state_dict(), tmp_path / 'other.pth')
    model = create_backbone('vmamba-test')
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match='does not fit the VMamba that was built'):
        load_backbone(model, tmp_path / 'other.pth')
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match='does not exist'):
        create_backbone('vmamba-test', tmp_path / 'nowhere.pth')
    with pytest.raises(ValueError, match="no weights of 'vmamba-test' were published"):
        create_backbone('vmamba-test', True)


@pytest.mark.parametrize('kind', ['single', 'multi'])
def test_plain_weights_with_and_without_a_pyramid(kind, tmp_path, log) -> None:
    plain = create_backbone('v2m-test')
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    with_pyramid = create_backbone('v2m-test', tmp_path / 'plain.pth', pyramid=kind)
    assert log == [f'{tmp_path / "plain.pth"}: pyramid missing, kept as initialised.']
    torch.save(with_pyramid.state_dict(), tmp_path / 'pyramid.pth')
    create_backbone('v2m-test', tmp_path / 'pyramid.pth', pyramid='single')
    assert len(log) == 1
    back = create_backbone('v2m-test', tmp_path / 'pyramid.pth')
    assert ': norm3 missing, kept as initialised' in log[1]
    for model in (with_pyramid, back):
        for name, value in model.stages.state_dict().items():
            assert torch.equal(value, plain.stages.state_dict()[name]), name
    assert not any(name.startswith('pyramid') for name in back.state_dict())


def test_a_pyramid_in_part_is_refused(tmp_path) -> None:
    state = create_backbone('v2m-test', pyramid='single').state_dict()
    name = next(name for name in state if name.startswith('pyramid.'))
    state['pyramid.other'] = state.pop(name)
    torch.save(state, tmp_path / 'part.pth')
    with pytest.raises(CheckpointError, match=rf'{name} \(.*\) is missing; pyramid.other is not expected'):
        create_backbone('v2m-test', tmp_path / 'part.pth', pyramid='single')


def test_an_output_norm_in_part_is_refused_and_one_of_no_stage(tmp_path) -> None:
    state = create_backbone('vmamba-test').state_dict()
    del state['norm1.bias']
    state['norm4.weight'] = state['norm3.weight']
    torch.save(state, tmp_path / 'part.pth')
    with pytest.raises(CheckpointError, match=r'built: norm1.bias \(32\) is missing; norm4.weight is not expected\.'):
        create_backbone('vmamba-test', tmp_path / 'part.pth')
    # Without that stage's map its norm is not asked for.
    del state['norm4.weight']
    torch.save(state, tmp_path / 'part.pth')
    loaded = create_backbone('vmamba-test', tmp_path / 'part.pth', out_indices=0)
    assert torch.equal(loaded.norm0.bias, state['norm0.bias'])


def test_the_position_embedding_is_resized_on_load(tmp_path, log) -> None:
    source = create_backbone('v2m-test', img_size=96).eval()
    torch.save(source.state_dict(), tmp_path / 'weights.pth')
    loaded = create_backbone('v2m-test', tmp_path / 'weights.pth', img_size=(64, 128)).eval()
    assert loaded.patch_embed.pos_embed.shape == (1, 4, 8, 16)
    assert log == ['patch_embed.pos_embed is resized from 6x6 to 4x8 patches.']
    images = torch.randn(1, 3, 64, 128)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), source(images))
    state = source.state_dict() | {'patch_embed.pos_embed': torch.zeros(1, 6, 6, 8)}
    torch.save(state, tmp_path / 'narrow.pth')
    with pytest.raises(CheckpointError, match=r'pos_embed is \(1, 6, 6, 8\), expected \(1, 4, 4, 16\)'):
        create_backbone('v2m-test', tmp_path / 'narrow.pth', img_size=64)


@pytest.mark.parametrize(('trained', 'built'), [('corner', 'mean'), ('mean', 'center')])
def test_class_tokens_have_to_be_those_of_the_checkpoint(trained, built, tmp_path) -> None:
    torch.save(create_backbone('v2m-test', cls_token=trained).state_dict(), tmp_path / 'weights.pth')
    with pytest.raises(CheckpointError, match='Give the cls_token that the checkpoint was trained with'):
        create_backbone('v2m-test', tmp_path / 'weights.pth', cls_token=built)
