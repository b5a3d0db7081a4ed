#!/usr/bin/env python
"""Make a config for a folder of your own data, and print the commands that train on it."""

import argparse
import sys
from collections.abc import Sequence

from ssm_backbones.cli import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these arguments (the process's by default) and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='det reads COCO files, and YOLO and Pascal VOC by supervision; seg a folder of images and one of label '
        'maps: indices, palettes, black and white, or colours with a class list; cls a folder for each class, or a '
        'table. Without a validation set, a tenth is put aside.',
    )
    parser.add_argument('--task', required=True, choices=['det', 'seg', 'cls'])
    parser.add_argument('--data', required=True, metavar='FOLDER', help='the data; for cls also a table (.csv)')
    parser.add_argument('--out', required=True, metavar='FILE', help='config file to write, such as my_config.py')
    parser.add_argument('--backbone', default='vmamba-tiny', metavar='NAME', help='such as vmamba-tiny, mamba2d-nano')
    parser.add_argument(
        '--weights',
        metavar='PATH',
        help="checkpoint to start from (default: the authors'), or none to start from scratch",
    )
    parser.add_argument('--classes', metavar='FILE', help='class list for seg: a name, or a name and a colour, a line')
    parser.add_argument('--batch-size', type=int, metavar='N', help='images of a step (default: what should fit)')
    parser.add_argument('--epochs', type=int, metavar='N', help='epochs (default: by the number of images)')
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='of what is put aside for validation (0)')
    args = parser.parse_args(argv)

    def run() -> None:
        from ssm_backbones.data_check import ERROR, as_table
        from ssm_backbones.project import NewProjectOptions, new_project
        from ssm_backbones.utils.errors import CommandError

        made = new_project(NewProjectOptions(**vars(args)))
        found = made.found
        print(f'{found.kind}: {found.images} training and {found.val_images} validation images')
        print(f'{len(found.classes)} classes: {", ".join(found.classes)}')
        for note in found.notes:
            print(f'note: {note}')
        print(
            f'{made.config} inherits {made.base}: batches of {made.batch_size}, {made.epochs} epochs, '
            f'{made.iterations} steps on one device'
        )
        print(f'check of the data: {as_table(made.findings)}')
        errors = sum(finding.severity == ERROR for finding in made.findings)
        if errors:
            raise CommandError(f'{errors} error{"s" * (errors > 1)} in the data of {made.config}; see above.')
        print(f'train: python tools/train.py {made.config}')

    return run_command(run)


if __name__ == '__main__':
    sys.exit(main())
