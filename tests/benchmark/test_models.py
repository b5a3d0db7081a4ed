"""tools/benchmark.py on whole models: records that agree with each other, the plot, and bad input."""

import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from ssm_backbones.benchmark import Settings, models
from ssm_backbones.benchmark.models import ModelOptions, Subject, measure_models
from ssm_backbones.benchmark.plot import draw_models
from ssm_backbones.utils.errors import CommandError

TOOL = Path(__file__).resolve().parents[2] / 'tools' / 'benchmark.py'
CPU = torch.device('cpu')
HEADS = {'mmpretrain': 'head', 'mmseg': 'decode_head', 'mmdet': 'roi_head'}


@pytest.fixture(scope='module')
def configs(write_config) -> dict[str, str]:
    """A tiny config of every library."""
    return {host: str(write_config(host)) for host in HEADS}


def options(*paths: str, **changes) -> ModelOptions:
    return ModelOptions(**{'configs': paths, 'shapes': [(64, 64)], 'batch_size': 2, **changes})


@pytest.mark.parametrize('host', HEADS)
def test_whole_models_predict_and_learn(configs: dict[str, str], host: str) -> None:
    subject = Subject(configs[host], options(configs[host]), CPU)
    model = subject.model
    seen: list[tuple[torch.Size, bool, bool]] = []
    model.backbone.register_forward_pre_hook(
        lambda module, inputs: seen.append((inputs[0].shape, module.training, torch.is_grad_enabled()))
    )
    predict, details = subject.prepare(64, 96, False)
    seen.clear()
    assert len(predict()) == 2
    assert seen == [((2, 3, 64, 96), False, False)] and details['padded'] == [64, 96]
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    held = subject.held_bytes()
    assert held == sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
    learned: dict[torch.Tensor, float] = {}
    for value in model.parameters():
        value.register_hook(lambda gradient, value=value: learned.update({value: gradient.abs().max().item()}))
    step, _ = subject.prepare(64, 96, True)
    step()
    assert seen[-1] == ((2, 3, 64, 96), True, True)
    assert {*getattr(model, HEADS[host]).parameters(), next(model.backbone.parameters())} <= learned.keys()
    assert all(math.isfinite(value) for value in learned.values()) and max(learned.values()) > 0
    # AdamW's two moments and its count of steps; weights stay, as the rate is zero.
    assert subject.held_bytes() == held + sum(2 * value.nbytes + 4 for value in learned)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=0)
    subject.forget_training()
    assert subject.held_bytes() == held and all(value.grad is None for value in model.parameters())


def test_detectors_detect(configs: dict[str, str]) -> None:
    subject = Subject(configs['mmdet'], options(configs['mmdet']), CPU)
    subject.model.roi_head.test_cfg.score_thr = 0.9
    masks: list[int] = []
    subject.model.roi_head.mask_head.register_forward_hook(lambda module, inputs, out: masks.append(len(inputs[0])))
    predict, details = subject.prepare(64, 64, False)
    found = [len(each.pred_instances) for each in predict()]
    assert 0 < max(found) <= 10 and details['detections_per_image'] == sum(found) / 2
    assert masks[-1] == sum(found)


def test_segmentors_train_at_the_size_that_is_asked_for(write_config) -> None:
    path = str(write_config('mmseg', 'model = dict(data_preprocessor=dict(size=(128, 128), size_divisor=None))'))
    _, details = Subject(path, options(path), CPU).prepare(64, 96, True)
    assert details['padded'] == [64, 96]


def test_backbones_alone(configs: dict[str, str]) -> None:
    subject = Subject(configs['mmdet'], options(configs['mmdet'], backbone=True), CPU)
    called: list[str] = []
    subject.model.neck.register_forward_hook(lambda *given: called.append('neck'))
    gradients: list[torch.Tensor] = []
    next(subject.model.backbone.parameters()).register_hook(gradients.append)
    for train in (False, True):
        call, _ = subject.prepare(64, 64, train)
        call()
    assert not called and len(gradients) == 1 and gradients[0].abs().sum() > 0
    assert subject.held_bytes() == sum(v.nbytes for v in subject.model.backbone.state_dict().values())


@pytest.mark.slow
def test_records_agree_with_each_other(configs: dict[str, str]) -> None:
    asked = options(configs['mmpretrain'], against=[configs['mmseg']], shapes=[(64, 64), (160, 160)], train=True)
    saved: list[int] = []
    report = measure_models(asked, Settings(repeats=2), save=lambda report: saved.append(len(report.models)))
    assert not report.failed and saved == [2, 4, 6, 8]
    records = {(each['model'], each['what'], each['height']): each for each in report.models}
    assert len(records) == 8
    for each in report.models:
        assert len(each['times_s']) == 2
        assert each['images_per_s'] == pytest.approx(2 / each['latency_s'])
        assert each['peak_bytes'] > each['model_bytes']
    ours, theirs = Path(configs['mmpretrain']).stem, Path(configs['mmseg']).stem
    for model in (ours, theirs):
        for what in (models.INFERENCE, models.TRAINING):
            small, large = records[model, what, 64], records[model, what, 160]
            # The stem's first map, 8 channels at half the side, of two images, is there in any case.
            assert large['peak_bytes'] > small['peak_bytes'] + 2 * 8 * (80**2 - 32**2) * 4
        # Gradients and what the backward pass needs.
        assert records[model, models.TRAINING, 160]['peak_bytes'] > records[model, models.INFERENCE, 160]['peak_bytes']
    ratio = report.ratios[1]
    assert (ratio['model'], ratio['against'], ratio['height']) == (ours, theirs, 160)
    first, second = records[ours, 'inference', 160], records[theirs, 'inference', 160]
    assert ratio['memory_ratio'] == first['peak_bytes'] / second['peak_bytes']
    round_ratios = sorted(a / b for a, b in zip(first['times_s'], second['times_s'], strict=True))
    assert ratio['time_ratio'] == pytest.approx(sum(round_ratios) / 2)


def test_curves_are_the_records() -> None:
    records = [
        dict(model=model, what=what, height=height, width=2 * height, images_per_s=speed * height, peak_bytes=2**20)
        for model, speed in (('one', 1.0), ('two', 2.0))
        for what in ('inference', 'training step')
        for height in (64, 32)
    ]
    figure = draw_models(records, 'heading')
    throughput, memory = figure.axes
    curves = {line.get_label(): line.get_xydata().tolist() for line in throughput.lines}
    assert curves['two, inference'] == curves['two, training step'] == [[2048, 64], [8192, 128]]
    assert len(curves) == 4
    assert [line.get_ydata().tolist() for line in memory.lines] == [[1, 1]] * 4
    assert [label.get_text() for label in memory.get_xticklabels()] == ['32x64', '64x128']
    with pytest.raises(ValueError, match='nothing was measured'):
        draw_models([], 'heading')


def test_command_measures_and_draws(
    tool: ModuleType, configs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, record = tmp_path / 'out.png', tmp_path / 'out.json'
    arguments = [
        configs['mmpretrain'],
        '--shape',
        '64',
        '64',
        '--shape',
        '32',
        '64',
        '--backbone',
        '--amp',
        '--repeats',
        '1',
        '--plot',
        str(image),
        '--json',
        str(record),
    ]
    assert tool.main(arguments) == 0
    table, progress = capsys.readouterr()
    report = json.loads(record.read_text())
    assert report['settings'] == dict(repeats=1, device='cpu', batch_size=1, amp=True, of='backbone')
    assert [(each['height'], each['width']) for each in report['models']] == [(64, 64), (32, 64)]
    assert f'| {Path(configs["mmpretrain"]).stem} | inference | 32x64 |     1 |' in table
    assert 'measuring inference at 32x64' in progress
    with Image.open(image) as drawn:
        assert drawn.format == 'PNG' and drawn.width > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ['out.json', 'out.png']


def test_what_a_model_cannot_take_does_not_stop_the_rest(
    tool: ModuleType, configs: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = Subject.prepare

    def refuse(self: Subject, height: int, width: int, train: bool):
        if height == 63:
            raise RuntimeError('no such size\nin detail')
        return prepare(self, height, width, train)

    monkeypatch.setattr(Subject, 'prepare', refuse)
    arguments = [configs['mmpretrain'], '--shape', '63', '8', '--shape', '64', '64', '--repeats', '1']
    assert tool.main(arguments) == 2
    table, errors = capsys.readouterr()
    name = Path(configs['mmpretrain']).stem
    assert f'failed: {name}, inference at 63x8: RuntimeError: no such size\n' in table
    assert f'| {name} | inference | 64x64 ' in table
    assert errors.strip().splitlines()[-1] == 'error: 1 entries failed; they are listed above'


@pytest.mark.parametrize('when', ['rounds', 'peak'])
def test_what_fails_after_its_warm_up_does_not_take_along_the_others(
    configs: dict[str, str], when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, peak_bytes, runs = Subject.prepare, models.peak_bytes, []
    measuring_peak: list[bool] = []

    def counted(self: Subject, height: int, width: int, train: bool):
        call, details = prepare(self, height, width, train)

        def run() -> None:
            runs.append(self.path)
            if self.path == configs['mmseg'] and (measuring_peak or when == 'rounds'):
                raise torch.OutOfMemoryError('no memory')
            call()

        return run, details

    def peak(call, device: torch.device) -> int:
        measuring_peak.append(True)
        try:
            return peak_bytes(call, device)
        finally:
            measuring_peak.clear()

    monkeypatch.setattr(Subject, 'prepare', counted)
    monkeypatch.setattr(models, 'peak_bytes', peak)
    monkeypatch.setattr(models, 'warm_up', lambda call, device, clock: 1)
    asked = options(configs['mmseg'], against=[configs['mmpretrain']])
    report = measure_models(asked, Settings(repeats=3))
    (record,) = report.models
    assert record['config'] == configs['mmpretrain'] and len(record['times_s']) == 3
    name = f'{Path(configs["mmseg"]).stem}, inference at 64x64'
    assert report.failed == [dict(name=name, reason='OutOfMemoryError: no memory')] and not report.ratios
    assert runs.count(configs['mmseg']) == (1 if when == 'rounds' else 4)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    (
        (['nowhere.py', '--shape', '8', '8'], 'nowhere.py does not exist'),
        (['{config}'], '--shape H W says how large the images are'),
        (['{config}', '--shape', '0', '8'], 'at least 1 pixel each way, got 0 8'),
        (['{config}', '--shape', '8', '8', '--batch-size', '0'], '--batch-size must be at least 1, got 0'),
        (['{config}', '--shape', '8', '8', '--device', 'cuda:99'], "the device 'cuda:99' cannot be used"),
        (['{config}', '--shape', '8', '8', '--device', 'meta'], "cpu, cuda or cuda:1, got 'meta'"),
        (['{config}', '--shape', '8', '8', '--plot', 'out.svg'], 'the name must end in .png'),
        (['{config}', '--shape', '8', '8', '--plot', '/no/such/out.png'], '--plot: the folder /no/such does not exist'),
        (['{config}', '--shape', '8', '8', '--only', 'x'], 'give them without CONFIG'),
        (['{config}', '--shape', '8', '8', '--compare', '{config}'], 'is named twice'),
        (['{config}', '--shape', '8', '8', '--cfg-options', 'model.backbone.arch=huge'], "has no arch 'huge'"),
        (['--shape', '8', '8'], '--shape is for whole models'),
    ),
)
def test_bad_arguments_get_one_line(
    tool: ModuleType, configs: dict[str, str], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([each.replace('{config}', configs['mmpretrain']) for each in arguments]) == 2
    output, errors = capsys.readouterr()
    lines = [line for line in errors.splitlines() if line.startswith('error: ')]
    assert len(lines) == 1 and message in lines[0] and not output


def test_models_are_told_apart() -> None:
    asked = options('a/same.py', against=['b/same.py', 'c/other.py'])
    assert models._names(asked) == {'a/same.py': 'a/same.py', 'b/same.py': 'b/same.py', 'other': 'c/other.py'}
    with pytest.raises(CommandError, match='named twice'):
        models._names(options('a/same.py', against=['a/same.py']))
