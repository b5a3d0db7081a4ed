"""The check of a config's data, as a whole."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope

from ssm_backbones.apis.checks import check_paths, is_here, leaf_datasets
from ssm_backbones.data_check import classes as class_checks
from ssm_backbones.data_check import classification, coco, segmentation
from ssm_backbones.data_check.coco_file import CocoFile, read_coco
from ssm_backbones.data_check.finding import ERROR, Finding, Findings
from ssm_backbones.data_check.images import check_copies, turns_images
from ssm_backbones.data_check.trial import LOADED, try_pipeline
from ssm_backbones.utils.errors import CommandError


@dataclass
class Report:
    """What was found in a config's data.

    Attributes:
        findings: The findings, errors first.
        counts: Counts by data set (config key), class and size: objects of a detection set by COCO's ``small``,
            ``medium`` and ``large``, pixels of the label maps that were opened, or images of a classification set.
        unit: ``'objects'``, ``'pixels'`` or ``'images'``.
    """

    findings: list[Finding]
    counts: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    unit: str = 'objects'


def check_data(cfg: Config, modes: Sequence[str] = ('train', 'val'), every_file: bool = False) -> list[Finding]:
    """Check the data sets and evaluators of a config against its model and against each other.

    See :func:`inspect_data`, which returns the counts of objects, too.
    """
    return inspect_data(cfg, modes, every_file).findings


def inspect_data(cfg: Config, modes: Sequence[str] = ('train', 'val'), every_file: bool = False) -> Report:
    """Check the data sets and evaluators of a config, and count what they hold.

    Annotations are read as a whole. Of images and label maps all are looked up, and a sample is opened. Nothing is
    written, and the random state is left as it is.

    Args:
        cfg: An mmpretrain, mmdet or mmseg config, from :func:`~ssm_backbones.apis.config.load_config`.
        modes: Some of ``'train'``, ``'val'`` and ``'test'``.
        every_file: Whether to open every image and label map.

    Returns:
        The findings, errors first, and the counts.
    """
    findings = Findings()
    try:
        check_paths(cfg, modes)
    except CommandError as error:
        key, _, text = str(error).partition(': ')
        value, _, remedy = text.partition('. ')
        return Report([Finding(ERROR, key, '', value, remedy)])
    check = {'mmdet': _Detection, 'mmseg': _Segmentation, 'mmpretrain': _Classification}[cfg.default_scope](
        cfg, modes, every_file, findings
    )
    check.run()
    return Report(findings.ordered(), check.counts, check.unit)


class _Check:
    """What the checks of the three libraries share."""

    unit = 'objects'

    def __init__(self, cfg: Config, modes: Sequence[str], every_file: bool, findings: Findings) -> None:
        self.cfg = cfg
        self.modes = modes
        self.every_file = every_file
        self.findings = findings
        self.counts: dict[str, dict[str, dict[str, int]]] = {}
        self.classes: dict[str, Sequence[str] | None] = {}
        self.paths: dict[str, list[str]] = {}

    def run(self) -> None:
        for mode in self.modes:
            loader = self.cfg.get(f'{mode}_dataloader')
            if loader is None:
                continue
            for key, dataset in leaf_datasets(loader.dataset, f'{mode}_dataloader.dataset'):
                if not is_here(dataset, self.cfg.default_scope):
                    continue
                kind = class_checks.dataset_class(dataset, self.cfg.default_scope)
                if kind is None:
                    self.findings.add(
                        ERROR, f'{key}.type', f'{dataset.get("type")!r} is not registered', 'Import it: custom_imports.'
                    )
                    continue
                self.classes[key] = class_checks.class_names(dataset, key, self.cfg.default_scope, self.findings)
                if not self.findings.has_errors():
                    self.check_dataset(key, dataset, kind)
        self.finish()
        class_checks.check_same_classes(self.classes, self.findings)
        classes = next((names for names in self.classes.values() if names is not None), None)
        class_checks.check_numbers(self.cfg, classes, self.modes, self.findings)
        train = {key: paths for key, paths in self.paths.items() if key.startswith('train_')}
        others = {key: paths for key, paths in self.paths.items() if not key.startswith('train_')}
        if train and others:
            check_copies(train, others, self.findings)

    def check_dataset(self, key: str, dataset: Mapping[str, Any], kind: Any) -> None:
        """Check one data set of class ``kind``; each host library's check implements this."""
        raise NotImplementedError

    def finish(self) -> None:
        """Check what concerns several data sets."""

    def build(self, key: str, dataset: Mapping[str, Any], **changes: Any) -> Any:
        """Build a data set without its pipeline; add a finding and return None if that fails."""
        settings = {**deepcopy(dict(dataset)), 'pipeline': [], 'serialize_data': False, **changes}
        try:
            scope = DefaultScope.overwrite_default_scope(self.cfg.default_scope)
            # pycocotools prints what it does.
            with scope, contextlib.redirect_stdout(io.StringIO()):
                return DATASETS.build(settings)
        except Exception as error:
            self.explain_failure(key, dataset, error)
            return None

    def explain_failure(self, key: str, dataset: Mapping[str, Any], error: Exception) -> None:
        self.findings.add(
            ERROR,
            key,
            f'{dataset.get("type")} cannot be built ({type(error).__name__}: {str(error).strip()})',
            'Correct the settings or the files.',
        )

    def try_pipeline(self, key: str, dataset: Mapping[str, Any], built: Any) -> None:
        indices = np.unique(np.linspace(0, max(len(built) - 1, 0), LOADED).astype(int))[: len(built)]
        infos = [built.get_data_info(int(index)) for index in indices]
        try_pipeline(infos, dataset.get('pipeline') or [], key, self.cfg, self.findings)


class _Detection(_Check):
    unit = 'objects'

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.files: dict[str, CocoFile | None] = {}
        self.datasets: dict[str, CocoFile] = {}

    def check_dataset(self, key: str, dataset: Mapping[str, Any], kind: Any) -> None:
        from mmdet.datasets import CocoDataset

        # Others, such as LVIS and panoptic sets, read their files in ways of their own.
        if getattr(kind, 'load_data_list', None) is not CocoDataset.load_data_list:
            built = self.build(key, dataset)
            if built is not None:
                self.try_pipeline(key, dataset, built)
            return
        root = dataset.get('data_root') or ''
        file = self.read(os.path.join(root, dataset.get('ann_file') or ''))
        if file is None:
            return
        self.datasets[key] = file
        pipeline = dataset.get('pipeline') or []
        prefix = dataset.get('data_prefix') or {}
        folder = os.path.join(root, prefix.get('img', '') if isinstance(prefix, Mapping) else prefix)
        coco.check_image_files(file, folder, turns_images(pipeline), self.every_file, self.findings)
        self.paths[key] = [os.path.join(folder, str(image['file_name'])) for image in file.images]
        training = not dataset.get('test_mode', False)
        filters = dataset.get('filter_cfg') or {} if training else {}
        masks = any(step.get('with_mask') for step in pipeline)
        needs = coco.Needs(
            key,
            dataset=True,
            masks=masks,
            min_size=filters.get('min_size', 0),
            drops_empty=filters.get('filter_empty_gt', False),
        )
        # Sets of images alone, for semi-supervised training, keep the empty ones.
        self.check_file(file, needs, key, required=needs.drops_empty)
        self.counts[key] = coco.count_objects(file)
        if not self.findings.has_errors():
            self._try_on_sample(key, dataset, file)

    def finish(self) -> None:
        for mode in self.modes:
            loader = self.cfg.get(f'{mode}_dataloader')
            if loader is None:
                continue
            datasets = dict(leaf_datasets(loader.dataset, f'{mode}_dataloader.dataset'))
            keys = list(datasets)
            for key, evaluator in class_checks.evaluators(self.cfg, mode):
                if not str(evaluator.get('type')).endswith('CocoMetric') or not evaluator.get('ann_file'):
                    continue
                file = self.read(evaluator['ann_file'])
                if file is None or evaluator.get('format_only'):
                    continue
                metrics = evaluator.get('metric', 'bbox')
                masks = 'segm' in (metrics if isinstance(metrics, (list, tuple)) else [metrics])
                self.check_file(file, coco.Needs(key, evaluator=True, masks=masks), keys[0])
                for each in keys:
                    if self.datasets.get(each, file) is not file:
                        chosen = bool(datasets[each].get('indices')) or not datasets[each].get('test_mode')
                        coco.check_same_images(self.datasets[each], file, f'{key}.ann_file', chosen, self.findings)

    def read(self, path: str) -> CocoFile | None:
        """Read a file, once for all that use it; None if it cannot be used."""
        real = os.path.realpath(path)
        if real not in self.files:
            self.files[real] = None
            try:
                file = read_coco(path)
            except (ValueError, OSError) as error:
                self.findings.add(ERROR, path, f'is no file of COCO annotations ({error})', 'Replace it.')
                return None
            if coco.check_structure(file, self.findings):
                self.files[real] = file
        return self.files[real]

    def check_file(self, file: CocoFile, needs: coco.Needs, key: str, required: bool = True) -> None:
        classes = self.classes.get(key)
        if classes is not None:
            names = [category['name'] for category in file.categories]
            counts = dict(zip(names, np.bincount(file.category_indices + 1, minlength=len(names) + 1)[1:], strict=True))
            class_checks.check_names_in_file(file.path, names, classes, key, counts, self.findings)
        if file.ids or required:
            coco.check_annotations(file, needs, classes, self.findings)

    def _try_on_sample(self, key: str, dataset: Mapping[str, Any], file: CocoFile) -> None:
        """Try the pipeline on a few images without reading the whole file once more."""
        id = file.image_ids[0] if file.ids else None
        images = sorted(file.images, key=lambda image: image['id'] != id)
        chosen = [images[index] for index in np.unique(np.linspace(0, len(images) - 1, LOADED).astype(int))]
        # Where a size is too small for the model, it is that of one of these.
        for size in (lambda each: each['width'] * each['height'], _flatness):
            extreme = min(images, key=size)
            if extreme not in chosen:
                chosen.append(extreme)
        content = {'images': chosen, 'annotations': file.sample, 'categories': file.categories}
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, 'annotations.json')
            with open(path, 'w', encoding='utf-8') as output:
                json.dump(content, output)
            built = self.build(key, dataset, ann_file=path, indices=None, filter_cfg=None)
        if built is not None:
            infos = sorted((built.get_data_info(i) for i in range(len(built))), key=lambda info: info['img_id'] != id)
            try_pipeline(infos, dataset.get('pipeline') or [], key, self.cfg, self.findings)


def _flatness(image: Mapping[str, Any]) -> float:
    """Return an image's shorter over its longer side."""
    return min(image['width'], image['height']) / max(image['width'], image['height'], 1)


class _Segmentation(_Check):
    unit = 'pixels'

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.ignored = False

    def check_dataset(self, key: str, dataset: Mapping[str, Any], kind: Any) -> None:
        from mmseg.datasets import BaseSegDataset

        built = self.build(key, dataset, lazy_init=True)
        if built is None:
            return
        self.classes[key] = built.metainfo.get('classes')
        if isinstance(built, BaseSegDataset):
            pipeline = dataset.get('pipeline') or []
            pixels = segmentation.check_label_maps(built, key, pipeline, self.every_file, self.findings)
            self.ignored |= pixels.pop(segmentation.IGNORED, 0) > 0
            names = self.classes[key] or ()
            self.counts[key] = {name: {'': pixels.get(label, 0)} for label, name in enumerate(names)}
        if self.findings.has_errors():
            return
        built.full_init()
        self.paths[key] = [info['img_path'] for info in built.data_list]
        self.try_pipeline(key, dataset, built)

    def finish(self) -> None:
        segmentation.check_losses(self.cfg, self.ignored, self.findings)


class _Classification(_Check):
    unit = 'images'

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.trees: dict[str, tuple[str, ...]] = {}

    def check_dataset(self, key: str, dataset: Mapping[str, Any], kind: Any) -> None:
        built = self.build(key, dataset)
        if built is None:
            return
        counts, names = classification.check_labels(built, key, self.findings)
        self.classes[key] = names
        self.counts[key] = {name: {'': count} for name, count in counts.items()}
        if getattr(built, 'folder_to_idx', None) is not None:
            self.trees[key] = tuple(built.folder_to_idx)
        self.paths[key] = [info['img_path'] for info in built.data_list if 'img_path' in info]
        if not self.findings.has_errors():
            self.try_pipeline(key, dataset, built)

    def explain_failure(self, key: str, dataset: Mapping[str, Any], error: Exception) -> None:
        classification.explain_failure(dataset, key, error, self.findings)

    def finish(self) -> None:
        classification.check_same_folders(self.trees, self.findings)
