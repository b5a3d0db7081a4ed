"""Evaluate exported classifiers, segmentors and detectors on their config's data, by the config's own metrics."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from torch import Tensor

from cuda_ops.runtimes import BuildError, library
from ssm_backbones.apis.config import load_config
from ssm_backbones.apis.model import build_model
from ssm_backbones.onnx_export.custom_ops import DOMAIN
from ssm_backbones.onnx_export.detector import pixels
from ssm_backbones.onnx_export.export import PARTS, open_session
from ssm_backbones.prediction.predictor import number_of_classes
from ssm_backbones.utils.errors import CommandError

RUNTIMES = ('onnxruntime', 'openvino')


@dataclass(frozen=True)
class ExportedModel:
    """An exported file in a runtime, on the CPU.

    Attributes:
        run: Computes every output of images (B, C, H, W), float32.
        notes: The file's metadata.
        shape: Shape of the images, with names for sizes that are open.
    """

    run: Callable[[np.ndarray], Sequence[np.ndarray]]
    notes: Mapping[str, str]
    shape: Sequence[int | str]

    @classmethod
    def open(cls, path: str | os.PathLike[str], runtime: str = 'onnxruntime') -> ExportedModel:
        """Open a file.

        Args:
            path: The file. One with custom operators needs the libraries of :mod:`cuda_ops.runtimes`.
            runtime: One of :data:`RUNTIMES`. OpenVINO computes in float32 where the file does.

        Raises:
            CommandError: If the runtime is not installed or cannot read the file, or a library is not built.
            ValueError: If there is no such runtime.
        """
        if runtime not in RUNTIMES:
            raise ValueError(f'runtime must be one of {", ".join(RUNTIMES)}, got {runtime!r}')
        if not Path(path).is_file():
            raise CommandError(f'model {path} does not exist.')
        try:
            model: Any = importlib.import_module('onnx').load(path, load_external_data=False)
            custom_ops = any(each.domain == DOMAIN for each in model.opset_import)
            run = (_in_openvino if runtime == 'openvino' else _in_onnxruntime)(path, custom_ops)
        except ImportError as error:
            raise CommandError(f'{error.name} is not installed; pip install {error.name}') from error
        except (CommandError, BuildError) as error:
            raise CommandError(str(error)) from error
        except Exception as error:
            # The runtimes' errors have no other common base class.
            raise CommandError(f'model {path} cannot be read: {_first_line(error)}') from error
        # Graphs of other tools may have no input.
        sizes = [size for each in model.graph.input[:1] for size in each.type.tensor_type.shape.dim]
        notes = {each.key: each.value for each in model.metadata_props}
        return cls(run, notes, [each.dim_param or each.dim_value for each in sizes])

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Run on images (B, C, H, W), and return every output.

        Raises:
            CommandError: If the file takes other sizes, or the runtime fails.
        """
        self.check_size(images)
        given, batch = images, self.shape[0]
        if isinstance(batch, int):
            # The last group is filled up with copies, whose outputs are dropped.
            given = torch.cat([images, images[:1].expand(-len(images) % batch, -1, -1, -1)])
        groups = given.split(batch if isinstance(batch, int) else len(given))
        try:
            found = [self.run(group.numpy()) for group in groups]
        except Exception as error:
            # The runtimes' errors have no other common base class.
            raise CommandError(f'the file fails for images {tuple(images.shape)}: {_first_line(error)}') from error
        return [torch.from_numpy(np.concatenate(each)[: len(images)]) for each in zip(*found, strict=True)]

    def check_size(self, images: Tensor) -> None:
        """Refuse images of sizes that the file does not take.

        Raises:
            CommandError: If so.
        """
        for given, wanted in zip(images.shape[2:], self.shape[2:], strict=True):
            if isinstance(wanted, int) and wanted != given:
                sizes = 'x'.join(map(str, self.shape[2:]))
                raise CommandError(
                    f'an image is {images.shape[2]}x{images.shape[3]}, and the file takes {sizes}; export it for that '
                    'shape or with open sizes (dynamic).'
                )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _in_onnxruntime(path: str | os.PathLike[str], custom_ops: bool) -> Callable[[np.ndarray], Sequence[np.ndarray]]:
    session = open_session(path, custom_ops)
    return lambda images: session.run(None, {'images': images})


def _in_openvino(path: str | os.PathLike[str], custom_ops: bool) -> Callable[[np.ndarray], Sequence[np.ndarray]]:
    core: Any = importlib.import_module('openvino').Core()
    if custom_ops:
        core.add_extension(str(library('openvino')))
    settings = {'INFERENCE_PRECISION_HINT': 'f32', 'INFERENCE_NUM_THREADS': torch.get_num_threads()}
    compiled = core.compile_model(core.read_model(path), 'CPU', settings)
    return lambda images: list(compiled([images]).values())


def evaluate_onnx(
    config: str,
    path: str,
    runtime: str = 'onnxruntime',
    cfg_options: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Evaluate an exported file on the config's test data and return its metrics, as ``tools/test.py`` of a checkpoint.

    Args:
        config: The config file that the file was exported with.
        path: The file.
        runtime: One of :data:`RUNTIMES`.
        cfg_options: Values that replace the config's, by dotted key.

    Raises:
        CommandError: If the file is of another kind of model or of other sizes, or the config has no test data.
    """
    from mmengine.evaluator import Evaluator
    from mmengine.registry import DefaultScope

    cfg = load_config(config, cfg_options or {})
    exported = ExportedModel.open(path, runtime)
    model = with_outputs_of(exported, cfg)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        loader = test_loader(cfg)
        evaluator = Evaluator(cfg.test_evaluator)
        evaluator.dataset_meta = loader.dataset.metainfo
        with torch.no_grad():
            for data in loader:
                evaluator.process(data_samples=model(data), data_batch=data)
        return evaluator.evaluate(len(loader.dataset))


def test_loader(cfg: Config) -> Any:
    """Return the loader of a config's test data, in this process.

    Raises:
        CommandError: If the config has none.
    """
    from mmengine.registry import DefaultScope
    from mmengine.runner import Runner

    if cfg.get('test_dataloader') is None or cfg.get('test_evaluator') is None:
        raise CommandError('the config has no test_dataloader or no test_evaluator.')
    settings = {**cfg.test_dataloader, 'num_workers': 0, 'persistent_workers': False}
    importlib.import_module(f'{cfg.default_scope}.datasets')
    importlib.import_module(f'{cfg.default_scope}.evaluation')
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return Runner.build_dataloader(settings, seed=0)


def with_outputs_of(exported: ExportedModel, cfg: Config) -> Callable[[Mapping[str, Any]], Any]:
    """Return a function from a loader's batch to data samples with a file's predictions, by the model's own means.

    Raises:
        CommandError: If the file is of another kind of model than the config, or of other classes, of which the
            function tells.
    """
    part = exported.notes.get('part')
    if part not in PARTS or PARTS[part] != cfg.default_scope:
        raise CommandError(
            f'the file is a {part or "graph of another tool"}, and the config one of {cfg.default_scope}.'
        )
    model: Any = build_model(cfg)
    if part == 'detector':
        if 'classes' in exported.notes:
            _check_classes(len(json.loads(exported.notes['classes'])), number_of_classes(model))
        return lambda data: [
            _detected(exported, model, *each) for each in zip(data['inputs'], data['data_samples'], strict=True)
        ]
    count = number_of_classes(model) if part == 'classifier' else model.decode_head.out_channels

    def scores(images: Tensor, _: Any = None) -> Tensor:
        found = exported(images)[0]
        _check_classes(found.shape[1], count)
        return found

    if part == 'classifier':
        model.extract_feat = lambda images: images
        model.head.forward = scores
    else:
        # A file takes each image as a whole.
        model.test_cfg = ConfigDict(mode='whole')
        model.encode_decode = scores
    return model.test_step


def _check_classes(found: int, wanted: int | None) -> None:
    if wanted is not None and found != wanted:
        raise CommandError(f"the file has {found} classes, and the config's model {wanted}; export that model.")


def _detected(exported: ExportedModel, model: Any, image: Tensor, sample: Any) -> Any:
    from mmengine.structures import InstanceData

    boxes, scores, labels, *masks = (each[0] for each in exported(pixels(image)))
    real = scores > 0
    found: Any = InstanceData(bboxes=boxes[real], scores=scores[real], labels=labels[real])
    if masks:
        head = model.roi_head.mask_head
        classes = 1 if head.class_agnostic else head.num_classes
        cells = masks[0][real].unsqueeze(1).expand(-1, classes, -1, -1)
        # This also brings the boxes to the size of the original image.
        (found,) = head.predict_by_feat(
            [cells], [found], [sample.metainfo], model.roi_head.test_cfg, rescale=True, activate_map=True
        )
    else:
        found.bboxes = found.bboxes / found.bboxes.new_tensor(sample.scale_factor).repeat(2)
    sample.pred_instances = found
    return sample
