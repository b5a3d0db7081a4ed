"""What a runner loads fits its model, or is refused; the authors' files are converted on the way."""

import logging
from types import SimpleNamespace

import pytest
import torch
from mmengine.model import BaseTTAModel
from mmengine.registry import MODELS
from torch import nn

from ssm_backbones.checkpoints import CheckpointError
from ssm_backbones.checkpoints.fitting import FittingCheckpoint
from ssm_backbones.preflight import CommandError
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
    runner = SimpleNamespace(model=model, logger=logging.getLogger('tests.fitting'))
    FittingCheckpoint('file.pth', whole, **options).after_load_checkpoint(runner, checkpoint)


def without(weights, *beginnings):
    return {name: tensor for name, tensor in weights.items() if not name.startswith(beginnings)}


def changed(weights, name, tensor):
    return {**weights, name: tensor}


@pytest.mark.parametrize('wrap', [
    lambda weights: dict(state_dict=weights),
    lambda weights: dict(weights),
    lambda weights: dict(state_dict={f'module.{name}': tensor for name, tensor in weights.items()}),
    lambda weights: dict(state_dict={**weights, 'data_preprocessor.mean': torch.zeros(3), 'ema_head': torch.ones(2)}),
    lambda weights: dict(state_dict=weights, ema_state_dict={'steps': torch.tensor(3)}, message_hub={}, meta={}),
], ids=['runner', 'bare', 'parallel', 'beside', 'ema'])
@pytest.mark.parametrize('whole', [True, False])
def test_a_model_s_own_weights_fit(wrap, whole, model, saved) -> None:
    checkpoint = wrap(saved)
    load(model, checkpoint, whole)
    # Where the other hooks and the runner look for them.
    assert len(checkpoint['state_dict']) >= len(saved)


MISFITS = {
    'empty': (lambda held: {}, 'backbone.patch_embed.first.conv.weight is missing'),
    'prefixed': (lambda held: {f'model.{name}': tensor for name, tensor in held.items()}, 'is missing'),
    'missing': (lambda held: without(held, 'backbone.stages.1.blocks.0.mixer.D'),
                r'stages.1.blocks.0.mixer.D is missing\. Name'),
    'left over': (lambda held: changed(held, 'backbone.stages.0.blocks.7.norm.weight', torch.ones(2)),
                  r'stages.0.blocks.7.norm.weight is not expected\. Name'),
    'shape': (lambda held: changed(held, 'backbone.norm3.weight', torch.ones(7)),
              r'backbone.norm3.weight is \(7\), expected \(128\)'),
    'dimensions': (lambda held: changed(held, 'backbone.norm3.weight', torch.ones(4, 32)),
                   r'backbone.norm3.weight is \(4, 32\), expected \(128\)'),
}


@pytest.mark.parametrize('whole', [True, False])
@pytest.mark.parametrize('misfit', MISFITS)
def test_misfits_of_the_backbone_are_named(misfit, whole, model, saved) -> None:
    change, message = MISFITS[misfit]
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
    with pytest.raises(CheckpointError, match='head.fc.bias is missing; neck.convs.0.weight is not expected'):
        load(model, dict(state_dict=weights))


def test_parts_that_are_not_used_may_lack_or_be_left_over(model, saved) -> None:
    both = dict(unused=('auxiliary_head.',))
    load(model, dict(state_dict=changed(saved, 'auxiliary_head.w', torch.ones(1))), **both)
    load(Model(auxiliary_head=nn.Linear(1, 1)), dict(state_dict=saved), **both)
    with pytest.raises(CheckpointError, match='auxiliary_head.weight is missing'):
        load(Model(auxiliary_head=nn.Linear(1, 1)), dict(state_dict=saved))


def test_counters_of_old_batch_norms_may_lack(saved) -> None:
    norm = nn.BatchNorm2d(2)
    weights = saved | {f'neck.{name}': tensor for name, tensor in norm.state_dict().items()}
    load(Model(neck=norm), dict(state_dict=without(weights, 'neck.num_batches_tracked')))
    with pytest.raises(CheckpointError, match='neck.running_mean is missing'):
        load(Model(neck=norm), dict(state_dict=without(weights, 'neck.running_mean')))


def test_a_classifier_s_weights_start_a_pyramid(saved) -> None:
    detector = Model(dict(out_indices=(0, 1, 2)))
    load(detector, dict(state_dict=dict(saved)), whole=False)
    name = 'backbone.stages.2.blocks.1.mixer.out_proj.weight'
    torch.testing.assert_close(detector.state_dict()[name], saved[name])
    with pytest.raises(CheckpointError, match='norm0.weight is missing'):
        load(detector, dict(state_dict=saved))


def test_a_plain_classifier_s_weights_start_a_pyramid() -> None:
    weights = Model(dict(type='V2M', out_indices=None)).state_dict()
    load(Model(dict(type='V2M', out_indices=None, pyramid='single')), dict(state_dict=weights), whole=False)


@pytest.mark.parametrize('whole', [True, False])
@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_position_embeddings_are_resized_once_and_for_no_training_that_goes_on(whole, prefix, log) -> None:
    source, model = (Model(dict(type='V2M', out_indices=None, img_size=size)) for size in (96, 64))
    weights = {f'{prefix}{name}': tensor for name, tensor in source.state_dict().items()}
    name = 'backbone.patch_embed.pos_embed'
    checkpoint = dict(state_dict=dict(weights))
    load(model, checkpoint, whole)
    assert log == [f'{prefix}{name} is resized from 6x6 to 4x4 patches.']
    resized = source.backbone.patch_embed.position_embedding(4, 4)
    assert torch.equal(checkpoint['state_dict'][f'{prefix}{name}'], resized)
    with pytest.raises(CheckpointError, match=rf'{name} is \(1, 6, 6, 16\), expected \(1, 4, 4, 16\)\. Name'):
        load(model, dict(state_dict=dict(weights)), convert=False)


def test_models_under_test_time_augmentation_are_checked(model, saved) -> None:
    class Augmented(BaseTTAModel):
        def merge_preds(self, data_samples_list):
            raise NotImplementedError

    load(Augmented(model), dict(state_dict=saved))
    with pytest.raises(CheckpointError, match='head.fc.bias is missing'):
        load(Augmented(model), dict(state_dict=without(saved, 'head.fc.bias')))


@pytest.mark.parametrize('whole', [True, False])
def test_the_authors_classifiers_are_converted(whole, caplog) -> None:
    model = Model(classes=10)
    official = classifier()
    checkpoint = dict(model=official, optimizer={})
    with caplog.at_level(logging.INFO, 'tests.fitting'):
        load(model, checkpoint, whole)
    assert set(checkpoint['state_dict']) == set(model.state_dict())
    torch.testing.assert_close(checkpoint['state_dict']['head.fc.weight'], official['classifier.head.weight'])
    (line,) = caplog.messages
    assert line == "file.pth: the authors' classifier, VMamba, arch='test', is converted to our names."


def test_the_authors_detectors_are_converted() -> None:
    model = Model(dict(out_indices=(0, 1, 2, 3)))
    official = {f'backbone.{name}': tensor for name, tensor in pyramid().items()}
    head = {f'head.{name}': tensor for name, tensor in model.head.state_dict().items()}
    load(model, dict(state_dict={**official, **head}, meta={}))
    with pytest.raises(CheckpointError, match='head.fc.weight is missing'):
        load(model, dict(state_dict={**official, 'neck.w': torch.ones(1)}, meta={}))


def test_the_authors_files_of_another_arch_are_refused_and_none_is_resumed_from() -> None:
    model = Model(classes=10)
    with pytest.raises(CheckpointError, match=r'file\.pth does not fit the backbone of the config'):
        load(model, dict(model=classifier(embed_dims=8)), whole=False)
    with pytest.raises(CheckpointError, match=r'backbone\.patch_embed\.first\.conv\.weight is missing'):
        load(model, dict(model=classifier()), convert=False)
