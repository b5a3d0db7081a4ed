"""Annotations in COCO's form: what mmdet would stop at, pass over or take for something else."""

import json
import shutil

import pytest
from PIL import Image

from ssm_backbones.data_check import ERROR, NOTE, WARNING, check_data
from ssm_backbones.data_check.check import Report
from ssm_backbones.data_check.report import draw_counts
from tests.data_check.conftest import edit, errors

BOXES_ONLY = {
    'model.roi_head.mask_head': None,
    'model.roi_head.mask_roi_extractor': None,
    'train_dataloader.dataset.pipeline.1.with_mask': False,
    'val_dataloader.dataset.pipeline.2.with_mask': False,
    'val_evaluator.metric': ['bbox'],
}


def first(content, **values):
    """Change the file's first annotation, and return it."""
    content['annotations'][0].update(values)
    return content['annotations'][0]


def without(content, key, every=True):
    for annotation in content['annotations'] if every else content['annotations'][:1]:
        del annotation[key]


def rename(content, index, name):
    content['categories'][index]['name'] = name


def test_the_generated_data_are_right(check):
    found = check('mmdet')
    assert not errors(found)
    assert {finding.severity for finding in found} <= {NOTE}
    assert all('crowd' in finding.value for finding in found)


@pytest.mark.parametrize(
    ('change', 'expected'),
    [
        (lambda c: without(c, 'segmentation'), ('no segmentation', 'mask_head=None')),
        (lambda c: [a.update(segmentation=[]) for a in c['annotations']], ('an empty segmentation', "metric='bbox'")),
        (lambda c: without(c, 'segmentation', every=False), ('annotation 100 of image 1', 'with_mask=False')),
        (lambda c: first(c, segmentation='mask.png'), ('annotation 100', 'neither a list of polygons nor run lengths')),
        (lambda c: first(c, segmentation={'counts': [64 * 64], 'size': [64, 32]}), ('size [64, 32]', '[64, 64]')),
        (lambda c: without(c, 'area'), ("no 'area'", 'annotation 100')),
        (lambda c: first(c, bbox=[1, 2, 3]), ('annotation 100', 'bbox [1, 2, 3]', 'x, y, width, height')),
        (lambda c: first(c, bbox=['1', '2', '3', '4']), ('annotation 100', "bbox ['1', '2', '3', '4']")),
        (lambda c: first(c, bbox=[float('nan'), 2, 3, 4]), ('annotation 100', 'nan')),
        (lambda c: [a.update(bbox=[0.1, 0.1, 0.5, 0.5]) for a in c['annotations']], ('pixels, not in shares',)),
        (lambda c: first(c, id=c['annotations'][1]['id']), ('annotation 101', 'more than once')),
        (lambda c: c['images'][0].update(id=c['images'][1]['id']), ('image 2', 'more than once')),
        (lambda c: rename(c, 0, ['circle']), ('category 0', "has name ['circle'], of type list", 'Names are text')),
        (lambda c: first(c, category_id=77), ('annotation 100', 'category_id 77')),
        (lambda c: first(c, image_id=77), ('annotation 100 of image 77', 'not in `images`')),
        (lambda c: c['images'][0].pop('height'), ('image 1', "no 'height'")),
        (lambda c: c['images'][0].update(file_name='gone.jpg'), ('gone.jpg', 'no such image')),
        (lambda c: c['images'][0].update(width=640), ('image 1', 'loaded as 64x64', 'annotated as 640x64')),
        (lambda c: c.update(annotations=[]), ('no annotations',)),
        (lambda c: c.update(images=[]), ('no image',)),
        (lambda c: rename(c, 0, 'Disc'), ("no category is named 'disc'", "the file writes 'Disc'")),
        (lambda c: rename(c, 2, 'triangle '), ("no category is named 'triangle'", "the file writes 'triangle '")),
        (lambda c: rename(c, 3, 'start'), ("no category is named 'star' (did you mean 'start'?)",)),
        (lambda c: [rename(c, i, f'class {i}') for i in range(6)], ("no category is named 'disc'", '(5 more alike)')),
        (lambda c: c['categories'].reverse(), ('in the order', "('cross', 'ring'", "file's order")),
    ],
)
def test_errors_of_the_file(change, expected, check, tmp_path):
    found = errors(check('mmdet', edit(change, 'train'), modes=['train']))
    assert found and all(text in found[0] for text in expected), found
    assert f'{tmp_path}/coco/annotations/instances_train2017.json' in found[0]


def test_boxes_alone_are_enough_without_masks(check):
    assert not errors(check('mmdet', edit(lambda c: without(c, 'segmentation')), BOXES_ONLY))


def test_the_evaluator_s_needs_are_checked_before_the_training(check):
    (error,) = errors(check('mmdet', edit(lambda c: without(c, 'iscrowd'))))
    assert "no 'iscrowd', which val_evaluator needs" in error and 'instances_val2017' in error


def test_without_an_evaluation_crowds_need_not_be_named(check):
    assert not errors(check('mmdet', edit(lambda c: without(c, 'iscrowd')), modes=['train']))


def test_the_evaluator_has_the_images_that_are_predicted_on(check, tmp_path):
    other = {'val_evaluator.ann_file': f'{tmp_path}/coco/annotations/instances_train2017.json'}
    (error,) = errors(check('mmdet', None, other, modes=['val']))
    assert error.startswith('val_evaluator.ann_file, image ') and 'instances_train2017.json' in error
    assert 'on which the predictions are made' in error


def test_the_evaluator_may_name_the_same_images_otherwise(check, tmp_path):
    def copy(folder):
        content = json.loads((folder / 'annotations/instances_val2017.json').read_text())
        for image in content['images']:
            image['file_name'] = f'other/{image["file_name"]}'.replace('.jpg', '.png')
        gone = content['images'].pop()
        content['annotations'] = [each for each in content['annotations'] if each['image_id'] != gone['id']]
        (tmp_path / 'own.json').write_text(json.dumps(content))

    options = {'val_evaluator.ann_file': f'{tmp_path}/own.json', 'val_dataloader.dataset.indices': 3}
    assert not errors(check('mmdet', copy, options, modes=['val']))


@pytest.mark.parametrize(('objects', 'severity'), [(1, ERROR), (200, WARNING)])
def test_annotation_id_0_is_never_found(objects, severity, check):
    def change(content):
        annotation = first(content, id=0, category_id=1, iscrowd=0)
        others = [a for a in content['annotations'] if a['category_id'] != 1]
        copies = [{**annotation, 'id': 10**6 + number} for number in range(objects - 1)]
        content['annotations'] = [annotation, *others, *copies]

    (found,) = [f for f in check('mmdet', edit(change, 'val'), modes=['val']) if 'id 0' in f.value]
    assert found.severity == severity and found.id.startswith('annotation 0')
    assert f'one of {objects} of its class' in found.value


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        ({'model.roi_head.bbox_head.num_classes': 80}, ['model.roi_head.bbox_head.num_classes: is 80']),
        ({'model.roi_head.mask_head.num_classes': 3}, ['model.roi_head.mask_head.num_classes: is 3']),
        (
            {'model.roi_head.bbox_head.num_classes': 80, 'model.roi_head.mask_head.num_classes': 80},
            ['model.roi_head.bbox_head.num_classes: is 80', 'model.roi_head.mask_head.num_classes: is 80'],
        ),
    ],
)
def test_heads_have_the_number_of_classes(options, expected, check):
    found = errors(check('mmdet', None, options))
    assert len(found) == len(expected)
    for error, start in zip(found, expected, strict=True):
        assert error.startswith(start) and "6 classes ('disc'," in error


def test_a_head_s_default_number_is_told_as_such(loaded):
    cfg = loaded('mmdet')
    del cfg.model.roi_head.bbox_head.num_classes
    (error,) = errors(check_data(cfg))
    assert error.startswith('model.roi_head.bbox_head.num_classes: is 80 by default')


def test_every_stage_of_a_cascade_is_counted(loaded):
    cfg = loaded('mmdet')
    heads = [dict(type='Shared2FCBBoxHead', num_classes=number) for number in (6, 80, 6)]
    cfg.model.roi_head.bbox_head = heads
    (error,) = errors(check_data(cfg))
    assert error.startswith('model.roi_head.bbox_head[1].num_classes: is 80')


@pytest.mark.parametrize(
    ('metainfo', 'expected'),
    [
        (dict(classes='disc'), ("is the string 'disc'", "classes=('disc', )")),
        (dict(CLASSES=('disc',)), ("has 'CLASSES'", "Write 'classes'")),
        (dict(classes=('disc', 'disc')), ("lists 'disc' more than once",)),
    ],
)
def test_classes_of_the_config(metainfo, expected, loaded):
    cfg = loaded('mmdet')
    cfg.train_dataloader.dataset.metainfo = metainfo
    error = errors(check_data(cfg, ('train',)))[0]
    assert all(text in error for text in expected), error


def test_training_and_validation_have_the_same_classes(loaded):
    cfg = loaded('mmdet')
    cfg.val_dataloader.dataset.metainfo = dict(classes=('disc', 'rectangle', 'triangle', 'star', 'ring'))
    assert any('val_dataloader.dataset.metainfo.classes' in error for error in errors(check_data(cfg)))


@pytest.mark.parametrize(
    ('change', 'severity', 'expected'),
    [
        (lambda c: first(c, bbox=[100, 100, 20, 20]), WARNING, 'outside of it; mmdet leaves it out'),
        (lambda c: first(c, bbox=[30, 30, 60, 60]), WARNING, 'partly outside of it'),
        (lambda c: first(c, bbox=[5, 5, 0.5, 9]), NOTE, 'narrower or lower than one pixel'),
        (lambda c: first(c, area=0), NOTE, 'has no area'),
        (lambda c: first(c, ignore=1), NOTE, "has 'ignore' set"),
        (lambda c: first(c, segmentation=[[1, 1, 9, 9]]), NOTE, 'fewer than three points'),
        (lambda c: first(c, segmentation=[[1, 1, 9, 9, 90, 1]]), WARNING, 'beyond its image'),
        (lambda c: first(c, segmentation=[[1, 1, 9, 1, 5, 1]]), WARNING, 'of no extent'),
        (lambda c: c['categories'].append(dict(id=9, name='blob')) or first(c, category_id=9), WARNING, "'blob'"),
    ],
)
def test_what_is_likely_wrong_or_left_out_in_silence(change, severity, expected, check):
    found = check('mmdet', edit(change, 'train'), modes=['train'])
    assert not errors(found)
    assert [f.severity for f in found if expected in f.value] == [severity], found


def test_images_that_are_left_out_are_told(check):
    filtered = {'train_dataloader.dataset.filter_cfg': dict(filter_empty_gt=True, min_size=65)}
    assert 'no image is left' in errors(check('mmdet', None, filtered, modes=['train']))[0]


def test_a_broken_file_is_named(check):
    def cut(folder):
        path = folder / 'annotations/instances_train2017.json'
        path.write_text(path.read_text()[:-100])

    (error,) = errors(check('mmdet', cut, modes=['train']))
    assert 'is no file of COCO annotations' in error and 'line 1 column' in error


@pytest.mark.parametrize(('orientation', 'annotated'), [(6, (40, 64)), (6, (64, 40)), (3, (40, 64))])
def test_orientation_of_the_camera(orientation, annotated, check):
    """A frame of 40x64 that its tag turns: right if the annotations are of the turned image."""
    height, width = annotated

    def turn(folder):
        def shrink(content):
            content['images'][0].update(height=height, width=width)
            content['annotations'] = [
                {**a, 'bbox': [1, 1, 20, 20], 'segmentation': [[1, 1, 20, 1, 20, 20]]} for a in content['annotations']
            ]

        edit(shrink, 'train')(folder)
        name = json.loads((folder / 'annotations/instances_train2017.json').read_text())['images'][0]['file_name']
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new('RGB', (64, 40)).save(folder / 'train2017' / name, exif=exif)

    found = [f for f in check('mmdet', turn, modes=['train']) if f.severity != NOTE]
    if (orientation, annotated) == (6, (64, 40)):
        assert not found
        return
    (finding,) = found
    assert finding.severity == WARNING
    assert f'EXIF orientation {orientation}: stored as 64x40' in finding.value
    assert f'loaded as {"40x64" if orientation == 6 else "64x40"}' in finding.value
    assert 'annotated as 64x40' in finding.value and '.jpg' in finding.value


def test_validation_images_that_are_trained_on(check):
    def copy(folder):
        train, val = (sorted((folder / f'{split}2017').iterdir()) for split in ('train', 'val'))
        shutil.copy(train[5], val[2])

    (found,) = [f for f in check('mmdet', copy) if f.severity == WARNING]
    assert 'is a copy of' in found.value and found.file == 'val_dataloader.dataset'


def test_names_are_shown_as_they_are(check):
    """Neither steering the terminal nor as formulas."""
    name = 'a$b_{c$ \x1b]0;title\x07'
    (error,) = errors(check('mmdet', edit(lambda content: content['categories'][0].update(name=name), 'train')))[:1]
    assert 'a$b_{c$ \\x1b]0;title\\x07' in error and error.isprintable()
    draw_counts(Report([], {'train': {name[:7]: {'small': 1}}})).draw_without_rendering()
