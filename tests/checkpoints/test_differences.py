"""Mismatches are records, made from names and shapes, and named in an error once."""

import torch
from torch import nn

from ssm_backbones import VMamba
from ssm_backbones.checkpoints.differences import Mismatch, compare, explain, fit


def test_records_of_every_kind_in_the_model_s_order() -> None:
    found = {'b': (2, 3), 'extra': (1,), 'same': (4,), 'number': ()}
    expected = {'a': (5,), 'b': (3, 2), 'same': (4,), 'number': ()}
    assert compare(found, expected) == [
        Mismatch('a', 'missing', None, (5,)),
        Mismatch('b', 'shape', (2, 3), (3, 2)),
        Mismatch('extra', 'unexpected', (1,), None),
    ]
    assert not compare(expected, dict(expected))


def test_the_first_five_are_named_and_the_others_counted() -> None:
    mismatches = compare({'b': (2, 3), 'c': (1,)}, {'a': (5, 1), 'b': (), **{f'd{i}': (1,) for i in range(4)}})
    assert explain(mismatches, 'neck.') == (
        'neck.a (5, 1) is missing; neck.b is (2, 3), expected (); neck.d0 (1) is missing; neck.d1 (1) is missing; '
        'neck.d2 (1) is missing; and 2 more'
    )


def test_a_module_is_compared_without_being_touched() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = {'0.weight': torch.ones(3, 2), '0.bias': torch.ones(2), '1.weight': torch.ones(3)}
    tensors |= {'1.bias': torch.ones(3), '1.running_mean': torch.ones(3)}
    found = fit(model, tensors)
    # Batch norms' counters may be missing.
    assert found.mismatches == [
        Mismatch('0.bias', 'shape', (2,), (3,)),
        Mismatch('1.running_var', 'missing', None, (3,)),
    ]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_output_norms_of_a_backbone_may_be_missing_but_not_in_part() -> None:
    model = VMamba('test', out_indices=(1, 3))
    state = model.state_dict()
    assert fit(model, {name: tensor for name, tensor in state.items() if not name.startswith('norm1.')}) == (
        {name: tensor for name, tensor in state.items() if not name.startswith('norm1.')},
        ['norm1'],
        [],
    )
    del state['norm3.bias']
    state['norm0.weight'] = torch.ones(16)
    found = fit(model, state)
    assert found.mismatches == [Mismatch('norm3.bias', 'missing', None, (128,))] and not found.initial
    assert 'norm0.weight' not in found.tensors
