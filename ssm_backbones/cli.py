"""Command lines of ``tools/``: parse arguments, call the package's functions, print errors as one line."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from ssm_backbones.utils import mm
from ssm_backbones.utils.errors import CommandError
from ssm_backbones.utils.mm import DictAction
from ssm_backbones.utils.signals import interrupt_on_sigterm

# What to do about missing modules. A name that is not listed may be a module of the user's own, or anybody's package.
_REMEDIES = dict.fromkeys(('mmcv', 'mmdet', 'mmseg', 'mmpretrain'), mm.STACKS)
_REMEDIES |= {'mmengine': mm.REMEDY, 'PIL': 'pip install pillow', 'cv2': 'pip install opencv-python'}
_SAME_NAMES = (
    'matplotlib',
    'msgspec',
    'onnx',
    'onnxruntime',
    'onnxscript',
    'pycocotools',
    'tifffile',
    'timm',
    'torchvision',
)
_REMEDIES |= {name: f'pip install {name}' for name in _SAME_NAMES}
_CFG_OPTIONS_HELP = (
    'replace settings of the config: KEY=VALUE pairs, nested keys joined by dots; lists as KEY="[a,b]" or KEY=a,b, '
    'tuples within them as KEY="[(a,b),(c,d)]", quoted and without spaces'
)


def train_main(argv: Sequence[str] | None = None) -> int:
    """Run ``tools/train.py`` with the given or the process's arguments and return its exit status."""
    parser = argparse.ArgumentParser(description='Train a model from an mmpretrain, mmdet or mmseg config.')
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--work-dir', help="folder for logs and checkpoints (default: work_dirs/ and the config's name)"
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='PATH',
        help='resume from this checkpoint; without PATH, or with auto, from the latest one in the work dir, or if '
        "there is none start as without the option, from the config's load_from if it has one",
    )
    parser.add_argument('--amp', action='store_true', help='mixed precision: float16 on a GPU, bfloat16 on a CPU')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate from the config's base batch to the actual one",
    )
    parser.add_argument(
        '--detect-anomaly',
        action='store_true',
        help='stop at the first NaN or infinity and name the module and the iteration that made it; slower',
    )
    _add_common_arguments(parser)
    args = parser.parse_args(argv)

    def run() -> None:
        from ssm_backbones.engine.runner import TrainOptions, train

        train(TrainOptions(**_options(args)))

    return run_command(run)


def test_main(argv: Sequence[str] | None = None) -> int:
    """Run ``tools/test.py`` with the given or the process's arguments and return its exit status."""
    parser = argparse.ArgumentParser(description='Test a model from an mmpretrain, mmdet or mmseg config.')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument('--work-dir', help="folder for logs and metrics (default: work_dirs/ and the config's name)")
    parser.add_argument(
        '--out', help='dump the predictions: a .pkl file (mmpretrain, mmdet), a folder of label maps (mmseg)'
    )
    parser.add_argument('--show', action='store_true', help='show the predictions in windows')
    parser.add_argument('--show-dir', help='save images with the predictions drawn on them in this folder')
    parser.add_argument('--wait-time', type=float, default=2.0, help='seconds that each window stays (default: 2)')
    parser.add_argument('--tta', action='store_true', help="test-time augmentation: the config's, or else flipping")
    _add_common_arguments(parser)
    args = parser.parse_args(argv)

    def run() -> None:
        from ssm_backbones.engine.runner import TestOptions, test

        test(TestOptions(**_options(args)))

    return run_command(run)


train_main.__test__ = test_main.__test__ = False  # type: ignore[attr-defined]


def run_command(run: Callable[[], Any]) -> int:
    """Call a command and return its exit status.

    It is 2 after printing a :class:`CommandError` or the name of a package that is missing, 130 after Ctrl-C or
    SIGTERM, else 0. Either signal ends the processes that the command has started.
    """
    logging.basicConfig(format='%(levelname)s: %(message)s')
    # mmengine finds the libraries' own configs through pkg_resources, which warns each time that it is deprecated.
    warnings.filterwarnings('ignore', message='pkg_resources is deprecated')
    try:
        with interrupt_on_sigterm():
            run()
    except CommandError as error:
        print(f'error: {_without_worker_traceback(error)}', file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or '').partition('.')[0]
        # A part that is missing in a package that is there is an error of one of both.
        if not package or importlib.util.find_spec(package) is not None:
            raise
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if 'importlib' not in frame.filename]
        place = f'{frames[-1].filename}:{frames[-1].lineno}'
        own = f'{place} imports it; install it or, if it is a module of your own, put its folder into PYTHONPATH'
        remedy = _REMEDIES.get(package, own)
        print(f'error: this command needs {package}, which is not installed; {remedy}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        return 130
    return 0


def _add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, help=_CFG_OPTIONS_HELP)
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='launcher of the processes of a distributed run',
    )
    parser.add_argument(
        '--no-check',
        dest='check',
        action='store_false',
        help='do not check the data first (tools/check_data.py tells what the check finds)',
    )
    # torch.distributed.launch passes one spelling or the other; torchrun sets LOCAL_RANK instead.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    options = vars(args)
    os.environ.setdefault('LOCAL_RANK', str(options.pop('local_rank')))
    return options


def _without_worker_traceback(error: CommandError) -> str:
    # A DataLoader worker's error contains its traceback as text, which ends in the message.
    return str(error).rstrip().rpartition(f'{CommandError.__name__}: ')[2]
