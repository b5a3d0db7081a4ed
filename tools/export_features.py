#!/usr/bin/env python
"""Write the feature maps of images to files, for other heads to be trained on."""

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
        epilog="Images are read and prepared by the config's own test pipeline and data preprocessor. With OpenCV, "
        'the default reader: images of 16 bits a channel are read at 8, grey ones into three equal channels, and an '
        'alpha channel is dropped. Records say where the maps of a resized, cropped, padded or mirrored image lie on '
        'it; other transforms that move pixels are rejected. Started again in the same folder, existing maps are not '
        'computed again. Exit status: 0, or 2 where anything could not be exported.',
    )
    parser.add_argument('config', help='config file of mmpretrain, mmdet or mmseg')
    parser.add_argument('checkpoint', help="the model's checkpoint, or its backbone's, official ones too")
    parser.add_argument('input', help='an image, a folder, a pattern, a COCO file (.json), or train, val or test')
    parser.add_argument('--out', required=True, metavar='DIR', help='folder to write to')
    parser.add_argument('--image-folder', metavar='DIR', help='where the images of a COCO file lie')
    parser.add_argument('--neck', action='store_true', help="the maps of the model's neck, instead of the backbone's")
    parser.add_argument('--levels', nargs='+', type=int, metavar='N', help='which maps, from 0 on (default: all)')
    parser.add_argument('--dtype', choices=['fp32', 'fp16', 'bf16'], default='fp32', help='of the files')
    parser.add_argument('--shard-size', type=int, default=0, metavar='N', help='images a file (default: one each)')
    parser.add_argument('--batch-size', type=int, default=8, metavar='N', help='images computed at once (8)')
    parser.add_argument('--workers', type=int, default=2, metavar='N', help='processes that read images (2)')
    parser.add_argument('--device', help='cpu, cuda or cuda:1 (default: a GPU where there is one)')
    parser.add_argument('--max-pixels', type=int, default=100_000_000, metavar='N', help='largest image to read')
    parser.add_argument('--preview', action='store_true', help='also draw each level as colours beside the image')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, help='KEY=VALUE for the config')
    parser.add_argument('--launcher', choices=['none', 'pytorch'], default='none', help='pytorch: torchrun started us')
    args = parser.parse_args(argv)

    def run() -> None:
        from ssm_backbones.features.export import ExportOptions, export_features
        from ssm_backbones.features.store import UNREADABLE

        result = export_features(ExportOptions(**vars(args)))
        if os.environ.get('RANK', '0') != '0' and args.launcher != 'none':
            return
        kept = f', {result.kept} were there already' if result.kept else ''
        print(f'{result.exported} images exported to {args.out}{kept}')
        for level in result.levels:
            print(f'  {level["name"]}: stride {level["stride"]}, {level["channels"]} channels, {args.dtype}')
        if result.unreadable:
            for failure in result.unreadable:
                print(f'unreadable: {failure["path"]}: {failure["reason"]}', file=sys.stderr)
            raise CommandError(
                f'{len(result.unreadable)} images could not be exported; they are listed above and in '
                f'{os.path.join(args.out, UNREADABLE)}.'
            )

    return run_command(run)


if __name__ == '__main__':
    sys.exit(main())
