"""Trials of a config's pipelines and data preprocessor on some of its images, in this process, before any worker."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, TRANSFORMS, DefaultScope

from ssm_backbones.apis.config import registered
from ssm_backbones.apis.model import preprocessor_config
from ssm_backbones.apis.top_k import chosen_positions, count_positions
from ssm_backbones.data_check.finding import ERROR, WARNING, Findings

LOADED = 8
"""Images that are loaded to compare their channels."""
_TRIES = 16


def try_pipeline(
    infos: Sequence[Mapping[str, Any]], pipeline: Sequence[Mapping[str, Any]], key: str, cfg: Config, findings: Findings
) -> None:
    """Load a few images, run the whole pipeline and the data preprocessor on the first, and compare channels.

    Args:
        infos: What the data set says of each image; the first one goes through the whole pipeline.
        pipeline: The config's transforms.
        key: Config key of the data set.
        cfg: The config.
        findings: Collects what is found.
    """
    with _same_random_state(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        _Trial(pipeline, key, cfg, findings).run(infos)


class _Trial:
    def __init__(self, pipeline: Sequence[Mapping[str, Any]], key: str, cfg: Config, findings: Findings) -> None:
        self.pipeline = pipeline
        self.key = key
        self.cfg = cfg
        self.findings = findings
        self.kinds = [str(step.get('type')) for step in pipeline]
        # Channels after each step, in each run through the whole pipeline.
        self.traces: list[list[int]] = []

    def run(self, infos: Sequence[Mapping[str, Any]]) -> None:
        steps = self._build()
        if not steps or not infos or 'img_path' not in infos[0] or not self._load(steps[0], infos):
            return
        path = infos[0]['img_path']
        results = self._transform(steps, infos[0])
        if results is None:
            return
        if self.traces[0][0] != 3:
            # Transforms made for colour images may stop at others or change their channels, but at random.
            for _ in range(_TRIES):
                if self._transform(steps, infos[0]) is None:
                    return
            if self._depends_on_chance(path):
                return
        inputs = results.get('inputs')
        if isinstance(inputs, torch.Tensor) and inputs.ndim == 3:
            preprocessor = self._preprocess(results, path)
            if preprocessor is not None and chosen_positions(self.cfg.model):
                self._check_sizes(steps, preprocessor, infos)

    def _build(self) -> list[Any] | None:
        steps = []
        for index, step in enumerate(self.pipeline):
            try:
                with DefaultScope.overwrite_default_scope(self.cfg.default_scope):
                    # Some transforms build those within them in place.
                    steps.append(TRANSFORMS.build(deepcopy(dict(step))))
            except Exception as error:
                self.findings.add(
                    ERROR,
                    f'{self.key}.pipeline[{index}]',
                    f'{self.kinds[index]} cannot be built ({_reason(error)})',
                    'Correct its settings.',
                )
                return None
        return steps

    def _load(self, loader: Any, infos: Sequence[Mapping[str, Any]]) -> bool:
        """Load the images, and return whether that is possible and gives the same number of channels for each."""
        unreadable: list[tuple[str, str]] = []
        loaded: dict[int, tuple[str, Any]] = {}
        for info in infos[:LOADED]:
            try:
                image = (loader(deepcopy(dict(info))) or {}).get('img')
            except Exception as error:
                unreadable.append((info['img_path'], _reason(error)))
                continue
            if isinstance(image, np.ndarray):
                loaded.setdefault(_channels(image), (info['img_path'], image.dtype))
        self.findings.add_all(
            ERROR,
            f'{self.key}.pipeline[0]',
            unreadable,
            lambda found: (f'image {found[0]}', f'cannot be read ({found[1]})'),
            'Replace the file, or take it out of the annotations, or load it in another way (imdecode_backend).',
        )
        if len(loaded) > 1:
            examples = '; '.join(f'{path} has {count} ({dtype})' for count, (path, dtype) in loaded.items())
            self.findings.add(
                ERROR,
                f'{self.key}.pipeline[0]',
                f'images differ in their channels: {examples}',
                "Convert them to one form, or load with color_type='color' (3 channels) or 'grayscale' (1).",
            )
        return not unreadable and len(loaded) < 2

    def _transform(self, steps: Sequence[Any], info: Mapping[str, Any]) -> Any:
        """Run the pipeline; None if it stops or gives nothing."""
        trace = []
        results: Any = deepcopy(dict(info))
        for index, step in enumerate(steps):
            image = results.get('img')
            try:
                results = step(results)
            except Exception as error:
                self._explain(index, info, image, error)
                return None
            if not isinstance(results, Mapping):
                # Some transforms give None for an image that they cannot use; another one is taken for it.
                return None
            image = results.get('img')
            trace.append(_channels(image) if isinstance(image, np.ndarray) else 0)
        self.traces.append(trace)
        return results

    def _explain(self, index: int, info: Mapping[str, Any], image: Any, error: Exception) -> None:
        step = f'{self.key}.pipeline[{index}]'
        if self.kinds[index].endswith('LoadAnnotations') and info.get('seg_map_path'):
            self.findings.add(
                ERROR,
                step,
                f'cannot be read by {self.kinds[index]} ({_reason(error)})',
                'Replace the file, or take it out.',
                f'label map {info["seg_map_path"]}',
            )
            return
        shape = f' of shape {image.shape}, {image.dtype},' if isinstance(image, np.ndarray) else ''
        self.findings.add(
            ERROR,
            step,
            f'{self.kinds[index]} stops at {info["img_path"]}{shape} with {_reason(error)}',
            'Take the transform out or change its settings; colour transforms are for three channels.',
        )

    def _depends_on_chance(self, path: str) -> bool:
        """Look for the transform after which the number of channels depends on chance."""
        for index, seen in enumerate(zip(*self.traces, strict=True)):
            if len(set(seen)) > 1:
                counts = ' or '.join(map(str, sorted(set(seen))))
                self.findings.add(
                    ERROR,
                    f'{self.key}.pipeline[{index}]',
                    f'{self.kinds[index]} makes {counts} channels of {self.traces[0][0]}, by chance, of {path}',
                    'Take it out of the pipeline: it is made for images of three channels.',
                )
                return True
        return False

    def _preprocess(self, results: Mapping[str, Any], path: str) -> Any:
        """Run the data preprocessor, and compare its channels with the backbone's; return it if they agree."""
        settings = preprocessor_config(self.cfg)
        name = 'model.data_preprocessor' if self.cfg.model.get('data_preprocessor') else 'data_preprocessor'
        inputs = results['inputs']
        channels, expected = inputs.shape[0], _in_channels(self.cfg)
        if expected is None:
            return None
        mean = settings.get('mean')
        described = self._describe_channels(path, channels, settings, name)
        remedy = (
            "Make them agree: color_type='color' gives 3 channels, 'grayscale' 1, 'unchanged' those of the file; mean "
            'and std have a value for each, or one for all; bgr_to_rgb and rgb_to_bgr are for 3.'
        )
        if str(inputs.dtype).startswith('torch.uint') and inputs.dtype != torch.uint8:
            remedy += ' PyTorch has few operators for this type: set to_float32=True in the loader.'
        if channels != expected or (mean is not None and len(mean) not in (1, channels)):
            self.findings.add(ERROR, f'{self.key}.pipeline', described, remedy)
            return None
        importlib.import_module(f'{self.cfg.default_scope}.models')
        try:
            with DefaultScope.overwrite_default_scope(self.cfg.default_scope):
                preprocessor = MODELS.build(settings)
            outputs = _batch(preprocessor, results)
        except Exception as error:
            self.findings.add(ERROR, name, f'stops with {_reason(error)}: {described}, {inputs.dtype}', remedy)
            return None
        if isinstance(outputs, torch.Tensor) and outputs.shape[1] != expected:
            self.findings.add(ERROR, name, f'makes {outputs.shape[1]} channels of {channels}: {described}', remedy)
            return None
        return preprocessor

    def _check_sizes(self, steps: Sequence[Any], preprocessor: Any, infos: Sequence[Mapping[str, Any]]) -> None:
        """Check that every image has as many positions as the detector chooses of them."""
        made: list[tuple[int, int, str]] = []
        for info in [*infos, *infos]:
            results: Any = deepcopy(dict(info))
            try:
                for step in steps:
                    results = step(results)
                height, width = map(int, _batch(preprocessor, results).shape[-2:])
            except Exception:
                # An image that a transform of chance cannot use, or whose annotations were not read for this trial.
                continue
            made.append((height, width, str(info['img_path'])))
        queries = chosen_positions(self.cfg.model)
        if not made or queries is None:
            return
        height, width, path = min(made, key=lambda each: each[0] * each[1])
        largest = max(each[0] for each in made), max(each[1] for each in made)
        try:
            positions, most = (count_positions(self.cfg, *size) for size in ((height, width), largest))
        except Exception:
            # A model that computes only on a device of its own, such as one with compiled operators of mmcv.
            return
        if positions < queries:
            # A batch has the size of its largest image.
            certain = most < queries or _batch_size(self.cfg, self.key) == 1
            self.findings.add(
                ERROR if certain else WARNING,
                f'{self.key}.pipeline',
                f'makes {width}x{height} pixels of {path}, in whose feature maps the detector finds {positions} '
                f'positions to choose model.num_queries={queries} from'
                + ('' if certain else '; a batch of such images alone stops the training'),
                f'Enlarge the images (Resize), or set model.num_queries to at most {positions} and '
                'model.test_cfg.max_per_img to no more than that times the number of classes.',
            )

    def _describe_channels(self, path: str, channels: int, settings: Mapping[str, Any], name: str) -> str:
        trace = self.traces[0]
        changed = next((index for index, count in enumerate(trace) if count not in (0, trace[0])), None)
        turned = next((flag for flag in ('bgr_to_rgb', 'rgb_to_bgr', 'to_rgb') if settings.get(flag)), None)
        mean = settings.get('mean')
        values = 'no values' if mean is None else f'{len(mean)} value{"s" * (len(mean) != 1)}'
        parts = [
            f'{path} has {trace[0]} channel{"s" * (trace[0] != 1)} as {self.key}.pipeline loads it '
            f'(color_type={self.pipeline[0].get("color_type", "color")!r})',
            f'{name}.mean has {values}',
            f'model.backbone.in_channels is {_in_channels(self.cfg)}',
        ]
        if changed is not None:
            parts.insert(1, f'of which pipeline[{changed}], {self.kinds[changed]}, leaves {channels}')
        if turned is not None and channels != 3:
            parts.append(f'{name}.{turned}=True is for 3')
        return ', '.join(parts)


def _batch_size(cfg: Config, key: str) -> int:
    return int(cfg[key.partition('.')[0]].get('batch_size') or 1)


def _batch(preprocessor: Any, results: Mapping[str, Any]) -> Any:
    return preprocessor({'inputs': [results['inputs']], 'data_samples': [results['data_samples']]}, False)['inputs']


def _in_channels(cfg: Config) -> int | None:
    backbone = cfg.model.get('backbone')
    if backbone is None:
        return None
    if isinstance(backbone.get('in_channels'), int):
        return backbone['in_channels']
    kind = registered(MODELS, backbone['type'], cfg.default_scope) if isinstance(backbone.get('type'), str) else None
    if not inspect.isclass(kind):
        return None
    parameter = inspect.signature(kind.__init__).parameters.get('in_channels')
    return parameter.default if parameter is not None and isinstance(parameter.default, int) else None


def _channels(image: np.ndarray) -> int:
    return image.shape[2] if image.ndim > 2 else 1


def _reason(error: Exception) -> str:
    return f'{type(error).__name__}: {str(error).strip()}'.rstrip(': ')


@contextlib.contextmanager
def _same_random_state() -> Iterator[None]:
    """Leave the random numbers of the training as they are."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
