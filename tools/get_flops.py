#!/usr/bin/env python
"""Count the parameters and FLOPs of a config's model."""

import argparse
import math
import sys
from collections.abc import Sequence

from ssm_backbones.cli import run_command
from ssm_backbones.utils.mm import DictAction


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these arguments (the process's by default) and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='The papers use 224 224 for classification, 800 1280 for detection and 512 2048 for segmentation. '
        'Nothing is downloaded, and no weights are loaded.',
    )
    parser.add_argument('config', help='config file of mmpretrain, mmdet or mmseg')
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        required=True,
        help='height and width of the image as the model gets it, padding included',
    )
    parser.add_argument(
        '--per-layer',
        type=int,
        nargs='?',
        const=math.inf,
        metavar='DEPTH',
        help='print a line for each module, down to DEPTH dots in its name; without it, all',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help='replace settings of the config, by dotted key',
    )
    args = parser.parse_args(argv)

    def run() -> None:
        from ssm_backbones.apis.config import load_config
        from ssm_backbones.flops import CONVENTION, config_complexity, human
        from ssm_backbones.utils.errors import CommandError

        if args.per_layer is not None and args.per_layer < 1:
            raise CommandError(f'--per-layer takes a depth of at least 1, got {args.per_layer}')
        height, width = args.shape
        complexity = config_complexity(load_config(args.config, args.cfg_options), height, width)
        if args.per_layer is not None:
            print(complexity.as_table(None if math.isinf(args.per_layer) else args.per_layer) + '\n')
        print(f'config: {args.config}\nimage: {height}x{width} (height x width)')
        print(f'parameters: {human(complexity.params)} ({complexity.params})')
        print(f'FLOPs: {human(complexity.flops)} ({complexity.flops})\n{CONVENTION}')

    return run_command(run)


if __name__ == '__main__':
    sys.exit(main())
