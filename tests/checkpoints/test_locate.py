"""Which weights are taken from what trainers write: wrappers, moving averages, several sets."""

import pytest
import torch

from ssm_backbones.checkpoints import CheckpointError, convert_checkpoint, restore_checkpoint
from tests.checkpoints.small import classifier, marked, prefixed, pyramid

RAW, AVERAGED = 0.0, 1000.0


def taken(checkpoint, weights='auto'):
    """'raw' or 'averaged', and the label."""
    converted, report = convert_checkpoint(checkpoint, weights=weights)
    number = converted['state_dict']['backbone.patch_embed.first.conv.weight'].flatten()[0]
    return 'raw' if number == RAW else 'averaged' if number == AVERAGED else number, report.weights


LIGHTNING = {'epoch': 300, 'pytorch-lightning_version': '2.4', 'loops': {}, 'optimizer_states': [{'state': {}}]}
BOTH = {
    'timm': ({'model': marked(RAW), 'model_ema': marked(AVERAGED), 'optimizer': {}}, 'model', 'model_ema'),
    'timm-named': ({'state_dict': marked(RAW), 'state_dict_ema': marked(AVERAGED)}, 'state_dict', 'state_dict_ema'),
    'callback': (
        {**LIGHTNING, 'state_dict': marked(RAW), 'callbacks': {'EMACallback': {'weights': marked(AVERAGED)}}},
        'state_dict',
        'callbacks/EMACallback/weights',
    ),
    'callback-key': (
        {
            **LIGHTNING,
            'state_dict': marked(RAW),
            'callbacks': {'Averager': {'ema_state_dict': prefixed('module.', marked(AVERAGED))}},
        },
        'state_dict',
        'callbacks/Averager/ema_state_dict:module.',
    ),
    'submodule': (
        {
            'state_dict': {
                **prefixed('model.', marked(RAW)),
                **prefixed('ema.module.', marked(AVERAGED)),
                'ema.n_averaged': torch.tensor(5),
            }
        },
        'state_dict:model.',
        'state_dict:ema.module.',
    ),
    'beside': (
        {
            'state_dict': {
                **marked(RAW),
                **prefixed('model_ema.module.', marked(AVERAGED)),
                'model_ema.decay': torch.tensor(5),
            }
        },
        'state_dict',
        'state_dict:model_ema.module.',
    ),
}


@pytest.mark.parametrize('case', BOTH)
def test_raw_weights_unless_averages_are_asked_for(case):
    checkpoint, raw, averaged = BOTH[case]
    assert taken(checkpoint) == taken(checkpoint, 'raw') == taken(checkpoint, raw) == ('raw', raw)
    assert taken(checkpoint, 'ema') == taken(checkpoint, averaged) == ('averaged', averaged)


def test_trainers_that_save_the_averages_in_the_place_of_the_weights():
    lightning = {**LIGHTNING, 'state_dict': marked(AVERAGED), 'current_model_state': marked(RAW)}
    assert taken(lightning) == taken(lightning, 'ema') == ('averaged', 'state_dict')
    assert taken(lightning, 'raw') == ('raw', 'current_model_state')
    whole, aside = (prefixed('backbone.', pyramid()) for _ in range(2))
    mmengine = {
        'meta': {},
        'message_hub': {},
        'state_dict': {**whole, 'neck': torch.ones(1)},
        'ema_state_dict': {**prefixed('module.', {**aside, 'neck': torch.ones(1)}), 'steps': torch.tensor(9)},
    }
    name = 'backbone.patch_embed.first.conv.weight'
    for weights, expected, label in [('ema', whole, 'state_dict'), ('raw', aside, 'ema_state_dict:module.')]:
        converted, report = convert_checkpoint(mmengine, weights=weights)
        assert report.weights == label
        assert torch.equal(converted['state_dict'][name], expected['backbone.patch_embed.0.weight'])
    converted, report = convert_checkpoint(mmengine)
    assert converted.keys() == {'meta', 'message_hub', 'state_dict'}
    assert report.left_out == {'ema_state_dict:module.': 'other weights, to be chosen by this name'}


@pytest.mark.parametrize('wrapper', ['module.', 'model.', 'module._orig_mod.', 'net.model.'])
def test_wrappers_are_taken_off_and_logged(wrapper, log):
    tensors = classifier()
    expected = convert_checkpoint({'model': tensors})[0]['state_dict']
    found, report = convert_checkpoint({'model': {**prefixed(wrapper, tensors), 'criterion.weight': torch.ones(2)}})
    assert found['state_dict'].keys() == expected.keys()
    assert all(torch.equal(found['state_dict'][name], tensor) for name, tensor in expected.items())
    taken_off = wrapper.removesuffix('_orig_mod.')
    assert report.left_out == {'criterion.weight': f'beside the model in model:{taken_off}'}
    (line,) = log
    parts = [repr(part) for part in (taken_off, wrapper[len(taken_off) :]) if part]
    assert line == (
        f'the checkpoint: {" and ".join(parts)} is taken off the names of {len(tensors)} tensors; '
        '1 others are left out: criterion.weight.'
    )


def test_what_a_compiler_inserts_within_names_is_taken_off(log):
    tensors = classifier()
    expected = convert_checkpoint({'model': tensors})[0]['state_dict']
    inserted = {name.replace('.blocks.0.', '.blocks.0._orig_mod.'): value for name, value in tensors.items()}
    assert inserted.keys() != tensors.keys()
    found = convert_checkpoint({'model': inserted})[0]['state_dict']
    assert found.keys() == expected.keys()
    assert log == [f"the checkpoint: '_orig_mod.' is taken off the names of {len(tensors)} tensors."]


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', 'student.model.', 'ema._orig_mod.'])
def test_wrappers_are_taken_off_on_the_way_back(prefix, log):
    ours = convert_checkpoint({'model': classifier()})[0]['state_dict']
    expected = restore_checkpoint({'state_dict': ours})[0]['model']
    for held in (ours, {name.removeprefix('backbone.'): value for name, value in ours.items() if 'head' not in name}):
        found = restore_checkpoint({'state_dict': prefixed(prefix, held)})[0]['model']
        assert found.keys() <= expected.keys() and len(found) == len(held)
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
        assert f'is taken off the names of {len(held)} tensors' in log.pop()
    twins = {**prefixed('student.', ours), **prefixed('teacher.', ours)}
    with pytest.raises(CheckpointError, match="under the prefixes 'student.', 'teacher.'"):
        restore_checkpoint({'state_dict': twins})


def test_a_bare_state_dict_and_averages_alone_are_taken():
    assert taken(marked(RAW)) == ('raw', 'top')
    assert taken({'model_ema': marked(AVERAGED)}) == ('averaged', 'model_ema')


def test_what_is_not_there_or_not_clear_is_refused_with_what_is():
    checkpoint = {'model': marked(RAW)}
    with pytest.raises(CheckpointError, match="x.pth holds no weights for 'ema'; it holds model. Choose one of these"):
        convert_checkpoint(checkpoint, weights='ema', source='x.pth')
    twins = {'state_dict': {**prefixed('student.', marked(RAW)), **prefixed('teacher.', marked(AVERAGED))}}
    with pytest.raises(
        CheckpointError,
        match='more than one set of weights for .auto.; it holds state_dict:student., state_dict:teacher.',
    ):
        convert_checkpoint(twins)
    assert taken(twins, 'state_dict:teacher.') == ('averaged', 'state_dict:teacher.')
