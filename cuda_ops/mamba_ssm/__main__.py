"""``python -m cuda_ops.mamba_ssm script.py [arguments]``: run a program with the drop-in in place."""

import os
import runpy
import sys


def main(arguments: list[str]) -> int:
    """Run a script, or a module after ``-m``, as Python itself would."""
    if not arguments or arguments[0] == '-m' and len(arguments) < 2:
        print('usage: python -m cuda_ops.mamba_ssm script.py [arguments], or -m module [arguments]', file=sys.stderr)
        return 2
    # The current folder stands first, by `python -m`; for a script its own folder does.
    if arguments[0] == '-m':
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name='__main__', alter_sys=True)
        return 0
    if not os.path.exists(arguments[0]):
        print(f'error: {arguments[0]} does not exist', file=sys.stderr)
        return 2
    sys.argv = arguments
    sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
    runpy.run_path(arguments[0], run_name='__main__')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
