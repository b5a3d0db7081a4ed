"""The formats, read back by pycocotools and Pillow and compared with the scenes they were made from."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ssm_backbones.shapes import CLASSES, SEG_CLASSES, WNIDS
from ssm_backbones.shapes.options import ShapesOptions
from ssm_backbones.shapes.scene import Scene, draw_scene

SPLITS = ('train', 'val')


def _scenes(options: ShapesOptions, split: str) -> list[Scene]:
    return [draw_scene(options.seed, split, i, options.size, options.largest) for i in range(options.count(split))]


def _coco(root: Path, split: str) -> COCO:
    return COCO(str(root / f'coco/annotations/instances_{split}2017.json'))


@pytest.mark.parametrize('split', SPLITS)
def test_coco_holds_the_visible_pixels_exactly(root: Path, options: ShapesOptions, split: str) -> None:
    coco = _coco(root, split)
    assert [category['name'] for category in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    scenes = _scenes(options, split)
    assert len(coco.getImgIds()) == len(scenes)
    for image_id, scene in zip(sorted(coco.getImgIds()), scenes, strict=True):
        record = coco.loadImgs([image_id])[0]
        assert (record['height'], record['width']) == scene.clutter.shape
        annotations = sorted(coco.loadAnns(coco.getAnnIds([image_id])), key=lambda annotation: annotation['id'])
        assert len(annotations) == len(scene.instances)
        for annotation, instance in zip(annotations, scene.instances, strict=True):
            np.testing.assert_array_equal(coco.annToMask(annotation).astype(bool), instance.mask)
            assert annotation['category_id'] == instance.label + 1
            assert annotation['iscrowd'] == instance.crowd
            assert annotation['area'] == instance.mask.sum()
            rows, columns = np.nonzero(instance.mask)
            x, y = columns.min(), rows.min()
            assert annotation['bbox'] == [x, y, columns.max() + 1 - x, rows.max() + 1 - y]


def test_coco_has_every_kind_of_segmentation(root: Path) -> None:
    annotations = _coco(root, 'train').dataset['annotations']
    kinds = {'polygon': 0, 'polygons': 0, 'text': 0, 'runs': 0}
    for annotation in annotations:
        segmentation = annotation['segmentation']
        if isinstance(segmentation, list):
            kinds['polygon' if len(segmentation) == 1 else 'polygons'] += 1
            assert not annotation['iscrowd']
        elif isinstance(segmentation['counts'], str):
            kinds['text'] += 1
            assert not annotation['iscrowd']
        else:
            kinds['runs'] += 1
            assert annotation['iscrowd']
    assert all(kinds.values()), kinds


def test_coco_ids_are_unique_and_apart_between_splits(root: Path) -> None:
    contents = [_coco(root, split).dataset for split in SPLITS]
    for key in ('images', 'annotations'):
        ids = [entry['id'] for content in contents for entry in content[key]]
        assert len(set(ids)) == len(ids) and min(ids) > 0
    for split, content in zip(SPLITS, contents, strict=True):
        names = {image['file_name'] for image in content['images']}
        assert names == {path.name for path in (root / f'coco/{split}2017').iterdir()}
        for image in content['images']:
            assert image['file_name'] == f'{image["id"]:012d}.jpg'


@pytest.mark.parametrize('kind', ['bbox', 'segm'])
def test_coco_truth_as_prediction_scores_one(root: Path, kind: str) -> None:
    truth = _coco(root, 'val')
    predictions = [
        {
            'image_id': annotation['image_id'],
            'category_id': annotation['category_id'],
            'bbox': annotation['bbox'],
            'segmentation': truth.annToRLE(annotation),
            'score': 0.9,
        }
        for annotation in truth.dataset['annotations']
        if not annotation['iscrowd']
    ]
    if kind == 'bbox':
        for prediction in predictions:
            del prediction['segmentation']
    evaluation = COCOeval(truth, truth.loadRes(predictions), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


def test_images_are_the_scenes(root: Path, options: ShapesOptions) -> None:
    for index, scene in enumerate(_scenes(options, 'val')):
        name = f'coco/val2017/{1_000_001 + index:012d}.jpg'
        with Image.open(root / name) as file:
            assert file.format == 'JPEG'
            image = np.asarray(file.convert('RGB')).astype(float)
        # What JPEG loses of the noise, at this quality; other images differ by tens.
        assert np.abs(image - scene.image).mean() < 4.0
        same = root / f'ade20k/images/validation/ADE_val_{index + 1:08d}.jpg'
        assert same.read_bytes() == (root / name).read_bytes()


@pytest.mark.parametrize(('split', 'folder'), [('train', 'training'), ('val', 'validation')])
def test_ade20k_label_maps_agree_with_the_instances(
    root: Path, options: ShapesOptions, split: str, folder: str
) -> None:
    scenes = _scenes(options, split)
    images = sorted((root / 'ade20k/images' / folder).iterdir())
    maps = sorted((root / 'ade20k/annotations' / folder).iterdir())
    assert len(maps) == len(scenes)
    assert [path.stem for path in maps] == [path.stem for path in images]
    seen = set()
    for path, scene in zip(maps, scenes, strict=True):
        with Image.open(path) as file:
            assert (file.format, file.mode) == ('PNG', 'L')
            labels = np.asarray(file)
        names = np.array(['other', *SEG_CLASSES])[labels]
        for instance in scene.instances:
            assert set(names[instance.mask]) == {CLASSES[instance.label]}
        covered = np.any([instance.mask for instance in scene.instances], axis=0)
        assert set(names[~covered & ~scene.clutter]) == {'background'}
        if scene.clutter.any():
            assert set(names[scene.clutter]) == {'other'}
        seen |= set(names.ravel())
    assert seen == {'other', *SEG_CLASSES}


def test_imagenet_classes_are_balanced(root: Path, options: ShapesOptions) -> None:
    assert list(WNIDS) == sorted(WNIDS)
    for split in SPLITS:
        folders = sorted(path for path in (root / 'imagenet' / split).iterdir())
        assert [folder.name for folder in folders] == list(WNIDS)
        counts = [len(list(folder.glob('*.JPEG'))) for folder in folders]
        assert sum(counts) == options.count(split) and max(counts) - min(counts) <= 1
    lines = (root / 'imagenet/LOC_synset_mapping.txt').read_text().splitlines()
    assert lines == [f'{wnid} {name}' for wnid, name in zip(WNIDS, CLASSES, strict=True)]


def test_annotations_are_strict_json(root: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f'{name} is not JSON')

    for split in SPLITS:
        text = (root / f'coco/annotations/instances_{split}2017.json').read_text(encoding='utf-8')
        assert set(json.loads(text, parse_constant=refuse)) == {
            'info',
            'licenses',
            'images',
            'annotations',
            'categories',
        }
