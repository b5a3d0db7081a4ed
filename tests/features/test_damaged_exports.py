"""Exports that were damaged or written by somebody else: each is refused by an error of our own, or read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_backbones.features import FeatureDataset
from ssm_backbones.features.store import EXPORT, FORMAT, INDEX, read_records
from ssm_backbones.utils.errors import CommandError
from tests.checkpoints.test_damaged_files import DAMAGES
from tests.features.exports import LEVELS, write_export


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp('export') / 'out')


def read(folder: Path) -> list[tuple[torch.Tensor, ...]]:
    """Use everything that a reader offers."""
    list(read_records(folder))
    dataset = FeatureDataset(folder, crop=True)
    for index in range(len(dataset)):
        dataset.cell_edges(index)
    return [dataset[index]['maps'] for index in range(len(dataset))]


def changed(folder: Path, name: str, content: bytes) -> Iterator[None]:
    before = (folder / name).read_bytes()
    (folder / name).write_bytes(content)
    try:
        yield
    finally:
        (folder / name).write_bytes(before)


@pytest.mark.parametrize('name', [EXPORT, INDEX, 'features'])
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_damaged_exports_are_refused_or_read(name: str, folder: Path, data: st.DataObject) -> None:
    (shard,) = (folder / 'features').iterdir()
    path = shard if name == 'features' else folder / name
    content = data.draw(st.sampled_from(DAMAGES))(data, path.read_bytes())
    for _ in changed(folder, str(path.relative_to(folder)), content):
        try:
            read(folder)
        except CommandError as error:
            assert str(folder) in str(error) or 'record of' in str(error)


def test_the_export_itself_is_read(folder: Path) -> None:
    (first, second), _ = read(folder)
    assert first.shape == (2, 2, 2) and second.shape == (3, 1, 1) and first[0, 0, 0] == ord('a')


@pytest.mark.parametrize('settings', [[], 7, None, {'format': FORMAT}, {'format': FORMAT, 'levels': [{'name': 3}]}])
def test_settings_of_another_kind(settings: Any, folder: Path) -> None:
    for _ in changed(folder, EXPORT, json.dumps(settings).encode()):
        with pytest.raises(CommandError, match='is damaged|is of the format'):
            FeatureDataset(folder)


RECORD: dict[str, Any] = dict(id='a', file='features/a.safetensors', path='a.png', levels=[])
RECORD |= dict(original_size=[8, 8], input_size=[8, 8], padded_size=[8, 8], image_box=[0, 0, 8, 8])
RECORD |= dict(scale_x=1.0, scale_y=1.0, offset_x=0.0, offset_y=0.0)


@pytest.mark.parametrize(
    'change',
    [
        dict(file='../../secret.safetensors'),
        dict(file='/etc/secret.safetensors'),
        dict(id=7),
        dict(scale_x=float('nan')),
        dict(original_size=[8]),
        dict(image_box=[0, 0, 8, 'x']),
        dict(levels=[dict(name='level0', stride=0, shape=[2, 2, 2])]),
        dict(levels=[7]),
    ],
    ids=lambda change: '-'.join(change),
)
def test_records_that_cannot_be_an_export_s(change: dict[str, Any], folder: Path) -> None:
    for _ in changed(folder, INDEX, json.dumps(RECORD | change).encode()):
        with pytest.raises(CommandError, match=f'line 1 of .*{INDEX} is damaged'):
            FeatureDataset(folder)


def test_maps_that_are_not_those_of_the_record(folder: Path) -> None:
    assert LEVELS[0]['name'] == 'level0'
    record = json.loads((folder / INDEX).read_text().splitlines()[0])
    for change, message in (
        (dict(file='features/none.safetensors'), 'is missing or damaged'),
        (dict(id='c'), 'is missing or damaged'),
        (dict(levels=record['levels'][:1]), 'has no level1'),
        (dict(levels=[record['levels'][0], record['levels'][1] | {'shape': [3, 2, 1]}]), 'level1 of the shape'),
    ):
        for _ in changed(folder, INDEX, json.dumps(record | change).encode()):
            with pytest.raises(CommandError, match=message):
                read(folder)
