"""Files of COCO annotations as columns."""

import json

import numpy as np
import pytest

from ssm_backbones.data_check import coco_file
from ssm_backbones.data_check.coco_file import DEGENERATE, EMPTY, MALFORMED, POLYGONS, RLE, read_coco

POLYGON = [1, 2, 30.5, 2, 30.5, 40]
ANNOTATIONS = [
    dict(id=1, image_id=5, category_id=1, bbox=[1, 2, 29.5, 38], area=9, iscrowd=0, segmentation=[POLYGON, [5.0] * 8]),
    dict(id=2, image_id=5, category_id='é"\\}{,', bbox=[1, 2, 3], area=None, iscrowd=1, ignore=True, segmentation=[]),
    dict(id=3, image_id=6, bbox=[1, 2, 3, 10**400], area=10**400, segmentation=[[1, 2, 3, 10**400, 5, 6]]),
    dict(id=2**70, image_id=5, bbox='1234', area=True, segmentation=dict(counts='x', size=[3, 4]), more=[{'a': []}]),
    dict(image_id=5, bbox=[1, 2, 3, None], segmentation=[[1, 2, 3, 4], POLYGON[:5]]),
]
CONTENT = dict(
    info={'a': [1, 2], 'b': None},
    images=[dict(id=5, file_name='é.jpg', width=3, height=4, license=1), dict(id=6)],
    annotations=ANNOTATIONS,
    categories=[dict(id=1, name='x')],
    version=1,
)


@pytest.fixture(params=['strict', 'json'])
def read(request, monkeypatch, tmp_path):
    """Reads a text by msgspec, or by json, which reads what msgspec rejects."""
    readers = {'strict': coco_file._read_strictly, 'json': coco_file._read_by_json}
    return lambda text: readers[request.param](tmp_path / 'x.json', text.encode())


@pytest.mark.parametrize('form', [dict(), dict(indent=2), dict(separators=(',', ':')), dict(ensure_ascii=False)])
def test_columns_are_those_of_the_file(form, read):
    coco = read(json.dumps(CONTENT, **form) + '\n')
    assert coco.images == [dict(id=5, file_name='é.jpg', width=3, height=4), dict(id=6)]
    assert coco.categories == CONTENT['categories']
    assert coco.ids == [1, 2, 3, 2**70, None]
    assert coco.image_ids == [5, 5, 6, 5, 5]
    assert coco.category_ids == [1, ANNOTATIONS[1]['category_id'], None, None, None]
    np.testing.assert_array_equal(coco.boxes, [ANNOTATIONS[0]['bbox']] + [[np.nan] * 4] * 4)
    assert coco.bad_boxes == {index: ANNOTATIONS[index]['bbox'] for index in (1, 2, 3, 4)}
    np.testing.assert_array_equal(coco.areas, [9, np.nan, np.nan, 1, np.nan])
    assert coco.has_area.tolist() == [True, False, False, True, False]
    assert coco.has_crowd.tolist() == [True, True, False, False, False]
    assert coco.crowd.tolist() == coco.ignored.tolist() == [False, True, False, False, False]
    assert coco.masks.tolist() == [POLYGONS, EMPTY, MALFORMED, RLE, DEGENERATE]
    assert coco.few_points.tolist() == [False, False, False, False, True]
    np.testing.assert_array_equal(coco.extents, [[1, 2, 30.5, 40]] + [[np.nan] * 4] * 4)
    assert coco.rle_sizes == {3: [3, 4]}
    assert coco.sample == [entry for entry in ANNOTATIONS if entry['image_id'] == 5]
    assert coco.image_indices.tolist() == [0, 0, 1, 0, 0]
    assert coco.category_indices.tolist() == [0, -1, -1, -1, -1]


def test_an_empty_object_has_no_annotations(read):
    coco = read('{ }')
    assert (coco.images, coco.ids, coco.categories) == ([], [], [])
    assert coco.boxes.shape == coco.extents.shape == (0, 4)


def test_what_only_python_s_json_reads_is_read(tmp_path):
    path = tmp_path / 'x.json'
    path.write_text('{"annotations": [{"id": 1, "bbox": [NaN, 1, 2, -Infinity], "area": 1e999}]}')
    coco = read_coco(path)
    np.testing.assert_array_equal(coco.boxes, [[np.nan, 1, 2, -np.inf]])
    assert coco.areas.tolist() == [np.inf]


BROKEN = {
    '': 'char 0',
    '[]': 'has to be an object.* found \\[\\]',
    '{"annotations": [1, 2': 'char 21',
    '{"annotations": [1 2]}': 'char 19',
    '{"annotations": [{"b": }]}': 'char 23',
    '{"annotations": [{"b": 01}]}': 'char 24',
    '{"a": {"b": [1,]}}': 'char 15',
    '{"a": 1,}': 'char [78]',
    '{"a": "\n"}': 'char 7',
    '{1: 2}': 'char 1',
    '\ufeff{}': 'BOM|char 0',
    '{} x': 'char 3',
    '{"annotations": [{},]}': 'char (19|20)',
    '{"annotations": [{}, 7]}': 'annotations has to be a list of objects, found 7 at index 1',
    '{"annotations": {"1": {}}}': 'annotations has to be a list of objects, found {',
    '{"images": [[]]}': 'images has to be a list of objects',
    '{"categories": "x"}': 'categories has to be a list of objects',
    '{"a": ' + '[' * 100_000: 'nested too deeply|char',
}


@pytest.mark.parametrize('text', BROKEN, ids=lambda text: text[:30])
def test_what_is_no_annotations_is_an_error_with_its_place(text, tmp_path):
    path = tmp_path / 'x.json'
    path.write_text(text, encoding='utf-8')
    with pytest.raises(ValueError, match=BROKEN[text]):
        read_coco(path)


def test_text_that_is_not_utf_8_is_an_error_with_its_place(tmp_path):
    path = tmp_path / 'x.json'
    path.write_bytes(b'{"images": [{"file_name": "\xe9.jpg"}]}')
    with pytest.raises(ValueError, match='position 27'):
        read_coco(path)
