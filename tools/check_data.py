#!/usr/bin/env python
"""Check the data of a config before a training: annotations, label maps, images, classes and pipelines."""

import argparse
import sys
from collections.abc import Sequence

from ssm_backbones.cli import run_command
from ssm_backbones.utils.mm import DictAction


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these arguments (the process's by default) and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='Ends with status 2 if there are errors, at which tools/train.py and tools/test.py stop, else with 0.',
    )
    parser.add_argument('config', help='config file of mmpretrain, mmdet or mmseg')
    parser.add_argument('--all', action='store_true', help='open every image and label map, not a sample')
    parser.add_argument('--test', action='store_true', help='check the data that tools/test.py reads, too')
    parser.add_argument('--plot', metavar='FILE', help='draw the counts by class and size into this picture (.png)')
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
        from ssm_backbones.data_check import ERROR, as_table, draw_counts, inspect_data
        from ssm_backbones.utils.errors import CommandError
        from ssm_backbones.utils.files import atomic_file

        modes = ('train', 'val', 'test') if args.test else ('train', 'val')
        report = inspect_data(load_config(args.config, args.cfg_options), modes, args.all)
        print(as_table(report.findings))
        if args.plot and report.counts:
            with atomic_file(args.plot) as partial:
                draw_counts(report).savefig(partial, format='png')
            print(f'counts by class and size: {args.plot}')
        errors = sum(finding.severity == ERROR for finding in report.findings)
        if errors:
            raise CommandError(f'{errors} error{"s" * (errors > 1)} in the data of {args.config}; see above.')

    return run_command(run)


if __name__ == '__main__':
    sys.exit(main())
