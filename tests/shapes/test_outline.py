"""Outlines and run lengths against pycocotools."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from ssm_backbones.shapes.outline import compress_counts, polygons, run_lengths, trace


def _random_masks() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    masks = []
    for height, width in ((1, 1), (1, 9), (9, 1), (2, 2), (5, 7), (33, 20), (64, 65)):
        for density in (0.1, 0.5, 0.9, 1.0):
            masks.append(rng.random((height, width)) < density)
            coarse = rng.random((height // 8 + 1, width // 8 + 1)) < density
            masks.append(np.kron(coarse, np.ones((8, 8), dtype=bool))[:height, :width])
    return masks


def _decode(segmentation: list | dict, shape: tuple[int, int]) -> np.ndarray:
    encoded = coco_mask.frPyObjects(segmentation, *shape)
    return coco_mask.decode(coco_mask.merge(encoded) if isinstance(encoded, list) else encoded).astype(bool)


@pytest.mark.parametrize('mask', _random_masks(), ids=lambda mask: f'{mask.shape}-{int(mask.sum())}')
def test_polygons_rasterise_to_exactly_the_mask(mask: np.ndarray) -> None:
    parts = [outline for outline in trace(mask) if not outline.hole]
    filled = np.zeros_like(mask)
    if parts:
        filled = _decode(polygons(parts), mask.shape)
    holes = np.zeros_like(mask)
    for outline in trace(mask):
        if outline.hole:
            holes |= _decode([np.ravel(outline.points).tolist()], mask.shape)
    # Whatever lies in a hole is background, except for parts within it.
    np.testing.assert_array_equal(filled[mask], True)
    np.testing.assert_array_equal(holes[filled & ~mask], True)
    assert not filled[~mask & ~holes].any()


def test_areas_and_holes_of_nested_squares() -> None:
    mask = np.zeros((20, 20), dtype=bool)
    mask[1:15, 2:18] = True
    mask[3:12, 5:15] = False
    mask[5:8, 7:11] = True
    assert [(outline.hole, outline.area) for outline in trace(mask)] == [
        (False, 14 * 16),
        (True, 9 * 10),
        (False, 3 * 4),
    ]


def test_pixels_that_touch_in_a_corner_are_one_part() -> None:
    for mask in (np.eye(3, dtype=bool), np.eye(3, dtype=bool)[::-1]):
        (outline,) = trace(mask)
        assert not outline.hole and outline.area == 3
        np.testing.assert_array_equal(_decode(polygons([outline]), mask.shape), mask)


def test_a_diamond_has_a_hole() -> None:
    mask = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]], dtype=bool)
    outlines = trace(mask)
    assert [outline.hole for outline in outlines] == [False, True]
    with pytest.raises(ValueError, match='hole'):
        polygons(outlines)


def test_an_empty_mask_has_no_outline() -> None:
    assert trace(np.zeros((4, 5), dtype=bool)) == []


@pytest.mark.parametrize('mask', _random_masks(), ids=lambda mask: f'{mask.shape}-{int(mask.sum())}')
def test_run_lengths_are_those_of_pycocotools(mask: np.ndarray) -> None:
    counts = run_lengths(mask)
    np.testing.assert_array_equal(_decode({'counts': counts, 'size': list(mask.shape)}, mask.shape), mask)
    assert compress_counts(counts) == coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))['counts'].decode()


def test_long_runs_are_compressed_as_pycocotools_does() -> None:
    mask = np.zeros((1000, 1100), dtype=bool)
    mask[3:900, 40:41] = mask[10:11, 50:1000] = mask[999, 1099] = True
    encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))['counts'].decode()
    assert compress_counts(run_lengths(mask)) == encoded
