"""Train on generated images for two hours, and see that memory, open files and speed hold: `make endurance`.

The training is that of a segmentation demo, with a validation and a checkpoint every 400 iterations. The ten minutes
after the first validation, which starts processes of its own that stay, are compared with the last ten. Whatever else
runs on the machine changes the speed.
"""

import argparse
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from ssm_backbones.shapes.generate import make_shapes  # noqa: E402

FOLDER = ROOT / 'build' / 'endurance'
DEMO = ROOT / 'configs' / 'vmamba' / 'vmamba-nano_upernet_demo_shapes.py'
EVERY = 10  # seconds between two samples
VALIDATION = 400  # iterations
# The demo's model on the data's own images, without an end and at one rate.
CONFIG = f"""
_base_ = {str(DEMO)!r}
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=10_000_000, val_interval={VALIDATION})
train_dataloader = dict(
    sampler=dict(type='InfiniteSampler'),
    dataset=dict(data_root={str(FOLDER / 'shapes' / 'ade20k')!r}, pipeline=_base_.train_pipeline))
val_dataloader = dict(dataset=dict(data_root={str(FOLDER / 'shapes' / 'ade20k')!r}))
param_scheduler = None
custom_hooks = []
log_processor = dict(by_epoch=False)
default_hooks = dict(
    logger=dict(interval=1, log_metric_by_epoch=False), checkpoint=dict(by_epoch=False, interval={VALIDATION}))
"""
PART = 600  # seconds that are compared
MEMORY, SPEED = 0.02, 0.03  # how much larger the last part's may be


@dataclass(frozen=True)
class Sample:
    """What the training's processes hold at one time."""

    seconds: float
    mebibytes: float
    handles: int
    processor: float
    """Seconds of processor time of the main process so far."""
    step: int


def take_sample(pid: int, started: float) -> Sample:
    """Add up the training's process and its data loaders'.

    Memory is resident memory, in which pages that several share count for each of them. Proportional set sizes would
    grow for an hour in a training that takes nothing more: a page that the loaders have from the main process counts
    once until one of them writes to it, and then for each.
    """
    pids = [pid, *map(int, Path(f'/proc/{pid}/task/{pid}/children').read_text().split())]
    memory = handles = 0
    for each in pids:
        try:
            lines = Path(f'/proc/{each}/smaps_rollup').read_text().splitlines()
            memory += next(int(line.split()[1]) for line in lines if line.startswith('Rss:'))
            handles += len(os.listdir(f'/proc/{each}/fd'))
        except (FileNotFoundError, ProcessLookupError):  # a worker that ended meanwhile
            continue
    user, system = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[11:13]
    processor = (int(user) + int(system)) / os.sysconf('SC_CLK_TCK')
    return Sample(time.monotonic() - started, memory / 1024, handles, processor, last_step())


def last_step() -> int:
    """The last iteration in the training's log of scalars."""
    logs = sorted(FOLDER.glob('train/*/vis_data/scalars.json'))
    lines = logs[-1].read_text().splitlines() if logs else []
    steps = [json.loads(line).get('step', 0) for line in lines[-3:] if line.endswith('}')]
    return max(steps, default=0)


def remove_earlier_run() -> None:
    """Remove what an earlier run left, whose iterations would be taken for this one's until it writes its first."""
    shutil.rmtree(FOLDER / 'train', ignore_errors=True)
    (FOLDER / 'samples.jsonl').unlink(missing_ok=True)


def run(minutes: float) -> list[Sample]:
    """Train for this long and return the samples.

    Raises:
        SystemExit: if the training ends before.
    """
    remove_earlier_run()
    make_shapes(FOLDER / 'shapes', formats=['ade20k'])
    (FOLDER / 'config.py').write_text(CONFIG)
    command = [sys.executable, 'tools/train.py', FOLDER / 'config.py', '--work-dir', FOLDER / 'train']
    with (FOLDER / 'log.txt').open('w') as log:
        training = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    started, samples = time.monotonic(), []
    try:
        while time.monotonic() - started < minutes * 60:
            time.sleep(EVERY)
            if training.poll() is not None:
                sys.exit(f'error: the training ended by itself with status {training.returncode}: see {FOLDER}/log.txt')
            samples.append(take_sample(training.pid, started))
            with (FOLDER / 'samples.jsonl').open('a') as stream:
                stream.write(json.dumps(vars(samples[-1])) + '\n')
    finally:
        training.send_signal(signal.SIGTERM)
        training.wait()
    return samples


def for_each_step(part: list[Sample], name: str) -> float:
    """What an iteration takes of something, without the samples between which a validation was."""
    pairs = [(a, b) for a, b in itertools.pairwise(part) if a.step // VALIDATION == b.step // VALIDATION]
    return sum(getattr(b, name) - getattr(a, name) for a, b in pairs) / sum(b.step - a.step for a, b in pairs)


def compare(samples: list[Sample]) -> bool:
    """Print the first part and the last of the run side by side, and say whether all is within its bounds."""
    total = samples[-1].seconds
    settled = [sample for sample in samples if sample.step > VALIDATION]
    if not settled or settled[0].seconds > total * 0.5:
        sys.exit(f'error: {total:.0f} s are too short: the first validation was at their end or not at all')
    part = min(PART, total / 4)
    first = [sample for sample in settled if sample.seconds < settled[0].seconds + part]
    last = [sample for sample in settled if sample.seconds > total - part]
    good = True
    rows = {
        'memory in MiB': (MEMORY, lambda part: statistics.median(sample.mebibytes for sample in part)),
        'open files': (0, lambda part: statistics.median(sample.handles for sample in part)),
        'processor time of an iteration in s': (SPEED, lambda part: for_each_step(part, 'processor')),
        'time of an iteration in s': (SPEED, lambda part: for_each_step(part, 'seconds')),
    }
    print(f'{samples[-1].step} iterations in {total / 60:.0f} minutes')
    for name, (bound, figure) in rows.items():
        before, after = figure(first), figure(last)
        held = after <= before * (1 + bound)
        good &= held
        print(f'{name}: {before:.4g} first, {after:.4g} last{"" if held else f": more than {bound:.0%} more"}')
    return good


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--minutes', type=float, default=120)
    FOLDER.mkdir(parents=True, exist_ok=True)
    sys.exit(not compare(run(parser.parse_args().minutes)))
