"""The doctor: a whole installation passes, and each thing that is broken is named and fails it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cuda_ops
from ssm_backbones import doctor
from ssm_backbones.doctor import hosts, machine, selftest
from ssm_backbones.doctor.line import Line

ROOT = Path(__file__).resolve().parents[2]
OPS = ('cross_selective_scan', 'line_scan', 'selective_scan', 'wavefront_scan')

# Put first on the path, it makes Python believe that these modules and distributions are not installed.
HIDE = """
import importlib.machinery, importlib.metadata, os
hidden = os.environ['HIDDEN'].split()
find = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition('.')[0] in hidden else find(name, path, target)
importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
from_name = importlib.metadata.Distribution.from_name
def from_name_unless_hidden(name):
    if name in hidden:
        raise importlib.metadata.PackageNotFoundError(name)
    return from_name(name)
importlib.metadata.Distribution.from_name = staticmethod(from_name_unless_hidden)
"""


def run(folder: Path, *command: str, **environ: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = {**os.environ, 'PYTHONPATH': path, **environ}
    command = command or ('-m', 'ssm_backbones')
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=folder, env=environment, timeout=300
    )


def hide(folder: Path, *extra: str) -> str:
    (folder / 'sitecustomize.py').write_text(HIDE)
    names = [name for names in hosts.DISTRIBUTIONS.values() for name in names if 'mmengine' not in name]
    return ' '.join([*names, 'mmcv-lite', 'torchvision', 'mmseg', *extra])


def findings(page: str) -> dict[str, str]:
    """The page's findings by label, each in one line, with its remedy."""
    found: dict[str, str] = {}
    label = ''
    for line in page.splitlines():
        if not line.startswith('  '):
            continue
        head, text = line[:24].strip(), line[24:].strip()
        label = head or label
        found[label] = f'{found[label]} {text}' if label in found else text
    return found


def test_this_installation_passes(capsys) -> None:
    status = doctor.main()
    page = capsys.readouterr().out
    assert status == 0, page
    assert page.endswith('Nothing that a config needs is broken.\n') and 'Traceback' not in page
    found = findings(page)
    assert found['torch'].startswith(torch.__version__) and sys.executable in found['Python']
    for library, version in hosts.installed().items():
        if library in hosts.PROBED:
            assert found[library].startswith(version)
    for op in OPS:
        assert found[op].startswith('cpu: error') and 'right' in found[op]
    assert 'compiled kernels' in found['cpu'] or 'build the ops' in found['cpu']
    lines = page.splitlines()
    assert len(lines) < 60 and max(map(len, lines)) <= 120


def test_torch_and_mmengine_are_enough(tmp_path) -> None:
    result = run(tmp_path, HIDDEN=hide(tmp_path))
    assert result.returncode == 0, result.stdout
    found = findings(result.stdout)
    assert result.stdout.endswith('Nothing that a config needs is broken.\n') and 'Traceback' not in result.stderr
    assert all(found[name] == 'not installed' for name in hosts.PROBED)
    assert found['checkpoints'].startswith('mmengine reads its own')


def test_without_mmengine(tmp_path) -> None:
    hidden = hide(tmp_path, 'mmengine', 'onedl-mmengine')
    result = run(tmp_path, str(ROOT / 'ssm_backbones'), HIDDEN=hidden)
    assert result.returncode == 0 and not result.stderr
    found = findings(result.stdout)
    assert found['mmengine'].startswith('not installed; create_backbone') and 'pip install' in found['mmengine']
    assert found['ssm_backbones'].startswith('imports') and 'checkpoints' not in found
    assert 'right' in found['line_scan']


def test_host_libraries_without_mmengine(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, 'mmengine', None)
    assert hosts.mmengine_line({'mmcv': '2.1.0'}).broken and not hosts.mmengine_line({'torchvision': '0.28.0'}).broken


@pytest.mark.slow
def test_each_broken_library_is_named(tmp_path) -> None:
    """And ops without a compiled library where only compiled ones are wanted."""
    for name, code in {
        'torchvision': 'raise RuntimeError("operator torchvision::nms does not exist")',
        'mmcv': '__version__ = "2.2.0"\nprint("{}")',
        'mmdet': 'assert False, "MMCV==2.2.0 is used but incompatible. Please install mmcv>=2.0.0rc4, <2.2.0."',
        'mmseg': 'import os; os.abort()',
        'mmpretrain': '__version__ = "1.2.0"',
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / '__init__.py').write_text(code)
    (tmp_path / 'mmpretrain' / 'models.py').write_text('import ftfy_of_old\nraise SystemExit(3)')
    (tmp_path / 'ftfy_of_old.py').write_text('raise ModuleNotFoundError("No module named \'ftfy\'")')
    shutil.copytree(ROOT / 'cuda_ops', tmp_path / 'cuda_ops', ignore=shutil.ignore_patterns('_C.so', '__pycache__'))
    result = run(tmp_path, SSM_OPS_STRICT='1')
    assert result.returncode == 1 and 'Traceback' not in result.stdout + result.stderr
    found = findings(result.stdout)
    assert found['torchvision'].startswith('BROKEN: ') and 'torchvision::nms does not exist' in found['torchvision']
    assert found['mmcv'].startswith('2.2.0, whose compiled operators do not load') and 'mmcv-lite' in found['mmcv']
    assert 'AssertionError: MMCV==2.2.0 is used but incompatible' in found['mmdet']
    assert 'install the version that it asks for' in found['mmdet']
    assert '`import mmseg` fails: the process died of SIGABRT' in found['mmseg']
    assert '`import mmpretrain.models` fails' in found['mmpretrain'] and '-> pip install ftfy' in found['mmpretrain']
    assert 'does not exist' in found['compiled library'] and 'PyTorch reference' in found['cpu']
    for op in OPS:
        assert 'BROKEN: cpu: RuntimeError: SSM_OPS_STRICT is set' in found[op]
    assert f'Broken: torchvision, mmdet, mmseg, mmpretrain, {", ".join(OPS)}.' in result.stdout


@pytest.mark.parametrize('factor', [1.001, float('nan')])
def test_an_op_with_wrong_numbers(factor, monkeypatch, capsys) -> None:
    right = cuda_ops.line_scan

    class Wrong(torch.autograd.Function):
        """The right output and a wrong gradient, in float32 alone, as compiled code would be wrong."""

        @staticmethod
        def forward(context, output):
            return output.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * (factor if gradient.dtype == torch.float32 else 1)

    monkeypatch.setattr(cuda_ops, 'line_scan', lambda **given: Wrong.apply(right(**given)))
    monkeypatch.setattr(hosts, 'host_lines', lambda found: [])
    assert doctor.main() == 1
    page = capsys.readouterr().out
    found = findings(page)
    assert found['line_scan'].startswith('BROKEN: cpu: error') and 'WRONG' in found['line_scan']
    assert page.endswith('Broken: line_scan.\n')


def test_the_reference_serves_the_exact_results() -> None:
    """Else the self-test would compare compiled code with itself."""

    class Scans(TorchDispatchMode):
        called: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.called += [func.name()] if func.namespace == 'cuda_ops' else []
            return func(*args, **(kwargs or {}))

    with Scans():
        selftest.examine_ops([])
    assert not Scans.called
    with Scans():
        selftest.examine_ops(['cpu'])
    assert len(Scans.called) == 2 * len(OPS)


def test_both_stacks_at_once() -> None:
    (line,) = hosts.stack_lines({'mmcv': '2.1.0', 'onedl-mmcv': '2.3.6', 'onedl-mmdetection': '3.5.1'})
    assert 'the files of mmcv are' in line.text and 'keep one stack alone' in line.remedy and not line.broken
    stack, name = hosts.stack_lines({'onedl-mmengine': '0.10.12', 'onedl-mmsegmentation': '1.4.2'})
    assert stack.text == 'the onedl forks' and 'ssm_backbones/compat' in name.text


def test_a_distribution_without_its_module(monkeypatch) -> None:
    monkeypatch.setattr(hosts.importlib.util, 'find_spec', lambda name: None)
    (line,) = hosts.host_lines({'onedl-mmdetection': '3.5.1'}, ['mmdet'])
    assert line.broken and '3.5.1 is installed, but there is no module mmdet' in line.text


def test_what_torch_cannot_do(monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise RuntimeError('Numpy is not available')

    monkeypatch.setattr(torch, 'from_numpy', refuse)
    line = machine.numpy_line(torch)
    assert line.broken and 'Numpy is not available' in line.text and "'numpy<2'" in line.remedy
    monkeypatch.setattr(torch, 'load', refuse)
    line = hosts.loading_line(torch)
    assert line.broken and 'does not read' in line.text


def test_a_gpu_that_torch_does_not_use(monkeypatch) -> None:
    monkeypatch.setattr(machine, '_ask_driver', lambda: ['580.1, NVIDIA Some GPU'])
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    for cuda, remedy in ((None, 'install a torch built for CUDA'), ('13.0', 'too old for CUDA 13.0')):
        monkeypatch.setattr(torch.version, 'cuda', cuda)
        driver, gpu = machine.gpu_lines(torch)
        assert driver.text == '580.1, NVIDIA Some GPU' and remedy in gpu.remedy and not gpu.broken


def test_a_line_is_wrapped_below_its_text() -> None:
    page = doctor.render([('part', [Line('label', 'word ' * 40, 'do this', broken=True)])])
    assert page.startswith('part\n  label                 BROKEN: word') and '\n' + 24 * ' ' + '-> do this\n' in page
    assert findings(page)['label'].count('word') == 40
