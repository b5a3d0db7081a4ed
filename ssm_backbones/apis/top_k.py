"""Detectors that choose a fixed number of an image's positions, of which a small image has too few."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from ssm_backbones.utils.errors import CommandError

_ERROR = 'selected index k out of range'


def chosen_positions(model: Mapping[str, Any]) -> int | None:
    """Return how many positions of each image a detector's config chooses as its queries; None for other models.

    Deformable DETR in two stages and DINO choose ``num_queries`` of them. DDQ DETR fills up what is missing.
    """
    kind = str(model.get('type')).rpartition('.')[2]
    if not model.get('as_two_stage') or kind == 'DDQDETR':
        return None
    return int(model.get('num_queries', 100))


def count_positions(cfg: Config, height: int, width: int) -> int:
    """Count the positions of all feature maps that a model's encoder gets of an image, without arithmetic.

    Args:
        cfg: A config whose model has a backbone and a neck.
        height: Height of the model's input, padding included.
        width: Width of the model's input, padding included.
    """
    settings = [cfg.model.backbone, cfg.model.neck]
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        try:
            with torch.device('meta'):
                parts = [MODELS.build(each) for each in settings]
        except (RuntimeError, NotImplementedError):
            # Swin and others read their drop-path rates out of a tensor, which has none on the meta device.
            parts = [MODELS.build(each) for each in settings]
    extractor = nn.Sequential(*parts).to('meta').eval()
    channels = int(cfg.model.backbone.get('in_channels', 3))
    with torch.no_grad():
        maps = extractor(torch.empty(1, channels, height, width, device='meta'))
    return sum(each.shape[-2] * each.shape[-1] for each in maps)


@contextlib.contextmanager
def explain_top_k(model: nn.Module) -> Iterator[None]:
    """Raise a :class:`CommandError` that names the images' size where a model asks for more positions than there are.

    PyTorch's error tells neither. Whatever chooses the best k of an image's positions may stop at a small image:
    proposals, keypoints, candidates for an object.

    Args:
        model: A host library's model, perhaps in a wrapper, with a ``data_preprocessor``.
    """
    preprocessor = getattr(getattr(model, 'module', model), 'data_preprocessor', None)
    sizes: list[tuple[int, ...]] = []

    def note_size(module: Any, given: Any, batch: Any) -> None:
        inputs = batch.get('inputs') if isinstance(batch, Mapping) else None
        sizes[:] = [tuple(inputs.shape[-2:])] if isinstance(inputs, torch.Tensor) else []

    handle = preprocessor.register_forward_hook(note_size) if isinstance(preprocessor, nn.Module) else None
    try:
        yield
    except RuntimeError as error:
        if _ERROR not in str(error):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        size = f' of {sizes[0][1]}x{sizes[0][0]} pixels, padding included' if sizes else ''
        raise CommandError(
            f'`{frame.line}` ({frame.name} in {Path(frame.filename).name}) asks for more entries than there are for '
            f"images{size}. Enlarge the images (Resize in the pipeline), or lower that number in the model's settings "
            '(model.num_queries of a DETR-like detector; max_per_img, topk and the like elsewhere).'
        ) from error
    finally:
        if handle is not None:
            handle.remove()
