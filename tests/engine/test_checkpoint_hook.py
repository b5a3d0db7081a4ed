"""What a runner loads fits its model, or is refused; the authors' files are converted on the way."""

import logging
from types import SimpleNamespace

import pytest
import torch
from mmengine.model import BaseTTAModel
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import _load_checkpoint_to_model
from torch import nn

from ssm_backbones.checkpoints import CheckpointError
from ssm_backbones.engine.checkpoint_hook import LoadCheckpointHook
from ssm_backbones.utils.errors import CommandError
from tests.checkpoints.small import classifier, pyramid


class Model(nn.Module):
    """A backbone and a head, as the host libraries name them."""

    def __init__(self, backbone=None, classes=3, **parts):
        super().__init__()
        self.backbone = MODELS.build({'type': 'VMamba', 'arch': 'test', 'out_indices': (3,), **(backbone or {})})
        self.head = nn.ModuleDict({'fc': nn.Linear(128, classes)})
        for name, part in parts.items():
            self.add_module(name, part)

    def test_step(self, data):
        """What mmengine's augmented testing asks for."""
        raise NotImplementedError


@pytest.fixture(scope='module')
def model():
    return Model()


@pytest.fixture
def saved(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def load(model, checkpoint, whole=True, **options):
    """Load as a runner does: hand the checkpoint to the hook, then whatever fits to the model."""
    runner = SimpleNamespace(model=model, logger=logging.getLogger('tests.hook'))
    LoadCheckpointHook('file.pth', whole, **options).after_load_checkpoint(runner, checkpoint)
    _load_checkpoint_to_model(model, checkpoint)


def without(weights, *beginnings):
    return {name: tensor for name, tensor in weights.items() if not name.startswith(beginnings)}


def changed(weights, name, tensor):
    return {**weights, name: tensor}


@pytest.mark.parametrize(
    'wrap',
    [
        lambda weights: dict(state_dict=weights),
        lambda weights: dict(weights),
        lambda weights: dict(state_dict={f'module.{name}': tensor for name, tensor in weights.items()}),
        lambda weights: dict(
            state_dict={**weights, 'data_preprocessor.mean': torch.zeros(3), 'ema_head': torch.ones(2)}
        ),
        lambda weights: dict(state_dict=weights, ema_state_dict={'steps': torch.tensor(3)}, message_hub={}, meta={}),
    ],
    ids=['runner', 'bare', 'parallel', 'beside', 'ema'],
)
@pytest.mark.parametrize('whole', [True, False])
def test_a_model_s_own_weights_fit(wrap, whole, model, saved) -> None:
    checkpoint = wrap(saved)
    load(model, checkpoint, whole)
    # Where the other hooks and the runner look for them.
    assert len(checkpoint['state_dict']) >= len(saved)


MISMATCHES = {
    'empty': (lambda held: {}, r'backbone.patch_embed.first.conv.weight \(8, 3, 3, 3\) is missing'),
    'in front': (lambda held: {f'x{name}': tensor for name, tensor in held.items()}, 'is missing'),
    'missing': (
        lambda held: without(held, 'backbone.stages.1.blocks.0.mixer.D'),
        r'stages.1.blocks.0.mixer.D \(4, 32\) is missing\. Name',
    ),
    'left over': (
        lambda held: changed(held, 'backbone.stages.0.blocks.7.norm.weight', torch.ones(2)),
        r'stages.0.blocks.7.norm.weight is not expected\. Name',
    ),
    'shape': (
        lambda held: changed(held, 'backbone.norm3.weight', torch.ones(7)),
        r'backbone.norm3.weight is \(7\), expected \(128\)',
    ),
    'dimensions': (
        lambda held: changed(held, 'backbone.norm3.weight', torch.ones(4, 32)),
        r'backbone.norm3.weight is \(4, 32\), expected \(128\)',
    ),
}


@pytest.mark.parametrize('whole', [True, False])
@pytest.mark.parametrize('mismatch', MISMATCHES)
def test_mismatches_of_the_backbone_are_named(mismatch, whole, model, saved) -> None:
    change, message = MISMATCHES[mismatch]
    with pytest.raises(CommandError, match=rf'file\.pth does not fit the (model|backbone) of the config: .*{message}'):
        load(model, dict(state_dict=change(saved)), whole)


def test_other_archs_are_refused(model) -> None:
    other = Model(dict(arch=dict(embed_dims=8, depths=[1, 1, 1, 1], d_state=1, ssm_ratio=1.0, version='v2')))
    for whole in (True, False):
        with pytest.raises(CheckpointError, match='; and [0-9]+ more'):
            load(model, dict(state_dict=other.state_dict()), whole)


@pytest.mark.parametrize(('classes', 'line'), [(3, None), (5, r'head.fc.weight is \(5, 128\), expected \(3, 128\)')])
def test_classes_may_differ_in_training_alone(classes, line, model) -> None:
    checkpoint = dict(state_dict=Model(classes=classes).state_dict())
    load(model, dict(checkpoint), whole=False)
    if line is None:
        load(model, checkpoint)
    else:
        with pytest.raises(CheckpointError, match=line):
            load(model, checkpoint)


def test_a_head_of_another_task_is_no_matter_in_training_alone(model, saved) -> None:
    weights = without(saved, 'head.') | {'neck.convs.0.weight': torch.ones(2)}
    load(model, dict(state_dict=weights), whole=False)
    with pytest.raises(CheckpointError, match=r'head.fc.bias \(3\) is missing; neck.convs.0.weight is not expected'):
        load(model, dict(state_dict=weights))


def test_parts_that_are_not_used_may_lack_or_be_left_over(model, saved) -> None:
    both = dict(unused=('auxiliary_head.',))
    load(model, dict(state_dict=changed(saved, 'auxiliary_head.w', torch.ones(1))), **both)
    load(Model(auxiliary_head=nn.Linear(1, 1)), dict(state_dict=saved), **both)
    with pytest.raises(CheckpointError, match=r'auxiliary_head.weight \(1, 1\) is missing'):
        load(Model(auxiliary_head=nn.Linear(1, 1)), dict(state_dict=saved))


def test_counters_of_old_batch_norms_may_lack(saved) -> None:
    norm = nn.BatchNorm2d(2)
    weights = saved | {f'neck.{name}': tensor for name, tensor in norm.state_dict().items()}
    load(Model(neck=norm), dict(state_dict=without(weights, 'neck.num_batches_tracked')))
    with pytest.raises(CheckpointError, match=r'neck.running_mean \(2\) is missing'):
        load(Model(neck=norm), dict(state_dict=without(weights, 'neck.running_mean')))


def test_a_classifier_s_weights_start_a_pyramid(saved) -> None:
    detector = Model(dict(out_indices=(0, 1, 2)))
    load(detector, dict(state_dict=dict(saved)), whole=False)
    name = 'backbone.stages.2.blocks.1.mixer.out_proj.weight'
    torch.testing.assert_close(detector.state_dict()[name], saved[name])
    with pytest.raises(CheckpointError, match=r'norm0.weight \(16\) is missing'):
        load(detector, dict(state_dict=saved))


def test_a_plain_classifier_s_weights_start_a_pyramid() -> None:
    weights = Model(dict(type='V2M', out_indices=None)).state_dict()
    model = Model(dict(type='V2M', out_indices=None, pyramid='single'))
    pyramid_before = {name: tensor.clone() for name, tensor in model.backbone.pyramid.state_dict().items()}
    load(model, dict(state_dict=weights), whole=False)
    loaded = model.backbone.state_dict()
    shared = [name for name in loaded if name.startswith(('patch_embed.', 'stages.'))]
    assert shared and all(torch.equal(loaded[name], weights[f'backbone.{name}']) for name in shared)
    assert all(torch.equal(loaded[f'pyramid.{name}'], tensor) for name, tensor in pyramid_before.items())


@pytest.mark.parametrize('whole', [True, False])
@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_position_embeddings_are_resized_once_and_for_no_training_that_goes_on(whole, prefix, log) -> None:
    source, model = (Model(dict(type='V2M', out_indices=None, img_size=size)) for size in (96, 64))
    weights = {f'{prefix}{name}': tensor for name, tensor in source.state_dict().items()}
    name = 'backbone.patch_embed.pos_embed'
    checkpoint = dict(state_dict=dict(weights))
    load(model, checkpoint, whole)
    assert [line for line in log if 'resized' in line] == [
        f'{name if whole else name.removeprefix("backbone.")} is resized from 6x6 to 4x4 patches.'
    ]
    resized = source.backbone.patch_embed.position_embedding(4, 4)
    assert torch.equal(checkpoint['state_dict'][name], resized)
    assert torch.equal(model.backbone.patch_embed.pos_embed, resized)
    with pytest.raises(CheckpointError, match=rf'{name} is \(1, 6, 6, 16\), expected \(1, 4, 4, 16\)\. Name'):
        load(model, dict(state_dict=dict(weights)), whole, convert=False)


WRAPPERS = {
    'module.': lambda name: f'module.{name}',
    'model.': lambda name: f'model.{name}',
    '_orig_mod.': lambda name: f'_orig_mod.{name}',
    'module._orig_mod.': lambda name: f'module._orig_mod.{name}',
    'compiled backbone': lambda name: name.replace('backbone.', 'backbone._orig_mod.'),
    'recomputed block': lambda name: name.replace('blocks.0.', 'blocks.0._checkpoint_wrapped_module.'),
}


@pytest.mark.parametrize('whole', [True, False])
@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_what_wrappers_put_into_names_is_taken_off_and_logged(wrapper, whole, saved, log) -> None:
    model = Model()
    load(model, dict(state_dict={WRAPPERS[wrapper](name): tensor for name, tensor in saved.items()}), whole)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert [line for line in log if 'taken off' in line] == [line for line in log if line.startswith('file.pth: ')]
    assert len(log) == 1


def test_several_copies_of_a_model_are_refused(model, saved) -> None:
    """Whatever a model of two parts, such as a teacher and a student, is to start from, it is not for us to guess."""
    held = {f'{prefix}.{name}': tensor for prefix in ('teacher', 'student') for name, tensor in saved.items()}
    with pytest.raises(CheckpointError, match="several times, under the prefixes 'teacher.', 'student.'"):
        load(model, dict(state_dict=held))
    averaged = {
        f'{prefix}.{name}': tensor for prefix in ('model', 'model_ema.module') for name, tensor in saved.items()
    }
    load(Model(), dict(state_dict=averaged))


class Renaming(nn.Module):
    """A part that loads an older name, as those of the host libraries do, and takes an older shape."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3))
        self.inner = nn.Linear(1, 1)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in [name for name in state_dict if name.startswith(f'{prefix}old.')]:
            state_dict[name.replace(f'{prefix}old.', f'{prefix}inner.')] = state_dict.pop(name)
        state_dict[f'{prefix}weight'] = state_dict[f'{prefix}weight'].reshape(2, 3)
        super()._load_from_state_dict(state_dict, prefix, *args)


def test_parts_that_rename_what_they_load_are_asked_and_nothing_is_loaded_meanwhile(saved) -> None:
    model = Model(neck=Renaming())
    old = {'neck.weight': torch.ones(6), 'neck.old.weight': torch.ones(1, 1), 'neck.old.bias': torch.ones(1)}
    weights = {**saved, **old}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match='neck.extra is not expected'):
        load(model, dict(state_dict={**weights, 'neck.extra': torch.ones(1)}))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    load(model, dict(state_dict=weights))
    assert model.neck.weight.eq(1).all() and model.neck.inner.weight == 1


def test_missing_tensors_that_a_part_excuses_are_no_mismatch(saved) -> None:
    """As mmpretrain's adapters do, whose files hold the adapters alone."""
    neck = nn.Linear(1, 1)
    neck.register_load_state_dict_post_hook(lambda module, keys: keys.missing_keys.remove('neck.bias'))
    load(Model(neck=neck), dict(state_dict={**saved, 'neck.weight': torch.ones(1, 1)}))


def test_models_under_test_time_augmentation_are_checked(model, saved) -> None:
    class Augmented(BaseTTAModel):
        def merge_preds(self, data_samples_list):
            raise NotImplementedError

    load(Augmented(model), dict(state_dict=saved))
    with pytest.raises(CheckpointError, match=r'head.fc.bias \(3\) is missing'):
        load(Augmented(model), dict(state_dict=without(saved, 'head.fc.bias')))


@pytest.mark.parametrize('whole', [True, False])
def test_the_authors_classifiers_are_converted(whole, caplog) -> None:
    model = Model(classes=10)
    official = classifier()
    checkpoint = dict(model=official, optimizer={})
    with caplog.at_level(logging.INFO, 'tests.hook'):
        load(model, checkpoint, whole)
    assert set(checkpoint['state_dict']) == set(model.state_dict())
    torch.testing.assert_close(checkpoint['state_dict']['head.fc.weight'], official['classifier.head.weight'])
    (line,) = caplog.messages
    assert line == "file.pth: the authors' classifier, VMamba, arch='test', is converted to our names."


@pytest.mark.parametrize('out_indices', [(3,), (0, 1, 2, 3), (1, 3)])
def test_the_authors_classifiers_start_pyramids_without_their_norm(out_indices) -> None:
    model = Model(dict(out_indices=out_indices), classes=10)
    official = classifier()
    load(model, dict(model=official), whole=False)
    expected = official['classifier.norm.weight'] if out_indices == (3,) else torch.ones(128)
    assert torch.equal(model.backbone.norm3.weight, expected)
    assert torch.equal(model.backbone.stages[0].blocks[0].norm1.bias, official['layers.0.blocks.0.norm.bias'])


def test_the_authors_detectors_are_converted() -> None:
    model = Model(dict(out_indices=(0, 1, 2, 3)))
    official = {f'backbone.{name}': tensor for name, tensor in pyramid().items()}
    head = {f'head.{name}': tensor for name, tensor in model.head.state_dict().items()}
    load(model, dict(state_dict={**official, **head}, meta={}))
    with pytest.raises(CheckpointError, match=r'head.fc.weight \(3, 128\) is missing'):
        load(model, dict(state_dict={**official, 'neck.w': torch.ones(1)}, meta={}))


def test_the_authors_files_of_another_arch_are_refused_and_none_is_resumed_from() -> None:
    model = Model(classes=10)
    with pytest.raises(CheckpointError, match=r'file\.pth does not fit the backbone of the config'):
        load(model, dict(model=classifier(embed_dims=8)), whole=False)
    with pytest.raises(CheckpointError, match=r'backbone\.patch_embed\.first\.conv\.weight .* is missing'):
        load(model, dict(model=classifier()), convert=False)
