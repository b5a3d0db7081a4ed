#!/usr/bin/env python
"""Generate data, train a small model on it, evaluate, and show what it learnt."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ssm_backbones.cli import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these arguments (the process's by default) and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--family', default='vmamba', help="the backbone's family: vmamba, v2m or mamba2d")
    parser.add_argument('--task', default='det', help='det: instances, seg: semantic segmentation, cls: classes')
    parser.add_argument('--fresh', action='store_true', help='remove the results of earlier runs first')
    args = parser.parse_args(argv)

    def run() -> None:
        from ssm_backbones.demo import run_demo

        os.chdir(Path(__file__).resolve().parent.parent)
        run_demo(args.family, args.task, args.fresh)

    return run_command(run)


if __name__ == '__main__':
    sys.exit(main())
