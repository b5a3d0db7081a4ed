"""The benchmark: what it computes from its measurements, what it measures, and its command line."""

import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ssm_backbones.benchmark import (
    Comparison,
    LowerBound,
    Pair,
    Report,
    Scaling,
    Settings,
    Unavailable,
    backbones,
    comparison,
    gpu,
    registry,
    run,
    select,
)
from ssm_backbones.benchmark.backbones import BACKBONES, backbone_call, build_backbone
from ssm_backbones.benchmark.comparison import DetailedCall, measure_comparison, measure_scaling, scaling_peak
from ssm_backbones.benchmark.export import EXPORTS
from ssm_backbones.benchmark.registry import COMPARISONS, SCALINGS
from ssm_backbones.benchmark.roofline import Rates
from ssm_backbones.benchmark.timing import measure_interleaved

TOOL = Path(__file__).resolve().parents[2] / 'tools' / 'benchmark.py'
CPU = torch.device('cpu')


class Clock:
    """A clock that only the measured calls move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def takes(self, label: str, *seconds: float) -> Callable[[torch.device], Callable[[], None]]:
        """An entry that takes these seconds, one after the other and over again, after two calls to warm up."""
        state = {'calls': 0}

        def call() -> None:
            self.calls.append(label)
            self.now += seconds[max(0, state['calls'] - 2) % len(seconds)]
            state['calls'] += 1

        return lambda device: call


def test_ratio_is_the_median_of_the_turns() -> None:
    clock = Clock()
    compared = Comparison(
        'name',
        'summary',
        {'ours': clock.takes('ours', 1.0, 9.0, 2.0), 'theirs': clock.takes('theirs', 2.0, 3.0, 8.0)},
        (Pair('ours', 'theirs', 0.5), Pair('theirs', 'ours', 1.9), Pair('ours', 'ours')),
    )
    result = measure_comparison(compared, Settings(repeats=3), clock)
    assert result['entries']['ours'] == {'median_s': 2.0, 'times_s': [1.0, 9.0, 2.0]}
    assert result['entries']['theirs'] == {'median_s': 3.0, 'times_s': [2.0, 3.0, 8.0]}
    # Round by round 1/2, 9/3 and 2/8.
    assert [(pair['ratio'], pair['met']) for pair in result['pairs']] == [(0.5, True), (2.0, False), (1.0, None)]


def test_entries_take_turns_and_change_the_order() -> None:
    clock = Clock()
    calls = {label: clock.takes(label, 1.0)(CPU) for label in 'abc'}
    measure_interleaved(calls, 3, CPU, clock)
    assert clock.calls == list('aabbccabccbaabc')


def test_short_calls_are_repeated_within_a_turn() -> None:
    clock = Clock()
    times = measure_interleaved({'short': clock.takes('short', 0.01)(CPU)}, 4, CPU, clock)
    assert len(clock.calls) == 2 + 4 * 5
    assert times['short'] == pytest.approx([0.01] * 4)


def test_lower_bounds_and_entries_that_are_missing() -> None:
    def lacks(device: torch.device) -> LowerBound:
        raise Unavailable('no such thing here')

    def breaks(device: torch.device) -> LowerBound:
        raise RuntimeError('it broke\nin detail')

    clock = Clock()
    entries = {
        'ours': clock.takes('ours', 2.0),
        'lower bound': lambda device: LowerBound(0.5, {'counted': 7}),
        'lacking': lacks,
        'broken': breaks,
    }
    pairs = (Pair('ours', 'lower bound', 3.0), Pair('ours', 'lacking', 1.0), Pair('ours', 'broken', 1.0))
    result = measure_comparison(Comparison('name', 'summary', entries, pairs, images=8), Settings(repeats=2), clock)
    assert [(pair['against'], pair['ratio'], pair['met']) for pair in result['pairs']] == [('lower bound', 4.0, False)]
    assert result['entries']['lower bound'] == {'median_s': 0.5, 'times_s': [0.5, 0.5], 'counted': 7}
    assert result['entries']['ours']['images_per_s'] == 4.0
    assert result['skipped'] == {'lacking': 'no such thing here'}
    assert result['failed'] == {'broken': 'RuntimeError: it broke'}


def test_details_are_reported_and_the_load_lasts_for_the_rounds() -> None:
    clock = Clock()

    @contextmanager
    def load() -> Iterator[None]:
        clock.calls.append('begin')
        yield
        clock.calls.append('end')

    call = clock.takes('ours', 1.0)(CPU)
    entries = {'ours': lambda device: DetailedCall(call, {'graph breaks': 0, 'option': 'a'})}
    compared = Comparison('name', 'summary', entries, (Pair('ours', 'ours'),), during=load)
    result = measure_comparison(compared, Settings(repeats=1), clock)
    assert clock.calls == ['ours', 'ours', 'begin', 'ours', 'end']
    assert result['entries']['ours']['details'] == {'graph breaks': 0, 'option': 'a'}
    assert '\nname: ours: graph breaks 0, option a\n' in Report({}, {}, comparisons=[result]).as_table() + '\n'


def test_a_run_names_what_it_leaves_out() -> None:
    clock = Clock()
    pairs = (Pair('ours', 'theirs'),)
    entries = {'ours': clock.takes('ours', 0.0), 'theirs': lambda device: build_backbone('lacking', device)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, 'lacking', dict(type='no_such_library.Model'))
        saved = []
        report = run(
            [
                Comparison('one', '', entries, pairs),
                Comparison('gpu', '', entries, pairs, devices=('cuda',)),
                Comparison('two', '', entries, pairs),
            ],
            Settings(repeats=1),
            save=lambda report: saved.append(len(report.comparisons)),
        )
        late = run([Comparison('one', '', entries, pairs)], Settings(repeats=1), seconds=-1)
    assert saved == [1, 1, 2] and not report.failed
    assert report.skipped[1] == {'name': 'gpu', 'reason': 'it is for --device cuda'}
    missing = "lacking is no_such_library's, which cannot be imported: No module named 'no_such_library'"
    assert report.skipped[0] == {'name': 'one: theirs', 'reason': missing}
    table = report.as_table()
    assert '| one        | ours  |' in table and f'skipped: two: theirs: {missing}' in table
    assert not late.comparisons and late.skipped == [{'name': 'one', 'reason': '-1 seconds were over'}]


def test_the_registry_is_consistent() -> None:
    names = [each.name for each in select()]
    assert len(set(names)) == len(names)
    for each in COMPARISONS:
        labels = {label for pair in each.pairs for label in (pair.entry, pair.against)}
        assert labels == set(each.entries), each.name
    for scaling in SCALINGS:
        assert scaling.backbone in BACKBONES and scaling.sizes == tuple(sorted(scaling.sizes))


def test_gpu_comparisons_cover_the_models_sizes() -> None:
    by_name = {each.name: each for each in gpu.COMPARISONS}
    # Each ends in its pass.
    sizes = {name.rpartition('/')[0] for name in by_name}
    for job in gpu.JOBS:
        for stage in ('stage1', 'stage2'):
            for image in ('224/batch-64', '224/batch-128', '1280x800/batch-2', '1024/batch-1', '2048/batch-1'):
                assert f'gpu/{job.op}/{job.model}/{stage}/{image}' in sizes
    cross = by_name['gpu/cross-scan/vmamba-base/stage2/1280x800/batch-2/forward+backward']
    assert cross.pairs == (Pair('cuda_ops', 'lower bound', 3.0), Pair('cuda_ops', 'mamba-ssm', 1 / 3))
    wavefront = by_name['gpu/wavefront/mamba2d-tiny/stage1/2048/batch-1/forward']
    assert wavefront.pairs == (Pair('cuda_ops', 'lower bound', 2.0), Pair('cuda_ops', 'diagonals', 1 / 5))
    trained = by_name['gpu/wavefront/mamba2d-tiny/stage1/2048/batch-1/forward+backward']
    assert trained.pairs == (Pair('cuda_ops', 'lower bound', 3.0), Pair('cuda_ops', 'diagonals', 1 / 5, 1 / 8))
    assert '(2, 100, 160, 512), N=1' in cross.summary and '(1, 512, 512, 64), N=16' in wavefront.summary
    assert {each.devices for each in gpu.COMPARISONS} == {('cuda',)}


@pytest.mark.parametrize('job', gpu.JOBS, ids=lambda job: job.model)
def test_gpu_comparisons_run_what_they_say(job: gpu.ScanJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, 'measure_rates', lambda device: Rates(1e9, 1e9))
    monkeypatch.setitem(gpu.IMAGES, 'small', (2, 16, 24))
    small = gpu.ScanJob(job.op, job.model, 8, 2)
    forward, both = gpu.scan_comparisons(small, 'small', 'stage2')
    y = forward.entries['cuda_ops'](CPU)()
    assert y.shape == (2, 2, 3, 16) and y.dtype == torch.bfloat16
    gradients = both.entries['cuda_ops'](CPU)()
    assert gradients[0].shape == y.shape
    bounds = [each.entries['lower bound'](CPU).seconds for each in (forward, both)]
    work = gpu.work(job.op, (2, 2, 3, 16), 2)
    seconds = [max(each.bytes, each.exponentials) / 1e9 for each in work]
    assert bounds == pytest.approx([seconds[0], sum(seconds)])


def test_low_rank_dt_in_the_scan_equals_the_product_before_it() -> None:
    forward, both = gpu.low_rank_delta_comparisons((2, 3, 4, 8), 4)
    for each in (forward, both):
        ours, theirs = (entry(CPU)() for entry in each.entries.values())
        for value, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(value, other, rtol=0.05, atol=0.05)


def test_selection_by_name_and_pattern() -> None:
    assert [each.name for each in select(['vmamba-tiny/sizes'])] == ['vmamba-tiny/sizes']
    assert len(select(['cross-scan/*/n1', 'cross-scan/*/n16'])) == 4
    assert select() == [*COMPARISONS, *SCALINGS, *EXPORTS]
    here = {each.name for each in select(device='cpu')}
    assert 'wavefront/forward/n16' in here and not any(name.startswith('gpu/') for name in here)
    assert 'wavefront/forward/n16' not in {each.name for each in select(device='cuda:1')}
    with pytest.raises(ValueError, match=r"no comparison is called 'cross-scan'.*cross-scan/forward/n1"):
        select(['cross-scan'])


def test_plain_models_do_the_same_job() -> None:
    with torch.device('meta'):
        image = torch.empty(1, 3, 224, 224)
        ours, theirs = (build_backbone(name, torch.device('meta'))(image) for name in ('v2m-tiny', 'deit-tiny'))
    assert [value.shape for value in ours] == [value.shape for value in theirs] == [(1, 192, 14, 14)]


def test_swin_with_fused_attention_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    small = dict(embed_dims=16, depths=[2, 2], num_heads=[2, 4])
    config = dict(type='mmpretrain.SwinTransformer', arch=small, img_size=56, out_indices=(1,), drop_path_rate=0.0)
    monkeypatch.setitem(BACKBONES, 'small-swin', config)
    model = build_backbone('small-swin', CPU).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    images = torch.randn(2, 3, 56, 56, dtype=torch.float64)
    before = model(images)[0]
    backbones.use_fused_attention(model)
    called = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(backbones.F, 'scaled_dot_product_attention', lambda *a, **k: called.append(1) or fused(*a, **k))
    torch.testing.assert_close(model(images)[0], before)
    assert len(called) == 4


@pytest.mark.parametrize(
    ('options', 'message'),
    (
        (dict(repeats=0), 'repeats must be at least 1, got 0'),
        (dict(threads=-2), 'threads must be at least 1, got -2'),
        (dict(device='gpu'), "the device 'gpu' cannot be used"),
        (dict(device='cuda:99'), "the device 'cuda:99' cannot be used"),
    ),
)
def test_settings_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**options)


@pytest.fixture
def small_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backbone, a comparison and a scaling that take no time."""
    monkeypatch.setitem(BACKBONES, 'small', dict(type='VMamba', arch='test', out_indices=(3,)))
    entries = {
        label: lambda device, train=train: backbone_call('small', 2, 32, train, device)
        for label, train in (('small', False), ('trained', True))
    }
    pairs = (Pair('small', 'trained', 1.0), Pair('trained', 'small'))
    monkeypatch.setattr(registry, 'COMPARISONS', [Comparison('small/one', 'a small one', entries, pairs)])
    monkeypatch.setattr(registry, 'EXPORTS', [])
    monkeypatch.setattr(registry, 'SCALINGS', [Scaling('small/sizes', 'small ones', 'small', (32, 64))])
    # A process of its own would not know the small backbone.
    monkeypatch.setattr(comparison, 'scaling_peak', lambda name, size, device: 1000 * size**2 + 24000)


def test_backbone_calls_do_what_they_say(small_registry: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.Size, bool, bool]] = []
    model = build_backbone('small', CPU)
    model.register_forward_pre_hook(
        lambda module, inputs: seen.append((inputs[0].shape, module.training, torch.is_grad_enabled()))
    )
    monkeypatch.setattr(backbones, 'build_backbone', lambda name, device: model)
    backbone_call('small', 2, 32, False, CPU)()
    assert all(parameter.grad is None for parameter in model.parameters())
    backbone_call('small', 3, 64, True, CPU)()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert seen == [((2, 3, 32, 32), False, False), ((3, 3, 64, 64), True, True)]


def test_scaling_is_relative_to_the_first_size_and_the_pixels(small_registry: None) -> None:
    first, second = measure_scaling(registry.SCALINGS[0], Settings(repeats=3))['sizes']
    assert first['time_per_pixel'] == first['peak_per_pixel'] == 1
    assert second['peak_per_pixel'] == pytest.approx((1000 * 64**2 + 24000) / (1000 * 32**2 + 24000) / 4)
    ratios = [late / early / 4 for late, early in zip(second['times_s'], first['times_s'], strict=True)]
    assert second['time_per_pixel'] == pytest.approx(statistics.median(ratios))


@pytest.mark.slow
def test_peak_memory_grows_with_the_pixels() -> None:
    small, large = (scaling_peak('vmamba-tiny', size, 'cpu') for size in (224, 448))
    # The stem's map alone: 48 channels at half the side, before and after its norm.
    assert small > 2 * 48 * 112**2 * 4
    # Four times the pixels. What an allocator keeps blurs it, so the bounds lie half way, in factors, to no growth and
    # to growth with the pixels' square.
    assert 2 < large / small < 8


def test_a_scaling_that_fails_does_not_stop_the_rest(small_registry: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> int:
        raise RuntimeError('no memory for it')

    monkeypatch.setattr(comparison, 'scaling_peak', fail)
    report = run(select(['small/*']), Settings(repeats=1))
    assert len(report.comparisons) == 1 and not report.scalings
    assert report.failed == [{'name': 'small/sizes', 'reason': 'RuntimeError: no memory for it'}]


def test_peak_memory_that_cannot_be_measured_is_an_error() -> None:
    with pytest.raises(RuntimeError, match='peak memory of vmamba-tiny at 0x0 could not be measured'):
        scaling_peak('vmamba-tiny', 0, 'cpu')


def test_command_prints_a_table_and_writes_json(
    tool: ModuleType, small_registry: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    try:
        assert tool.main(['--repeats', '2', '--threads', '1', '--json', str(tmp_path / 'out.json')]) == 0
    finally:
        torch.set_num_threads(threads)
    table, progress = capsys.readouterr()
    report = json.loads((tmp_path / 'out.json').read_text())
    assert [path.name for path in tmp_path.iterdir()] == ['out.json']
    assert report['settings'] == {'repeats': 2, 'device': 'cpu'}
    assert report['machine']['threads'] == 1 and report['machine']['torch'] == torch.__version__
    comparison, scaling = report['comparisons'][0], report['scalings'][0]
    assert all(len(entry['times_s']) == 2 for entry in comparison['entries'].values())
    pair = comparison['pairs'][0]
    assert pair['entry'] == 'small' and pair['met'] == (pair['ratio'] <= 1)
    assert [size['size'] for size in scaling['sizes']] == [32, 64]
    assert f'{pair["ratio"]:.3g} | <= 1: {"met" if pair["met"] else "missed"} ' in table
    assert '| small/sizes | 64x64 |' in table and report['machine']['CPU'] in table
    assert 'measuring small/one\nmeasuring small/sizes\n' in progress


def test_command_lists_what_there_is(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(['--list', '--only', 'cross-scan/*']) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        'cross-scan/forward/n1',
        'cross-scan/forward+backward/n1',
        'cross-scan/forward/n16',
        'cross-scan/forward+backward/n16',
    ]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    (
        (['--only', 'nothing'], "no comparison is called 'nothing'"),
        (['--repeats', '0'], 'repeats must be at least 1, got 0'),
        (['--device', 'gpu'], "the device 'gpu' cannot be used"),
        (['--json', '/no/such/folder/out.json'], 'the folder /no/such/folder does not exist'),
    ),
)
def test_command_refuses_before_it_measures(
    tool: ModuleType, small_registry: None, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(arguments) == 2
    output, errors = capsys.readouterr()
    assert message in errors and not output and 'measuring' not in errors
