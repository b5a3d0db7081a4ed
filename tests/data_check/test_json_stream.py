"""JSON that is read in parts."""

import json

import pytest

from ssm_backbones.data_check import json_stream
from ssm_backbones.data_check.json_stream import read_members

CONTENT = {
    'info': {'a': [1, 2], 'b': None},
    'numbers': [1, -2.5, 30000000, 'x', None, [], {}],
    'annotations': [{'id': i, 'segmentation': [[1.5] * i], 'name': 'é"\\}{,' * i} for i in range(60)],
    'licenses': [],
    'version': 12345,
}


@pytest.mark.parametrize('chunk', [1, 7, 64, 1000, 10**6])
@pytest.mark.parametrize('form', [dict(), dict(indent=2), dict(separators=(',', ':')), dict(ensure_ascii=False)])
def test_members_are_those_of_the_file(chunk, form, tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, '_CHUNK', chunk)
    path = tmp_path / 'x.json'
    path.write_text(json.dumps(CONTENT, **form) + '\n', encoding='utf-8')
    read = list(read_members(path))
    expected = []
    for key, value in CONTENT.items():
        expected.extend([(key, item) for item in value] if isinstance(value, list) else [(key, value)])
    assert read == expected


@pytest.mark.parametrize(
    'text',
    ['', '[]', '{"a": [1, 2', '{"a": [1 2]}', '{"a": [{"b": }]}', '{"a": 1,}', '{1: 2}', '\ufeff{}', '{"a": [{},]}'],
)
def test_what_is_not_json_is_an_error_with_its_place(text, tmp_path):
    path = tmp_path / 'x.json'
    path.write_text(text, encoding='utf-8')
    with pytest.raises(ValueError, match='character'):
        list(read_members(path))


def test_an_empty_object(tmp_path):
    (tmp_path / 'x.json').write_text('{ }')
    assert list(read_members(tmp_path / 'x.json')) == []
