"""Checkpoints that hypothesis damages: each is refused by an error of our own, or read exactly."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssm_backbones.checkpoints import CheckpointError, convert_checkpoint, read_checkpoint
from tests.checkpoints.small import classifier

TENSORS = {f'layers.{place}.weight': torch.arange(6.0).reshape(2, 3) + place for place in range(4)}

OFFICIAL = classifier()


def saved(**options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({'state_dict': TENSORS, 'epoch': 3}, buffer, **options)
    return buffer.getvalue()


FILES: dict[str, bytes] = {
    'zip': saved(),
    'legacy': saved(_use_new_zipfile_serialization=False),
    'safetensors': safetensors.torch.save(TENSORS),
}


def flipped(data: st.DataObject, content: bytes) -> bytes:
    changed = bytearray(content)
    for bit in data.draw(st.lists(st.integers(0, 8 * len(content) - 1), min_size=1, max_size=4), label='bits'):
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def cut(data: st.DataObject, content: bytes) -> bytes:
    return content[: data.draw(st.integers(0, len(content) - 1), label='length')]


def without_a_part(data: st.DataObject, content: bytes) -> bytes:
    start, end = sorted(data.draw(st.integers(0, len(content)), label='place') for _ in range(2))
    return content[:start] + content[end:]


def overwritten(data: st.DataObject, content: bytes) -> bytes:
    start = data.draw(st.integers(0, len(content) - 1), label='start')
    part = data.draw(st.binary(min_size=1, max_size=40), label='part')
    return content[:start] + part + content[start + len(part) :]


DAMAGES: list[Callable[[st.DataObject, bytes], bytes]] = [flipped, cut, without_a_part, overwritten]


def check(data: st.DataObject, path: Path) -> None:
    form = data.draw(st.sampled_from(list(FILES)), label='form')
    path.write_bytes(data.draw(st.sampled_from(DAMAGES), label='damage')(data, FILES[form]))
    try:
        read = read_checkpoint(path)
    except CheckpointError as error:
        assert str(path) in str(error) and '\n' not in str(error)
        return
    # The other formats have no checksums, so that what they hold is what they say.
    if form == 'zip':
        assert read['epoch'] == 3 and read['state_dict'].keys() == TENSORS.keys()
        assert all(torch.equal(read['state_dict'][name], tensor) for name, tensor in TENSORS.items())


# The path is the same for all examples, each of which writes it anew.
REUSED = [HealthCheck.function_scoped_fixture]


@settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=REUSED)
@given(st.data())
def test_damaged_files_are_refused_or_read_exactly(tmp_path: Path, data: st.DataObject) -> None:
    check(data, tmp_path / 'damaged.pth')


@pytest.mark.slow
@settings(max_examples=20_000, deadline=None, print_blob=True, suppress_health_check=REUSED)
@given(st.data())
def test_more_damaged_files_are_refused_or_read_exactly(tmp_path: Path, data: st.DataObject) -> None:
    check(data, tmp_path / 'damaged.pth')


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_exchanged_tensors_are_refused_or_converted_under_their_names(data: st.DataObject) -> None:
    names = st.lists(st.sampled_from(sorted(OFFICIAL)), min_size=2, max_size=2, unique=True)
    first, second = data.draw(names, label='exchanged')
    exchanged = {**OFFICIAL, first: OFFICIAL[second], second: OFFICIAL[first]}
    try:
        after = convert_checkpoint({'model': exchanged})[0]['state_dict']
    except CheckpointError as error:
        assert OFFICIAL[first].shape != OFFICIAL[second].shape, str(error)
        return
    # Nothing tells two tensors of one shape apart but their names.
    assert OFFICIAL[first].shape == OFFICIAL[second].shape
    before = convert_checkpoint({'model': OFFICIAL})[0]['state_dict']
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == 2 * (not torch.equal(OFFICIAL[first], OFFICIAL[second]))
    assert all(any(torch.equal(after[name], before[other]) for other in changed) for name in changed)
