"""The figures' command line: what it draws is what the library computes, and bad input ends in one line."""

from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from ssm_backbones.apis.config import load_config
from ssm_backbones.apis.model import build_model
from ssm_backbones.utils.errors import CommandError
from ssm_backbones.visualization import activation_maps, draw_erf_before_and_after, figures, receptive_field
from ssm_backbones.visualization import plots as drawing

TOOL = Path(__file__).resolve().parents[2] / 'tools' / 'visualize.py'
FAMILIES = {
    'mmdet': "model = dict(backbone=dict(type='VMamba', arch='test'))",
    'mmseg': "model = dict(backbone=dict(type='Mamba2D', arch='test'))",
    'mmpretrain': "model = dict(backbone=dict(type='V2M', arch='test', out_indices=(3, ), _delete_=True), "
    'head=dict(in_channels=16))',
}


@pytest.fixture(scope='module')
def models(write_config, tmp_path_factory):
    """A config and a checkpoint of each host library, each of another family."""
    folder = tmp_path_factory.mktemp('models')
    made = {}
    for host, changes in FAMILIES.items():
        config = str(write_config(host, changes))
        torch.manual_seed(1)
        torch.save({'state_dict': build_model(load_config(config), None).state_dict()}, folder / f'{host}.pth')
        made[host] = (config, str(folder / f'{host}.pth'))
    return made


@pytest.fixture(scope='module')
def image_folder(tmp_path_factory):
    """A folder of three images, one of another size."""
    folder = tmp_path_factory.mktemp('images')
    random = np.random.default_rng(0)
    for name, size in (('a.png', (64, 80)), ('b.jpg', (64, 80)), ('c.png', (48, 50))):
        Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).save(folder / name)
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """What reaches the drawing functions, which draw all the same."""
    calls = []

    def keep(original, *args):
        calls.append(args)
        original(*args)

    for name in ('draw_receptive_fields', 'draw_activation_maps', 'draw_scan_response'):
        monkeypatch.setattr(figures, name, partial(keep, getattr(drawing, name)))
    return calls


def written(folder: Path) -> list[str]:
    """The names of the figures in a folder, all of which are whole images."""
    for path in folder.iterdir():
        with Image.open(path) as image:
            assert image.format == 'PNG' and image.convert('RGB').getextrema() != ((255, 255),) * 3
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize('host', FAMILIES)
def test_erf(host, tool, models, image_folder, drawn, tmp_path, capsys) -> None:
    config, checkpoint = models[host]
    command = ['erf', config, checkpoint, '--img', str(image_folder / 'a.png'), str(image_folder / 'b.jpg')]
    assert tool.main([*command, '--out', str(tmp_path / 'new'), '--size', '48', '64', '--device', 'cpu']) == 0
    name = f'{Path(config).stem}_erf.png'
    assert written(tmp_path / 'new') == [name]
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / 'new' / name)]
    ((fields, _, heading),) = drawn
    assert list(fields) == ['before training', 'after training'] and 'mean of 2 images of 64x48' in heading
    # The trained one is that of the checkpoint's weights, on the normalised image.
    cfg = load_config(config)
    backbone = build_model(cfg, checkpoint).backbone
    images = []
    for name in ('a.png', 'b.jpg'):
        pixels = cv2.resize(cv2.imread(str(image_folder / name)), (64, 48))[:, :, ::-1]
        settings = cfg.model.get('data_preprocessor') or cfg.data_preprocessor
        mean, std = (torch.tensor(settings[key]).view(3, 1, 1) for key in ('mean', 'std'))
        images.append((torch.from_numpy(pixels.copy()).permute(2, 0, 1) - mean) / std)
    expected = receptive_field(backbone, torch.stack(images))
    np.testing.assert_allclose(fields['after training'].field, expected.field, rtol=1e-3, atol=1e-7)
    assert abs(fields['before training'].field - expected.field).max() > 0.1 * expected.field.max()


def test_random_weights_are_those_of_the_seed(models, image_folder, tmp_path) -> None:
    config, checkpoint = models['mmseg']
    before = torch.get_rng_state()
    first, second, third = (
        draw_erf_before_and_after(
            load_config(config), checkpoint, [image_folder / 'a.png'], tmp_path / f'{number}.png', seed=seed, stage=0
        )
        for number, seed in enumerate((0, 0, 1))
    )
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(first[0].field, second[0].field)
    assert (first[0].field != third[0].field).any()
    np.testing.assert_array_equal(first[1].field, third[1].field)
    assert first[1].field.shape == (64, 80) and len(written(tmp_path)) == 3


@pytest.mark.parametrize('host', FAMILIES)
def test_activation(host, tool, models, image_folder, drawn, tmp_path) -> None:
    config, checkpoint = models[host]
    command = ['activation', config, checkpoint, '--img', str(image_folder), '--out', str(tmp_path), '--device', 'cpu']
    options = {
        'mmdet': [],
        'mmseg': ['--kind', 'pca', '--stages', '0', '-1'],
        'mmpretrain': ['--channels', '3', '15', '--stages', '2'],
    }[host]
    assert tool.main([*command, *options]) == 0
    assert written(tmp_path) == [f'{Path(config).stem}_{name}_activation.png' for name in 'abc']
    shapes = [{name: value.shape for name, value in maps.items()} for _, maps, *_ in drawn]
    if host == 'mmdet':
        # Its pipeline resizes to 64x64 at most, keeping the proportions; what it pads is no image.
        assert shapes[0].keys() == {f'stage {i}' for i in range(4)}
        assert all(call[1]['stage 0'].shape == tuple(-(-side // 4) for side in call[0].shape[:2]) for call in drawn)
        assert drawn[0][2] == [4, 8, 16, 32]
    elif host == 'mmseg':
        assert shapes[0] == {'stage 0': (16, 20, 3), 'stage 3': (2, 3, 3)}
        assert shapes[2]['stage 0'][:2] == (12, 12)
    else:
        assert shapes == [{'block 2': (2, 4, 5)}] * 2 + [{'block 2': (2, 3, 4)}]
        with Image.open(image_folder / 'a.png') as opened:
            np.testing.assert_array_equal(drawn[0][0], np.asarray(opened))


@pytest.mark.parametrize('host', FAMILIES)
def test_scan_response(host, tool, models, image_folder, drawn, tmp_path) -> None:
    config, checkpoint = models[host]
    command = ['scan-response', config, checkpoint, '--img', str(image_folder / 'a.png'), '--out', str(tmp_path)]
    place = ['--stage', '0', '--point', '39', '20', '--size', '32', '48']
    assert tool.main([*command, *place, '--sense', 'feeds']) == 0
    ((shown, response, stride, _, heading),) = drawn
    assert shown.shape == (32, 48, 3)
    assert stride == (16 if host == 'mmpretrain' else 4) and response.point == (20 // stride, 39 // stride)
    assert response.sense == 'feeds' and 'feeds' in heading
    assert len(response.names) == (1 if host == 'mmseg' else 4)
    place = {'mmdet': 'stage0', 'mmseg': 'stage0-block1', 'mmpretrain': 'block0'}[host]
    assert written(tmp_path) == [f'{Path(config).stem}_a_scan-response-{place}.png']


@pytest.mark.parametrize('figure', ['erf', 'activation', 'scan-response'])
def test_out_may_be_the_file_of_the_only_figure(figure, tool, models, image_folder, tmp_path, capsys) -> None:
    out = tmp_path / 'new' / 'figure.png'
    command = [figure, *models['mmseg'], '--img', str(image_folder / 'a.png'), '--out', str(out), '--device', 'cpu']
    assert tool.main(command) == 0
    assert written(out.parent) == ['figure.png'] and capsys.readouterr().out.splitlines() == [str(out)]


def test_activation_values(models, image_folder) -> None:
    config, checkpoint = models['mmdet']
    backbone = build_model(load_config(config), checkpoint).backbone
    image = torch.randn(1, 3, 40, 56)
    kept = {}
    backbone.stages[1].blocks[-1].register_forward_hook(lambda module, given, result: kept.update(map=result[0]))
    norm = activation_maps(backbone, image, [1])[1]
    expected = kept['map'].permute(2, 0, 1)
    np.testing.assert_allclose(norm, expected.square().sum(0).sqrt(), rtol=1e-5)
    np.testing.assert_allclose(activation_maps(backbone, image, [-3], 'mean')[1], expected.abs().mean(0), rtol=1e-5)
    channels = activation_maps(backbone, image, [1], channels=[5, 0])[1]
    np.testing.assert_allclose(channels, expected[[5, 0]], rtol=1e-5)


def test_bad_input(tool, models, image_folder, tmp_path, capsys, monkeypatch) -> None:
    config, checkpoint = models['mmseg']
    good = str(image_folder / 'a.png')
    (tmp_path / 'cut.png').write_bytes((image_folder / 'a.png').read_bytes()[:2000])
    (tmp_path / 'words.png').write_text('no image')
    (tmp_path / 'file').write_text('')
    Image.new('RGB', (64, 80)).save(tmp_path / 'a.png')
    out = tmp_path / 'out'
    for figure, arguments, message in (
        (
            'erf',
            ['--img', good, str(image_folder / 'c.png')],
            'c.png reach the model in different sizes, 80x64 and 50x48, and',
        ),
        (
            'erf',
            ['--img', good, '--stage', '4'],
            'stage 4 does not exist: the Mamba2D that was built has stages 0 to 3',
        ),
        ('erf', ['--img', good, '--size', '0', '9'], 'size must be at least 1 1, got 0 9'),
        ('activation', ['--img', good, '--stages', '-5'], 'stage -5 does not exist'),
        (
            'activation',
            ['--img', good, '--channels', '16', '--stages', '0'],
            'channel 16 does not exist: stage 0 has channels 0 to 15',
        ),
        ('activation', ['--img', str(tmp_path / 'cut.png')], 'cut.png cannot be read: the file is cut off'),
        ('activation', ['--img', str(tmp_path / 'words.png')], 'words.png cannot be read: no image, or damaged'),
        ('activation', ['--img', 'nothing.png'], 'nothing.png is no image, folder, pattern'),
        ('activation', ['--img', good, '--max-pixels', '100'], '80x64 pixels are more than 100 (max_pixels)'),
        ('activation', ['--img', good, str(tmp_path / 'a.png')], 'would be drawn into one file, as both are called a'),
        ('activation', ['--img', good, '--limit', '0'], 'limit must be at least 1'),
        ('activation', ['--img', good, '--device', 'abacus'], 'device abacus is no device'),
        (
            'scan-response',
            ['--img', good, '--stage', '3'],
            'stage 3 mixes by RotaryAttention, which has no scan; stages that scan: 0, 1',
        ),
        ('scan-response', ['--img', good, '--block', '5'], 'block 5 does not exist: stage 1 has'),
        (
            'scan-response',
            ['--img', good, '--point', '80', '0'],
            'row 0, column 80 lie outside the image as the model is given it, which has 64 rows and 80 columns',
        ),
    ):
        assert tool.main([figure, config, checkpoint, *arguments, '--out', str(out)]) == 2, arguments
        error = capsys.readouterr().err
        assert message in error and len([line for line in error.splitlines() if line.startswith('error: ')]) == 1
        assert not out.exists() or list(out.iterdir()) == []
    command = ['activation', config, checkpoint, '--img', good, '--out']
    assert tool.main(['erf', config, 'gone.pth', '--img', good]) == 2
    assert 'checkpoint gone.pth does not exist' in capsys.readouterr().err
    assert tool.main([*command, str(tmp_path / 'x.jpg')]) == 2
    assert 'figures are PNG files; name a file that ends in .png, or a folder' in capsys.readouterr().err
    many = ['activation', config, checkpoint, '--img', str(image_folder), '--out', str(tmp_path / 'x.png')]
    assert tool.main(many) == 2
    assert 'x.png is the name of one file, and 3 figures are drawn' in capsys.readouterr().err
    assert not (tmp_path / 'x.jpg').exists() and not (tmp_path / 'x.png').exists()
    assert tool.main([*command, str(tmp_path / 'file')]) == 2
    assert 'is no folder that can be made' in capsys.readouterr().err
    assert tool.main([*command, str(tmp_path / 'file' / 'below')]) == 2
    assert 'is no folder that can be made' in capsys.readouterr().err
    monkeypatch.setattr('os.access', lambda *args: False)
    assert tool.main([*command, str(out)]) == 2
    assert 'cannot be written to' in capsys.readouterr().err
    assert tool.main(['erf', config, models['mmdet'][1], '--img', good, '--out', str(out)]) == 2


def test_what_cannot_be_finished_is_not_left(models, image_folder, tmp_path, monkeypatch) -> None:
    from matplotlib.figure import Figure

    def full(self, path, **options) -> None:
        Path(path).write_bytes(b'half')
        raise OSError(28, 'No space left on device')

    config, checkpoint = models['mmseg']
    (tmp_path / 'x.png').write_bytes(b'an earlier one')
    monkeypatch.setattr(Figure, 'savefig', full)
    image = image_folder / 'a.png'
    with pytest.raises(CommandError, match='No space left'):
        draw_erf_before_and_after(load_config(config), checkpoint, [image], tmp_path / 'x.png', stage=0)
    assert [path.name for path in tmp_path.iterdir()] == ['x.png']
    assert (tmp_path / 'x.png').read_bytes() == b'an earlier one'


def test_other_backbones_are_refused(tool, write_config, models, image_folder, tmp_path, capsys) -> None:
    config = write_config('mmseg', "model = dict(backbone=dict(type='ResNet', depth=18, _delete_=True))")
    torch.save({'state_dict': build_model(load_config(config), None).state_dict()}, tmp_path / 'resnet.pth')
    command = ['activation', str(config), str(tmp_path / 'resnet.pth'), '--img', str(image_folder / 'a.png')]
    assert tool.main([*command, '--out', str(tmp_path / 'out')]) == 2
    assert "the config's backbone is a ResNet; figures are of VMamba, V2M and Mamba2D alone" in capsys.readouterr().err
