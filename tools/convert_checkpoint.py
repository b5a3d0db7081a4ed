#!/usr/bin/env python
"""Convert an official checkpoint to one that configs of this package load, or back."""

import argparse
import sys
from collections.abc import Sequence

from ssm_backbones.cli import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these arguments (the process's by default) and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='The family and the variant are recognised from the tensors. A classifier becomes an mmpretrain '
        "checkpoint; in a detector's or segmentor's the backbone is converted and the rest passed through.",
    )
    parser.add_argument('source', metavar='SRC', help='checkpoint: a file or a URL')
    parser.add_argument('destination', metavar='DST', help='file to write')
    parser.add_argument('--to-official', action='store_true', help='SRC is ours: give it the official names back')
    parser.add_argument('--backbone-only', action='store_true', help='write the bare backbone alone')
    parser.add_argument(
        '--weights',
        default='auto',
        metavar='WHICH',
        help='auto (the main weights), raw, ema (the moving averages), or the name of a set in the file; default: auto',
    )
    parser.add_argument(
        '--in-channels',
        type=int,
        metavar='N',
        help='adapt the stem to images of N channels: the old channels are repeated in turn, scaled by 3 / N',
    )
    parser.add_argument('--overwrite', action='store_true', help='replace DST if it exists')
    args = parser.parse_args(argv)
    if args.to_official and (args.backbone_only or args.weights != 'auto' or args.in_channels is not None):
        parser.error('--to-official takes the file as it is: no --backbone-only, --weights or --in-channels')

    def run() -> None:
        from ssm_backbones.checkpoints import convert_file, restore_file

        if args.to_official:
            report = restore_file(args.source, args.destination, overwrite=args.overwrite)
        else:
            report = convert_file(
                args.source,
                args.destination,
                overwrite=args.overwrite,
                weights=args.weights,
                backbone_only=args.backbone_only,
                in_channels=args.in_channels,
            )
        print(f'{report}\nwritten: {args.destination}')

    return run_command(run)


if __name__ == '__main__':
    sys.exit(main())
