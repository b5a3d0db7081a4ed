"""Without a usable compiled library: what is said, what is computed, and what SSM_OPS_STRICT refuses."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cuda_ops
from cuda_ops import route_reference
from tests.ops.helpers import differentiate, relative_error, rounded, run_python
from tests.ops.route_cases import Cross, Lines, Sequence, decay_rates

PACKAGE = Path(cuda_ops.__file__).parent
REMEDY = 'pip install -e . --no-build-isolation'


def library_missing(package: Path) -> None:
    (package / '_C.so').unlink()


def library_of_another_kind(package: Path) -> None:
    (package / '_C.so').write_bytes(b'no library ' * 100)


def built_for_another_torch(package: Path) -> None:
    record = package / '_build_info.json'
    record.write_text(json.dumps(json.loads(record.read_text()) | {'torch': '1.2.3+other', 'oldest_torch': None}))


def record_missing(package: Path) -> None:
    (package / '_build_info.json').unlink()


def record_cut_off(package: Path) -> None:
    record = package / '_build_info.json'
    record.write_text(record.read_text()[:20])


def record_of_another_kind(package: Path) -> None:
    (package / '_build_info.json').write_text('[1, 2]')


DAMAGES: dict[Callable[[Path], None], str] = {
    library_missing: r'_C\.so does not exist',
    library_of_another_kind: r'cannot be loaded',
    built_for_another_torch: rf'compiled for torch 1\.2\.3\+other, and this is torch {re.escape(torch.__version__)}',
    record_missing: r'_build_info\.json, cannot be read',
    record_cut_off: r'_build_info\.json, cannot be read',
    record_of_another_kind: r'_build_info\.json, cannot be read',
}
CASES = (
    Sequence(2, 6, 35, 2, B=3, z=True),
    Sequence(1, 3, 9, 2, B=0, C=0),
    Cross(2, 5, 7, 6, 1),
    Lines(2, 5, 7, 6, 2, 'column', reverse=True, C=False),
    Lines(2, 5, 7, 6, 2, 'row', both_ways=True, C=False),
)

# Uses a package at the current folder: strictly, then for every case, and saves what comes of it.
USE = """
import os, warnings, torch, cuda_ops
cases = torch.load('cases.pt')
results, messages, refusal = [], [], None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    os.environ['SSM_OPS_STRICT'] = '1'
    for _, _, inputs, options, _ in cases[-1:]:
        try:
            cuda_ops.line_scan(**inputs, **options)
        except RuntimeError as error:
            refusal = str(error)
    del os.environ['SSM_OPS_STRICT']
    for function, _, inputs, options, weights in cases:
        leaves = [value.requires_grad_() for value in inputs.values() if value is not None]
        outputs = getattr(cuda_ops, function)(**inputs, **options)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        grads = torch.autograd.grad(outputs, leaves, weights)
        results.append([value.detach() for value in (*outputs, *grads)])
    messages = [str(warning.message) for warning in caught]
torch.save({'file': cuda_ops.__file__, 'results': results, 'messages': messages, 'refusal': refusal,
            'report': str(cuda_ops.backend_status())}, 'used.pt')
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package as it is installed, to be damaged."""
    return Path(shutil.copytree(PACKAGE, tmp_path / 'cuda_ops', ignore=shutil.ignore_patterns('__pycache__', 'csrc')))


def use(folder: Path) -> dict:
    """Compute the cases with the package in a folder, in a fresh process."""
    cases = []
    for case in CASES:
        inputs = rounded(case.inputs(), case.parameters(), torch.float32)
        expected, weights = differentiate(case.function, inputs, case.options())
        cases.append((case.function.__name__, list(expected.values()), inputs, case.options(), weights))
    torch.save(cases, folder / 'cases.pt')
    result = run_python(USE, path=folder)
    assert result.returncode == 0, result.stderr
    used = torch.load(folder / 'used.pt')
    assert Path(used['file']).parent.parent == folder
    for (_, expected, *_), results in zip(cases, used['results'], strict=True):
        for got, value in zip(results, expected, strict=True):
            assert got.dtype == value.dtype and relative_error(got, value.double()) < 1e-5
    return used


@pytest.mark.parametrize(
    'damage',
    [
        pytest.param(
            damage, id=damage.__name__, marks=[pytest.mark.slow] * (damage in (record_missing, record_cut_off))
        )
        for damage in DAMAGES
    ],
)
def test_reference_serves_after_one_warning(damage: Callable[[Path], None], package: Path) -> None:
    damage(package)
    used = use(package.parent)
    assert len(used['messages']) == 1, used['messages']
    message, reason = used['messages'][0], DAMAGES[damage]
    assert 'PyTorch reference on cpu' in message and re.search(reason, message) and REMEDY in message, message
    assert re.search(reason, used['refusal']) and REMEDY in used['refusal'], used['refusal']
    assert re.search(rf'compiled library +not in use: .*{reason}', used['report']), used['report']
    assert re.search(r'^cpu +PyTorch reference: ', used['report'], re.MULTILINE), used['report']


def test_a_library_with_other_arguments_is_refused(package: Path) -> None:
    source = package / 'route_scan.py'
    source.write_text(source.read_text().replace('int chunk, ', 'int chunk, int more, '))
    result = run_python('import cuda_ops', path=package.parent)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode and last.startswith('ImportError') and 'compiled from other sources' in last, result.stderr
    assert 'cuda_ops::route_scan takes other arguments' in last and REMEDY in last, last


def test_a_library_without_the_kernels_constants_is_refused(package: Path) -> None:
    source = package / '_library.py'
    source.write_text(source.read_text().replace('.cuda_ops_interface', '.interface_of_other_sources'))
    result = run_python('import cuda_ops', path=package.parent)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode and last.startswith('ImportError') and 'compiled from other sources' in last, result.stderr
    assert REMEDY in last, last


def test_an_intact_copy_says_nothing(package: Path) -> None:
    used = use(package.parent)
    assert used['messages'] == [] and used['refusal'] is None
    assert re.search(r'^cpu +compiled kernels, \w+ instructions$', used['report'], re.MULTILINE), used['report']


def test_module_prints_the_report(package: Path) -> None:
    code = 'import runpy; runpy.run_module("cuda_ops", run_name="__main__")'
    intact = run_python(code, path=package.parent)
    assert intact.returncode == 0, intact.stderr
    assert re.search(rf'^torch +{re.escape(torch.__version__)}$', intact.stdout, re.MULTILINE)
    assert re.search(r'^compiled library +in use: ', intact.stdout, re.MULTILINE)
    assert re.search(
        r'^cuda +(no such device here|PyTorch reference: .+|compiled kernels)$', intact.stdout, re.MULTILINE
    )


def test_the_library_under_test_is_the_compiled_one() -> None:
    status = cuda_ops.backend_status()
    assert status.compiled and status.devices['cpu'].backend == 'compiled', status


def test_status_tells_what_is_in_use() -> None:
    status = cuda_ops.backend_status()
    cpu, cuda = status.devices['cpu'], status.devices['cuda']
    assert (status.version, status.torch) == (cuda_ops.__version__, torch.__version__)
    oldest = status.build['oldest_torch']
    serves = f'torch {oldest} and newer' if oldest else f'torch {torch.__version__}'
    assert (oldest or status.build['torch'] == torch.__version__) and status.reason == f'compiled for {serves}'
    assert cpu.present and not cpu.reason and cpu.instruction_set in status.build['capabilities']
    assert cuda.present == torch.cuda.is_available() and cuda.instruction_set is None
    assert (cuda.backend, bool(cuda.reason)) == (('compiled', False) if status.build['cuda'] else ('reference', True))
    with pytest.raises(dataclasses.FrozenInstanceError):
        status.compiled = False


class CountOperations(TorchDispatchMode):
    """Counts the tensor operations that are dispatched."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(length: int) -> tuple[int, int]:
    """Tensor operations of the reference's forward and backward pass over a sequence."""
    x, delta = torch.randn(1, 1, length, 2), torch.randn(1, 1, length, 1, 2)
    B, C = torch.randn(2, 1, 1, length, 1, 1, 3)
    arguments = (x, delta, decay_rates(1, 2, 3).float(), B, C, torch.randn(1, 2), torch.randn(1, 2), [0], False, True)
    with CountOperations() as forward:
        y, last = route_reference.route_scan(*arguments)
    with CountOperations() as backward:
        route_reference.route_scan_backward(torch.ones_like(y), torch.ones_like(last), *arguments)
    return forward.count, backward.count


def test_reference_takes_a_logarithmic_number_of_operations() -> None:
    lengths = [2**k for k in range(3, 14)]
    counts = [operations(length) for length in lengths]
    for passes in zip(*counts, strict=True):
        growth = {after - before for before, after in zip(passes, passes[1:], strict=False)}
        assert len(growth) == 1 and 0 < growth.pop() < 40, f'operations at lengths {lengths}: {passes}'
