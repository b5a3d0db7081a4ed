"""Windows cover an image, and what is found in them is put together as if it had been found at once."""

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample
from pycocotools import mask as coco

from ssm_backbones.prediction.windows import Labels, Objects, check_window, run_lengths, spans, windows


@pytest.mark.parametrize(
    ('length', 'window', 'overlap'), [(1, 8, 2), (8, 8, 2), (9, 8, 2), (100, 16, 0), (101, 16, 5), (10_000, 1024, 256)]
)
def test_spans_cover_an_axis_and_their_cores_divide_it(length, window, overlap) -> None:
    found = spans(length, window, overlap)
    assert (found[0].start, found[0].inner) == (0, 0)
    assert (found[-1].stop, found[-1].outer) == (length, length)
    assert {span.stop - span.start for span in found} == {min(window, length)}
    for one, other in zip(found, found[1:], strict=False):
        assert one.stop - other.start >= overlap
        assert one.outer == other.inner
        # Half of the overlap lies on either side, but for a pixel.
        assert one.stop - one.outer >= overlap // 2 and other.inner - other.start >= overlap // 2


@pytest.mark.parametrize(
    ('window', 'overlap', 'message'),
    [((8, 8), 8, 'larger than overlap=8'), ((8,), -1, 'at least 0'), ((1, 2, 3), 0, 'height and width')],
)
def test_windows_that_do_not_work(window, overlap, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_window(window, overlap)


def test_run_lengths_are_pycocotools_own() -> None:
    generator = np.random.default_rng(0)
    for height, width, top, left in (
        (5, 4, 0, 0),
        (5, 4, 3, 2),
        (8, 6, 0, 0),
        (1, 1, 7, 5),
        (3, 6, 5, 0),
        (8, 1, 0, 5),
    ):
        for density in (0.0, 0.3, 1.0):
            mask = generator.random((height, width)) < density
            whole = np.zeros((8, 6), np.uint8, order='F')
            whole[top : top + height, left : left + width] = mask
            expected = coco.encode(whole)
            assert run_lengths(mask, (top, left), (8, 6)) == dict(size=[8, 6], counts=expected['counts'].decode())


def detect(objects: list[tuple[int, int, int, int]], window) -> DetDataSample:
    """What a perfect detector of objects sees in a window: those that overlap with it, cut at its edges."""
    rows, columns = window.rows, window.columns
    boxes, masks = [], []
    for left, top, right, bottom in objects:
        x0, x1 = max(left, columns.start) - columns.start, min(right, columns.stop) - columns.start
        y0, y1 = max(top, rows.start) - rows.start, min(bottom, rows.stop) - rows.start
        if x0 < x1 and y0 < y1:
            boxes.append([x0, y0, x1, y1])
            masks.append(torch.zeros(rows.stop - rows.start, columns.stop - columns.start, dtype=torch.bool))
            masks[-1][y0:y1, x0:x1] = True
    sample = DetDataSample()
    sample.pred_instances = InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        scores=torch.full((len(boxes),), 0.9),
        labels=torch.zeros(len(boxes), dtype=torch.long),
        masks=torch.stack(masks) if masks else torch.zeros(0, 32, 32, dtype=torch.bool),
    )
    return sample


def test_objects_no_larger_than_the_overlap_are_found_once_and_whole() -> None:
    size, overlap = (90, 120), 12
    generator = np.random.default_rng(1)
    corners = generator.integers(0, (120 - 12, 90 - 12), (40, 2))
    sides = generator.integers(1, 13, (40, 2))
    # Disjoint ones, so that no suppression of overlapping boxes is needed.
    taken, objects = np.zeros(size, bool), []
    for (left, top), (width, height) in zip(corners.tolist(), sides.tolist(), strict=True):
        if not taken[top : top + height, left : left + width].any():
            taken[top : top + height, left : left + width] = True
            objects.append((left, top, left + width, top + height))
    whole = Objects(size, iou=0.5)
    for window in windows(size, (32, 32), overlap):
        whole.add(window, detect(objects, window))
    found = whole.result().pred_instances
    assert sorted(map(tuple, found.bboxes.int().tolist())) == sorted(objects)
    union = coco.decode(coco.merge([dict(mask, counts=mask['counts'].encode()) for mask in found.masks]))
    assert np.array_equal(union.astype(bool), taken)


def test_no_objects_are_no_error() -> None:
    whole = Objects((90, 120), iou=0.5)
    for window in windows((90, 120), (32, 32), 8):
        whole.add(window, detect([], window))
    assert len(whole.result().pred_instances) == 0


@pytest.mark.parametrize(('classes', 'dtype'), [(256, torch.uint8), (257, torch.int16)])
def test_label_maps_are_put_together(classes, dtype) -> None:
    truth = torch.randint(classes, (50, 70))
    whole = Labels((50, 70), classes)
    for window in windows((50, 70), (16, 24), 6):
        part = truth[window.rows.start : window.rows.stop, window.columns.start : window.columns.stop]
        sample = SegDataSample(pred_sem_seg=PixelData(data=part[None].clone()))
        # What lies outside of the core is not taken.
        seen = sample.pred_sem_seg.data[0]
        if window.rows.inner > window.rows.start:
            seen[: window.rows.inner - window.rows.start] = 0
        whole.add(window, sample)
    assert whole.map.dtype == dtype
    assert torch.equal(whole.result().pred_sem_seg.data[0].long(), truth)
