"""Features lie where the records say: a disc in an image is found there, whatever the config's pipeline does to it."""

import json

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import MODELS, TRANSFORMS, DefaultScope
from PIL import Image
from torch import nn
from torch.nn import functional as F

from ssm_backbones.apis.config import load_config
from ssm_backbones.apis.images import test_pipeline
from ssm_backbones.apis.model import build_model
from ssm_backbones.features.dataset import FeatureDataset
from ssm_backbones.features.export import ExportOptions, export_features
from ssm_backbones.features.placement import PlacedPipeline, PlacementError
from ssm_backbones.utils.errors import CommandError

LOAD = dict(type='LoadImageFromFile')
PACK = {'mmpretrain': 'PackInputs', 'mmdet': 'PackDetInputs', 'mmseg': 'PackSegInputs'}
EDGE = dict(type='ResizeEdge', scale=96, edge='short', backend='pillow', interpolation='bicubic')
KEEP = dict(type='Resize', scale=(160, 96), keep_ratio=True)
PIPELINES = {
    'mmpretrain-as-it-is': [],
    'mmpretrain-resize': [dict(type='Resize', scale=(97, 65), backend='pillow')],
    'mmpretrain-resize-edge': [EDGE],
    'mmpretrain-centre-crop': [EDGE, dict(type='CenterCrop', crop_size=64)],
    'mmpretrain-mirrored-crop': [EDGE, dict(type='CenterCrop', crop_size=80), dict(type='RandomFlip', prob=1.0)],
    'mmpretrain-crop-and-resize': [dict(type='EfficientNetCenterCrop', crop_size=90)],
    'mmpretrain-random-crop': [dict(type='RandomCrop', crop_size=120, padding=(40, 50, 10, 20))],
    'mmdet-resize': [dict(type='Resize', scale=(150, 70))],
    'mmdet-keep-ratio': [KEEP],
    'mmdet-pad': [KEEP, dict(type='Pad', size_divisor=32, pad_val=dict(img=(114, 114, 114)))],
    'mmdet-mirrored-pad': [KEEP, dict(type='Pad', size=(160, 165)), dict(type='RandomFlip', prob=1.0)],
    'mmseg-keep-ratio': [KEEP],
    'mmseg-resize': [dict(type='Resize', scale=(65, 97))],
    'mmseg-multiple': [dict(type='ResizeToMultiple', size_divisor=32)],
    'mmseg-normalised-crop': [
        dict(type='Normalize', mean=[9.0] * 3, std=[2.0] * 3),
        dict(type='CenterCrop', crop_size=(110, 90)),
    ],
    'mmseg-upside-down': [KEEP, dict(type='RandomFlip', prob=1.0, direction='vertical')],
}
SIZES = ((203, 131), (98, 151))
STRIDES = (1, 4, 8, 16, 32)
RADIUS = 20


@MODELS.register_module()
class LocalBrightness(nn.Module):
    """A backbone of nothing but means over squares of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        grey = self.weight * images.mean(1, keepdim=True)
        height, width = grey.shape[2:]
        return tuple(F.avg_pool2d(F.pad(grey, (0, -width % stride, 0, -height % stride)), stride) for stride in STRIDES)


def centre(size: tuple[int, int]) -> tuple[float, float]:
    """Where the disc lies: not in the middle, but in every crop."""
    return 0.54 * size[0], 0.47 * size[1]


def disc(size: tuple[int, int], margin: int = 0) -> np.ndarray:
    """Grey (H, W), uint8: a white disc on grey, with dark margins on the left and right."""
    x, y = np.arange(size[0]) + 0.5, np.arange(size[1])[:, None] + 0.5
    found = np.where(np.hypot(x - centre(size)[0], y - centre(size)[1]) < RADIUS, 255, 60)
    found[:, :margin] = found[:, size[0] - margin :] = 0
    return found.astype(np.uint8)


def save(folder, name: str, grey: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    Image.fromarray(np.dstack([grey] * 3)).save(folder / f'{name}.png')


def write_pipeline(write_config, case: str, backbone: str = "type='LocalBrightness'") -> str:
    host = case.partition('-')[0]
    steps = [LOAD, *PIPELINES[case], dict(type=PACK[host])]
    return str(
        write_config(
            host,
            f'model = dict(backbone=dict({backbone}, _delete_=True))\n'
            f'test_dataloader = dict(dataset=dict(pipeline={steps!r}))',
        )
    )


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp('checkpoint') / 'brightness.pth'
    torch.save({'state_dict': {'backbone.weight': torch.ones(())}}, path)
    return str(path)


@pytest.mark.parametrize('case', PIPELINES)
def test_a_disc_is_found_where_the_record_says(case, write_config, checkpoint, tmp_path) -> None:
    """By the difference that it makes, at every level; to half a cell, so at stride 1 to half a pixel of the input."""
    np.random.seed(0)
    config = write_pipeline(write_config, case)
    for place, size in enumerate(SIZES):
        save(tmp_path / 'in', f'{place}-disc', disc(size))
        save(tmp_path / 'in', f'{place}-none', np.full(size[::-1], 60, np.uint8))
    export_features(ExportOptions(config, checkpoint, str(tmp_path / 'in'), str(tmp_path / 'out'), workers=0))
    dataset = FeatureDataset(tmp_path / 'out')
    for place, size in enumerate(SIZES):
        with_disc, without = place * 2, place * 2 + 1
        record = dataset.records[with_disc]
        assert record['original_size'] == [size[1], size[0]]
        maps, edges = dataset.maps(with_disc), dataset.cell_edges(with_disc)
        if 'random' in case:
            # The two were cropped at places of their own, but one knows what is behind the disc: grey.
            below = torch.where(maps[0] > 1, maps[0].median(), maps[0])
            others = LocalBrightness()(below[None])
        else:
            others = [value[None] for value in dataset.maps(without)]
        for stride, value, other, (y, x) in zip(STRIDES, maps, others, edges, strict=True):
            assert (len(y) - 1, len(x) - 1) == value.shape[1:]
            weights = (value - other[0])[0].detach().double().clamp(min=0).numpy()
            cell_y, cell_x = abs(y[1] - y[0]), abs(x[1] - x[0])
            found = (
                (weights.sum(0) @ (x[:-1] + x[1:])) / 2 / weights.sum(),
                (weights.sum(1) @ (y[:-1] + y[1:])) / 2 / weights.sum(),
            )
            assert abs(found[0] - centre(size)[0]) <= 0.5 * cell_x, (stride, found)
            assert abs(found[1] - centre(size)[1]) <= 0.5 * cell_y, (stride, found)
            if stride == 1:
                area = weights.sum() / weights.max() * cell_x * cell_y
                assert area == pytest.approx(np.pi * RADIUS**2, rel=0.05)
                # A label map is brought to the same place.
                laid = dataset.to_input(with_disc, disc(size), fill=7)
                assert laid.shape == tuple(record['padded_size'])
                under, seen = laid == 255, weights > 0.5 * weights.max()
                assert (under & seen).sum() > 0.85 * (under | seen).sum()
                left, top, right, bottom = record['image_box']
                padding = np.ones_like(under)
                padding[top:bottom, left:right] = False
                assert ((laid == 7) == padding).all()


@pytest.mark.parametrize('backbone', ['VMamba', 'Mamba2D', 'V2M'])
def test_a_disc_changes_the_features_of_a_backbone_there(backbone, write_config, tmp_path) -> None:
    arch = 'test-hier' if backbone == 'V2M' else 'test'
    config = write_pipeline(
        write_config, 'mmpretrain-centre-crop', f"type='{backbone}', arch='{arch}', out_indices=(0, 1, 2, 3)"
    )
    size = SIZES[0]
    save(tmp_path / 'in', 'disc', disc(size))
    save(tmp_path / 'in', 'none', np.full(size[::-1], 60, np.uint8))
    torch.manual_seed(0)
    weights = build_model(load_config(config), None).backbone.state_dict()
    torch.save({'state_dict': {f'backbone.{name}': value for name, value in weights.items()}}, tmp_path / 'model.pth')
    export_features(
        ExportOptions(config, str(tmp_path / 'model.pth'), str(tmp_path / 'in'), str(tmp_path / 'out'), workers=0)
    )
    dataset = FeatureDataset(tmp_path / 'out')
    for one, other, (y, x) in zip(dataset.maps(0), dataset.maps(1), dataset.cell_edges(0), strict=True):
        change = (one - other).norm(dim=0)
        row, column = divmod(int(change.argmax()), change.shape[1])
        # The most changed cell meets the disc; the windows of cells are centred up to half a cell off their squares.
        assert abs((x[column] + x[column + 1]) / 2 - centre(size)[0]) <= RADIUS + x[1] - x[0]
        assert abs((y[row] + y[row + 1]) / 2 - centre(size)[1]) <= RADIUS + y[1] - y[0]


@pytest.mark.parametrize('case', ['mmpretrain-centre-crop', 'mmdet-mirrored-pad', 'mmseg-keep-ratio'])
def test_previews_show_the_image_as_the_model_got_it(case, write_config, checkpoint, tmp_path) -> None:
    size = (203, 131)
    save(tmp_path / 'in', 'disc', disc(size, margin=40))
    config = write_pipeline(write_config, case)
    export_features(
        ExportOptions(config, checkpoint, str(tmp_path / 'in'), str(tmp_path / 'out'), workers=0, preview=True)
    )
    sheet = np.asarray(Image.open(tmp_path / 'out' / 'previews' / 'disc.png.png').convert('RGB'))[:, :, 0]
    record = FeatureDataset(tmp_path / 'out').records[0]
    height, width = record['input_size']
    scale = 320 / max(height, width)
    shape = round(height * scale), round(width * scale)
    step = (sheet.shape[1] - 12) // 6
    panels = [sheet[52 : 52 + shape[0], 12 + place * step : 12 + place * step + shape[1]] for place in range(6)]
    # Where the disc lies in the input, by the record, drawn so large.
    expected = tuple(
        (where - record[f'offset_{axis}']) / record[f'scale_{axis}'] * scale
        for where, axis in zip(centre(size), 'xy', strict=True)
    )
    for stride, panel in zip((1, *STRIDES), panels, strict=True):
        rows, columns = np.nonzero(panel > 200 if stride < 16 else panel == panel.max())
        assert abs(columns.mean() + 0.5 - expected[0]) < max(0.75 * stride * scale, 2), stride
        assert abs(rows.mean() + 0.5 - expected[1]) < max(0.75 * stride * scale, 2), stride
    dark = (panels[0] < 30).mean()
    shown = {'mmpretrain-centre-crop': 0.0, 'mmseg-keep-ratio': 80 / 203}.get(case)
    assert shown is None or dark == pytest.approx(shown, abs=0.02)


@pytest.mark.parametrize(
    'host, step',
    [
        ('mmseg', dict(type='RandomRotate', prob=1.0, degree=20.0)),
        ('mmpretrain', dict(type='Rotate', angle=30.0, prob=1.0)),
        ('mmpretrain', dict(type='Shear', magnitude=0.3, prob=1.0)),
        ('mmseg', dict(type='PhotoMetricDistortion')),
        ('mmpretrain', dict(type='NumpyToPIL')),
    ],
)
def test_what_cannot_be_placed_is_refused_early(host, step, write_config, checkpoint, tmp_path) -> None:
    steps = [LOAD, step, dict(type=PACK[host])]
    config = write_config(
        host,
        f"model = dict(backbone=dict(type='LocalBrightness', _delete_=True))\n"
        f'test_dataloader = dict(dataset=dict(pipeline={steps!r}))',
    )
    save(tmp_path / 'in', 'disc', disc((40, 30)))
    with pytest.raises(CommandError, match=f'the test pipeline has {step["type"]}, and .* scale, crop, pad or mirror'):
        export_features(ExportOptions(str(config), checkpoint, str(tmp_path / 'in'), str(tmp_path / 'out'), workers=0))
    assert not (tmp_path / 'out').exists()


def test_a_pipeline_without_an_image_is_refused() -> None:
    with pytest.raises(PlacementError, match='loads no image; it holds PackInputs'):
        PlacedPipeline([dict(type='PackInputs')], 'mmpretrain')


def test_what_is_loaded_behind_a_change_of_the_image_is_refused() -> None:
    """The loaded image is what places count from."""
    steps = [LOAD, EDGE, dict(type='LoadProposals'), dict(type='PackDetInputs')]
    with pytest.raises(PlacementError, match='has ResizeEdge before LoadProposals'):
        PlacedPipeline(steps, 'mmdet')


def test_annotations_of_every_kind_are_left_out() -> None:
    pipeline = [dict(type=name) for name in ('LoadImageFromFile', 'LoadAnnotations', 'LoadDepthAnnotation', 'Pack')]
    cfg = Config(dict(test_dataloader=dict(dataset=dict(type='NYUDataset', pipeline=pipeline))))
    assert [step['type'] for step in test_pipeline(cfg)] == ['LoadImageFromFile', 'Pack']


@pytest.mark.parametrize('size', [(1, 1), (2, 1), (3, 40), (1000, 1), (5, 3)])
def test_small_images(size, tmp_path) -> None:
    """Enlarged, padded and mirrored, all of such an image is there."""
    save(tmp_path, 'small', np.zeros(size[::-1], np.uint8))
    steps = [
        LOAD,
        dict(type='Resize', scale=(64, 48)),
        dict(type='Pad', size=(70, 50)),
        dict(type='RandomFlip', prob=1.0),
        dict(type='PackDetInputs'),
    ]
    _, placement = PlacedPipeline(steps, 'mmdet')(str(tmp_path / 'small.png'))
    assert placement.image_box == (6, 0, 70, 48)
    # An image of one column is its own mirror image.
    left, right = (placement.offset_x + placement.scale_x * x for x in (6, 70))
    assert sorted((left, right)) == pytest.approx([0, size[0]], abs=2e-3 * size[0])
    assert placement.offset_y == pytest.approx(0, abs=1e-3)
    assert 48 * placement.scale_y == pytest.approx(size[1], rel=1e-3)


def test_random_numbers_are_those_of_the_pipeline_alone(tmp_path) -> None:
    save(tmp_path, 'disc', disc((203, 131)))
    path = str(tmp_path / 'disc.png')
    steps = [LOAD, dict(type='RandomCrop', crop_size=64), dict(type='RandomFlip', prob=0.5), dict(type='PackInputs')]
    placed = PlacedPipeline(steps, 'mmpretrain')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        plain = Compose([TRANSFORMS.build(step) for step in steps])
    np.random.seed(1)
    expected = [plain(dict(img_path=path))['inputs'] for _ in range(4)]
    np.random.seed(1)
    found = [placed(path) for _ in range(4)]
    assert all(torch.equal(data['inputs'], inputs) for (data, _), inputs in zip(found, expected, strict=True))
    assert len({placement for _, placement in found}) == 4


def test_exports_of_the_earlier_format_are_refused(write_config, checkpoint, tmp_path) -> None:
    save(tmp_path / 'in', 'disc', disc((40, 30)))
    options = ExportOptions(
        write_pipeline(write_config, 'mmseg-keep-ratio'),
        checkpoint,
        str(tmp_path / 'in'),
        str(tmp_path / 'out'),
        workers=0,
    )
    export_features(options)
    assert export_features(options).kept == 1
    path = tmp_path / 'out' / 'export.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), 'format': 'ssm_backbones.features/1'}))
    for use in (lambda: FeatureDataset(tmp_path / 'out'), lambda: export_features(options)):
        with pytest.raises(CommandError, match='features/1.*do not say where .* Export again into another folder'):
            use()


def test_a_label_map_of_another_size_is_refused(write_config, checkpoint, tmp_path) -> None:
    save(tmp_path / 'in', 'disc', disc((40, 30)))
    export_features(
        ExportOptions(
            write_pipeline(write_config, 'mmseg-keep-ratio'),
            checkpoint,
            str(tmp_path / 'in'),
            str(tmp_path / 'out'),
            workers=0,
        )
    )
    with pytest.raises(ValueError, match=r'disc.png has 30 rows and 40 columns, got an array \(40, 30\)'):
        FeatureDataset(tmp_path / 'out').to_input(0, np.zeros((40, 30)))
