#!/usr/bin/env python
"""Predict on images, folders or videos: drawn, and as a COCO file, label maps or a table."""

import argparse
import os
import sys
from collections.abc import Sequence

from ssm_backbones.cli import run_command
from ssm_backbones.utils.errors import CommandError
from ssm_backbones.utils.mm import DictAction


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these arguments (the process's by default) and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='A detector writes predictions.json (COCO, with scores), a segmentor labels/*.png (class indices with '
        'the palette), a classifier predictions.csv. Started again in the same folder, it goes on where it was '
        'interrupted. Exit status: 0, or 2 where any image could not be read.',
    )
    parser.add_argument('config', help='config file of mmdet, mmseg or mmpretrain')
    parser.add_argument('checkpoint', help="the model's checkpoint")
    parser.add_argument(
        'inputs',
        nargs='+',
        metavar='INPUT',
        help='images, folders, patterns, videos, a COCO file (.json), or train, val or test',
    )
    parser.add_argument('--out', required=True, metavar='DIR', help='folder to write to')
    parser.add_argument('--image-folder', metavar='DIR', help='where the images of a COCO file lie')
    parser.add_argument(
        '--window',
        nargs='+',
        type=int,
        metavar='N',
        help='predict on larger images by windows of this size: a side, or height and width',
    )
    parser.add_argument(
        '--overlap', type=int, metavar='N', help='of windows, at least the size of the largest object (a quarter)'
    )
    parser.add_argument('--score-thr', type=float, default=0.3, help='least score of objects that are drawn (0.3)')
    parser.add_argument('--no-draw', dest='draw', action='store_false', help='do not draw the predictions')
    parser.add_argument('--batch-size', type=int, default=8, metavar='N', help='images or windows at once (8)')
    parser.add_argument('--workers', type=int, default=2, metavar='N', help='processes that read images (2)')
    parser.add_argument('--device', help='cpu, cuda or cuda:1 (default: a GPU where there is one)')
    parser.add_argument('--max-pixels', type=int, default=100_000_000, metavar='N', help='largest image to read')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, help='KEY=VALUE for the config')
    parser.add_argument('--launcher', choices=['none', 'pytorch'], default='none', help='pytorch: torchrun started us')
    args = parser.parse_args(argv)

    def run() -> None:
        from ssm_backbones.prediction import PredictOptions, predict

        result = predict(PredictOptions(**vars(args)))
        if os.environ.get('RANK', '0') != '0' and args.launcher != 'none':
            return
        kept = f', {result.kept} were there already' if result.kept else ''
        print(f'predicted on {result.predicted} images{kept}')
        for path in result.files:
            print(f'  {path}')
        if result.unreadable:
            for failure in result.unreadable:
                print(f'unreadable: {failure["path"]}: {failure["reason"]}', file=sys.stderr)
            raise CommandError(
                f'{len(result.unreadable)} images could not be read; they are listed above and in '
                f'{args.out}/unreadable.jsonl.'
            )

    return run_command(run)


if __name__ == '__main__':
    sys.exit(main())
