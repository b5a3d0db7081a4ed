"""tools/get_flops.py, as users call it."""

import importlib.util
import re
from pathlib import Path

import pytest

from ssm_backbones.flops import CONVENTION

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / 'tools' / 'get_flops.py'
CONFIG = str(ROOT / 'configs/vmamba/vmamba-tiny_8xb128_in1k.py')
TINY = ['--cfg-options', 'model.backbone.arch=test', 'model.head.in_channels=128']


@pytest.fixture(scope='module')
def main(tool):
    """The tool's main function."""
    return tool.main


def test_prints_parameters_flops_and_the_convention(main, capsys):
    assert main([CONFIG, '--shape', '224', '224']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-5:] == [
        f'config: {CONFIG}',
        'image: 224x224 (height x width)',
        'parameters: 30.25 M (30249064)',
        lines[-2],
        CONVENTION,
    ]
    assert re.fullmatch(r'FLOPs: 4\.90 G \(489\d{7}\)', lines[-2])


def test_prints_a_table_of_modules(main, capsys):
    assert main([CONFIG, '--shape', '64', '32', '--per-layer', *TINY]) == 0
    everything = capsys.readouterr().out
    assert re.search(r'^ {12}mixer +[\d.]+ K +[\d.]+ [KM] +[\d.]+%$', everything, re.MULTILINE)
    assert main([CONFIG, '--shape', '64', '32', '--per-layer', '1', *TINY]) == 0
    coarse = capsys.readouterr().out
    assert re.findall(r'^ *(\S+) .*%$', coarse, re.MULTILINE) == ['(model)', 'backbone', 'neck', 'head']


def test_counts_a_multiply_add_once(main, capsys):
    assert main([CONFIG, '--shape', '64', '64', '--per-layer', *TINY]) == 0
    table = capsys.readouterr().out
    # The classifier's one product of 128 features with 1000 classes; of the bias nothing is counted.
    assert re.search(r'^ +fc +129\.00 K +128\.00 K +', table, re.MULTILINE)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['nowhere.py', '--shape', '8', '8'], 'nowhere.py does not exist'),
        ([CONFIG, '--shape', '0', '8'], 'at least 1 pixel'),
        ([CONFIG, '--shape', '8', '8', '--per-layer', '-1'], 'at least 1, got -1'),
        ([CONFIG, '--shape', '8', '8', '--per-layer', '0'], 'at least 1, got 0'),
        ([CONFIG, '--shape', '8', '8', '--cfg-options', 'model.backbone.arch=huge'], "has no arch 'huge'"),
    ],
)
def test_bad_arguments_get_one_line(main, capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith('error: ') and message in error


@pytest.mark.parametrize(
    ('config', 'gigaflops'),
    [('swin_transformer/swin-tiny_16xb64_in1k.py', 4.51), ('convnext/convnext-tiny_32xb128_in1k.py', 4.47)],
)
def test_counts_models_that_read_drop_path_rates_from_a_tensor(main, capsys, config, gigaflops):
    """They cannot be built on the meta device; the papers give 4.5 G for both."""
    path = Path(importlib.util.find_spec('mmpretrain').submodule_search_locations[0], '.mim', 'configs', config)
    assert main([str(path), '--shape', '224', '224']) == 0
    assert f'FLOPs: {gigaflops:.2f} G' in capsys.readouterr().out
