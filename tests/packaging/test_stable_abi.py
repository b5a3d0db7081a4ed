"""What a library serves: flags for each torch, what is refused, what a wheel may need; and headers that are kept."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from cuda_ops import _library


def load_tool(root, name):
    spec = importlib.util.spec_from_file_location(f'{name}_under_test', root / 'tools' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def abi_check(root):
    return load_tool(root, 'abi_check')


@pytest.fixture
def make_wheel(root):
    return load_tool(root, 'make_wheel')


@pytest.mark.parametrize(
    ('version', 'stable'),
    [('2.1.2', False), ('2.4.1+cu121', False), ('2.9.1', False), ('2.10.0', True), ('2.15.0a0+git1', True)],
)
def test_torch_from_2_10_on_gets_the_stable_abi(build, version, stable):
    flags = build.binding_flags(version, [Path('/include')], cxx11_abi=False)
    assert ('-DSSM_STABLE_ABI' in flags) == stable
    # Compiled for the oldest torch that has it, not for the one at hand.
    assert ('-DTORCH_TARGET_VERSION=0x020a000000000000' in flags) == stable
    assert ('-D_GLIBCXX_USE_CXX11_ABI=0' in flags) != stable


def test_a_version_that_is_none_is_refused(build):
    with pytest.raises(ValueError, match="'unknown'"):
        build.uses_stable_abi('unknown')


@pytest.mark.skipif(not sys.platform.startswith('linux') or not shutil.which('nm'), reason='needs nm')
def test_the_library_takes_nothing_of_torch_but_the_stable_abi():
    if not _library.STATUS.info.get('oldest_torch'):
        pytest.skip('this torch has no stable ABI')
    listed = subprocess.run(['nm', '-D', '--undefined-only', _library.LIBRARY_PATH], capture_output=True, text=True)
    names = re.findall(r' [Uw] (\w+)', listed.stdout)
    assert 'torch_call_dispatcher' in names, listed
    assert not [name for name in names if re.search('c10|2at|caffe|5torch', name)], names
    torchs = [name for name in names if 'torch' in name]
    assert all(re.match('(aoti_)?torch_', name) for name in torchs), torchs


@pytest.mark.parametrize(
    ('record', 'compiled', 'reason'),
    [
        ({'torch': 'other', 'oldest_torch': '2.10'}, True, 'compiled for torch 2.10 and newer'),
        (
            {'torch': 'other', 'oldest_torch': '99.1'},
            False,
            f'for torch 99.1 and newer, and this is torch {torch.__version__}',
        ),
        (
            {'torch': 'other', 'oldest_torch': 'x'},
            False,
            f'for torch x and newer, and this is torch {torch.__version__}',
        ),
        ({'torch': '2.8.0', 'oldest_torch': None}, False, f'for torch 2.8.0, and this is torch {torch.__version__}'),
    ],
)
def test_the_record_says_which_torch_a_library_serves(monkeypatch, tmp_path, record, compiled, reason):
    monkeypatch.setattr(_library, 'INFO_PATH', tmp_path / 'info.json')
    monkeypatch.setattr(_library.torch.ops, 'load_library', lambda path: None)
    _library.INFO_PATH.write_text(json.dumps(record))
    status = _library._load()
    assert status.compiled == compiled and reason in status.reason


def test_want_of_memory_is_torchs_error():
    nothing = torch.zeros(1)
    side = 2**20
    maps = [nothing.expand(1, side, side, 64), nothing.expand(1, side, side, 1, 64)]
    arguments = (*maps, torch.zeros(1, 64, 1), None, None, None, None, [0], False, True, 0)
    with pytest.raises(_library.OutOfMemoryError, match=rf'\(1, {side}, {side}, 64\)'):
        _library.call(torch.ops.cuda_ops.route_scan, *arguments)
    with pytest.raises(ValueError, match='routes are 0 to 3'):
        _library.call(
            torch.ops.cuda_ops.route_scan, *(value[:, :1, :1] for value in maps), *arguments[2:7], [9], *arguments[8:]
        )


def test_a_portable_library_takes_old_functions(build, tmp_path):
    link = build.Step(tmp_path / 'lib.so', (), ('c++', '-shared', '-lm', '-o', 'lib.so'))
    compiled, linked = build.make_portable([link], build.CSRC, tmp_path, ['c++'])
    assert compiled.output == tmp_path / 'portable.o' and compiled.output in linked.inputs
    assert {'-Wl,--wrap=exp', '-Wl,--wrap=dlopen', '-Wl,--wrap=pthread_create'} <= set(linked.argv)
    assert linked.argv[-2:] == ('-o', 'lib.so')


def wheel_of(folder, name='ssm_backbones-1-py3-none-manylinux_2_28_x86_64.whl', **record):
    path = folder / name
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr(
            'cuda_ops/_build_info.json', json.dumps({'torch': '2.13', 'oldest_torch': '2.10', 'cuda': None} | record)
        )
    return path


def test_a_wheel_that_serves_less_than_it_says_is_refused(make_wheel, monkeypatch, tmp_path):
    monkeypatch.setattr(make_wheel, '_audit', lambda command, *arguments: command)
    monkeypatch.setattr(make_wheel, '_run', lambda folder: 'ran')
    line, *audits = make_wheel.check(wheel_of(tmp_path))
    assert audits == ['auditwheel', 'torch-abi-audit', 'ran']
    assert 'torch 2.10 and newer, no CUDA kernels' in line
    with pytest.raises(make_wheel.WheelError, match='has no stable ABI'):
        make_wheel.check(wheel_of(tmp_path, oldest_torch=None))
    with pytest.raises(make_wheel.WheelError, match='not tagged py3-none-manylinux_2_28'):
        make_wheel.check(wheel_of(tmp_path, 'ssm_backbones-1-cp311-cp311-linux_x86_64.whl'))
    monkeypatch.setattr(make_wheel, 'LIMIT', 10)
    with pytest.raises(make_wheel.WheelError, match='100 MiB'):
        make_wheel.check(wheel_of(tmp_path))


def test_a_wheel_that_does_not_run_is_refused(make_wheel, tmp_path):
    (tmp_path / 'cuda_ops.py').write_text('raise ImportError("undefined symbol")')
    with pytest.raises(make_wheel.WheelError, match='does not run:(.|\n)*undefined symbol'):
        make_wheel._run(str(tmp_path))


def test_a_checkers_refusal_stops_the_wheel(make_wheel, monkeypatch, tmp_path):
    checker = tmp_path / 'checker'
    checker.write_text('#!/bin/sh\necho "Torch ABI: $1"\n')
    checker.chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path))
    assert make_wheel._audit('checker', ['STABLE'], 'STABLE') == 'checked by checker'
    with pytest.raises(make_wheel.WheelError, match='checker refuses UNSTABL'):
        make_wheel._audit('checker', ['UNSTABL'], 'STABLE')
    assert 'not installed' in make_wheel._audit('other', ['x'], 'STABLE')


def headers_of(folder, text=b'#define TORCH 1\n'):
    wheel = folder / 'torch-2.99.0-cp311-none-macosx_11_0_arm64.whl'
    with zipfile.ZipFile(wheel, 'w') as archive:
        archive.writestr('torch/include/torch/library.h', text)
        archive.writestr('torch/lib/large.dylib', b'0')
    return wheel


def test_headers_are_fetched_once(abi_check, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(abi_check, '_download', lambda version, folder: calls.append(version) or headers_of(folder))
    include = abi_check.fetch_headers('2.99.0', tmp_path / 'cache')
    assert (include / 'torch' / 'library.h').exists() and not (include.parent / 'lib').exists()
    assert abi_check.fetch_headers('2.99.0', tmp_path / 'cache') == include and calls == ['2.99.0']
    assert [path.name for path in (tmp_path / 'cache').iterdir()] == ['2.99.0']


def test_half_a_download_is_never_used(abi_check, monkeypatch, tmp_path):
    def cut_off(version, folder):
        wheel = headers_of(folder)
        wheel.write_bytes(wheel.read_bytes()[:-30])
        return wheel

    def no_space(archive, *arguments):
        raise OSError('No space left on device')

    monkeypatch.setattr(abi_check, '_download', cut_off)
    with pytest.raises(abi_check.HeaderError, match='headers of torch 2.99.0 cannot be put into'):
        abi_check.fetch_headers('2.99.0', tmp_path)
    monkeypatch.setattr(abi_check, '_download', lambda version, folder: headers_of(folder))
    with monkeypatch.context() as full:
        full.setattr(zipfile.ZipFile, 'extractall', no_space)
        with pytest.raises(abi_check.HeaderError, match='No space left'):
            abi_check.fetch_headers('2.99.0', tmp_path)
    assert not list(tmp_path.iterdir())
    assert abi_check.fetch_headers('2.99.0', tmp_path).is_dir()


def test_a_version_that_pip_does_not_have_is_named(abi_check, monkeypatch, tmp_path):
    answer = subprocess.CompletedProcess([], 1, '', 'ERROR: No matching distribution found for torch==9.9.9\n')
    monkeypatch.setattr(abi_check.subprocess, 'run', lambda *arguments, **options: answer)
    with pytest.raises(abi_check.HeaderError, match=r'no torch 9\.9\.9 .*No matching distribution'):
        abi_check.fetch_headers('9.9.9', tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_headers_at_hand_compile(abi_check, build):
    """With this torch alone; `make abi` takes all versions."""
    from torch.utils.cpp_extension import include_paths

    if not build.uses_stable_abi(torch.__version__):
        pytest.skip('ATen takes too long; make abi compiles against it')
    include = Path(include_paths()[0])
    assert abi_check.compile_bindings(build, torch.__version__, include, True) == ''
