"""Feature export: what is written is what the model computes, once, whatever happens in between."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from PIL import Image

from ssm_backbones.apis.checks import check_device
from ssm_backbones.apis.config import load_config
from ssm_backbones.apis.images import InputImage, UnreadableImage, check_readable, find_images
from ssm_backbones.apis.model import build_extractor, build_model
from ssm_backbones.apis.processes import processes
from ssm_backbones.features import export as features
from ssm_backbones.features.dataset import FeatureDataset
from ssm_backbones.features.export import ExportOptions, _Sample, batches, export_features
from ssm_backbones.features.store import read_records
from ssm_backbones.utils.errors import CommandError
from ssm_backbones.utils.files import file_name
from ssm_backbones.visualization.colours import pca_colours
from ssm_backbones.visualization.figures import VisualizeOptions, visualize

TOOL = Path(__file__).resolve().parents[2] / 'tools' / 'export_features.py'


@pytest.fixture(scope='module')
def models(write_config, tmp_path_factory):
    """A config and a checkpoint of each host library."""
    folder = tmp_path_factory.mktemp('models')
    made = {}
    for host in ('mmdet', 'mmseg', 'mmpretrain'):
        config = write_config(host)
        model = build_model(load_config(config), None)
        torch.save({'state_dict': model.state_dict(), 'meta': {}}, folder / f'{host}.pth')
        made[host] = (str(config), str(folder / f'{host}.pth'))
    return made


@pytest.fixture
def export(models):
    def run(given, out, host='mmseg', **options):
        return export_features(ExportOptions(*models[host], str(given), str(out), workers=0, **options))

    return run


def fails(capsys, status):
    assert status == 2
    captured = capsys.readouterr()
    assert len([line for line in captured.err.splitlines() if line.startswith('error: ')]) == 1
    return captured.err


@pytest.mark.parametrize('host', ['mmdet', 'mmseg', 'mmpretrain'])
@pytest.mark.parametrize('split', ['train', 'val'])
def test_features_are_the_models_own(host, split, models, export, tmp_path) -> None:
    """Against the maps that the library's own test loop gives to the heads."""
    neck = host == 'mmdet'
    result = export(split, tmp_path / 'out', host, neck=neck)
    dataset = FeatureDataset(tmp_path / 'out')
    assert result.exported == len(dataset) == {'train': 12, 'val': 4}[split]
    cfg = load_config(models[host][0])
    loader_cfg = cfg.test_dataloader.copy()
    if host == 'mmpretrain':
        loader_cfg.collate_fn = dict(type='default_collate')
    with DefaultScope.overwrite_default_scope(host):
        loader = Runner.build_dataloader(loader_cfg)
    model = build_model(cfg, models[host][1])
    seen = 0
    with torch.no_grad():
        for data in loader:
            data = model.data_preprocessor(data, False)
            maps = model.backbone(data['inputs'])
            maps = model.neck(maps) if neck else maps
            for place, sample in enumerate(data['data_samples']):
                index = next((i for i, record in enumerate(dataset.records) if record['path'] == sample.img_path), None)
                if index is None:
                    continue
                seen += 1
                record = dataset.records[index]
                assert record['original_size'] == list(sample.ori_shape)
                assert record['input_size'] == list(sample.img_shape)
                assert record['padded_size'] == list(data['inputs'].shape[2:])
                for ours, theirs in zip(dataset.maps(index), maps, strict=True):
                    torch.testing.assert_close(ours, theirs[place], rtol=1e-4, atol=1e-5)
    assert seen == {'train': 0, 'val': 4}[split]


def test_annotations_of_the_data_set_are_kept(export, tmp_path, shapes) -> None:
    export('train', tmp_path / 'seg')
    for record in FeatureDataset(tmp_path / 'seg').records:
        assert Path(record['label_map']).stem == Path(record['path']).stem
    export('val', tmp_path / 'cls', 'mmpretrain')
    labels = [record['label'] for record in FeatureDataset(tmp_path / 'cls').records]
    assert labels == sorted(labels) and set(labels) <= set(range(6))


@pytest.mark.parametrize('dtype', ['fp16', 'bf16'])
def test_shards_levels_and_dtypes(dtype, export, tmp_path, shapes) -> None:
    folder = shapes / 'ade20k' / 'images' / 'validation'
    export(folder, tmp_path / 'whole')
    export(folder, tmp_path / 'out', dtype=dtype, levels=[2, 0], shard_size=3)
    assert len(list((tmp_path / 'out' / 'features').glob('shard-*.safetensors'))) == 2
    whole, dataset = FeatureDataset(tmp_path / 'whole'), FeatureDataset(tmp_path / 'out')
    assert dataset.levels == ['level2', 'level0'] and dataset.channels() == [64, 16]
    assert [record['id'] for record in dataset.records] == [record['id'] for record in whole.records]
    kind = {'fp16': torch.float16, 'bf16': torch.bfloat16}[dtype]
    for index in range(len(whole)):
        level0, _, level2, _ = whole.maps(index)
        assert all(torch.equal(a, b.to(kind)) for a, b in zip(dataset.maps(index), (level2, level0), strict=True))
    one = FeatureDataset(tmp_path / 'out', ['level0'], dtype=torch.float32)
    assert one.channels() == [16] and one[0]['maps'][0].dtype == torch.float32
    loader = torch.utils.data.DataLoader(one, batch_size=2, num_workers=1)
    assert next(iter(loader))['maps'][0].shape == (2, 16, 16, 16)
    with pytest.raises(CommandError, match='has no level7; it holds level2, level0'):
        FeatureDataset(tmp_path / 'out', ['level7'])


def test_maps_do_not_depend_on_neighbours_and_padding_is_told(export, tmp_path) -> None:
    generator = np.random.default_rng(0)
    sizes = [(40, 64), (64, 40), (40, 64), (33, 50)]
    for index, size in enumerate(sizes):
        pixels = generator.integers(0, 255, (*size, 3), dtype=np.uint8)
        (tmp_path / 'in').mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / 'in' / f'{index}.png')
    padding = {'model.data_preprocessor.test_cfg': dict(size_divisor=32)}
    export(tmp_path / 'in', tmp_path / 'many', cfg_options=padding)
    export(tmp_path / 'in', tmp_path / 'one', batch_size=1, cfg_options=padding)
    many, one = FeatureDataset(tmp_path / 'many'), FeatureDataset(tmp_path / 'one', crop=True)
    for index, size in enumerate(sizes):
        assert many.records[index]['input_size'] == list(size)
        assert many.records[index]['padded_size'] == [-(-side // 32) * 32 for side in size]
        for a, b, stride in zip(many.maps(index), one.maps(index), (4, 8, 16, 32), strict=True):
            assert list(b.shape[1:]) == [-(-side // stride) for side in size]
            torch.testing.assert_close(a[:, : b.shape[1], : b.shape[2]], b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('shard_size', [0, 4])
def test_resumed_export_redoes_nothing(shard_size, export, tmp_path, shapes, monkeypatch) -> None:
    folder = shapes / 'ade20k' / 'images' / 'training'
    compute, computed = features._compute, []

    def counted(extractor, batch, *args):
        if len(computed) == 8:
            raise KeyboardInterrupt
        computed.extend(sample.image.id for sample in batch)
        return compute(extractor, batch, *args)

    monkeypatch.setattr(features, '_compute', counted)
    with pytest.raises(KeyboardInterrupt):
        export(folder, tmp_path / 'out', batch_size=2, shard_size=shard_size)
    assert len(list(read_records(tmp_path / 'out'))) == 8
    with pytest.raises(CommandError, match='interrupted'):
        FeatureDataset(tmp_path / 'out')
    half = tmp_path / 'out' / 'features' / f'.{"0123456789abcdef" * 2}.part'
    foreign = [tmp_path / 'out' / name for name in ('.x.part', 'features/.x.part', f'mine/{half.name}')]
    foreign[2].parent.mkdir()
    for path in (half, *foreign):
        path.write_bytes(b'x')
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'out').rglob('*.safetensors')}
    first, computed[:] = set(computed), []
    result = export(folder, tmp_path / 'out', batch_size=2, shard_size=shard_size)
    assert (result.exported, result.kept) == (4, 8)
    assert not first & set(computed) and len(computed) == 4
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert not half.exists() and all(path.exists() for path in foreign)
    ids = [record['id'] for record in FeatureDataset(tmp_path / 'out').records]
    assert ids == sorted(path.name for path in folder.iterdir())
    computed[:] = []
    assert export(folder, tmp_path / 'out', shard_size=shard_size).exported == 0
    assert computed == []


def test_killed_process_leaves_whole_files_alone(models, tmp_path, shapes, environment, export) -> None:
    folder = shapes / 'ade20k' / 'images' / 'training'
    out = tmp_path / 'out'
    command = [sys.executable, TOOL, *models['mmseg'], folder, '--out', out, '--batch-size', '1', '--workers', '0']
    process = subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and len(list(out.glob('features/*.safetensors'))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {record['id'] for record in read_records(out)}
    assert len(done) >= 2
    result = export(folder, out)
    assert result.kept == len(done) and result.exported == 12 - len(done)
    export(folder, tmp_path / 'once')
    again, once = FeatureDataset(out), FeatureDataset(tmp_path / 'once')
    for index in range(12):
        assert all(
            torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(again.maps(index), once.maps(index), strict=True)
        )
    assert not list(out.rglob('.*.part'))


def test_another_model_in_the_same_folder(models, export, tmp_path, shapes) -> None:
    folder = shapes / 'ade20k' / 'images' / 'validation'
    export(folder, tmp_path / 'out')
    with pytest.raises(CommandError, match='another dtype: fp32, this one has fp16'):
        export(folder, tmp_path / 'out', dtype='fp16')
    config, checkpoint = models['mmseg']
    weights = torch.load(checkpoint, weights_only=True)
    weights['state_dict']['backbone.norm0.bias'] = torch.full((16,), 0.5)
    torch.save(weights, tmp_path / 'other.pth')
    with pytest.raises(CommandError, match='another model'):
        export_features(ExportOptions(config, str(tmp_path / 'other.pth'), str(folder), str(tmp_path / 'out')))
    with pytest.raises(CommandError, match='another model'):
        export(folder, tmp_path / 'out', cfg_options={'model.data_preprocessor.std': [50.0] * 3})


def test_other_images_of_the_same_names(export, tmp_path, monkeypatch) -> None:
    for name, colour in (('a', 'red'), ('b', 'blue')):
        (tmp_path / name).mkdir()
        Image.new('RGB', (32, 32), colour).save(tmp_path / name / 'x.png')
    out = tmp_path / 'out'
    monkeypatch.chdir(tmp_path)
    export('a', out)
    (record,) = FeatureDataset(out).records
    assert record['path'] == str(tmp_path / 'a' / 'x.png')
    with pytest.raises(CommandError, match=r"'x.png': .*/a/x.png, this one is .*/b/x.png. Name another folder"):
        export('b', out)
    (tmp_path / 'link').symlink_to(tmp_path / 'a')
    for same in (tmp_path / 'a', 'link'):
        assert (export(same, out).exported, export(same, out).kept) == (0, 1)


def test_images_of_other_kinds(export, tmp_path) -> None:
    """Grey becomes three equal channels, alpha is dropped, 16 bits become 8: as OpenCV reads them."""
    folder = tmp_path / 'in'
    folder.mkdir()
    rgb = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    grey = rgb[:, :, 0]
    kinds = {
        'rgb': Image.fromarray(rgb),
        'rgba': Image.fromarray(np.dstack([rgb, np.full((32, 48), 128, np.uint8)])),
        'grey': Image.fromarray(grey),
        'grey3': Image.fromarray(np.dstack([grey] * 3)),
        'grey16': Image.fromarray(grey.astype(np.uint16) * 256),
        'palette': Image.fromarray(grey).convert('P'),
    }
    for name, image in kinds.items():
        image.save(folder / f'{name}.png')
    assert export(folder, tmp_path / 'out', preview=True).unreadable == []
    panels = {}
    for name in kinds:
        # The image's own panel: 320 pixels wide, below its title.
        sheet = np.asarray(Image.open(tmp_path / 'out' / 'previews' / f'{name}.png.png').convert('RGB'))
        panels[name] = sheet[60:260, 20:320].astype(float)
    for name, same in (('rgba', 'rgb'), ('grey16', 'grey3')):
        assert panels[name].mean() == pytest.approx(panels[same].mean(), abs=2), name
    assert 100 < panels['grey16'].mean() < 150
    dataset = FeatureDataset(tmp_path / 'out')
    maps = {record['id'].partition('.')[0]: dataset.maps(index) for index, record in enumerate(dataset.records)}
    for name, same in (('rgba', 'rgb'), ('grey', 'grey3'), ('grey16', 'grey3'), ('palette', 'grey3')):
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(maps[name], maps[same], strict=True)), name
    assert not torch.allclose(maps['rgb'][0], maps['grey'][0], atol=1e-4)


def test_unreadable_images_do_not_stop_the_rest(tool, models, tmp_path, capsys, shapes) -> None:
    folder = tmp_path / 'in'
    folder.mkdir()
    good = next((shapes / 'ade20k' / 'images' / 'training').iterdir()).read_bytes()
    (folder / 'good.jpg').write_bytes(good)
    (folder / 'cut.jpg').write_bytes(good[: len(good) * 2 // 3])
    (folder / 'empty.png').write_bytes(b'')
    (folder / 'text.jpg').write_text('no image')
    (folder / 'sub').mkdir()
    Image.new('RGB', (60, 50)).save(folder / 'sub' / 'cut.png')
    whole = (folder / 'sub' / 'cut.png').read_bytes()
    (folder / 'sub' / 'cut.png').write_bytes(whole[:-20])
    Image.new('L', (400, 300)).save(folder / 'huge.png')
    middle = whole.index(b'IDAT') + 6
    (folder / 'damaged.png').write_bytes(whole[:middle] + b'damaged' + whole[middle + 7 :])
    out = tmp_path / 'out'
    command = [*models['mmseg'], str(folder), '--out', str(out), '--workers', '1', '--max-pixels', '100000']
    error = fails(capsys, tool.main(command))
    for name, reason in (
        ('cut.jpg', 'cut off'),
        ('empty.png', 'the file is empty'),
        ('text.jpg', 'no image'),
        ('sub/cut.png', 'cut off'),
        ('huge.png', '400x300 pixels are more than 100000'),
        ('damaged.png', 'failed to load image'),
    ):
        (line,) = [line for line in error.splitlines() if line.startswith(f'unreadable: {folder / name}: ')]
        assert reason in line
    assert 'error: 6 images could not be exported' in error
    assert [record['id'] for record in FeatureDataset(out).records] == ['good.jpg']
    assert len((out / 'unreadable.jsonl').read_text().splitlines()) == 6
    # Fixed, they are exported by the next run alone.
    for name in ('cut.jpg', 'empty.png', 'text.jpg', 'sub/cut.png', 'huge.png', 'damaged.png'):
        (folder / name).write_bytes(whole if name.endswith('png') else good)
    assert tool.main(command) == 0
    assert '6 images exported' in capsys.readouterr().out
    assert not (out / 'unreadable.jsonl').exists()


def test_the_bound_on_pixels_is_the_one_asked_for(tmp_path, monkeypatch) -> None:
    """PIL has one too, lower than what may be asked for."""
    Image.new('RGB', (40, 30)).save(tmp_path / 'x.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10)
    check_readable(str(tmp_path / 'x.png'), 1200)
    with pytest.raises(UnreadableImage, match='40x30 pixels are more than 1199'):
        check_readable(str(tmp_path / 'x.png'), 1199)
    assert Image.MAX_IMAGE_PIXELS == 10


@pytest.mark.slow
def test_processes_share_the_images(models, tmp_path, shapes, environment, export, free_port) -> None:
    folder = shapes / 'ade20k' / 'images' / 'training'
    (tmp_path / 'in').mkdir()
    for path in folder.iterdir():
        (tmp_path / 'in' / path.name).write_bytes(path.read_bytes())
    (tmp_path / 'in' / 'broken.jpg').write_bytes(b'x')
    command = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--nproc_per_node=2',
        f'--master_port={free_port}',
        TOOL,
        *models['mmseg'],
        tmp_path / 'in',
        '--out',
        tmp_path / 'out',
        '--launcher',
        'pytorch',
        '--workers',
        '0',
    ]
    result = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode != 0 and 'error: 1 images could not be exported' in result.stderr
    assert '12 images exported' in result.stdout
    export(folder, tmp_path / 'alone')
    shared, alone = FeatureDataset(tmp_path / 'out'), FeatureDataset(tmp_path / 'alone')
    assert [record['id'] for record in shared.records] == [record['id'] for record in alone.records]
    for index in range(12):
        assert torch.allclose(shared.maps(index)[3], alone.maps(index)[3], rtol=1e-4, atol=1e-5)


def test_processes_wait_for_slow_ones(monkeypatch) -> None:
    for name, value in dict(RANK='0', WORLD_SIZE='1', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1', MASTER_PORT='0').items():
        monkeypatch.setenv(name, value)
    with processes('pytorch', 'cpu'):
        group = torch.distributed.distributed_c10d._get_default_group()
        timeout = group._get_backend(torch.device('cpu')).options._timeout
        assert timeout >= timedelta(days=2)
    assert not torch.distributed.is_initialized()


def test_preview(tool, models, tmp_path, shapes) -> None:
    folder = shapes / 'ade20k' / 'images' / 'validation'
    command = [*models['mmseg'], str(folder), '--out', str(tmp_path / 'out'), '--workers', '0', '--preview']
    assert tool.main(command) == 0
    drawn = sorted((tmp_path / 'out' / 'previews').iterdir())
    assert len(drawn) == 4
    sheet = np.asarray(Image.open(drawn[0]).convert('RGB'))
    assert sheet.shape[1] > 5 * 300 and len(np.unique(sheet.reshape(-1, 3), axis=0)) > 1000
    before = [path.stat().st_mtime_ns for path in drawn]
    drawn[1].unlink()
    assert tool.main(command) == 0
    assert drawn[1].exists() and drawn[0].stat().st_mtime_ns == before[0]


def test_preview_of_images_that_vanished(export, tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / 'in').mkdir()
    for name, size in (('gone', (40, 40)), ('here', (40, 40)), ('large', (400, 300))):
        Image.new('RGB', size, 'red').save(tmp_path / 'in' / f'{name}.png')
    draw = features._draw_previews

    def drawing(*args):
        (tmp_path / 'in' / 'gone.png').unlink()
        monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 50_000)
        draw(*args)

    monkeypatch.setattr(features, '_draw_previews', drawing)
    assert export(tmp_path / 'in', tmp_path / 'out', preview=True).exported == 3
    drawn = {path.name for path in (tmp_path / 'out' / 'previews').iterdir()}
    assert drawn == {'here.png.png', 'large.png.png'}
    assert f'no preview of {tmp_path / "in" / "gone.png"}: ' in capsys.readouterr().err


def test_colours_of_a_large_map() -> None:
    """More values than torch.quantile takes."""
    ramp = torch.linspace(0, 1, 2400).expand(2400, 2400)
    colours = pca_colours(torch.stack([ramp, ramp.t() / 2, torch.zeros_like(ramp)]))
    assert colours.shape == (2400, 2400, 3) and colours[0, 0, 0] == 0 and colours[0, -1, 0] == 255


def test_pca_colours() -> None:
    ramp = torch.linspace(-1, 1, 20).expand(10, 20)
    features = torch.stack([5 * ramp, 2 * ramp.flip(1).square(), *torch.zeros(6, 10, 20)])
    colours = pca_colours(features)
    assert colours.shape == (10, 20, 3) and colours.dtype == np.uint8
    assert (np.diff(colours[0, :, 0].astype(int)) >= 0).all() and colours[0, 0, 0] == 0 and colours[0, -1, 0] == 255
    assert (colours[:, :, 2] == 128).all()
    assert (pca_colours(torch.ones(2, 3, 3)) == 128).all()


def test_inputs(models, shapes, tmp_path) -> None:
    cfg = load_config(models['mmdet'][0])
    folder = shapes / 'ade20k' / 'images'
    assert len(find_images(str(folder), cfg)) == 16
    assert {image.id.split('/')[0] for image in find_images(str(folder), cfg)} == {'training', 'validation'}
    (one,) = find_images(str(next((folder / 'training').iterdir())), cfg)
    assert one.id == os.path.basename(one.path)
    assert len(find_images(str(folder / '*' / '*_000000[01]1.jpg'), cfg)) == 3
    annotations = shapes / 'coco' / 'annotations' / 'instances_val2017.json'
    coco = find_images(str(annotations), cfg)
    assert [image.id for image in coco] == ['1000001', '1000002', '1000003', '1000004']
    assert coco == find_images(str(annotations), cfg, str(shapes / 'coco' / 'val2017'))
    assert [image.id for image in find_images('val', cfg)] == [image.id for image in coco]
    (tmp_path / 'bad.json').write_text('{}')
    for given, message in (
        ('nowhere', 'is no image, folder, pattern, COCO file or split'),
        (str(tmp_path / 'bad.json'), 'no file of COCO annotations'),
        (str(tmp_path), 'holds no images'),
        (str(tmp_path / '*.png'), 'holds no images'),
    ):
        with pytest.raises(CommandError, match=message):
            find_images(given, cfg)
    with pytest.raises(CommandError, match='goes with a COCO file'):
        find_images(str(folder), cfg, str(folder))


@pytest.mark.parametrize('name', ['../../secret.png', '/etc/secret.png', 'a/../../secret.png', 7])
def test_annotations_name_no_image_outside_their_folder(name, models, shapes, tmp_path) -> None:
    shutil.copytree(shapes / 'coco', tmp_path / 'coco')
    path = tmp_path / 'coco' / 'annotations' / 'instances_val2017.json'
    content = json.loads(path.read_text())
    content['images'][0]['file_name'] = name
    path.write_text(json.dumps(content))
    cfg = load_config(models['mmdet'][0])
    with pytest.raises(CommandError, match=re.escape(f'names the image {name!r}')):
        find_images(str(path), cfg)
    if isinstance(name, str):
        cfg.val_dataloader.dataset.data_root = f'{tmp_path}/coco/'
        with pytest.raises(CommandError, match=r'the annotations name the image .*secret\.png, which is not in'):
            find_images('val', cfg)


def test_bad_arguments(tool, models, tmp_path, shapes, capsys) -> None:
    config, checkpoint = models['mmseg']
    folder = str(shapes / 'ade20k' / 'images' / 'validation')
    out = ['--out', str(tmp_path / 'out')]
    (tmp_path / 'file').touch()
    (tmp_path / 'junk.pth').write_bytes(b'junk')
    torch.save({'state_dict': {'head.fc.weight': torch.zeros(2)}}, tmp_path / 'head.pth')
    for command, message in (
        ([config, 'nowhere.pth', folder, *out], 'checkpoint nowhere.pth does not exist'),
        ([config, str(tmp_path / 'junk.pth'), folder, *out], 'junk.pth'),
        ([config, str(tmp_path / 'head.pth'), folder, *out], 'head.pth'),
        (['nowhere.py', checkpoint, folder, *out], 'nowhere.py does not exist'),
        ([config, models['mmdet'][1], folder, '--neck', *out], 'neck: the model of the config'),
        ([config, checkpoint, folder, '--out', str(tmp_path / 'file')], 'is a file; name a folder'),
        ([config, checkpoint, folder, '--out', str(tmp_path / 'file' / 'x')], 'cannot be written'),
        ([config, checkpoint, folder, *out, '--levels', '4'], 'the model gives 4 maps, 0 to 3'),
        ([config, checkpoint, folder, *out, '--batch-size', '0'], 'batch_size must be at least 1'),
        ([config, checkpoint, folder, *out, '--launcher', 'pytorch'], 'torchrun'),
    ):
        assert message in fails(capsys, tool.main(command)), command
    if not torch.cuda.is_available():
        command = [config, checkpoint, folder, *out, '--device', 'cuda']
        assert 'no GPU is visible' in fails(capsys, tool.main(command))
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'device, message',
    [
        ('abacus', 'abacus is no device'),
        ('meta', 'meta is no device that can be used'),
        ('cuda:99', 'PyTorch sees 2 GPUs here, cuda:0 to cuda:1'),
    ],
)
def test_devices_that_are_not_there(device, message, models, export, tmp_path, shapes, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    folder = shapes / 'ade20k' / 'images' / 'validation'
    with pytest.raises(CommandError, match=message):
        export(folder, tmp_path / 'out', device=device)
    with pytest.raises(CommandError, match=message):
        next(visualize(VisualizeOptions('erf', *models['mmseg'], [str(folder)], str(tmp_path), device=device)))
    assert check_device('cuda:1') == torch.device('cuda:1') and check_device(None).type == 'cuda'


def test_checkpoint_of_another_model(models, tmp_path) -> None:
    cfg = load_config(models['mmdet'][0])
    with pytest.raises(CommandError, match=r'neck.lateral_convs.0.conv.weight \(32, 16, 1, 1\) is missing'):
        build_extractor(cfg, models['mmseg'][1], with_neck=True)
    with pytest.raises(CommandError, match='does not fit the model of the config'):
        build_model(cfg, models['mmseg'][1])


def test_features_beyond_float16(export, tmp_path, shapes, models) -> None:
    config, checkpoint = models['mmseg']
    weights = torch.load(checkpoint, weights_only=True)
    weights['state_dict']['backbone.norm0.bias'] = torch.full((16,), 1e6)
    torch.save(weights, tmp_path / 'large.pth')
    folder = str(shapes / 'ade20k' / 'images' / 'validation')
    options = ExportOptions(config, str(tmp_path / 'large.pth'), folder, str(tmp_path / 'out'), dtype='fp16')
    with pytest.raises(CommandError, match='beyond what float16 holds'):
        export_features(options)


def test_the_next_batch_is_read_while_one_is_computed(models, tmp_path, shapes, monkeypatch) -> None:
    check, compute, read = features.check_readable, features._compute, tmp_path / 'read'
    read.mkdir()

    def reading(path, max_pixels):
        (read / Path(path).name).touch()
        check(path, max_pixels)

    def computing(*args):
        deadline = time.monotonic() + 60
        while len(list(read.iterdir())) < 12 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(list(read.iterdir())) == 12
        return compute(*args)

    monkeypatch.setattr(features, 'check_readable', reading)
    monkeypatch.setattr(features, '_compute', computing)
    folder = str(shapes / 'ade20k' / 'images' / 'training')
    options = ExportOptions(*models['mmseg'], folder, str(tmp_path / 'out'), batch_size=6, workers=1)
    assert export_features(options).exported == 12


@pytest.mark.parametrize('shard_size', [0, 3])
def test_a_full_disk(shard_size, export, tmp_path, shapes) -> None:
    """Files end at a few kilobytes here."""
    folder = shapes / 'ade20k' / 'images' / 'validation'
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(CommandError, match='out cannot be written: .*File too large'):
            export(folder, tmp_path / 'out', shard_size=shard_size)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / 'out').rglob('*.part')) and not list((tmp_path / 'out').rglob('*.safetensors'))
    assert export(folder, tmp_path / 'out', shard_size=shard_size).exported == 4


@pytest.mark.parametrize('name', ['index.jsonl', 'unreadable.jsonl'])
def test_lists_that_cannot_be_written(name, export, tmp_path, shapes) -> None:
    (tmp_path / 'out' / name).mkdir(parents=True)
    with pytest.raises(CommandError, match=f'out cannot be written: .*{name}'):
        export(shapes / 'ade20k' / 'images' / 'validation', tmp_path / 'out')


def test_batches_are_of_one_size_and_few_wait() -> None:
    sizes = [1, 2, 1, 3, 4, 5, 6, 7, 8, 1, 9, 1]
    samples = [
        _Sample(InputImage(str(place), ''), dict(inputs=torch.zeros(3, size, 1))) for place, size in enumerate(sizes)
    ]
    seen = []
    for batch in batches(iter(samples), 2):
        assert len({sample.data['inputs'].shape for sample in batch}) == 1 and len(batch) <= 2
        seen += [sample.image.id for sample in batch]
    assert sorted(seen, key=int) == [str(place) for place in range(len(sizes))]
    assert seen[:2] == ['0', '2']


@pytest.mark.parametrize('id', ['a/b.jpg', '../x.png', 'ä b', '/etc/passwd', 'x' * 300, '..', '7', 'a//b'])
def test_file_names_stay_below_the_folder(id, tmp_path) -> None:
    path = (tmp_path / f'{file_name(id)}.safetensors').resolve()
    assert path.is_relative_to(tmp_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_records_say_what_the_files_hold(export, tmp_path, shapes) -> None:
    result = export(shapes / 'ade20k' / 'images' / 'validation', tmp_path / 'out')
    dataset = FeatureDataset(tmp_path / 'out')
    for index, record in enumerate(dataset.records):
        assert record['fingerprint'] == result.fingerprint and record['dtype'] == 'fp32'
        assert [level['shape'] for level in record['levels']] == [list(value.shape) for value in dataset.maps(index)]
        assert [level['stride'] for level in record['levels']] == [4, 8, 16, 32]
    settings = json.loads((tmp_path / 'out' / 'export.json').read_text())
    assert settings['levels'] == result.levels
