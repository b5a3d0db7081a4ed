"""Images of many bands, as TIFF or array: what trains can be exported and drawn."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import TRANSFORMS, DefaultScope

from ssm_backbones import LoadBands
from ssm_backbones.apis.images import UnreadableImage, check_readable
from ssm_backbones.features.dataset import FeatureDataset
from ssm_backbones.features.export import ExportOptions, export_features
from ssm_backbones.prediction import PredictOptions, predict
from ssm_backbones.project import NewProjectOptions, new_project
from ssm_backbones.utils.errors import CommandError
from ssm_backbones.visualization.figures import VisualizeOptions, visualize
from ssm_backbones.visualization.reading import array_as_rgb

FORMS = {
    # name: suffix, bands, dtype, bands first in the file
    'five bands of uint16, TIFF': ('.tif', 5, np.uint16, False),
    'thirteen bands of float32, TIFF, first': ('.tif', 13, np.float32, True),
    'three bands of uint16, TIFF': ('.tif', 3, np.uint16, False),
    'five bands of float32, array': ('.npy', 5, np.float32, False),
    'thirteen bands of uint16, array, first': ('.npy', 13, np.uint16, True),
}


def save(path: Path, image: np.ndarray, first: bool) -> None:
    image = np.ascontiguousarray(np.moveaxis(image, 2, 0)) if first else image
    if path.suffix == '.npy':
        np.save(path, image)
    else:
        tifffile = pytest.importorskip('tifffile', reason='TIFFs of many bands are read by tifffile')
        tifffile.imwrite(path, image, photometric='minisblack', planarconfig='separate' if first else 'contig')


def many_bands(image: np.ndarray, bands: int, dtype: type) -> np.ndarray:
    """An image's channels again and again, each dimmer, in another range."""
    factors = np.linspace(1, 0.2, bands)
    values = np.stack([image[:, :, place % 3] * factors[place] for place in range(bands)], axis=2)
    return (values * 200).astype(dtype) if dtype == np.uint16 else (values / 255 - 0.3).astype(dtype)


@pytest.mark.parametrize('form', FORMS)
def test_values_are_the_files_in_any_pipeline(form, tmp_path) -> None:
    suffix, bands, dtype, first = FORMS[form]
    image = many_bands(np.random.default_rng(0).integers(0, 255, (20, 30, 3)), bands, dtype)
    path = tmp_path / f'x{suffix}'
    save(path, image, first)
    check_readable(str(path), 600)
    with pytest.raises(UnreadableImage, match='30x20 pixels'):
        check_readable(str(path), 599)
    for scope in ('mmdet', 'mmseg', 'mmpretrain'):
        __import__(scope)
        with DefaultScope.overwrite_default_scope(scope):
            load = TRANSFORMS.build(dict(type='LoadBands', bands=bands))
        results = load(dict(img_path=str(path)))
        assert results['img'].dtype == np.float32 and results['img_shape'] == results['ori_shape'] == (20, 30)
        assert np.array_equal(results['img'], image.astype(np.float32)) and results['img'].flags.c_contiguous
    picture = array_as_rgb(np.moveaxis(np.moveaxis(image, 2, 0).copy(), 0, 2))
    assert picture.shape == (20, 30, 3) and picture.flags.c_contiguous
    mean, std = np.arange(bands) + 1.0, np.arange(bands) + 2.0
    normalised = LoadBands(bands, mean.tolist(), std.tolist())(dict(img_path=str(path)))['img']
    assert np.allclose(normalised, (image.astype(np.float32) - mean) / std, atol=1e-3)
    with pytest.raises(CommandError, match=f'expected {bands + 1} bands'):
        LoadBands(bands + 1)(dict(img_path=str(path)))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(bands=0), 'at least 1'),
        (dict(bands=2, mean=[1, 2]), 'go together'),
        (dict(bands=2, mean=[1], std=[1, 2]), 'each of 2 bands'),
        (dict(bands=2, mean=[1, 2], std=[1, 0]), 'must be positive'),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        LoadBands(**options)


@pytest.mark.parametrize('content', [b'', b'no array', b'II*\0 broken'])
@pytest.mark.parametrize('suffix', ['.npy', '.tif'])
def test_damaged_files(content, suffix, tmp_path) -> None:
    path = tmp_path / f'x{suffix}'
    path.write_bytes(content)
    with pytest.raises(UnreadableImage):
        check_readable(str(path), 600)
    if suffix == '.npy':
        with pytest.raises(CommandError, match='x.npy cannot be read'):
            LoadBands(3)(dict(img_path=str(path)))


def data_of(form: str, shapes: Path, folder: Path) -> None:
    """The generated label maps with images of a form."""
    suffix, bands, dtype, first = FORMS[form]
    for split, name in (('training', 'train'), ('validation', 'val')):
        for kind in ('images', 'masks'):
            (folder / kind / name).mkdir(parents=True)
        for path in (shapes / 'ade20k' / 'images' / split).glob('*.jpg'):
            image = many_bands(cv2.imread(str(path)), bands, dtype)
            save(folder / 'images' / name / f'{path.stem}{suffix}', image, first)
            shutil.copy(shapes / 'ade20k' / 'annotations' / split / f'{path.stem}.png', folder / 'masks' / name)


SMALL = {
    **{f'{mode}_dataloader.num_workers': 0 for mode in ('train', 'val', 'test')},
    **{f'{mode}_dataloader.persistent_workers': False for mode in ('train', 'val', 'test')},
    'train_cfg.max_iters': 2,
    'train_cfg.val_interval': 2,
    'train_dataloader.dataset.pipeline.2.scale': (64, 64),
    'train_dataloader.dataset.pipeline.3.crop_size': (64, 64),
    'model.data_preprocessor.size': (64, 64),
    'val_dataloader.dataset.pipeline.1.scale': (64, 64),
    'test_dataloader.dataset.pipeline.1.scale': (64, 64),
    'model.decode_head.channels': 16,
    'model.auxiliary_head.channels': 16,
    'default_hooks.checkpoint.interval': 2,
}


@pytest.mark.parametrize(
    'form',
    [
        name if name.startswith('five bands of float32') else pytest.param(name, marks=pytest.mark.slow)
        for name in FORMS
    ],
)
def test_what_trains_is_exported_drawn_and_predicted_on(form, shapes, tmp_path, train) -> None:
    _, bands, _, _ = FORMS[form]
    data_of(form, shapes, tmp_path / 'data')
    made = new_project(
        NewProjectOptions('seg', str(tmp_path / 'data'), str(tmp_path / 'mine.py'), 'vmamba-test', batch_size=2)
    )
    runner = train(made.config, work_dir=str(tmp_path / 'work'), cfg_options=SMALL)
    assert runner.model.backbone.in_channels == bands
    model = (str(made.config), str(tmp_path / 'work' / 'iter_2.pth'))
    images = str(tmp_path / 'data' / 'images' / 'val')
    exported = export_features(
        ExportOptions(*model, images, str(tmp_path / 'out'), workers=0, preview=True, cfg_options=SMALL)
    )
    assert (exported.exported, exported.unreadable) == (4, [])
    assert all(torch.isfinite(value).all() for value in FeatureDataset(tmp_path / 'out').maps(0))
    assert len(list((tmp_path / 'out' / 'previews').rglob('*.png'))) == 4
    drawn = visualize(
        VisualizeOptions('activation', *model, [images], out=str(tmp_path / 'maps'), limit=1, cfg_options=SMALL)
    )
    assert all(Path(path).stat().st_size for path in drawn) and drawn
    found = predict(PredictOptions(*model, [images], str(tmp_path / 'found'), workers=0, cfg_options=SMALL))
    assert (found.predicted, found.unreadable) == (4, [])


@pytest.mark.slow
def test_detectors_and_classifiers_of_five_bands(shapes, tmp_path, train) -> None:
    boxes, classes = tmp_path / 'boxes', tmp_path / 'classes'
    shutil.copytree(shapes / 'coco', boxes)
    for path in boxes.glob('*/*.jpg'):
        np.save(path.with_suffix('.npy'), many_bands(cv2.imread(str(path)), 5, np.float32))
        path.unlink()
    for path in boxes.glob('annotations/*.json'):
        path.write_text(path.read_text().replace('.jpg"', '.npy"'))
    for path in (shapes / 'imagenet').glob('*/*/*.JPEG'):
        target = classes / path.relative_to(shapes / 'imagenet').with_suffix('.npy')
        target.parent.mkdir(parents=True, exist_ok=True)
        np.save(target, many_bands(cv2.imread(str(path)), 5, np.float32))
    few = {key: value for key, value in SMALL.items() if 'workers' in key}
    scale = {
        f'{mode}_dataloader.dataset.pipeline.{place}.scale': (64, 64)
        for mode, place in (('train', 2), ('val', 1), ('test', 1))
    }
    for task, data, options in (('det', boxes, scale), ('cls', classes, {})):
        out = tmp_path / f'{task}_mine.py'
        made = new_project(NewProjectOptions(task, str(data), str(out), 'vmamba-test', batch_size=4, epochs=1))
        assert not [finding for finding in made.findings if finding.severity == 'error']
        runner = train(out, work_dir=str(tmp_path / task), cfg_options={**few, **options})
        assert runner.model.backbone.in_channels == 5
        images = [str(path) for path in sorted(data.rglob('*.npy'))[:2]]
        found = predict(
            PredictOptions(
                str(out),
                str(tmp_path / task / 'epoch_1.pth'),
                images,
                str(tmp_path / f'found_{task}'),
                workers=0,
                cfg_options=options,
            )
        )
        assert (found.predicted, found.unreadable) == (2, [])
