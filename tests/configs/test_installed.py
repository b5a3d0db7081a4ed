"""What ``pip install .`` ships: configs and tools, from which configs in any other folder inherit.

The wheel is built as pip builds it but for the op library, which is taken from the checkout instead of compiled again.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.config.utils import _get_external_cfg_base_path, _get_package_and_cfg_path
from mmengine.utils import get_installed_path

from ssm_backbones import config_file
from ssm_backbones.utils.configs import config_folder

ROOT = Path(__file__).resolve().parents[2]
BASE = 'vmamba/mask-rcnn_vmamba-tiny_fpn_1x_coco.py'

INHERIT = """
import json
from mmengine.config import Config
from mmengine.config.utils import _get_external_cfg_base_path, _get_package_and_cfg_path
from mmengine.utils import get_installed_path

config = Config.fromfile('by_expression.py')
import ssm_backbones
from mmengine.hub import get_config

published = get_config('ssm_backbones::vmamba/vmamba-tiny_8xb128_in1k.py', pretrained=True)
print(json.dumps({
    'package': ssm_backbones.__file__,
    'by_expression': config.pretty_text,
    'by_name': Config.fromfile('by_name.py').pretty_text,
    'weights': published.model_path,
    'published': published.model.backbone.type,
}))
"""


def run(*argv: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """A command's result, whatever its exit status."""
    return subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=cwd,
        env={**os.environ, **environment},
        text=True,
        capture_output=True,
        check=False,
    )


@pytest.fixture(scope='module')
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which pip has installed the wheel."""
    folder = tmp_path_factory.mktemp('install')
    library = folder / 'lib' / 'cuda_ops'
    # Everything goes below the folder: a build in the checkout could find what an older one left.
    (folder / 'build.cfg').write_text(f'[build]\nbuild_lib={folder}/lib\n[egg_info]\negg_base={folder}\n')
    build = dict(DIST_EXTRA_CONFIG=str(folder / 'build.cfg'))
    steps = [run('setup.py', '-q', 'build_py', **build)]
    for name in ('_C.so', '_build_info.json'):
        if (ROOT / 'cuda_ops' / name).is_file():
            shutil.copyfile(ROOT / 'cuda_ops' / name, library / name)
    steps.append(
        run(
            'setup.py',
            '-q',
            'bdist_wheel',
            '--skip-build',
            '--dist-dir',
            folder,
            '--bdist-dir',
            folder / 'bdist',
            **build,
        )
    )
    (wheel,) = folder.glob('*.whl')
    site = folder / 'site'
    steps.append(run('-m', 'pip', 'install', '-q', '--no-deps', '--no-index', '--target', site, wheel))
    for step in steps:
        assert step.returncode == 0, step.stdout + step.stderr
    return site


@pytest.fixture(scope='module')
def inherited(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a process in an otherwise empty folder reads from the installed package."""
    folder = tmp_path_factory.mktemp('empty')
    change = 'model = dict(backbone=dict(drop_path_rate=0.5))\n'
    (folder / 'by_name.py').write_text(f"_base_ = 'ssm_backbones::{BASE}'\n{change}")
    (folder / 'by_expression.py').write_text(f"_base_ = __import__('ssm_backbones').config_file('{BASE}')\n{change}")
    result = run('-c', INHERIT, cwd=folder, PYTHONPATH=str(installed))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]) | {'folder': str(folder)}


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob('*')
        if path.is_file() and path.suffix != '.pyc'
    }


def test_configs_tools_and_index_are_shipped(installed) -> None:
    mim = installed / 'ssm_backbones' / '.mim'
    for folder in ('configs', 'tools'):
        assert files_below(mim / folder) == files_below(ROOT / folder)
    assert (mim / 'model-index.yml').read_bytes() == (ROOT / 'model-index.yml').read_bytes()


def test_type_checkers_may_read_the_annotations(installed) -> None:
    for package in ('cuda_ops', 'ssm_backbones'):
        assert (installed / package / 'py.typed').is_file()


def test_configs_in_any_folder_inherit_from_the_installed_ones(inherited, installed) -> None:
    assert Path(inherited['package']) == installed / 'ssm_backbones' / '__init__.py'
    expected = Config.fromfile(ROOT / 'configs' / BASE)
    expected.model.backbone.drop_path_rate = 0.5
    assert inherited['by_name'] == inherited['by_expression'] == expected.pretty_text


def test_mmengine_s_hub_finds_config_and_weights(inherited) -> None:
    assert inherited['published'] == 'VMamba'
    assert inherited['weights'].endswith('/vssm1_tiny_0230s_ckpt_epoch_264.pth')


def test_installed_tools_read_configs_of_any_folder(inherited, installed) -> None:
    tool = installed / 'ssm_backbones' / '.mim' / 'tools' / 'train.py'
    result = run(tool, 'by_name.py', cwd=Path(inherited['folder']), PYTHONPATH=str(installed))
    assert result.returncode != 0
    assert 'train_dataloader.dataset.data_root: data/coco/ does not exist' in result.stderr


def test_the_checkout_s_configs_are_found_by_name(tmp_path) -> None:
    assert config_folder() == ROOT / 'configs'
    config = tmp_path / 'mine.py'
    config.write_text(f"_base_ = ['ssm_backbones::{BASE}']\n")
    assert Config.fromfile(config).pretty_text == Config.fromfile(ROOT / 'configs' / BASE).pretty_text


def test_no_scope_of_its_own_reaches_what_is_built(tmp_path) -> None:
    config = tmp_path / 'mine.py'
    config.write_text("_base_ = 'ssm_backbones::vmamba/mask-rcnn_vmamba-tiny_fpn_ms-crop-3x_coco.py'\n")
    assert "_scope_='ssm_backbones'" not in Config.fromfile(config).pretty_text.replace(' ', '')


def test_an_unknown_config_is_named_with_the_nearest() -> None:
    with pytest.raises(
        FileNotFoundError,
        match=r"no config 'vmamba/vmamba-tiny_8xb12_in1k.py' \(did you mean 'vmamba/vmamba-tiny_8xb128_in1k.py'\?\)\.",
    ):
        config_file('vmamba/vmamba-tiny_8xb12_in1k.py')


def test_other_packages_configs_are_found_as_before(tmp_path) -> None:
    config = tmp_path / 'mine.py'
    config.write_text("_base_ = 'mmdet::_base_/default_runtime.py'\n")
    assert Config.fromfile(config).default_scope == 'mmdet'


@pytest.mark.parametrize(
    'name',
    [
        'mmdet::_base_/datasets/coco_instance.py',
        'mmseg::_base_/default_runtime.py',
        'mmpretrain::_base_/models/swin_transformer/tiny_224.py',
    ],
)
def test_the_shorter_way_to_a_base_leads_where_mmengine_s_does(name) -> None:
    package, path = _get_package_and_cfg_path(name)
    expected = _get_external_cfg_base_path(get_installed_path(package), path)
    assert Config._get_cfg_path(name, '') == (expected, name.partition('::')[0])


def test_a_base_that_is_nowhere_is_mmengine_s_to_refuse() -> None:
    with pytest.raises(FileNotFoundError, match='_base_/nothing.py'):
        Config._get_cfg_path('mmdet::_base_/nothing.py', '')
