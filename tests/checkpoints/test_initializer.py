"""Official checkpoints straight into backbones: init_cfg and load_official."""

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope

from ssm_backbones import V2M, Mamba2D, VMamba, load_official
from ssm_backbones.checkpoints import CheckpointError, convert_checkpoint
from tests.checkpoints.layouts import (
    VMAMBA,
    mamba2d_backbone,
    mamba2d_classifier,
    marked_tensors,
    random_tensors,
    vmamba_classifier,
)
from tests.checkpoints.small import TEST_ARCH, classifier, prefixed, pyramid


@pytest.fixture
def save(tmp_path):
    """Saves tensors as an official checkpoint and returns its path."""

    def save(tensors, key='model'):
        path = tmp_path / 'official.pth'
        torch.save({key: tensors}, path)
        return str(path)

    return save


def converted(tensors, key='model'):
    return convert_checkpoint({key: tensors}, backbone_only=True)[0]['state_dict']


def assert_loaded(model, tensors, but=()):
    for name, tensor in model.state_dict().items():
        assert name.startswith(tuple(but)) or torch.equal(tensor, tensors[name]), name


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize('scope', ['mmengine', 'mmdet', 'mmseg', 'mmpretrain'])
def test_init_cfg_loads_a_classifier_into_a_detectors_backbone(scope, save, log):
    tensors = classifier()
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(
            dict(type='VMamba', arch='test', init_cfg=dict(type='OfficialPretrained', checkpoint=save(tensors)))
        )
        before = snapshot(model)
        model.init_weights()
    text = '\n'.join(log)
    assert_loaded(model, converted(tensors), but=['norm'])
    for i in range(4):
        # All of them new, as the authors' detectors have them.
        assert torch.equal(model.state_dict()[f'norm{i}.weight'], before[f'norm{i}.weight'])
        assert torch.equal(model.state_dict()[f'norm{i}.bias'], before[f'norm{i}.bias'])
    assert 'left as initialised: norm1: the checkpoint has no output norm for this stage' in text
    assert "left out: norm3: the classifier's own" in text
    assert "left as initialised: norm3: a classifier's output norm is not loaded (classifier_norm)" in text
    assert 'left out: classifier.head.weight, classifier.head.bias: a bare backbone does not hold it' not in text
    assert 'left out: head.fc.weight, head.fc.bias: a bare backbone does not hold it' in text


@pytest.mark.parametrize(
    ('out_indices', 'option', 'loaded'),
    [
        ((3,), None, True),
        ((3,), False, False),
        ((0, 1, 2, 3), None, False),
        ((0, 1, 2, 3), True, True),
        ((1, 3), None, False),
        ((2,), True, False),
    ],
)
def test_a_classifiers_norm_goes_into_a_classifier_alone_unless_told_otherwise(out_indices, option, loaded, save):
    init_cfg = dict(type='OfficialPretrained', checkpoint=save(classifier()))
    if option is not None:
        init_cfg['classifier_norm'] = option
    model = MODELS.build(dict(type='VMamba', arch='test', out_indices=out_indices, init_cfg=init_cfg))
    model.init_weights()
    assert torch.equal(model.norm3.weight, torch.ones(128)) != loaded if 3 in out_indices else not loaded
    assert all(torch.equal(getattr(model, f'norm{i}').weight, torch.ones(16 * 2**i)) for i in out_indices if i < 3)


def test_a_detectors_own_norms_are_loaded_in_any_case(save):
    tensors = pyramid()
    model = MODELS.build(
        dict(
            type='VMamba',
            arch='test',
            init_cfg=dict(type='OfficialPretrained', checkpoint=save(tensors), classifier_norm=False),
        )
    )
    model.init_weights()
    assert_loaded(model, converted(tensors))


def test_plain_pytorch_is_given_the_trained_norm_unless_told_otherwise(save):
    path = save(classifier())
    model = VMamba('test')
    assert 'norm3' not in load_official(model, path).initial
    assert not torch.equal(model.norm3.weight, torch.ones(128))
    report = load_official(VMamba('test'), path, classifier_norm=False)
    assert list(report.initial) == ['norm3', 'norm0', 'norm1', 'norm2']


def test_a_classifiers_backbone_takes_all_of_a_classifier(save):
    tensors = classifier()
    model = VMamba('test', out_indices=(3,))
    report = load_official(model, save(tensors))
    assert_loaded(model, converted(tensors))
    assert not report.initial and report.model == "VMamba, arch='test'"


def test_a_detectors_backbone_is_taken_out_of_it(save):
    tensors = pyramid()
    whole = {**prefixed('backbone.', tensors), 'neck.convs.0.weight': torch.ones(2)}
    model = VMamba('test')
    report = load_official(model, save(whole, 'state_dict'))
    assert_loaded(model, converted(whole, 'state_dict'))
    assert not report.initial
    assert report.left_out == {'neck.convs.0.weight': 'a bare backbone does not hold it'}


@pytest.mark.parametrize(
    ('out_indices', 'left_out'),
    [
        ((1, 2), ['norm0', 'norm3', 'stages.2.downsample.conv', 'stages.2.downsample.norm', 'stages.3']),
        ((0, 3), ['norm1', 'norm2']),
    ],
)
def test_what_the_out_indices_leave_unbuilt_is_left_out(out_indices, left_out, save):
    tensors = pyramid()
    model = VMamba('test', out_indices=out_indices)
    report = load_official(model, save(tensors))
    assert list(report.left_out) == left_out and not report.initial
    assert_loaded(model, converted(tensors))


def test_moving_averages_are_loaded_on_request(tmp_path):
    raw, averaged = classifier(), classifier()
    torch.save({'model': raw, 'model_ema': averaged}, tmp_path / 'both.pth')
    model = MODELS.build(
        dict(
            type='VMamba',
            arch='test',
            out_indices=3,
            init_cfg=dict(type='OfficialPretrained', checkpoint=str(tmp_path / 'both.pth'), weights='ema'),
        )
    )
    model.init_weights()
    assert_loaded(model, converted(averaged))
    report = load_official(model, tmp_path / 'both.pth')
    assert_loaded(model, converted(raw))
    assert report.left_out['model_ema'] == 'other weights, to be chosen by this name'


def test_frozen_and_half_precision_models_are_loaded_too(save):
    tensors = classifier()
    model = VMamba('test', out_indices=3, frozen_stages=2).to(torch.bfloat16)
    load_official(model, save(tensors))
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in converted(tensors).items()}
    assert_loaded(model, expected)
    assert not model.patch_embed.first.conv.weight.requires_grad
    assert model.norm3.weight.requires_grad


def test_another_arch_is_an_error_that_lists_the_first_tensors_and_loads_nothing(save):
    path = save(marked_tensors(vmamba_classifier(**VMAMBA['tiny-s1l8'])))
    model = VMamba('test')
    before = snapshot(model)
    with pytest.raises(CheckpointError) as error:
        load_official(model, path)
    message = str(error.value)
    assert "is a checkpoint of VMamba, arch='tiny-s1l8' and does not fit the model, VMamba, arch='test'. 27" in message
    assert 'patch_embed.first.conv.weight is (48, 3, 3, 3), expected (8, 3, 3, 3); patch_embed.first.conv' in message
    assert message.endswith('and 269 more.')
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ('change', 'difference'),
    [
        (dict(ssm_ratio=2.0), r'stages.0.blocks.0.mixer.dt_weight is \(4, 16, 1\), expected \(4, 32, 1\)'),
        (dict(d_state=2), r'stages.0.blocks.0.mixer.A_log is \(4, 16, 1\), expected \(4, 16, 2\)'),
        (dict(depths=[1, 1, 3, 1]), r'stages.2.blocks.2.norm1.weight \(64\) is missing'),
        (dict(depths=[1, 1, 1, 1]), r'stages.2.blocks.1.norm1.weight is not expected'),
        (dict(depths=[1, 1, 2]), 'stages.3.blocks.0.norm1.weight is not expected'),
        (dict(version='v0'), r'patch_embed.projection.conv.weight \(16, 3, 4, 4\) is missing'),
    ],
)
def test_archs_that_differ_in_one_setting_are_told_apart(change, difference, save):
    arch = {**VMamba.ARCHS['test'], **change}
    model = VMamba(arch, out_indices=tuple(range(len(arch['depths']))))
    with pytest.raises(CheckpointError, match=difference):
        load_official(model, save(classifier()))


SMALL_MAMBA2D = dict(embed_dims=[16, 24, 32, 64], depths=[2, 2, 1, 1])


def test_mamba2d_takes_classifiers_and_detectors_whole(save):
    classifier = random_tensors(mamba2d_classifier(**SMALL_MAMBA2D))
    detector = {**prefixed('backbone.', random_tensors(mamba2d_backbone(**SMALL_MAMBA2D))), 'neck': torch.ones(1)}
    for tensors, left_out in ((classifier, 'head.norm1.weight, head.norm1.bias'), (detector, 'neck')):
        model = Mamba2D('test')
        report = load_official(model, save(tensors, 'state_dict'))
        assert_loaded(model, converted(tensors, 'state_dict'))
        assert report.model == "Mamba2D, arch='test'" and not report.initial
        assert len(report.left_out) == 1 and next(iter(report.left_out)).startswith(left_out)


def test_mamba2d_leaves_out_what_it_does_not_build(save):
    tensors = random_tensors(mamba2d_classifier(**SMALL_MAMBA2D))
    model = Mamba2D('test', out_indices=(0, 1), in_channels=1)
    report = load_official(model, save(tensors, 'state_dict'), in_channels=1)
    assert list(report.left_out)[1:] == [
        'stages.1.downsample',
        'stages.2',
        'stages.2.downsample',
        'stages.2.norm',
        'stages.3',
        'stages.3.norm',
    ]
    assert_loaded(model, converted(tensors, 'state_dict'), but=['patch_embed.conv.weight'])
    torch.testing.assert_close(model.patch_embed.conv.weight, tensors['backbone.ds.stem.conv.weight'].sum(1, True))


def test_families_are_told_apart(save):
    with pytest.raises(
        CheckpointError,
        match="is a checkpoint of VMamba, arch='test' and does not fit the model, "
        r"Mamba2D, arch='test'. \d+ tensors .* differ: patch_embed.conv.weight ",
    ):
        load_official(Mamba2D('test'), save(classifier()))
    with pytest.raises(CheckpointError, match='is a checkpoint of Mamba2D, .* does not fit the model, VMamba, '):
        load_official(VMamba('test'), save(random_tensors(mamba2d_classifier(**SMALL_MAMBA2D)), 'state_dict'))


@pytest.mark.parametrize(
    ('change', 'difference'),
    [
        (dict(depths=[2, 3, 1, 1]), r'stages.1.blocks.2.norm1.weight \(24\) is missing'),
        (dict(d_state=8), r'stages.0.blocks.0.mixer.top.A_log is \(16, 16\), expected \(16, 8\)'),
        (dict(mixers=['scan', 'attention', 'attention', 'attention'], embed_dims=[16, 32, 32, 64]), 'expected'),
    ],
)
def test_mamba2d_archs_are_told_apart(change, difference, save):
    path = save(random_tensors(mamba2d_classifier(**SMALL_MAMBA2D)), 'state_dict')
    with pytest.raises(CheckpointError, match=difference):
        load_official(Mamba2D({**SMALL_MAMBA2D, **change}), path)


def test_the_stem_is_adapted_on_request_only(save):
    tensors = classifier()
    path = save(tensors)
    model = VMamba('test', in_channels=4)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match='is for images of 3 channels, the model for 4; in_channels=4 beside'):
        load_official(model, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    report = load_official(model, path, in_channels=4)
    assert report.notes == ['stem adapted from 3 to 4 channels of the image']
    old, new = tensors['patch_embed.0.weight'], model.patch_embed.first.conv.weight
    torch.testing.assert_close(new[:, :3], old * 0.75)
    torch.testing.assert_close(new[:, 3], old[:, 0] * 0.75)
    assert_loaded(model, converted(tensors), but=['patch_embed.first.conv.weight', 'norm0', 'norm1', 'norm2'])


@pytest.mark.parametrize('channels', [1, 6])
def test_an_adapted_stem_answers_repeated_channels_as_before(channels):
    tensors = random_tensors(vmamba_classifier(**TEST_ARCH), torch.float64)
    weight = convert_checkpoint({'model': tensors}, in_channels=channels)[0]['state_dict'][
        'backbone.patch_embed.first.conv.weight'
    ]
    grey = torch.randn(1, 1, 9, 7, dtype=torch.float64)
    expected = torch.conv2d(grey.expand(-1, 3, -1, -1), tensors['patch_embed.0.weight'])
    torch.testing.assert_close(torch.conv2d(grey.expand(-1, channels, -1, -1), weight), expected)


def test_the_same_number_of_channels_changes_nothing():
    tensors = classifier()
    same, report = convert_checkpoint({'model': tensors}, in_channels=3, backbone_only=True)
    assert not report.notes
    assert torch.equal(same['state_dict']['patch_embed.first.conv.weight'], tensors['patch_embed.0.weight'])


def test_bad_numbers_of_channels_are_refused():
    with pytest.raises(CheckpointError, match='in_channels must be at least 1, got 0'):
        convert_checkpoint({'model': classifier()}, in_channels=0)


def test_only_backbones_with_official_checkpoints_take_them(save):
    path = save(classifier())
    with pytest.raises(CheckpointError, match='into a backbone, a VMamba or Mamba2D, not into a PlainV2M'):
        load_official(V2M('test', out_indices=0), path)
    with pytest.raises(CheckpointError, match='not into a Sequential. Whole models: convert the file with tools/'):
        load_official(torch.nn.Sequential(VMamba('test')), path)


def test_a_model_without_memory_is_refused(save):
    tensors = classifier()
    path = save(tensors)
    with torch.device('meta'):
        model = VMamba('test')
    with pytest.raises(CheckpointError, match='the VMamba is on the meta device, where nothing can be loaded; move it'):
        load_official(model, path)
    load_official(model.to_empty(device='cpu'), path)
    assert_loaded(model, converted(tensors), but=['norm0', 'norm1', 'norm2'])
