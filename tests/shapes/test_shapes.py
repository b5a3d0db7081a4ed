"""Generating on disk: the same bytes each time, complete or not at all, never over something else."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from ssm_backbones.shapes import generate as shapes
from ssm_backbones.shapes import writers
from ssm_backbones.shapes.generate import FORMATS, make_shapes
from ssm_backbones.shapes.options import ShapesOptions

REPOSITORY = Path(__file__).parents[2]
TOOL = REPOSITORY / 'tools' / 'make_shapes.py'
FEW = ShapesOptions(seed=3, train=4, val=2, size=(64, 80))


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_the_same_bytes_each_time(root: Path, options: ShapesOptions, tmp_path: Path) -> None:
    assert make_shapes(tmp_path, options) == {name: True for name in FORMATS}
    assert _files(tmp_path) == _files(root)


def test_an_image_does_not_depend_on_how_many_there_are(root: Path, options: ShapesOptions, tmp_path: Path) -> None:
    fewer = ShapesOptions(options.seed, train=5, val=3, size=options.size, max_size=options.max_size)
    make_shapes(tmp_path, fewer)
    all_files, some_files = _files(root), _files(tmp_path)
    images = [name for name in some_files if not name.endswith(('.json', '.lock'))]
    assert len(images) == 8 * 4 + 1
    assert all(some_files[name] == all_files[name] for name in images)
    for split in ('train', 'val'):
        few, many = (
            json.loads((folder / f'coco/annotations/instances_{split}2017.json').read_text())['annotations']
            for folder in (tmp_path, root)
        )
        assert few == many[: len(few)]


def test_a_second_run_does_nothing(tmp_path: Path) -> None:
    make_shapes(tmp_path, FEW)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*.*') if path.name != '.lock'}
    lines: list[str] = []
    assert make_shapes(tmp_path, FEW, report=lines.append) == {name: False for name in FORMATS}
    assert lines == [f'{tmp_path / name}: complete already' for name in FORMATS]
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*.*') if path.name != '.lock'}


def test_a_format_can_be_added_later(tmp_path: Path) -> None:
    make_shapes(tmp_path, FEW, ['coco'])
    assert sorted(path.name for path in tmp_path.iterdir()) == ['.lock', 'coco']
    assert make_shapes(tmp_path, FEW, ['coco', 'imagenet']) == {'coco': False, 'imagenet': True}


def test_other_options_at_the_target_are_an_error_that_names_them(tmp_path: Path) -> None:
    make_shapes(tmp_path, FEW, ['coco'])
    before = _files(tmp_path)
    other = ShapesOptions(seed=4, train=4, val=2, size=(64, 80))
    with pytest.raises(FileExistsError, match=r'coco was made with other options: seed is 3, asked for 4; remove it'):
        make_shapes(tmp_path, other, ['ade20k', 'coco'])
    assert _files(tmp_path) == before
    assert make_shapes(tmp_path, other, ['coco'], overwrite=True) == {'coco': True}
    assert _files(tmp_path) != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ['.lock', 'coco']


def test_another_version_of_the_generator_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shapes(tmp_path, FEW, ['imagenet'])
    monkeypatch.setattr(shapes, 'VERSION', shapes.VERSION + 1)
    with pytest.raises(FileExistsError, match='version is'):
        make_shapes(tmp_path, FEW, ['imagenet'])


def test_missing_files_are_noticed(tmp_path: Path) -> None:
    make_shapes(tmp_path, FEW, ['coco'])
    next((tmp_path / 'coco/val2017').iterdir()).unlink()
    with pytest.raises(FileExistsError, match='damaged: 7 files instead of 8'):
        make_shapes(tmp_path, FEW, ['coco'])


@pytest.mark.parametrize('overwrite', [False, True])
@pytest.mark.parametrize('content', ['photo.jpg', 'manifest.json'])
def test_what_others_made_is_never_touched(tmp_path: Path, overwrite: bool, content: str) -> None:
    theirs = tmp_path / 'coco' / content
    theirs.parent.mkdir()
    theirs.write_text('{"name": "mine"}')
    with pytest.raises(FileExistsError, match='was not made by this generator'):
        make_shapes(tmp_path, FEW, overwrite=overwrite)
    assert _files(tmp_path / 'coco') == {content: b'{"name": "mine"}'}
    assert not (tmp_path / 'ade20k').exists()


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / 'coco').mkdir()
    assert make_shapes(tmp_path, FEW, ['coco']) == {'coco': True}
    assert (tmp_path / 'coco/manifest.json').is_file()
    assert not (tmp_path / '.coco.old').exists()


@pytest.mark.parametrize('error', [KeyboardInterrupt(), OSError(28, 'No space left on device')])
@pytest.mark.parametrize('there_before', [False, True])
def test_an_interruption_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, there_before: bool
) -> None:
    if there_before:
        make_shapes(tmp_path, FEW, ['coco'])
    before = _files(tmp_path)
    save, saved = writers._save_image, []

    def save_three(image: object, path: Path) -> None:
        if len(saved) == 3:
            raise error
        saved.append(path)
        save(image, path)

    monkeypatch.setattr(writers, '_save_image', save_three)
    with pytest.raises(type(error)):
        make_shapes(tmp_path, FEW, ['coco'], overwrite=there_before)
    assert len(saved) == 3
    assert {name: data for name, data in _files(tmp_path).items() if name != '.lock'} == {
        name: data for name, data in before.items() if name != '.lock'
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == (['.lock', 'coco'] if there_before else ['.lock'])


def _start(root: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(TOOL), str(root), *arguments],
        env={'PYTHONPATH': str(REPOSITORY), 'PATH': ''},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for(condition: object, process: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, 'nothing was written within a minute'
        time.sleep(0.02)


def test_a_killed_run_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    process = _start(tmp_path, '--train', '100000', '--formats', 'coco')
    partial = tmp_path / '.coco.partial' / 'train2017'
    _wait_for(lambda: partial.is_dir() and len(list(partial.iterdir())) > 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['.coco.partial', '.lock']
    make_shapes(tmp_path, FEW, ['coco'])
    assert sorted(path.name for path in tmp_path.iterdir()) == ['.lock', 'coco']
    assert len(list((tmp_path / 'coco/train2017').iterdir())) == FEW.train


@pytest.mark.slow
def test_a_second_process_waits_for_the_first(tmp_path: Path) -> None:
    arguments = ('--train', '600', '--val', '1', '--size', '64', '64', '--formats', 'coco')
    first = _start(tmp_path, *arguments)
    _wait_for(lambda: (tmp_path / '.coco.partial').is_dir(), first)
    lines: list[str] = []
    options = ShapesOptions(train=600, val=1, size=(64, 64))
    assert make_shapes(tmp_path, options, ['coco'], report=lines.append) == {'coco': False}
    assert first.communicate()[0].splitlines()[0] == f'{tmp_path / "coco"}: writing 600 + 1 images'
    assert first.returncode == 0
    assert 'waiting for another process' in lines[0]


def test_the_command_makes_what_the_function_makes(tmp_path: Path) -> None:
    process = _start(
        tmp_path / 'new' / 'command',
        *('--seed 3 --train 4 --val 2 --size 64 80 --max-size 70 90 --formats ade20k coco'.split()),
    )
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    make_shapes(tmp_path / 'function', ShapesOptions(3, 4, 2, (64, 80), (70, 90)), ['coco', 'ade20k'])
    assert _files(tmp_path / 'new' / 'command') == _files(tmp_path / 'function')
    assert [line.split(':')[0] for line in output.splitlines()] == [
        str(tmp_path / 'new' / 'command' / name) for name in ('ade20k', 'ade20k', 'coco', 'coco')
    ]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--train', '0'], 'error: train has to be from 1 to 1000000, not 0'),
        (['--val', '-3'], 'error: val has to be from 1 to 1000000, not -3'),
        (['--seed', '-1'], 'error: seed has to be from 0 to 4294967295, not -1'),
        (['--size', '10', '100'], 'error: size: height has to be from 64 to 4096, not 10'),
        (['--size', '100', '9999'], 'error: size: width has to be from 64 to 4096, not 9999'),
        (['--max-size', '100', '200'], 'error: max_size (100, 200) has to be at least size (128, 160)'),
        (['--formats', 'coco', 'voc'], "error: unknown format 'voc'; known are coco, ade20k, imagenet"),
    ],
)
def test_bad_options_are_clear_errors(
    tool: ModuleType, tmp_path: Path, capsys, arguments: list[str], message: str
) -> None:
    assert tool.main([str(tmp_path / 'new'), *arguments]) == 2
    assert capsys.readouterr().err == message + '\n'
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize('arguments', [['--train', 'many'], ['--size', '64'], ['--formats'], ['--colour', 'red']])
def test_malformed_options_are_usage_errors(tool: ModuleType, tmp_path: Path, capsys, arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match='2'):
        tool.main([str(tmp_path / 'new'), *arguments])
    assert arguments[0] in capsys.readouterr().err
    assert not (tmp_path / 'new').exists()


def test_a_file_as_root_is_a_clear_error(tool: ModuleType, tmp_path: Path, capsys) -> None:
    (tmp_path / 'file').write_text('')
    assert tool.main([str(tmp_path / 'file')]) == 2
    assert capsys.readouterr().err == f'error: {tmp_path / "file"} is a file; name a folder\n'
    assert tool.main([str(tmp_path / 'file' / 'below')]) == 2
    assert 'Not a directory' in capsys.readouterr().err


@pytest.mark.parametrize('formats', [[], 'coco'])
def test_formats_have_to_be_a_list(tmp_path: Path, formats: object) -> None:
    with pytest.raises(ValueError, match='formats has to be a list'):
        make_shapes(tmp_path, FEW, formats)


@pytest.mark.parametrize(
    'options', [{'train': 2.0}, {'seed': '1'}, {'val': True}, {'size': 128}, {'size': (64, 64, 3)}, {'size': (64, 6e2)}]
)
def test_options_of_a_wrong_type_are_errors(options: dict) -> None:
    with pytest.raises(TypeError, match=next(iter(options))):
        ShapesOptions(**options)


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        'import sys, types; package = types.ModuleType("ssm_backbones"); package.__path__ = ["ssm_backbones"];'
        'sys.modules["ssm_backbones"] = package; import ssm_backbones.shapes;'
        'print([name for name in ("numpy", "torch", "mmengine", "PIL") if name in sys.modules])'
    )
    done = subprocess.run([sys.executable, '-c', code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'
