#!/usr/bin/env python
"""Evaluate an exported classifier, segmentor or detector on its config's test data, by the config's metrics."""

import argparse
import sys
from collections.abc import Sequence

from ssm_backbones.cli import run_command
from ssm_backbones.utils.mm import DictAction


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these arguments (the process's by default) and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='Files are those of tools/export_onnx.py. A segmentor computes each image as a '
        'whole. Exit status: 0, or 2 where the file could not be evaluated.',
    )
    parser.add_argument('config', help='config file of mmpretrain, mmdet or mmseg')
    parser.add_argument('model', help='file of tools/export_onnx.py')
    parser.add_argument('--runtime', choices=['onnxruntime', 'openvino'], default='onnxruntime')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, help='KEY=VALUE for the config')
    args = parser.parse_args(argv)

    def run() -> None:
        from ssm_backbones.onnx_export.evaluate import evaluate_onnx

        for name, value in evaluate_onnx(args.config, args.model, args.runtime, args.cfg_options).items():
            print(f'{name} {value}')

    return run_command(run)


if __name__ == '__main__':
    sys.exit(main())
