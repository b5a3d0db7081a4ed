"""Channels of the files, the loader, the preprocessor and the backbone, in a trial of the pipeline."""

import numpy as np
import pytest
from PIL import Image

from ssm_backbones.data_check import check_data
from tests.data_check.conftest import errors

IMAGES = {'mmdet': 'train2017', 'mmseg': 'images/training', 'mmpretrain': 'train'}


def as_mode(host, mode, every=True):
    """Rewrite the training images in a mode of PIL, under their names (loaders look at the content)."""

    def change(folder):
        paths = [path for path in sorted((folder / IMAGES[host]).rglob('*.*')) if path.is_file()]
        for path in paths if every else paths[:1]:
            Image.open(path).convert(mode).save(path, format='PNG')

    return change


@pytest.mark.parametrize('host', IMAGES)
def test_four_channels_in_the_model_alone(host, check):
    (error,) = errors(check(host, as_mode(host, 'RGBA'), {'model.backbone.in_channels': 4}, modes=['train']))
    assert "has 3 channels as train_dataloader.dataset.pipeline loads it (color_type='color')" in error
    assert 'in_channels is 4' in error and 'mean has 3 values' in error


@pytest.mark.parametrize('host', IMAGES)
def test_four_channels_in_the_loader_alone(host, check):
    unchanged = {'train_dataloader.dataset.pipeline.0.color_type': 'unchanged'}
    (error,) = errors(check(host, as_mode(host, 'RGBA'), unchanged, modes=['train']))
    assert 'has 4 channels' in error and "(color_type='unchanged')" in error and 'in_channels is 3' in error


@pytest.mark.parametrize('host', IMAGES)
def test_grey_images_that_the_preprocessor_would_turn_round(host, check):
    grey = {'train_dataloader.dataset.pipeline.0.color_type': 'grayscale', 'model.backbone.in_channels': 1}
    grey |= {'model.data_preprocessor.mean': [127.0], 'model.data_preprocessor.std': [60.0]}
    found = errors(check(host, as_mode(host, 'L'), grey, modes=['train']))
    if host != 'mmdet':
        # Their own preprocessors turn three channels alone.
        assert not found
        return
    (error,) = found
    assert 'has 1 channel ' in error and 'bgr_to_rgb=True is for 3' in error


@pytest.mark.parametrize(
    ('host', 'transform', 'expected'),
    [
        ('mmseg', dict(type='PhotoMetricDistortion'), 'pipeline[2]: PhotoMetricDistortion makes 3 or 4 channels of 4'),
        ('mmdet', dict(type='PhotoMetricDistortion'), 'of which pipeline[3], PhotoMetricDistortion, leaves 3'),
    ],
)
def test_colour_transforms_of_four_channels(host, transform, expected, check, loaded):
    pipeline = [dict(step) for step in loaded(host).train_dataloader.dataset.pipeline]
    pipeline = [{**pipeline[0], 'color_type': 'unchanged'}, *pipeline[1:-1], transform, pipeline[-1]]
    options = {'train_dataloader.dataset.pipeline': pipeline, 'model.backbone.in_channels': 4}
    (error,) = errors(check(host, as_mode(host, 'RGBA'), options, modes=['train']))
    assert error.startswith('train_dataloader.dataset.pipeline') and expected in error


def test_images_of_different_kinds(check):
    unchanged = {'train_dataloader.dataset.pipeline.0.color_type': 'unchanged'}
    (error,) = errors(check('mmpretrain', as_mode('mmpretrain', 'L', every=False), unchanged, modes=['train']))
    assert 'differ in their channels' in error and 'has 1 (uint8)' in error and 'has 3 (uint8)' in error


def test_transforms_that_are_unknown_or_misspelt(check):
    wrong = {'train_dataloader.dataset.pipeline.1.with_masks': True}
    (error,) = errors(check('mmdet', None, wrong, modes=['train']))
    assert error.startswith('train_dataloader.dataset.pipeline[1]: LoadAnnotations cannot be built')


def test_the_config_is_left_as_it_is(loaded):
    """mmcv's TestTimeAug builds its transforms in place."""
    cfg = loaded('mmseg')
    augmented = dict(
        type='TestTimeAug', transforms=[[dict(type='Resize', scale=(64, 64))], [dict(type='PackSegInputs')]]
    )
    cfg.train_dataloader.dataset.pipeline = [cfg.train_dataloader.dataset.pipeline[0], augmented]
    before = cfg.pretty_text
    check_data(cfg, ('train',))
    assert cfg.pretty_text == before


def test_the_random_state_of_the_training_is_left_alone(loaded):
    np.random.seed(3)
    expected = np.random.RandomState(3).rand()
    check_data(loaded('mmdet'), ('train',))
    assert np.random.rand() == expected
