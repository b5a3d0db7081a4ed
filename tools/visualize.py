#!/usr/bin/env python
"""Draw what a backbone sees: effective receptive fields, activation maps, or a pixel's response through a scan."""

import argparse
import sys
from collections.abc import Sequence

from ssm_backbones.cli import run_command
from ssm_backbones.utils.mm import DictAction

_STAGE = 'stage, from 0 on, or -1 for the last; blocks count as stages where all are of one resolution (V2M-T, V2M-S)'


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these arguments (the process's by default) and return the exit status."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument('config', help='config file of mmpretrain, mmdet or mmseg')
    common.add_argument('checkpoint', help="the model's checkpoint, or its backbone's, official ones too")
    common.add_argument(
        '--img',
        required=True,
        nargs='+',
        metavar='INPUT',
        help='images, folders, patterns, COCO files (.json), or train, val or test',
    )
    common.add_argument(
        '--out',
        default='work_dirs/visualize',
        metavar='DIR',
        help='folder for the PNG files (%(default)s), or for one figure a file that ends in .png',
    )
    common.add_argument('--limit', type=int, metavar='N', help='only the first N images')
    common.add_argument(
        '--size',
        nargs=2,
        type=int,
        metavar=('H', 'W'),
        help="resize images to this, instead of what the config's test pipeline does",
    )
    common.add_argument('--max-pixels', type=int, default=100_000_000, metavar='N', help='largest image to read')
    common.add_argument('--device', help='cpu, cuda or cuda:1 (default: a GPU where there is one)')
    common.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, help='KEY=VALUE for the config')

    parser = argparse.ArgumentParser(description=__doc__)
    figures = parser.add_subparsers(dest='figure', required=True, metavar='erf|activation|scan-response')
    erf = figures.add_parser(
        'erf',
        parents=[common],
        help='effective receptive field before and after training',
        description='Draw how strongly each pixel of an image reaches the centre of a feature map, averaged over the '
        'images, with random weights and with those of the checkpoint: heat maps, and the share of the contribution '
        'within centred squares.',
    )
    erf.add_argument('--stage', type=int, metavar='N', help=f'{_STAGE} (default: the last)')
    erf.add_argument('--seed', type=int, default=0, metavar='N', help='of the random weights (0)')
    activation = figures.add_parser(
        'activation',
        parents=[common],
        help='activation maps of stages over the image',
        description='Draw how large the features behind chosen stages are, pixel by pixel, over each image.',
    )
    activation.add_argument('--stages', nargs='+', type=int, metavar='N', help=f'{_STAGE} (default: all, or four)')
    what = activation.add_mutually_exclusive_group()
    what.add_argument(
        '--kind',
        choices=['norm', 'mean', 'pca'],
        default='norm',
        help='norm over the channels, mean magnitude, or three principal components as colours',
    )
    what.add_argument('--channels', nargs='+', type=int, metavar='N', help='single channels instead')
    response = figures.add_parser(
        'scan-response',
        parents=[common],
        help="a pixel's response to every other one through the scan",
        description='Draw the weights that a block\'s scan gives all pixels in the output of one, the "attention" of a '
        'state-space model: all routes, corners or directions together, and each alone.',
    )
    response.add_argument('--stage', type=int, metavar='N', help=f'{_STAGE} (default: stride 8, or the last block)')
    response.add_argument('--block', type=int, metavar='N', help='block of the stage (default: the last)')
    response.add_argument(
        '--point',
        nargs=2,
        type=int,
        metavar=('X', 'Y'),
        help="pixel of the image as the model is given it, as the figure's axes count (default: the middle)",
    )
    response.add_argument(
        '--sense',
        choices=['reads', 'feeds'],
        default='reads',
        help='what the pixel reads of all others, or feeds to them (reads)',
    )
    args = parser.parse_args(argv)

    def run() -> None:
        from ssm_backbones.visualization import VisualizeOptions, visualize

        for path in visualize(VisualizeOptions(**vars(args))):
            print(path)

    return run_command(run)


if __name__ == '__main__':
    sys.exit(main())
