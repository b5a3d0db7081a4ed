"""Draw held-out images with truth and prediction, for each task."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config

from ssm_backbones.features.preview import PREVIEWS
from ssm_backbones.visualization.sheets import (
    Instances,
    draw_instances,
    draw_label_map,
    draw_scores,
    save_contact_sheet,
)

SHOWN_IMAGES = 12
SHOWN_SCORE = 0.5
# Label that the loaders of label maps ignore.
_IGNORED = 255


def show_detections(cfg: Config, dump: Path, heading: str, path: Path) -> None:
    """Draw objects.

    Args:
        cfg: An mmdet config whose test set is in COCO's format.
        dump: Output of ``tools/test.py --out`` for that config.
        heading: The heading of the sheet.
        path: The image to write.
    """
    from pycocotools import mask as rle
    from pycocotools.coco import COCO

    dataset = cfg.test_dataloader.dataset
    classes, palette = dataset.metainfo.classes, dataset.metainfo.palette
    truth = COCO(os.path.join(dataset.data_root, dataset.ann_file))
    labels = {category: label for label, category in enumerate(truth.getCatIds(catNms=list(classes)))}
    pairs = []
    for prediction in sorted(_unpickle(dump), key=lambda item: item['img_id'])[:SHOWN_IMAGES]:
        image = _read(prediction['img_path'])
        annotations = truth.loadAnns(truth.getAnnIds(imgIds=prediction['img_id'], iscrowd=False))
        boxes = np.array([annotation['bbox'] for annotation in annotations], dtype=float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        true = Instances(
            labels=np.array([labels[annotation['category_id']] for annotation in annotations], dtype=int),
            boxes=boxes,
            masks=_stack([truth.annToMask(annotation) for annotation in annotations], image.shape),
        )
        found = prediction['pred_instances']
        keep = np.flatnonzero(found['scores'].numpy() >= SHOWN_SCORE)
        predicted = Instances(
            labels=found['labels'].numpy()[keep],
            boxes=found['bboxes'].numpy()[keep],
            masks=_stack([rle.decode(found['masks'][index]) for index in keep], image.shape),
            scores=found['scores'].numpy()[keep],
        )
        drawn = [draw_instances(image, instances, classes, palette) for instances in (true, predicted)]
        pairs.append((drawn[0], drawn[1]))
    save_contact_sheet(pairs, ('ground truth', f'prediction (score >= {SHOWN_SCORE})'), heading, path)


def show_label_maps(cfg: Config, dump: Path, heading: str, path: Path) -> None:
    """Draw label maps; the arguments are those of :func:`show_detections`, of an mmseg config with ADE20K's layout."""
    dataset = cfg.test_dataloader.dataset
    classes, palette = dataset.metainfo.classes, dataset.metainfo.palette
    root, prefix = Path(dataset.data_root), dataset.data_prefix
    pairs = []
    for found in sorted(dump.glob('*.png'))[:SHOWN_IMAGES]:
        image = _read(root / prefix.img_path / f'{found.stem}.jpg')
        # Labels are stored plus one: 0 is ADE20K's "other", which becomes 255, the ignored label.
        maps = [_read_labels(file) - 1 for file in (root / prefix.seg_map_path / found.name, found)]
        drawn = [draw_label_map(image, labels, palette, ignored=_IGNORED, zoom=3) for labels in maps]
        pairs.append((drawn[0], drawn[1]))
    legend = list(zip(classes, palette, strict=True))
    save_contact_sheet(pairs, ('ground truth (dark: ignored)', 'prediction'), heading, path, legend=legend)


def show_classes(cfg: Config, dump: Path, heading: str, path: Path) -> None:
    """Draw class scores; the arguments are those of :func:`show_detections`, of an mmpretrain config."""
    classes: Sequence[str] = cfg.test_dataloader.dataset.metainfo.classes
    predictions = _unpickle(dump)
    # Evenly over the set, which is sorted by class.
    chosen = np.linspace(0, len(predictions) - 1, min(SHOWN_IMAGES, len(predictions))).round().astype(int)
    pairs = []
    for prediction in (predictions[index] for index in chosen):
        truth = int(prediction['gt_label'][0])
        image = _read(prediction['img_path']).repeat(2, axis=0).repeat(2, axis=1)
        pairs.append((image, draw_scores(prediction['pred_score'].numpy(), truth, classes, image.shape[:2])))
    save_contact_sheet(pairs, ('held-out image', 'scores (outlined: the truth)'), heading, path, columns=3)


def show_features(config: str, checkpoint: Path, images: str, export: Path, path: Path) -> None:
    """Export the backbone's maps of some images, and draw each level's principal components next to them.

    Args:
        config: The config file.
        checkpoint: The model's checkpoint.
        images: Glob pattern of the images.
        export: Folder to export to.
        path: The image to write.
    """
    from PIL import Image

    from ssm_backbones.features.export import ExportOptions, export_features

    export_features(ExportOptions(config, str(checkpoint), images, str(export), workers=0, preview=True))
    rows = [Image.open(file) for file in sorted((export / PREVIEWS).rglob('*.png'))]
    sheet = Image.new('RGB', (max(row.width for row in rows), sum(row.height for row in rows)), (255, 255, 255))
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    sheet.save(path)


def _unpickle(dump: Path) -> list[dict[str, Any]]:
    with dump.open('rb') as file:
        return pickle.load(file)  # the demo's own test run wrote it


def _read(path: str | Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path).convert('RGB'))


def _read_labels(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path))


def _stack(masks: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    return np.stack(masks).astype(bool) if masks else np.zeros((0, *shape[:2]), dtype=bool)
