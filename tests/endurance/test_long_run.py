"""What the comparison of a long training finds; `make endurance` makes one."""

import importlib.util
from argparse import Namespace
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location('long_run', Path(__file__).with_name('long_run.py'))
long_run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(long_run)


def samples(memory=0.0, handles=0, slower=0.0, minutes=60):
    """A training of half a second an iteration that grows by these parts over its time."""
    made, step, processor = [], 0, 0.0
    for number in range(1, minutes * 6 + 1):
        part = number / (minutes * 6)
        seconds = 0.5 * (1 + slower * part)
        step += round(10 / seconds)
        processor += round(10 / seconds) * seconds
        validating = 2.0 if step % long_run.VALIDATION < 20 else 0.0
        memory_now = (1000 if step > long_run.VALIDATION else 500) * (1 + memory * part)
        made.append(long_run.Sample(number * 10.0, memory_now, 40 + int(handles * part), processor + validating, step))
    return made


def test_a_flat_training_is_good(capsys):
    assert long_run.compare(samples())
    assert 'iterations in 60 minutes' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('grows', 'says'),
    [
        (dict(memory=0.04), 'memory in MiB: 10'),
        (dict(handles=3), 'open files: 40 first, 42 last: more'),
        (dict(slower=0.1), 'time of an iteration'),
    ],
)
def test_what_grows_is_named(grows, says, capsys):
    assert not long_run.compare(samples(**grows))
    assert says in capsys.readouterr().out


def test_a_training_that_is_too_short_is_an_error():
    with pytest.raises(SystemExit, match='too short'):
        long_run.compare(samples(minutes=3))


def test_an_earlier_run_is_not_taken_for_this_one(tmp_path, monkeypatch):
    monkeypatch.setattr(long_run, 'FOLDER', tmp_path)
    log = tmp_path / 'train' / '20260101' / 'vis_data' / 'scalars.json'
    log.parent.mkdir(parents=True)
    for path in (log, tmp_path / 'samples.jsonl'):
        path.write_text('{"step": 900}\n')
    assert long_run.last_step() == 900
    monkeypatch.setattr(long_run, 'make_shapes', lambda *args, **options: None)
    training = Namespace(poll=lambda: None, pid=0, send_signal=lambda number: None, wait=lambda: 0)
    monkeypatch.setattr(long_run.subprocess, 'Popen', lambda *args, **options: training)
    assert long_run.run(minutes=0) == []
    assert long_run.last_step() == 0 and not (tmp_path / 'samples.jsonl').exists()
