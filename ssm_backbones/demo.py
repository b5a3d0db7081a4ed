"""The demo: generate data, train a small model on it, evaluate, and show what it learnt.

Everything goes through what users have: the generator, ``tools/train.py`` and an ordinary config.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config

from ssm_backbones.datasets.options import ShapesOptions
from ssm_backbones.datasets.shapes import MANIFEST, make_shapes
from ssm_backbones.preflight import CommandError
from ssm_backbones.runner import TestOptions, load_config, test
from ssm_backbones.visual import Instances, draw_instances, read_history, save_contact_sheet, save_curves

_SHOWN_PICTURES = 12
_SHOWN_SCORE = 0.5


@dataclass(frozen=True)
class Demo:
    """One row of the table: what is trained and what is reported.

    Attributes:
        config: The config file, below the checkout's root.
        data_format: Which of the generated formats it reads.
        options: What is generated.
        figures: The figures to report: shown name by logged name.
        show: Draws predictions into a picture: ``show(cfg, predictions, heading, path)``.
    """

    config: str
    data_format: str
    options: ShapesOptions
    figures: Mapping[str, str]
    show: Callable[[Config, list[dict[str, Any]], str, Path], None]


def show_detections(cfg: Config, predictions: list[dict[str, Any]], heading: str, path: Path) -> None:
    """Draw truth beside prediction for the first held-out pictures.

    Args:
        cfg: An mmdet config whose test set is in COCO's format.
        predictions: What ``tools/test.py --out`` dumps for it.
        heading: The heading of the sheet.
        path: The picture to write.
    """
    from PIL import Image
    from pycocotools import mask as rle
    from pycocotools.coco import COCO

    dataset = cfg.test_dataloader.dataset
    classes, palette = dataset.metainfo.classes, dataset.metainfo.palette
    truth = COCO(os.path.join(dataset.data_root, dataset.ann_file))
    labels = {category: label for label, category in enumerate(truth.getCatIds(catNms=list(classes)))}
    pairs = []
    for prediction in sorted(predictions, key=lambda item: item['img_id'])[:_SHOWN_PICTURES]:
        image = np.asarray(Image.open(prediction['img_path']).convert('RGB'))
        annotations = truth.loadAnns(truth.getAnnIds(imgIds=prediction['img_id'], iscrowd=False))
        boxes = np.array([annotation['bbox'] for annotation in annotations], dtype=float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        true = Instances(
            labels=np.array([labels[annotation['category_id']] for annotation in annotations], dtype=int),
            boxes=boxes,
            masks=_stack([truth.annToMask(annotation) for annotation in annotations], image.shape),
        )
        found = prediction['pred_instances']
        keep = np.flatnonzero(found['scores'].numpy() >= _SHOWN_SCORE)
        predicted = Instances(
            labels=found['labels'].numpy()[keep],
            boxes=found['bboxes'].numpy()[keep],
            masks=_stack([rle.decode(found['masks'][index]) for index in keep], image.shape),
            scores=found['scores'].numpy()[keep],
        )
        drawn = [draw_instances(image, instances, classes, palette) for instances in (true, predicted)]
        pairs.append((drawn[0], drawn[1]))
    save_contact_sheet(pairs, ('ground truth', f'prediction (score >= {_SHOWN_SCORE})'), heading, path)


def _stack(masks: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    return np.stack(masks).astype(bool) if masks else np.zeros((0, *shape[:2]), dtype=bool)


DEMOS: dict[tuple[str, str], Demo] = {
    ('vmamba', 'det'): Demo(
        config='configs/vmamba/mask-rcnn_vmamba-nano_fpn_demo_shapes.py',
        data_format='coco',
        options=ShapesOptions(train=1600, val=200),
        figures={'coco/bbox_mAP': 'box AP', 'coco/segm_mAP': 'mask AP'},
        show=show_detections,
    ),
}
"""The demos there are, by (family, task)."""


def run_demo(family: str = 'vmamba', task: str = 'det', fresh: bool = False) -> dict[str, float]:
    """Run a demo in the current directory, which has to be the root of a checkout.

    The data go to ``data/shapes/``, everything else to ``demo/<family>-<task>/``. A run that was interrupted is carried
    on; one that was finished with the same data and config is only reported.

    Args:
        family: The backbone's family, ``'vmamba'``.
        task: ``'det'``, detection with instance masks.
        fresh: Drop what earlier runs left and start anew.

    Returns:
        The figures reached, by their logged names.

    Raises:
        CommandError: If there is no such demo, or data, training or evaluation fail.
    """
    if (family, task) not in DEMOS:
        known = ', '.join(f'--family {other} --task {kind}' for other, kind in DEMOS)
        raise CommandError(f'there is no demo for --family {family} --task {task}; there is: {known}')
    demo = DEMOS[family, task]
    out = Path('demo', f'{family}-{task}')
    started = time.monotonic()

    _say(f'Data: data/shapes/{demo.data_format}')
    try:
        make_shapes('data/shapes', demo.options, [demo.data_format], report=lambda line: print(line, flush=True))
    except (ValueError, OSError) as error:
        raise CommandError(f'the data cannot be generated: {error}') from error
    cfg = load_config(demo.config)
    _start_or_carry_on(out, _fingerprint(cfg, Path('data/shapes', demo.data_format, MANIFEST)), fresh)
    results = out / 'results.json'
    if not results.is_file():
        _train(demo.config, cfg, out / 'train')
        _evaluate_and_show(demo, cfg, out, f'{family}, {task}')
        _say(f'Done after {time.monotonic() - started:.0f} s.')
    else:
        _say('Finished before with the same data and config; --fresh trains anew.')
    figures = json.loads(results.read_text(encoding='utf-8'))
    reached = ', '.join(f'{shown} {figures[name]:.3f}' for name, shown in demo.figures.items())
    _say(f'{reached} on held-out pictures; see predictions.png, curves.png and model.pth in {out}{os.sep}')
    return figures


def _say(line: str) -> None:
    print(line, flush=True)


def _fingerprint(cfg: Config, manifest: Path) -> str:
    digest = hashlib.sha256(cfg.pretty_text.encode())
    digest.update(manifest.read_bytes())
    return digest.hexdigest()


def _start_or_carry_on(out: Path, fingerprint: str, fresh: bool) -> None:
    stamp = out / 'fingerprint'
    known = stamp.read_text(encoding='utf-8') if stamp.is_file() else None
    if out.exists() and (fresh or known != fingerprint):
        _say(f'Starting anew: {"asked to" if fresh else "data or config have changed"}; removing {out}{os.sep}')
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    stamp.write_text(fingerprint, encoding='utf-8')


def _train(config: str, cfg: Config, work_dir: Path) -> None:
    if _last_checkpoint(work_dir).name == f'epoch_{cfg.train_cfg.max_epochs}.pth':
        _say('Training: finished before')
        return
    command = [sys.executable, os.path.join('tools', 'train.py'), config, '--work-dir', str(work_dir), '--resume']
    _say('Training: ' + ' '.join(['python', *command[1:]]))
    status = subprocess.run(command, check=False).returncode
    if status != 0:
        raise CommandError(
            f'training stopped with exit status {status}; the same command carries on from the last epoch'
        )


def _last_checkpoint(work_dir: Path) -> Path:
    record = work_dir / 'last_checkpoint'
    return work_dir / Path(record.read_text(encoding='utf-8').strip()).name if record.is_file() else Path()


def _evaluate_and_show(demo: Demo, cfg: Config, out: Path, heading: str) -> None:
    checkpoint = _last_checkpoint(out / 'train')
    dump = out / 'train' / 'predictions.pkl'
    _say(f'Evaluation: {checkpoint}')
    metrics = test(TestOptions(demo.config, str(checkpoint), work_dir=str(out / 'train' / 'test'), out=str(dump)))
    figures = {name: float(metrics[name]) for name in demo.figures}
    reached = ', '.join(f'{shown} {figures[name]:.3f}' for name, shown in demo.figures.items())
    with dump.open('rb') as file:
        predictions = pickle.load(file)  # written by the line above
    demo.show(cfg, predictions, f'{heading}: held-out pictures ({reached})', out / 'predictions.png')
    save_curves(read_history(out / 'train'), demo.figures, f'{heading}: {reached}', out / 'curves.png')
    shutil.copyfile(checkpoint, out / 'model.pth')
    partial = out / '.results.json.partial'
    partial.write_text(json.dumps(figures, indent=2) + '\n', encoding='utf-8')
    partial.replace(out / 'results.json')
