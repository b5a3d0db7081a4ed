#!/usr/bin/env python
"""Measure the backbones and scans against their competitors: a table, and JSON on request."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ssm_backbones.benchmark import Settings, run, select, write_json
from ssm_backbones.cli import run_command
from ssm_backbones.preflight import CommandError


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these arguments (the process's by default) and return the exit status."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--list', action='store_true', help='list the comparisons and stop')
    parser.add_argument('--only', nargs='+', metavar='NAME', default=[],
                        help='comparisons to run, by name or pattern such as "vmamba-tiny/*"')
    parser.add_argument('--json', type=Path, metavar='PATH', help='write everything measured to this file')
    parser.add_argument('--threads', type=int, metavar='N', help="threads of the CPU; torch's choice without it")
    parser.add_argument('--repeats', type=int, metavar='N', default=defaults.repeats, help='turns of every measurement')
    parser.add_argument('--device', default=defaults.device, help='cpu, cuda or cuda:1')
    parser.add_argument('--seconds', type=float, metavar='N', help='begin nothing more after so many seconds')
    args = parser.parse_args(argv)

    def command() -> None:
        try:
            settings = Settings(args.device, args.repeats, args.threads)
            selected = select(args.only, args.device)
        except ValueError as error:
            raise CommandError(str(error)) from error
        if args.list:
            width = max(len(each.name) for each in selected)
            print('\n'.join(f'{each.name:<{width}}  {each.summary}' for each in selected))
            return
        if args.json and not args.json.absolute().parent.is_dir():
            raise CommandError(f'--json: the folder {args.json.absolute().parent} does not exist')
        report = run(
            selected,
            settings,
            progress=lambda name: print(f'measuring {name}', file=sys.stderr, flush=True),
            seconds=args.seconds,
            save=lambda report: write_json(report, args.json) if args.json else None,
        )
        print(report.as_table())
        if report.failed:
            raise CommandError(f'{len(report.failed)} entries failed; they are listed above')

    return run_command(command)


if __name__ == '__main__':
    sys.exit(main())
