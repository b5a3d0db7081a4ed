#!/usr/bin/env python
"""Measure whole models of any config against resolution, or the backbones and scans against their competitors."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ssm_backbones.benchmark import Report, Settings, run, select, write_json
from ssm_backbones.cli import run_command
from ssm_backbones.utils.errors import CommandError
from ssm_backbones.utils.mm import DictAction

EPILOG = """
examples:
  tools/benchmark.py --list
  tools/benchmark.py --only 'vmamba-tiny/*' --json out.json
  tools/benchmark.py configs/vmamba/vmamba-tiny_8xb128_in1k.py --shape 224 224 --shape 512 512 --train --plot out.png
  tools/benchmark.py CONFIG --compare OTHER... --shape 800 1280 --device cuda --amp

Models are measured as their libraries predict and train, on prepared batches of noise with made-up annotations, with
weights as initialised; a two-stage detector's score threshold is set so that it detects about as much as its config
allows. Peak memory counts weights, the optimizer's state, gradients and activations; on the CPU it needs Linux.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these arguments (the process's by default) and return the exit status."""
    args = _parser().parse_args(argv)

    def command() -> None:
        try:
            settings = Settings(args.device, args.repeats, args.threads)
        except ValueError as error:
            raise CommandError(str(error)) from error
        _check(args)
        report = _models(args, settings) if args.config else _named(args, settings)
        if report is None:
            return
        print(report.as_table())
        if report.failed:
            raise CommandError(f'{len(report.failed)} entries failed; they are listed above')

    return run_command(command)


def _parser() -> argparse.ArgumentParser:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = parser.add_argument_group('whole models')
    models.add_argument('config', nargs='*', metavar='CONFIG', help='config files of mmpretrain, mmdet or mmseg')
    models.add_argument(
        '--shape',
        type=int,
        nargs=2,
        action='append',
        default=[],
        metavar=('H', 'W'),
        help='height and width of the images; once for each resolution',
    )
    models.add_argument(
        '--compare',
        nargs='+',
        default=[],
        metavar='CONFIG',
        help='configs that each CONFIG is compared with: measured in interleaved rounds, reported as ratios',
    )
    models.add_argument('--batch-size', type=int, default=1, metavar='N', help='images at once (default: 1)')
    models.add_argument('--train', action='store_true', help='also a training step: losses, gradients and update')
    models.add_argument('--backbone', action='store_true', help='the backbones alone')
    models.add_argument('--amp', action='store_true', help='compute in bfloat16 autocast')
    models.add_argument('--plot', type=Path, metavar='PNG', help='draw throughput and memory against resolution')
    models.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help='replace settings of every config, by dotted key',
    )
    named = parser.add_argument_group('comparisons by name, without CONFIG')
    named.add_argument('--list', action='store_true', help='list them and stop')
    named.add_argument(
        '--only',
        nargs='+',
        metavar='NAME',
        default=[],
        help='which to run, by name or pattern such as "vmamba-tiny/*" (default: all for the device)',
    )
    parser.add_argument('--json', type=Path, metavar='PATH', help='write everything measured to this file')
    parser.add_argument('--threads', type=int, metavar='N', help="threads of the CPU (default: torch's choice)")
    parser.add_argument(
        '--repeats',
        type=int,
        metavar='N',
        default=defaults.repeats,
        help=f'rounds of every measurement (default: {defaults.repeats})',
    )
    parser.add_argument('--device', default=defaults.device, help=f'cpu, cuda or cuda:1 (default: {defaults.device})')
    parser.add_argument('--seconds', type=float, metavar='N', help='start no measurement after N seconds')
    return parser


def _check(args: argparse.Namespace) -> None:
    for option in ('json', 'plot'):
        path = getattr(args, option)
        if path and not path.absolute().parent.is_dir():
            raise CommandError(f'--{option}: the folder {path.absolute().parent} does not exist')
    if args.plot and args.plot.suffix != '.png':
        raise CommandError(f'--plot {args.plot}: the image is a PNG, so the name must end in .png')
    if args.config and (args.list or args.only):
        raise CommandError('--list and --only are for comparisons by name; give them without CONFIG')
    if not args.config:
        given = [
            name
            for name in ('shape', 'compare', 'train', 'backbone', 'amp', 'plot', 'cfg_options')
            if getattr(args, name)
        ]
        if given:
            raise CommandError(f'--{given[0].replace("_", "-")} is for whole models; name a CONFIG before it')


def _models(args: argparse.Namespace, settings: Settings) -> Report:
    from ssm_backbones.benchmark.models import ModelOptions, measure_models
    from ssm_backbones.benchmark.plot import plot_models

    options = ModelOptions(
        configs=args.config,
        shapes=[tuple(shape) for shape in args.shape],
        against=args.compare,
        batch_size=args.batch_size,
        train=args.train,
        backbone=args.backbone,
        amp=args.amp,
        cfg_options=args.cfg_options,
    )
    report = measure_models(options, settings, _progress, lambda report: _save(report, args.json), args.seconds)
    if args.plot and report.models:
        plot_models(report.models, report.heading(), args.plot)
    return report


def _named(args: argparse.Namespace, settings: Settings) -> Report | None:
    try:
        selected = select(args.only, args.device)
    except ValueError as error:
        raise CommandError(str(error)) from error
    if args.list:
        width = max(len(each.name) for each in selected)
        print('\n'.join(f'{each.name:<{width}}  {each.summary}' for each in selected))
        return None
    return run(selected, settings, _progress, args.seconds, lambda report: _save(report, args.json))


def _progress(name: str) -> None:
    print(f'measuring {name}', file=sys.stderr, flush=True)


def _save(report: Report, path: Path | None) -> None:
    if path:
        write_json(report, path)


if __name__ == '__main__':
    sys.exit(main())
