#!/usr/bin/env python
"""Compile the CPU scans as operators of onnxruntime and OpenVINO, for files of `tools/export_onnx.py --custom-ops`."""

import argparse
import sys
from collections.abc import Sequence

from cuda_ops import runtimes


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these arguments (the process's by default) and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('runtime', nargs='*', default=runtimes.RUNTIMES, help='onnxruntime, openvino (default: both)')
    args = parser.parse_args(argv)
    unknown = [name for name in args.runtime if name not in runtimes.RUNTIMES]
    if unknown:
        parser.error(f'runtime is one of {", ".join(runtimes.RUNTIMES)}, got {", ".join(unknown)}')
    try:
        for path in runtimes.build(args.runtime):
            print(path)
    except (runtimes.BuildError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    from children import end_children_on_sigterm

    end_children_on_sigterm()
    sys.exit(main())
