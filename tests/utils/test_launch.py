"""How a launch ends."""

import signal

import pytest
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from ssm_backbones.utils import launch

FAILURE = ProcessFailure(local_rank=0, pid=1, exitcode=7, error_file='<N/A>')


@pytest.mark.parametrize(
    ('error', 'status'),
    [
        (None, 0),
        (ChildFailedError('train', {0: FAILURE}), 7),
        (SignalException('asked to end', signal.SIGTERM), 130),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_status(error, status, monkeypatch) -> None:
    def fail(args) -> None:
        assert args.nproc_per_node == '2' and args.training_script == 'tools/train.py'
        if error is not None:
            raise error

    monkeypatch.setattr(run, 'run', fail)
    assert launch.main(['--nproc-per-node', '2', 'tools/train.py', 'config.py']) == status
