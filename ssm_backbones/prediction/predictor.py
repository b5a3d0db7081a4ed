"""A model that predicts on images: any config of the three host libraries, in one class."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DATASETS, TRANSFORMS, DefaultScope

from ssm_backbones.apis.checks import check_device, leaf_datasets
from ssm_backbones.apis.config import load_config
from ssm_backbones.apis.images import MAX_PIXELS, UnreadableImage, check_readable, test_pipeline
from ssm_backbones.apis.model import build_model
from ssm_backbones.apis.top_k import explain_top_k
from ssm_backbones.checkpoints import read_checkpoint
from ssm_backbones.prediction.drawing import Drawer, picture
from ssm_backbones.prediction.windows import Labels, Objects, Window, check_window, windows
from ssm_backbones.utils.errors import CommandError
from ssm_backbones.utils.memory import explain_lack_of_memory

TASKS = {'mmdet': 'det', 'mmseg': 'seg', 'mmpretrain': 'cls'}
_COLOURS = 255


@dataclass(frozen=True)
class Classes:
    """Names and colours (RGB, 0 to 255) of a model's classes."""

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]


class Pipeline:
    """A config's test pipeline in two parts: loading, and what follows, of an image or a window of it.

    Args:
        cfg: The config.

    Raises:
        CommandError: If the test pipeline loads no image.
    """

    def __init__(self, cfg: Config) -> None:
        self.steps = test_pipeline(cfg)
        types = [str(step['type']) for step in self.steps]
        first = 1 + max((place for place, name in enumerate(types) if 'Load' in name), default=-1)
        if first == 0:
            raise CommandError(f'the test pipeline loads no image; it holds {", ".join(types) or "no steps"}.')
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            self._load = Compose([TRANSFORMS.build(step) for step in self.steps[:first]])
            self._rest = Compose([TRANSFORMS.build(step) for step in self.steps[first:]])

    def load(self, image: str | os.PathLike[str] | np.ndarray, max_pixels: int = MAX_PIXELS) -> dict[str, Any]:
        """Load an image file, or take an array (H, W, C) as the config's loader would return it.

        Raises:
            UnreadableImage: If the image cannot be used. The message gives the reason.
        """
        if isinstance(image, np.ndarray):
            if image.ndim not in (2, 3) or image.size == 0:
                raise UnreadableImage(f'an image is an array (H, W) or (H, W, C), got {image.shape}')
            size = image.shape[:2]
            return dict(img=image, img_path=None, img_shape=size, ori_shape=size)
        path = os.fspath(image)
        check_readable(path, max_pixels)
        try:
            return self._load(dict(img_path=path, img_id=0, sample_idx=0, seg_fields=[]))
        except Exception as error:
            # Decoders raise arbitrary errors for damaged files.
            raise UnreadableImage(f'{type(error).__name__}: {str(error).strip()}') from error

    def prepare(self, loaded: Mapping[str, Any], window: Window | None = None) -> dict[str, Any]:
        """Run the rest of the pipeline on a loaded image, or on a window as if it were an image of its own."""
        image = loaded['img']
        if window is not None:
            image = image[window.rows.start : window.rows.stop, window.columns.start : window.columns.stop]
        size = image.shape[:2]
        given = dict(img_id=0, sample_idx=0, seg_fields=[], **{k: v for k, v in loaded.items() if k not in _GIVEN})
        # Transforms may write into the image.
        return self._rest({**given, 'img': image.copy(), 'img_shape': size, 'ori_shape': size})


_GIVEN = ('img', 'img_shape', 'ori_shape', 'img_id', 'sample_idx', 'seg_fields')


@dataclass(frozen=True)
class Sizes:
    """Which images are read, and which are predicted on by windows.

    Attributes:
        window: Height and width of the windows, or None.
        max_pixels: Larger images are not read.
        score_bytes: Memory that a segmentor's scores take for each pixel.
        memory: Memory of the device.
    """

    window: tuple[int, int] | None
    max_pixels: int
    score_bytes: int
    memory: int

    def is_divided(self, size: Sequence[int]) -> bool:
        """Return whether an image of a size (H, W) is larger than a window."""
        return self.window is not None and (size[0] > self.window[0] or size[1] > self.window[1])

    def check(self, size: Sequence[int]) -> None:
        """Reject an image whose scores of all classes at full size do not fit into memory.

        Raises:
            UnreadableImage: If it is too large to be predicted on as a whole. The message gives the remedy.
        """
        needed = self.score_bytes * size[0] * size[1]
        if needed > self.memory and not self.is_divided(size):
            raise UnreadableImage(
                f'the scores of all classes for {size[1]}x{size[0]} pixels take about {needed / 2**30:.0f} GiB; '
                'predict by windows (window)'
            )


class Predictor:
    """Predict on images with a config's model, whatever the task.

    Args:
        config: The config file, of mmdet, mmseg or mmpretrain.
        checkpoint: Checkpoint of its model.
        device: ``'cpu'``, ``'cuda'`` or ``'cuda:1'``; by default a GPU where there is one.
        window: Side, or height and width, in pixels of the windows that larger images are divided into, see
            :mod:`ssm_backbones.prediction.windows`; None predicts on each image as a whole. Not for classifiers.
        overlap: Least overlap of neighbouring windows in pixels, at least the size of the largest object; a quarter of
            the window's smaller side by default.
        batch_size: Images of one size, or windows, computed at once.
        score_thr: Least score of objects that are drawn. Results contain all.
        max_pixels: Larger images are rejected.
        cfg_options: Values that replace the config's, by dotted key.

    Attributes:
        task: ``'det'``, ``'seg'`` or ``'cls'``.
        classes: Names and colours of the classes.

    Raises:
        CommandError: If the config, the checkpoint or the device does not allow it.
        ValueError: If the window, the overlap or the batch size is out of range.
    """

    def __init__(
        self,
        config: str | os.PathLike[str],
        checkpoint: str | os.PathLike[str],
        device: str | None = None,
        *,
        window: int | Sequence[int] | None = None,
        overlap: int | None = None,
        batch_size: int = 1,
        score_thr: float = 0.3,
        max_pixels: int = MAX_PIXELS,
        cfg_options: Mapping[str, Any] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f'batch_size must be at least 1, got {batch_size}.')
        self.device, checkpoint = check_device(device), os.fspath(checkpoint)
        self.cfg = load_config(os.fspath(config), cfg_options)
        self.task = TASKS[self.cfg.default_scope]
        sides = [window] if isinstance(window, int) else window
        if overlap is None:
            overlap = min(sides) // 4 if sides is not None else 0
        self.window = None if sides is None else check_window(sides, overlap)
        if self.window is not None and self.task == 'cls':
            raise CommandError('window is for detectors and segmentors: a classifier sees each image as a whole.')
        self.overlap, self.batch_size = overlap, batch_size
        self.pipeline = Pipeline(self.cfg)
        self.model: Any = build_model(self.cfg, checkpoint).to(self.device)
        self.classes = find_classes(self.cfg, self.model, read_checkpoint(checkpoint).get('meta') or {})
        # The scores themselves, and once more resized to the image.
        score_bytes = 8 * len(self.classes.names) if self.task == 'seg' else 0
        self.sizes = Sizes(self.window, max_pixels, score_bytes, _memory(self.device))
        self.drawer = Drawer(self.cfg, self.classes.names, self.classes.palette, score_thr)

    def __call__(self, images: Sequence[str | os.PathLike[str] | np.ndarray] | str | os.PathLike[str]) -> list[Any]:
        """Predict on images.

        Args:
            images: A file, or a sequence of files and of arrays (H, W, C) as the config's loader returns them; OpenCV's
                gives BGR.

        Returns:
            For each image the host library's data sample, on the CPU: ``pred_instances`` with ``bboxes``, ``scores``,
            ``labels`` and ``masks`` in pixels of the image; ``pred_sem_seg.data`` (1, H, W) of class indices; or
            ``pred_score`` (classes) and ``pred_label``. Masks of an image that was divided into windows are COCO's
            compressed run lengths.

        Raises:
            CommandError: If an image cannot be read.
        """
        given = [images] if isinstance(images, (str, os.PathLike)) else list(images)
        results = []
        for image in given:
            try:
                loaded = self.pipeline.load(image, self.sizes.max_pixels)
                results.append(self.predict_loaded(loaded))
            except UnreadableImage as error:
                name = f'an array {image.shape}' if isinstance(image, np.ndarray) else os.fspath(image)
                raise CommandError(f'image {name} cannot be read: {error}.') from error
        return results

    def draw(self, image: str | os.PathLike[str] | np.ndarray, result: Any) -> np.ndarray:
        """Draw a result on its image, uint8 RGB (H, W, 3), of at most 2048 pixels a side."""
        return self.drawer(picture(self.pipeline.load(image, self.sizes.max_pixels)['img']), result)

    def predict_loaded(self, loaded: Mapping[str, Any], advance: Callable[[float], None] | None = None) -> Any:
        """Predict on one loaded image, by windows if it is larger than one.

        Args:
            loaded: What :meth:`Pipeline.load` returned.
            advance: Called with the share of the image that was computed, after each batch of windows.
        """
        size = tuple(loaded['img'].shape[:2])
        if self.sizes.is_divided(size):
            return self._by_windows(loaded, advance or (lambda share: None))
        self.sizes.check(size)
        result = self.predict_batch([self.pipeline.prepare(loaded)])[0]
        if advance is not None:
            advance(1)
        return result

    @torch.inference_mode()
    def predict_batch(self, prepared: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Predict on prepared images of one size; return a data sample each, on the CPU.

        Raises:
            CommandError: If they do not fit into memory.
        """
        data = dict(
            inputs=[each['inputs'] for each in prepared], data_samples=[each['data_samples'] for each in prepared]
        )
        height, width = prepared[0]['inputs'].shape[1:]
        what = f'a batch of {len(prepared)} images of {width}x{height} pixels'
        with (
            explain_lack_of_memory(what, 'lower batch_size, or set window to predict large images by parts'),
            DefaultScope.overwrite_default_scope(self.cfg.default_scope),
            explain_top_k(self.model),
        ):
            results = self.model.test_step(data)
        for result in results:
            result.pop('seg_logits', None)
        return [result.cpu() for result in results]

    def _by_windows(self, loaded: Mapping[str, Any], advance: Callable[[float], None]) -> Any:
        assert self.window is not None
        size = tuple(loaded['img'].shape[:2])
        parts = windows(size, self.window, self.overlap)
        whole = Labels(size, len(self.classes.names)) if self.task == 'seg' else Objects(size, self._iou())
        for some in _chunks(parts, self.batch_size):
            prepared = [self.pipeline.prepare(loaded, window) for window in some]
            for window, result in zip(some, self.predict_batch(prepared), strict=True):
                whole.add(window, result)
            advance(len(some) / len(parts))
        return whole.result()

    def _iou(self) -> float:
        """Return the threshold of the model's own non-maximum suppression, or mmdet's usual one."""
        settings = self.cfg.model.get('test_cfg') or {}
        nms = (settings.get('rcnn') or settings).get('nms') or {}
        return float(nms.get('iou_threshold', 0.5))


def _memory(device: torch.device) -> int:
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')


def find_classes(cfg: Config, model: Any, meta: Mapping[str, Any]) -> Classes:
    """Find names and colours of a model's classes.

    The checkpoint's are those that it was trained with; the config's data set has them where the checkpoint has none,
    as those of other authors. If neither fits the head, classes are named by their numbers.

    Args:
        cfg: The config.
        model: Its model.
        meta: The ``meta`` of the checkpoint.
    """
    loader = cfg.get('test_dataloader') or cfg.get('val_dataloader')
    settings = next(leaf for _, leaf in leaf_datasets(loader.dataset)).copy()
    settings.update(lazy_init=True, pipeline=[], test_mode=False)
    try:
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            of_config = DATASETS.build(settings).metainfo
    except (TypeError, ValueError, OSError, AssertionError):
        # Data sets with other arguments, or classes in a file that is not here.
        of_config = settings.get('metainfo') or {}
    of_checkpoint = {str(key).lower(): value for key, value in (meta.get('dataset_meta') or {}).items()}
    count = number_of_classes(model)
    for source in (of_checkpoint, of_config):
        names = source.get('classes')
        if names and (count is None or len(names) == count):
            # A config's colours may have been changed since the training.
            same = [each for each in (of_config, of_checkpoint) if tuple(each.get('classes') or ()) == tuple(names)]
            palette = next((each['palette'] for each in same if _fits(each.get('palette'), len(names))), None)
            return Classes(tuple(map(str, names)), _colours(palette, len(names)))
    if count is None:
        raise CommandError('neither the checkpoint nor the config names the classes (metainfo of the data set).')
    return Classes(tuple(map(str, range(count))), _colours(None, count))


def number_of_classes(model: Any) -> int | None:
    """Return the number of classes of a host library's model, or None if it has no such attribute."""
    roi_head = getattr(model, 'roi_head', None)
    box_head: Any = getattr(roi_head, 'bbox_head', None)
    if hasattr(box_head, '__getitem__'):
        box_head = box_head[0]
    heads: list[Any] = [box_head, getattr(model, 'bbox_head', None), getattr(model, 'decode_head', None)]
    for head in heads:
        if hasattr(head, 'num_classes'):
            return int(head.num_classes)
    return getattr(getattr(model, 'head', None), 'num_classes', None)


def _fits(palette: Any, count: int) -> bool:
    return isinstance(palette, (list, tuple)) and len(palette) == count


def _colours(palette: Any, count: int) -> tuple[tuple[int, int, int], ...]:
    """Return a palette as tuples, or hues that are as different as the number of classes allows."""
    if palette is not None:
        return tuple((int(red), int(green), int(blue)) for red, green, blue in palette)
    import colorsys

    # The golden ratio keeps neighbouring classes apart.
    hues = [(0.618034 * place) % 1 for place in range(count)]
    return tuple(
        (round(_COLOURS * red), round(_COLOURS * green), round(_COLOURS * blue))
        for red, green, blue in (colorsys.hsv_to_rgb(hue, 0.75, 0.95) for hue in hues)
    )


def _chunks(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for first in range(0, len(values), size):
        yield values[first : first + size]
