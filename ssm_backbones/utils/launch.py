"""``python -m ssm_backbones.utils.launch`` is ``torch.distributed.run`` without tracebacks of its own.

What a process wrote about its failure is then among the last lines.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(argv: Sequence[str] | None = None) -> int:
    """Run with ``torch.distributed.run``'s arguments (the process's by default) and return the exit status.

    It is that of the first process that failed, or 130 after Ctrl-C or SIGTERM, which end the processes.
    """
    try:
        run.run(run.parse_args(sys.argv[1:] if argv is None else list(argv)))
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except (KeyboardInterrupt, SignalException):
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
