"""Run a demo through the public tools: the generator, ``tools/train.py`` and an ordinary config."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from mmengine.config import Config

from ssm_backbones.apis.config import load_config
from ssm_backbones.demo.catalogue import DEMOS, Demo
from ssm_backbones.demo.images import show_features
from ssm_backbones.demo.report import RESULTS, describe_run, write_report
from ssm_backbones.engine.runner import TestOptions, test
from ssm_backbones.shapes.generate import MANIFEST, make_shapes
from ssm_backbones.utils.errors import CommandError
from ssm_backbones.utils.files import write_atomic
from ssm_backbones.utils.signals import interrupt_on_sigterm
from ssm_backbones.utils.torch_compat import HAS_FUSED_ADAMW
from ssm_backbones.visualization import draw_erf_before_and_after
from ssm_backbones.visualization.curves import read_history, save_curves


def run_demo(family: str = 'vmamba', task: str = 'det', fresh: bool = False) -> dict[str, float]:
    """Run a demo in the current directory, which has to be the root of a checkout.

    The data are written to ``data/shapes/``, everything else to ``demo/<family>-<task>/``, and ``demo/report.html``
    reports all demos that have been run. An interrupted run is resumed; a finished one with the same data and config is
    only reported.

    Args:
        family: The backbone's family: ``'vmamba'``, ``'v2m'`` or ``'mamba2d'``.
        task: ``'det'``, ``'seg'`` or ``'cls'``, see :data:`~ssm_backbones.demo.catalogue.TASKS`.
        fresh: Remove the results of earlier runs first.

    Returns:
        The metrics by their logged names, as fractions.

    Raises:
        CommandError: If the demo does not exist, or data, training or evaluation fail.
    """
    if (family, task) not in DEMOS:
        families, tasks = (', '.join(dict.fromkeys(names)) for names in zip(*DEMOS, strict=True))
        raise CommandError(
            f'there is no demo for --family {family} --task {task}; families are {families}, tasks are {tasks}'
        )
    demo = DEMOS[family, task]
    data_format = demo.task.data_format
    out = Path('demo', f'{family}-{task}')
    times = Times()

    _say(f'Data: data/shapes/{data_format}')
    try:
        make_shapes('data/shapes', demo.task.options, [data_format], report=lambda line: print(line, flush=True))
    except (ValueError, OSError) as error:
        raise CommandError(f'the data cannot be generated: {error}') from error
    cfg = load_config(demo.config)
    _start_or_carry_on(out, _fingerprint(cfg, Path('data/shapes', data_format, MANIFEST)), fresh)
    results = out / RESULTS
    if not results.is_file():
        times.lap('data')
        _train(demo.config, cfg, out / 'train')
        times.lap('training (of this run, where one was carried on)')
        _evaluate_and_show(demo, cfg, out, f'{family}, {task}', times)
        _say(f'Done after {times.total:.0f} s.')
    else:
        _say('Finished before with the same data and config; --fresh trains again.')
    figures = json.loads(results.read_text(encoding='utf-8'))['figures']
    page = write_report(out.parent)
    reached = _in_words(demo, figures)
    _say(f'{reached} on held-out images; see {page}, and predictions.png, curves.png and model.pth in {out}{os.sep}')
    return figures


def _say(line: str) -> None:
    print(line, flush=True)


def _fingerprint(cfg: Config, manifest: Path) -> str:
    digest = hashlib.sha256(cfg.pretty_text.encode())
    digest.update(manifest.read_bytes())
    return digest.hexdigest()


def _start_or_carry_on(out: Path, fingerprint: str, fresh: bool) -> None:
    stamp = out / 'fingerprint'
    known = stamp.read_text(encoding='utf-8') if stamp.is_file() else None
    if out.exists() and (fresh or known != fingerprint):
        _say(f'Starting over: {"asked to" if fresh else "data or config have changed"}; removing {out}{os.sep}')
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    stamp.write_text(fingerprint, encoding='utf-8')


def _train(config: str, cfg: Config, work_dir: Path) -> None:
    schedule = cfg.train_cfg
    last = f'epoch_{schedule.max_epochs}.pth' if 'max_epochs' in schedule else f'iter_{schedule.max_iters}.pth'
    if _last_checkpoint(work_dir).name == last:
        _say('Training: finished before')
        return
    batch_size = cfg.train_dataloader.batch_size
    processes = _processes(batch_size)
    command = _training_command(config, work_dir, processes, batch_size)
    _say('Training: ' + ' '.join(['python', *command[1:]]))
    status = _run(command, torch.get_num_threads() // processes)
    if status != 0:
        raise CommandError(
            f'training stopped with exit status {status}; the same command carries on from the last checkpoint'
        )


def _processes(batch_size: int) -> int:
    """Return how many processes train: two on a CPU, where much of a small model's step is not parallel."""
    distributed = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    cores = 1 if torch.cuda.is_available() else torch.get_num_threads()
    return 2 if distributed and cores > 1 and batch_size % 2 == 0 else 1


def _training_command(config: str, work_dir: Path, processes: int, batch_size: int) -> list[str]:
    """Return the command that trains by so many processes, which share a batch."""
    start = [sys.executable]
    command = [os.path.join('tools', 'train.py'), config, '--work-dir', str(work_dir), '--resume']
    changes = ['optim_wrapper.optimizer.fused=True'] if HAS_FUSED_ADAMW else []
    if not torch.cuda.is_available() and torch.get_num_threads() <= processes:
        # Where every core trains, processes that read small images take more from it than reading them here.
        changes += ['train_dataloader.num_workers=0']
    if processes > 1:
        # Where the host's own name cannot be resolved, the processes would not find each other by it.
        start += ['-m', 'ssm_backbones.utils.launch', '--standalone', '--local-addr', '127.0.0.1']
        start += ['--nproc-per-node', str(processes)]
        command += ['--launcher', 'pytorch']
        changes += [f'train_dataloader.batch_size={batch_size // processes}']
    return [*start, *command, *(['--cfg-options', *changes] if changes else [])]


def _run(command: Sequence[str], threads: int) -> int:
    """Run a command, which is terminated on SIGTERM with this process; return the exit status.

    Args:
        command: The command.
        threads: Threads of each process that it starts.
    """
    with interrupt_on_sigterm():
        process = subprocess.Popen(command, env={**os.environ, 'OMP_NUM_THREADS': str(threads)})
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            try:
                process.wait(45)  # a launcher gives its processes 30 seconds
            except subprocess.TimeoutExpired:
                process.kill()
            raise


def _last_checkpoint(work_dir: Path) -> Path:
    record = work_dir / 'last_checkpoint'
    return work_dir / Path(record.read_text(encoding='utf-8').strip()).name if record.is_file() else Path()


def _evaluate_and_show(demo: Demo, cfg: Config, out: Path, heading: str, times: Times) -> None:
    task, checkpoint = demo.task, _last_checkpoint(out / 'train')
    dump = out / 'train' / task.dump
    _say(f'Evaluation: {checkpoint}')
    metrics = test(TestOptions(demo.config, str(checkpoint), work_dir=str(out / 'train' / 'test'), out=str(dump)))
    times.lap('evaluation')
    figures = {name: task.scale * float(metrics[name]) for name in task.figures}
    heading = f'{heading}: {_in_words(demo, figures)}'
    task.show(cfg, dump, f'{heading} on held-out images', out / 'predictions.png')
    save_curves(read_history(out / 'train'), task.figures, heading, out / 'curves.png', task.scale)
    samples = Path('data/shapes', task.data_format, task.samples)
    show_features(demo.config, checkpoint, str(samples), out / 'features', out / 'features.png')
    draw_erf_before_and_after(cfg, checkpoint, sorted(glob.glob(str(samples))), out / 'erf.png')
    times.lap('images')
    shutil.copyfile(checkpoint, out / 'model.pth')
    results = {'figures': figures, 'seconds': times.seconds, 'versions': describe_run()}
    write_atomic(out / RESULTS, json.dumps(results, indent=2) + '\n')


class Times:
    """Seconds of the parts of a run.

    Attributes:
        seconds: By part, in order.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """Record the time since the last call for a part."""
        now = time.monotonic()
        self.seconds[name] = now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Return the seconds of all parts."""
        return sum(self.seconds.values())


def _in_words(demo: Demo, figures: Mapping[str, float]) -> str:
    return ', '.join(f'{shown} {figures[name]:.3f}' for name, shown in demo.task.figures.items())
