#!/usr/bin/env python
"""Generate the shapes data set, in the formats of COCO, ADE20K and ImageNet."""

import argparse
import sys
from collections.abc import Sequence

from ssm_backbones.cli import run_command
from ssm_backbones.shapes.generate import FORMATS, make_shapes
from ssm_backbones.shapes.options import ShapesOptions
from ssm_backbones.utils.errors import CommandError


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these arguments (the process's by default) and return the exit status."""
    defaults = ShapesOptions()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('root', nargs='?', default='data/shapes', help="folder for the formats' folders")
    parser.add_argument('--seed', type=int, default=defaults.seed, help='another seed gives other images')
    parser.add_argument('--train', type=int, default=defaults.train, help='images to train on, for each format')
    parser.add_argument('--val', type=int, default=defaults.val, help='images to evaluate on, for each format')
    parser.add_argument(
        '--size', type=int, nargs=2, metavar=('H', 'W'), default=list(defaults.size), help='height and width in pixels'
    )
    parser.add_argument(
        '--max-size',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        default=argparse.SUPPRESS,
        help='draw the height and width of each image between --size and these',
    )
    parser.add_argument('--formats', nargs='+', metavar='FORMAT', default=list(FORMATS), help='which formats')
    parser.add_argument('--overwrite', action='store_true', help='replace what was made before')
    args = parser.parse_args(argv)

    def run() -> None:
        max_size = getattr(args, 'max_size', None)
        try:
            options = ShapesOptions(
                seed=args.seed,
                train=args.train,
                val=args.val,
                size=tuple(args.size),
                max_size=tuple(max_size) if max_size else None,
            )
            make_shapes(args.root, options, args.formats, args.overwrite, report=lambda line: print(line, flush=True))
        except (ValueError, OSError) as error:
            raise CommandError(str(error)) from error

    return run_command(run)


if __name__ == '__main__':
    sys.exit(main())
