"""A tool that is asked to end leaves nothing running that it has started."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
# A child and a grandchild; both write their numbers.
CHILDREN = ['sh', '-c', 'sleep 300 & echo $$ $! > "$0"; wait']
DEVELOPMENT = """
import subprocess, sys
sys.path.insert(0, {tools!r})
from children import end_children_on_sigterm
end_children_on_sigterm()
subprocess.run({command!r})
"""
# The tools of a user start one process, which ends its own.
COMMAND = """
import subprocess, sys
from ssm_backbones.cli import run_command
sys.exit(run_command(lambda: subprocess.run({command!r})))
"""


def has_ended(pid: int) -> bool:
    try:
        # Whoever adopted it may still have to take note.
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] == 'Z'
    except OSError:
        return True


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ('code', 'command', 'status'),
    [
        (DEVELOPMENT, CHILDREN, -signal.SIGTERM),
        pytest.param(COMMAND, ['sh', '-c', 'echo $$ > "$0"; exec sleep 300'], 130, marks=pytest.mark.slow),
    ],
    ids=['development', 'command'],
)
def test_children_end_with_the_tool(code, command, status, tmp_path, environment) -> None:
    numbers = tmp_path / 'numbers'
    code = code.format(tools=str(TOOLS), command=[*command, str(numbers)])
    process = subprocess.Popen([sys.executable, '-c', code], env=environment, stderr=subprocess.PIPE)
    wait_until(lambda: numbers.exists() and numbers.read_text().endswith('\n'))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == status
    wait_until(lambda: all(has_ended(int(pid)) for pid in numbers.read_text().split()), 10)


@pytest.mark.parametrize('tool', ['abi_check', 'kernel_report', 'make_runtimes', 'make_wheel', 'matrix'])
def test_development_tools_end_their_children(tool) -> None:
    assert '    end_children_on_sigterm()\n' in (TOOLS / f'{tool}.py').read_text(encoding='utf-8')


@pytest.mark.slow
def test_processes_of_a_training_end_with_it(write_config, environment, tmp_path, free_port) -> None:
    changes = 'val_cfg = val_dataloader = val_evaluator = None\ntrain_cfg = dict(max_epochs=10000)\n'
    config, work_dir = write_config('mmpretrain', changes + 'train_dataloader = dict(num_workers=1)'), tmp_path / 'work'
    environment |= {'PORT': str(free_port), 'OMP_NUM_THREADS': '1'}
    job = subprocess.Popen([TOOLS / 'dist_train.sh', config, '2', '--work-dir', work_dir], env=environment)

    def below(pid: int) -> list[int]:
        tasks = Path(f'/proc/{pid}/task').glob('*/children')
        return [int(child) for task in tasks for child in task.read_text().split()]

    wait_until(lambda: (work_dir / 'last_checkpoint').exists() or job.poll() is not None, 600)
    assert job.poll() is None
    workers = below(job.pid)
    started = [*workers, *(child for worker in workers for child in below(worker))]
    assert len(workers) == 2 and len(started) > 2
    job.terminate()
    assert job.wait(120) != 0
    wait_until(lambda: all(map(has_ended, started)))
