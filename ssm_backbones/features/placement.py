"""Find the position of a model's input on the original image, for arbitrary test pipelines."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmengine.dataset import Compose
from mmengine.registry import TRANSFORMS, DefaultScope

from ssm_backbones.utils.errors import CommandError

# These only change values, or pack; all other transforms of a pipeline are run on coordinates.
_NOT_GEOMETRIC = ('Normalize', 'Pack', 'RGB2Gray', 'CLAHE', 'AdjustGamma', 'Rerange')
# Value of the third channel of the coordinates within the image; no padding has it.
_MARK = -1e6
_TRIED = (480, 640)
_REMEMBERED = 10_000


class PlacementError(CommandError):
    """A pipeline that does not keep an image's rows and columns; the message gives the remedy."""


@dataclass(frozen=True)
class Placement:
    """The map from a model's input back to the original image, along each axis.

    ``original_x = offset_x + scale_x * input_x``, and the same for y. Coordinates are in pixels and continuous: 0 is
    the left (upper) edge of the first pixel, 0.5 its centre.

    Attributes:
        scale_x, scale_y: Original pixels per input pixel; negative if the pipeline flips the image.
        offset_x, offset_y: Position of the input's left and upper edge on the original image; negative if the pipeline
            pads there.
        image_box: Left, top, right and bottom of the image within the input, in pixels; the rest is padding.
    """

    scale_x: float
    scale_y: float
    offset_x: float
    offset_y: float
    image_box: tuple[int, int, int, int]


class PlacedPipeline:
    """A config's test pipeline that also returns the position of its output on the original image.

    An image of coordinates is run through the transforms after loading, with the same random numbers. This works for
    any transform that scales, crops, pads or flips.

    Args:
        steps: The pipeline, from :func:`~ssm_backbones.apis.images.test_pipeline`.
        scope: The config's default scope, where the transforms are registered.

    Raises:
        PlacementError: If no step loads an image, or the steps after it rotate or distort the image, or fail on
            coordinates.
    """

    def __init__(self, steps: Sequence[Mapping[str, Any]], scope: str) -> None:
        types = [str(step['type']) for step in steps]
        first = 1 + max((place for place, name in enumerate(types) if 'Load' in name), default=-1)
        if first == 0:
            raise PlacementError(f'the test pipeline loads no image; it holds {", ".join(types) or "no steps"}.')
        among = [name for name in types[:first] if not any(part in name for part in ('Load', *_NOT_GEOMETRIC))]
        if among:
            raise PlacementError(
                f'the place of the features on the image is unknown: the test pipeline has {", ".join(among)} before '
                f'{types[first - 1]}. Give test_dataloader.dataset.pipeline all that loads first.'
            )
        geometric = [step for step in steps[first:] if not any(part in str(step['type']) for part in _NOT_GEOMETRIC)]
        self._named = ', '.join(str(step['type']) for step in geometric)
        with DefaultScope.overwrite_default_scope(scope):
            self._load = Compose([TRANSFORMS.build(deepcopy(dict(step))) for step in steps[:first]])
            self._rest = Compose([TRANSFORMS.build(deepcopy(dict(step))) for step in steps[first:]])
            self._follow = Compose([TRANSFORMS.build(_on_coordinates(step)) for step in geometric])
        self._known: OrderedDict[tuple[int, ...], Placement] = OrderedDict()
        # Unsupported pipelines are rejected before a model is built.
        before = _random_state()
        settings = dict(img_path='', img_id=0, sample_idx=0, seg_fields=[], img_shape=_TRIED, ori_shape=_TRIED)
        self._place(settings, _TRIED)
        _set_random_state(before)

    def __call__(self, path: str, id: Any = 0, index: int = 0) -> tuple[dict[str, Any], Placement]:
        """Load and prepare one image.

        Args:
            path: The file.
            id: The image's id, for the packed sample.
            index: The image's index, for the packed sample.

        Returns:
            The pipeline's output and its placement.

        Raises:
            PlacementError: If the pipeline does more than scale, crop, pad and flip. For damaged files, loaders and
                transforms raise their own errors.
        """
        loaded = self._load(dict(img_path=path, img_id=id, sample_idx=index, seg_fields=[]))
        original = loaded['img'].shape[:2]
        settings = deepcopy({key: value for key, value in loaded.items() if key != 'img'})
        before = _random_state()
        data = self._rest(loaded)
        after = _random_state()
        size = tuple(data['inputs'].shape[1:])
        key = (*original, *size)
        drawn = not _equal(before, after)
        # If no random numbers are drawn, the placement depends on the two sizes only.
        if drawn or key not in self._known:
            _set_random_state(before)
            placement, found = self._place(settings, original)
            repeated = _equal(_random_state(), after)
            _set_random_state(after)
            if found != size or not repeated:
                raise self._error(f'what they did to an image of {original[1]}x{original[0]} cannot be repeated')
            if drawn:
                return data, placement
            self._known[key] = placement
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return data, self._known[key]

    def _place(self, settings: Mapping[str, Any], size: tuple[int, ...]) -> tuple[Placement, tuple[int, ...]]:
        """Find the placement of an image of a size, and its size after the steps."""
        height, width = size
        image = np.empty((height, width, 3), np.float32)
        image[:, :, 0] = np.arange(width) + 0.5
        image[:, :, 1] = np.arange(height)[:, None] + 0.5
        image[:, :, 2] = _MARK
        try:
            followed = self._follow({**settings, 'img': image})['img']
        except Exception as error:
            # Transforms raise arbitrary errors for unsupported input.
            raise self._error(f'they cannot be followed ({type(error).__name__}: {str(error).strip()})') from error
        if not isinstance(followed, np.ndarray) or followed.ndim != 3 or followed.shape[2] != 3:
            raise self._error('they do not give one image of the channels that was loaded')
        inside = abs(followed[:, :, 2] - _MARK) < 1
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        if not len(rows):
            raise self._error('nothing of the image is left, or its values are changed')
        block = followed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        if not (abs(block[:, :, 2] - _MARK) < 1).all():
            raise self._error('they rotate or distort the image, or change its values')
        across, down = block[:, :, 0], block[:, :, 1]
        if np.ptp(across, axis=0).max() > 0.1 or np.ptp(down, axis=1).max() > 0.1:
            raise self._error('they rotate, shear or distort the image')
        scale_x, offset_x = self._line(across[0], columns[0], width)
        scale_y, offset_y = self._line(down[:, 0], rows[0], height)
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        return Placement(scale_x, scale_y, offset_x, offset_y, box), followed.shape[:2]

    def _line(self, found: np.ndarray, first: int, length: int) -> tuple[float, float]:
        """Find scale and offset of an axis.

        Args:
            found: Original coordinates (n,) at the centres of the pixels ``first`` to ``first + n - 1``.
            first: Number of padding pixels before them.
            length: Length of the original axis.
        """
        centres = first + np.arange(len(found)) + 0.5
        # Enlarging replicates the outermost pixels beyond their centres.
        exact = np.flatnonzero((found > 0.51) & (found < length - 0.51))
        if len(exact) > 1:
            one, other = exact[0], exact[-1]
            scale = float(found[other] - found[one]) / float(centres[other] - centres[one])
            offset = float(found[one]) - scale * float(centres[one])
        elif len(found) > 1 or length <= 2:
            # With so few pixels, none are cropped; this is verified below.
            scale = length / len(found)
            offset = -scale * float(first)
        else:
            raise self._error(f'of a side of {length} pixels they leave {len(found)}, too few to tell the place')
        expected = np.clip(offset + scale * centres, 0.5, length - 0.5)
        if abs(expected - found).max() > max(0.5, 0.5 * abs(scale)):
            raise self._error('they distort the image')
        # Adding 0 turns -0 into 0.
        return round(scale, 6) + 0.0, round(offset, 3) + 0.0

    def _error(self, reason: str) -> PlacementError:
        return PlacementError(
            f'the place of the features on the image is unknown: the test pipeline has {self._named}, and {reason}. '
            'Give test_dataloader.dataset.pipeline transforms that scale, crop, pad or mirror, and nothing else.'
        )


def _on_coordinates(step: Any) -> Any:
    """Change a transform's settings so that it takes coordinates.

    Pillow has no images of three floating-point channels; bilinear interpolation is exact on coordinates.
    """
    if isinstance(step, Mapping):
        changed = {key: _on_coordinates(value) for key, value in step.items()}
        if changed.get('backend') == 'pillow':
            changed['backend'] = 'cv2'
        if isinstance(changed.get('interpolation'), str):
            changed['interpolation'] = 'bilinear'
        return changed
    if isinstance(step, (list, tuple)):
        return type(step)(_on_coordinates(each) for each in step)
    return deepcopy(step)


def _random_state() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_random_state(state: tuple[Any, ...]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


def _equal(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    numpys = all(np.array_equal(a, b) for a, b in zip(one[1], other[1], strict=True))
    return one[0] == other[0] and numpys and torch.equal(one[2], other[2])
