"""The images themselves: the same each time, right about what is visible, and fit to learn from."""

import hashlib

import numpy as np
import pytest

from ssm_backbones.shapes import CLASSES
from ssm_backbones.shapes.geometry import make_shape
from ssm_backbones.shapes.outline import trace
from ssm_backbones.shapes.rng import ImageRng
from ssm_backbones.shapes.scene import Scene, _Canvas, draw_portrait, draw_scene
from ssm_backbones.shapes.texture import TEXTURES, texture

SIZE = (128, 160)


@pytest.fixture(scope='module')
def scenes() -> list[Scene]:
    return [draw_scene(0, 'train', index, SIZE, SIZE) for index in range(150)]


def _digest(scene: Scene) -> str:
    digest = hashlib.sha256(scene.image.tobytes() + np.packbits(scene.clutter).tobytes())
    for instance in scene.instances:
        digest.update(bytes([instance.label, instance.crowd]) + np.packbits(instance.mask).tobytes())
    return digest.hexdigest()[:16]


def test_images_are_those_that_the_version_stands_for() -> None:
    # If they are meant to change, raise shapes.VERSION and renew the digests.
    scenes = [_digest(draw_scene(0, 'train', index, SIZE, (160, 200))) for index in range(3)]
    assert scenes == ['378b1f5e8d156670', 'ddea2f8701995b59', 'ebc0080e828b2b69']
    portraits = [_digest(draw_portrait(0, 'val', index, index, SIZE, SIZE)) for index in range(3)]
    assert portraits == ['5773a887f39addad', '7720526cfecc8231', 'be8ddbfe59cbf4ce']


def test_seed_split_and_index_each_give_another_image() -> None:
    keys = [(0, 'train', 0), (1, 'train', 0), (0, 'val', 0), (0, 'train', 1)]
    digests = {_digest(draw_scene(*key, SIZE, SIZE)) for key in keys}
    assert len(digests) == len(keys)
    assert draw_portrait(0, 'train', 0, 0, SIZE, SIZE).image.tobytes() not in {
        draw_scene(*key, SIZE, SIZE).image.tobytes() for key in keys
    }


def test_sides_are_drawn_between_the_sizes() -> None:
    shapes = [draw_scene(0, 'train', index, (64, 100), (66, 130)).image.shape for index in range(40)]
    assert {shape[0] for shape in shapes} == {64, 65, 66}
    widths = {shape[1] for shape in shapes}
    assert min(widths) >= 100 and max(widths) <= 130 and len(widths) > 15


def test_instances_share_no_pixel_and_enough_of_each_is_visible(scenes: list[Scene]) -> None:
    for scene in scenes:
        masks = np.stack([instance.mask for instance in scene.instances])
        assert masks.sum(axis=0).max() == 1
        assert not (masks.any(axis=0) & scene.clutter).any()
        for instance in scene.instances:
            rows, columns = np.nonzero(instance.mask)
            assert min(np.ptp(rows), np.ptp(columns)) + 1 >= 9
            assert len(rows) >= 60
            if not instance.crowd:
                assert all(outline.area >= 16 for outline in trace(instance.mask) if not outline.hole)


def test_there_is_variety(scenes: list[Scene]) -> None:
    instances = [instance for scene in scenes for instance in scene.instances if not instance.crowd]
    counts = np.bincount([instance.label for instance in instances], minlength=len(CLASSES))
    assert counts.min() > 0.6 * counts.mean()
    numbers = [sum(not instance.crowd for instance in scene.instances) for scene in scenes]
    assert min(numbers) == 2 and max(numbers) == 7
    areas = np.array([instance.mask.sum() for instance in instances])
    assert np.percentile(areas, 90) > 8 * np.percentile(areas, 10)
    outlines = [trace(instance.mask) for instance in instances]
    assert sum(any(outline.hole for outline in parts) for parts in outlines) > 0.05 * len(instances)
    assert sum(sum(not outline.hole for outline in parts) > 1 for parts in outlines) > 0.03 * len(instances)
    assert sum(instance.crowd for scene in scenes for instance in scene.instances) >= 3
    assert np.mean([scene.clutter.any() for scene in scenes]) > 0.7


def test_a_mask_lies_on_its_object() -> None:
    # An object differs from what surrounds it: the image changes more across a mask's border than within.
    within, across = [], []
    for index in range(30):
        scene = draw_scene(1, 'train', index, SIZE, SIZE)
        labels = np.zeros(SIZE, dtype=int)
        for number, instance in enumerate(scene.instances, start=1):
            labels[instance.mask] = number
        step = np.abs(np.diff(scene.image.astype(float), axis=1, n=1)).max(axis=2)
        wide = step[:, :-1] + step[:, 1:]
        border = labels[:, 2:] != labels[:, :-2]
        within.append(wide[~border].mean())
        across.append(wide[border].mean())
    assert np.mean(across) > 3 * np.mean(within)


def test_each_mask_is_its_shape_less_the_shapes_before_it() -> None:
    height, width = SIZE
    y, x = np.mgrid[0:height, 0:width] + 0.5
    hidden_pixels = 0
    for index in range(20):
        canvas = _Canvas(ImageRng(5, (index,)), height, width)
        for _ in range(7):
            canvas.add_object()
        before = np.zeros(SIZE, dtype=bool)
        for shape, instance in zip(canvas.shapes, canvas.instances, strict=True):
            distance = shape.distance(x, y)
            np.testing.assert_array_equal(instance.mask, (distance < 0) & ~before)
            assert canvas.transmittance[distance < -0.5].max() == 0
            hidden_pixels += (before & (distance < 0)).sum()
            before |= distance < 0
        # Nothing of a shape shows beyond the pixels that its edge passes through.
        outside = np.min([shape.distance(x, y) for shape in canvas.shapes], axis=0) > 0.5
        assert canvas.transmittance[outside].min() == 1
    assert hidden_pixels > 1000


@pytest.mark.parametrize('label', range(len(CLASSES)), ids=CLASSES)
def test_a_portrait_shows_one_large_object_of_its_class(label: int) -> None:
    for index in range(20):
        scene = draw_portrait(0, 'train', index, label, SIZE, SIZE)
        (instance,) = scene.instances
        assert instance.label == label and not instance.crowd
        assert instance.mask.sum() > 0.02 * instance.mask.size
        holes = [outline for outline in trace(instance.mask) if outline.hole]
        assert len(holes) == (1 if CLASSES[label] == 'ring' else 0)


@pytest.mark.parametrize('label', range(len(CLASSES)), ids=CLASSES)
def test_shapes_fill_their_circle_and_have_their_area(label: int) -> None:
    # Areas as shares of the circle around, from the formulas of plane geometry with the proportions' bounds.
    low, high = {
        'disc': (1.0, 1.0),
        'rectangle': (0.50, 0.6367),
        'triangle': (0.35, 0.4136),
        'star': (0.36, 0.46),
        'ring': (1 - 0.62**2, 1 - 0.48**2),
        'cross': (0.551, 0.670),
    }[CLASSES[label]]
    y, x = np.mgrid[0:400, 0:400] + 0.5
    for index in range(10):
        shape = make_shape(ImageRng(0, (index,)), label, 200.3, 199.1, 150.0)
        inside = shape.distance(x, y) < 0
        share = inside.sum() / (np.pi * 150.0**2)
        assert low - 0.01 <= share <= high + 0.01
        distance = np.hypot(x - 200.3, y - 199.1)[inside]
        assert 148.0 < distance.max() < 150.0 + 1e-6


def test_distances_are_euclidean() -> None:
    y, x = np.mgrid[0:60, 0:60] + 0.5
    for label in range(len(CLASSES)):
        shape = make_shape(ImageRng(3, (label,)), label, 30.0, 30.0, 20.0)
        distance = shape.distance(x, y)
        fine_y, fine_x = np.mgrid[0:60:0.25, 0:60:0.25] + 0.125
        inside = shape.distance(fine_x, fine_y) < 0
        for row, column in ((30, 30), (5, 8), (40, 20), (31, 55), (25, 33)):
            other = inside != (distance[row, column] < 0)
            nearest = np.hypot(fine_x[other] - x[row, column], fine_y[other] - y[row, column]).min()
            assert abs(nearest - abs(distance[row, column])) < 0.4


@pytest.mark.parametrize('kind', TEXTURES)
def test_textures_lie_between_their_colours(kind: str) -> None:
    first, second = (0.2, 0.5, 0.9), (0.6, 0.1, 0.8)
    field = texture(ImageRng(0, (0,)), kind, 40, 50, (first, second), 9.0)
    assert field.shape == (40, 50, 3)
    weight = (field - first) / (np.array(second) - first)
    np.testing.assert_allclose(weight, weight[:, :, :1].repeat(3, axis=2), atol=1e-9)
    assert weight.min() >= -1e-9 and weight.max() <= 1 + 1e-9
    assert (np.ptp(weight) > 0.5) == (kind != 'flat')


def test_an_unknown_texture_is_an_error() -> None:
    with pytest.raises(ValueError, match="'plaid'"):
        texture(ImageRng(0, (0,)), 'plaid', 4, 4, ((0.0,) * 3, (1.0,) * 3), 4.0)
