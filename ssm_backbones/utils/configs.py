"""Find the configs that come with the package.

``_base_ = 'ssm_backbones::vmamba/mask-rcnn_vmamba-tiny_fpn_1x_coco.py'`` works in any folder, in every process that has
imported ``ssm_backbones`` when it reads the config, as this package's tools have. mmengine reads bases before
``custom_imports``, so a config for a host library's own tools imports the package on the way:
``_base_ = __import__('ssm_backbones').config_file('vmamba/mask-rcnn_vmamba-tiny_fpn_1x_coco.py')``.
"""

from __future__ import annotations

from pathlib import Path

from ssm_backbones.utils.errors import did_you_mean

PACKAGE = 'ssm_backbones'
_FOLDER = Path(__file__).resolve().parents[1]


def config_folder() -> Path:
    """Return the folder of the configs: ``.mim/configs`` in an installed package, else the checkout's ``configs``.

    Raises:
        FileNotFoundError: If neither exists.
    """
    for folder in (_FOLDER / '.mim' / 'configs', _FOLDER.parent / 'configs'):
        if (folder / '_base_').is_dir():
            return folder
    raise FileNotFoundError(f'{_FOLDER} was installed without configs; reinstall the package with pip')


def config_file(name: str) -> str:
    """Return the path of one of the package's configs.

    Args:
        name: Path below the folder of configs, e.g. ``'vmamba/vmamba-tiny_8xb128_in1k.py'``.

    Raises:
        FileNotFoundError: If no config has that name.
    """
    folder = config_folder()
    path = folder / name
    if not path.is_file():
        known = [str(file.relative_to(folder)) for file in folder.rglob('*.py')]
        raise FileNotFoundError(
            f'{PACKAGE} has no config {name!r}{did_you_mean(name, known)}. The configs are in {folder}.'
        )
    return str(path)
