"""Label maps: what mmseg would take for another label, or stop at without the file's name."""

import numpy as np
import pytest
import torch
from PIL import Image

from ssm_backbones.data_check import WARNING, check_data
from tests.data_check.conftest import errors


def maps(folder):
    return sorted((folder / 'annotations/training').iterdir())


def rewrite(change, every=True):
    """A change of the label maps of the training set, or of the first alone."""

    def rewritten(folder):
        for path in maps(folder) if every else maps(folder)[:1]:
            change(np.array(Image.open(path))).save(path)

    return rewritten


def with_pixel(value):
    def change(labels):
        labels[10, 20] = value
        return Image.fromarray(labels)

    return change


def palette(labels):
    image = Image.fromarray(labels, 'P')
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255, 255, 255, 0, 255, 0, 255, 0, 255, 255, 9, 9, 9])
    return image


def rename(folder):
    for path in maps(folder):
        path.rename(path.with_name(f'{path.stem}_labels.png'))


def test_the_generated_data_are_right(check):
    assert not errors(check('mmseg'))


def test_palette_images_are_class_indices(check):
    assert not errors(check('mmseg', rewrite(palette)))


def test_palette_images_are_colours_to_another_decoder(check):
    other = {'train_dataloader.dataset.pipeline.1.imdecode_backend': 'cv2'}
    (error,) = errors(check('mmseg', rewrite(palette), other, modes=['train']))
    assert 'as an image in colours' in error


@pytest.mark.parametrize(
    ('change', 'expected'),
    [
        (
            rewrite(lambda a: Image.fromarray(np.where(a > 1, 255, 0).astype(np.uint8))),
            ('all pixels are ignored', '0, 255', '0 and 1 in place of 0 and 255', 'reduce_zero_label'),
        ),
        (
            rewrite(lambda a: palette(a).convert('RGB')),
            ('ADE_train_00000001.png', '(64, 64, 3)', 'class indices from 0 to 6'),
        ),
        (rewrite(with_pixel(9), every=False), ('ADE_train_00000001.png, x, y [20, 10]', 'labels [8]', '7 classes')),
        (
            rewrite(lambda a: Image.fromarray(a.astype(np.uint16) * 256)),
            ('ADE_train_00000001.png', 'uint16', '256 is taken for 0'),
        ),
        (
            rewrite(lambda a: Image.fromarray(a[:32]), every=False),
            ('ADE_train_00000001.png', '64x32', 'ADE_train_00000001.jpg is loaded as 64x64'),
        ),
        (rename, ('ADE_train_00000001.png', "seg_map_suffix is '.png'", '12 of .png')),
    ],
    ids=['0 and 255', 'RGB', 'beyond the classes', '16 bits', 'another size', 'no partner'],
)
def test_label_maps_that_are_not_class_indices(change, expected, check):
    found = errors(check('mmseg', change, modes=['train']))
    assert len(found) == 1 and all(text in found[0] for text in expected), found


def test_black_and_white_without_reduced_labels(check):
    whole = {
        'train_dataloader.dataset.reduce_zero_label': False,
        'train_dataloader.dataset.pipeline.1.reduce_zero_label': False,
    }
    change = rewrite(lambda a: Image.fromarray(np.where(a > 1, 255, 0).astype(np.uint8)))
    (error,) = errors(check('mmseg', change, whole, modes=['train']))
    assert "all pixels but those of 'background' are ignored" in error


def test_images_with_another_suffix(check):
    (error,) = errors(check('mmseg', None, {'train_dataloader.dataset.img_suffix': '.jpeg'}, modes=['train']))
    assert error.startswith('train_dataloader.dataset.img_suffix') and '12 of .jpg' in error


def test_reduced_labels_of_data_without_a_label_to_ignore(check):
    found = check('mmseg', rewrite(lambda a: Image.fromarray(np.maximum(a, 1) - 1)), modes=['train'])
    assert not errors(found)
    assert any(f.severity == WARNING and "'cross' never occurs" in f.value for f in found)


def test_class_weights_do_not_go_with_ignored_pixels(check, loaded):
    loss = dict(type='CrossEntropyLoss', class_weight=[1.0] * 7)
    (error,) = errors(check('mmseg', None, {'model.decode_head.loss_decode': loss}))
    assert error.startswith('model.decode_head.loss_decode.class_weight')
    cfg = loaded('mmseg')
    cfg.model.decode_head.loss_decode = dict(loss, class_weight=[1.0] * 3)
    assert any('has 3 weights' in error for error in errors(check_data(cfg)))


def test_the_dice_loss_counts_ignored_pixels(check):
    dice = dict(type='DiceLoss', use_sigmoid=False)
    found = check('mmseg', None, {'model.auxiliary_head.loss_decode': [dict(type='CrossEntropyLoss'), dice]})
    assert not errors(found)
    (warning,) = (f for f in found if f.severity == WARNING and 'DiceLoss' in f.value)
    assert warning.file == 'model.auxiliary_head.loss_decode' and 'TverskyLoss' in warning.remedy


@pytest.mark.parametrize('ignored', [False, True])
def test_the_losses_that_are_named_ignore_pixels(ignored):
    from mmseg.models.losses import DiceLoss, TverskyLoss

    labels = torch.randint(3, (1, 6, 6))
    scores = torch.randn(1, 3, 6, 6)
    found = scores.masked_fill(torch.nn.functional.one_hot(labels, 3).permute(0, 3, 1, 2) > 0, 60.0)
    if ignored:
        labels[:, :2] = 255
        found[:, :, :2] = scores[:, :, :2]
    assert (DiceLoss(use_sigmoid=False)(found, labels, ignore_index=255) > 1e-2) == ignored
    assert TverskyLoss(alpha=0.5, beta=0.5)(found, labels, ignore_index=255) < 1e-3


def test_heads_have_the_number_of_classes(check):
    (error,) = errors(check('mmseg', None, {'model.decode_head.num_classes': 150}))
    assert error.startswith('model.decode_head.num_classes: is 150') and '7 classes' in error


def test_classes_that_never_occur_are_told(check):
    found = check('mmseg', rewrite(lambda a: Image.fromarray(np.where(a == 7, 1, a).astype(np.uint8))), modes=['train'])
    assert "no pixel is labelled 'cross'" in [f.value for f in found if f.severity == WARNING]


def test_a_sample_is_looked_at_unless_all_are_asked_for(check, monkeypatch):
    monkeypatch.setattr('ssm_backbones.data_check.images.SAMPLED', 3)

    def last_but_one(folder):
        path = maps(folder)[-2]
        with_pixel(9)(np.array(Image.open(path))).save(path)

    assert not errors(check('mmseg', last_but_one, modes=['train']))


def test_every_label_map_is_looked_at_where_all_are_asked_for(check, monkeypatch):
    monkeypatch.setattr('ssm_backbones.data_check.images.SAMPLED', 3)

    def last_but_one(folder):
        path = maps(folder)[-2]
        with_pixel(9)(np.array(Image.open(path))).save(path)

    assert len(errors(check('mmseg', last_but_one, modes=['train'], every_file=True))) == 1
