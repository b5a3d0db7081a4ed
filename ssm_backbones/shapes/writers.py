"""Write generated images in the layouts of COCO, ADE20K and ImageNet."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ssm_backbones.shapes.classes import CLASSES, WNIDS
from ssm_backbones.shapes.options import ShapesOptions
from ssm_backbones.shapes.outline import compress_counts, polygons, run_lengths, trace
from ssm_backbones.shapes.scene import SPLITS, Instance, Scene, draw_portrait, draw_scene
from ssm_backbones.shapes.workers import for_each_image

# Room for the annotation ids of an image, and for the image ids of a split: ids do not depend on the counts.
_IDS_PER_IMAGE, _IDS_PER_SPLIT = 100, 1_000_000


def write_coco(folder: Path, options: ShapesOptions) -> None:
    """Write instances in COCO's layout: `annotations/instances_{train,val}2017.json`, `train2017/`, `val2017/`.

    Visible parts without holes are polygons, which rasterise to exactly the visible pixels; those with holes are
    compressed run lengths; crowds (iscrowd=1) are uncompressed run lengths, as in COCO itself.
    """
    (folder / 'annotations').mkdir()
    for offset, split in enumerate(SPLITS):
        image_folder = folder / f'{split}2017'
        image_folder.mkdir()
        draw = partial(_write_coco_image, image_folder, options, split, offset * _IDS_PER_SPLIT)
        records = for_each_image(draw, options.count(split))
        content = {
            'info': {
                'description': f'Generated shapes, {split}, seed {options.seed}',
                'url': '',
                'version': '1.0',
                'year': 2024,
                'contributor': 'ssm_backbones',
                'date_created': '2024/01/01',
            },
            'licenses': [{'id': 1, 'name': 'Apache License 2.0', 'url': 'https://www.apache.org/licenses/LICENSE-2.0'}],
            'images': [image for image, _ in records],
            'annotations': [annotation for _, annotations in records for annotation in annotations],
            'categories': [
                {'supercategory': 'shape', 'id': label + 1, 'name': name} for label, name in enumerate(CLASSES)
            ],
        }
        path = folder / 'annotations' / f'instances_{split}2017.json'
        path.write_text(json.dumps(content, separators=(',', ':')), encoding='utf-8')


def _write_coco_image(
    folder: Path, options: ShapesOptions, split: str, first_id: int, index: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write an image and return its entries of COCO's `images` and `annotations`."""
    scene = draw_scene(options.seed, split, index, options.size, options.largest)
    height, width = scene.clutter.shape
    image_id = first_id + index + 1
    name = f'{image_id:012d}.jpg'
    _save_image(scene.image, folder / name)
    record = {
        'license': 1,
        'file_name': name,
        'height': height,
        'width': width,
        'date_captured': '2024-01-01 00:00:00',
        'id': image_id,
    }
    return record, [
        coco_annotation(instance, image_id, image_id * _IDS_PER_IMAGE + number)
        for number, instance in enumerate(scene.instances)
    ]


def coco_annotation(instance: Instance, image_id: int, annotation_id: int) -> dict[str, Any]:
    """Build an entry of COCO's `annotations`; area and box (x, y, width, height) are those of the mask's pixels."""
    mask = instance.mask
    outlines = trace(mask)
    segmentation: list[list[int]] | dict[str, Any]
    if instance.crowd:
        segmentation = {'counts': run_lengths(mask), 'size': list(mask.shape)}
    elif any(outline.hole for outline in outlines):
        segmentation = {'counts': compress_counts(run_lengths(mask)), 'size': list(mask.shape)}
    else:
        segmentation = polygons(outlines)
    rows, columns = np.flatnonzero(mask.any(axis=1)).tolist(), np.flatnonzero(mask.any(axis=0)).tolist()
    return {
        'segmentation': segmentation,
        'area': float(np.count_nonzero(mask)),
        'iscrowd': int(instance.crowd),
        'image_id': image_id,
        'bbox': [
            float(columns[0]),
            float(rows[0]),
            float(columns[-1] - columns[0] + 1),
            float(rows[-1] - rows[0] + 1),
        ],
        'category_id': instance.label + 1,
        'id': annotation_id,
    }


def write_ade20k(folder: Path, options: ShapesOptions) -> None:
    """Write the same images as `write_coco` with label maps, in ADE20K's layout.

    `images/{training,validation}/*.jpg` and `annotations/{training,validation}/*.png`, the latter as `label_map` has
    them.
    """
    for split, name in zip(SPLITS, ('training', 'validation'), strict=True):
        images, maps = folder / 'images' / name, folder / 'annotations' / name
        images.mkdir(parents=True)
        maps.mkdir(parents=True)
        for_each_image(partial(_write_ade20k_image, images, maps, options, split), options.count(split))


def _write_ade20k_image(images: Path, maps: Path, options: ShapesOptions, split: str, index: int) -> None:
    scene = draw_scene(options.seed, split, index, options.size, options.largest)
    stem = f'ADE_{split}_{index + 1:08d}'
    _save_image(scene.image, images / f'{stem}.jpg')
    _image(label_map(scene)).save(maps / f'{stem}.png', compress_level=6)


def label_map(scene: Scene) -> np.ndarray:
    """Return ADE20K's labels, uint8 (height, width): 0 "other" (ignored), i + 1 for class i of `SEG_CLASSES`."""
    labels = np.ones(scene.clutter.shape, dtype=np.uint8)
    labels[scene.clutter] = 0
    for instance in scene.instances:
        labels[instance.mask] = instance.label + 2
    return labels


def write_imagenet(folder: Path, options: ShapesOptions) -> None:
    """Write images of one object each in ImageNet's layout: `{train,val}/WNID/*.JPEG`.

    Classes alternate, so that all are equally frequent. `LOC_synset_mapping.txt` maps folders to classes.
    """
    for split in SPLITS:
        for wnid in WNIDS:
            (folder / split / wnid).mkdir(parents=True)
        for_each_image(partial(_write_imagenet_image, folder, options, split), options.count(split))
    lines = [f'{wnid} {name}\n' for wnid, name in zip(WNIDS, CLASSES, strict=True)]
    (folder / 'LOC_synset_mapping.txt').write_text(''.join(lines), encoding='utf-8')


def _write_imagenet_image(folder: Path, options: ShapesOptions, split: str, index: int) -> None:
    label = index % len(CLASSES)
    scene = draw_portrait(options.seed, split, index, label, options.size, options.largest)
    _save_image(scene.image, folder / split / WNIDS[label] / f'{WNIDS[label]}_{split}_{index + 1:08d}.JPEG')


WRITERS: dict[str, Callable[[Path, ShapesOptions], None]] = {
    'coco': write_coco,
    'ade20k': write_ade20k,
    'imagenet': write_imagenet,
}
"""The formats by name; each writer fills an empty folder."""


def _image(values: np.ndarray) -> Any:
    # What shapes there are can be asked for without Pillow.
    from PIL import Image

    return Image.fromarray(values)


def _save_image(image: np.ndarray, path: Path) -> None:
    # All settings are spelt out: the bytes must not follow a default of another Pillow.
    _image(image).save(path, format='JPEG', quality=95, subsampling=0, optimize=False, progressive=False)
