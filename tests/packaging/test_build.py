"""How the ops are compiled: flags, order, CUDA's place, incremental builds, and what is said when it cannot be done."""

import dataclasses
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cuda_ops import _library


@pytest.fixture
def csrc(tmp_path):
    """A kernel, its dispatcher and a header, in a folder whose name needs quoting."""
    folder = tmp_path / 'my $ources'
    (folder / 'cpu').mkdir(parents=True)
    (folder / 'shared.h').write_text('inline int shared() { return 1; }\n')
    (folder / 'cpu' / 'scan.cpp').write_text('#include "shared.h"\nint scan() { return shared(); }\n')
    (folder / 'cpu' / 'scan_dispatch.cpp').write_text('int choose() { return 0; }\n')
    return folder


def flags_by_object(build, csrc, machine):
    return {step.output.name: step.argv for step in build.cpu_steps(csrc, csrc, ['c++'], machine)}


def test_kernels_are_compiled_for_three_instruction_sets_on_x86(build, csrc):
    flags = flags_by_object(build, csrc, 'x86_64')
    assert list(flags) == ['scan_dispatch.o', 'scan.baseline.o', 'scan.avx2.o', 'scan.avx512.o']
    assert not any(flag.startswith('-m') for flag in flags['scan.baseline.o'])
    assert {'-mavx2', '-mfma', '-DSSM_CPU_CAPABILITY=avx2'} <= set(flags['scan.avx2.o'])
    assert {
        '-mavx512f',
        '-mavx512bw',
        '-mavx512dq',
        '-mavx512vl',
        '-mfma',
        '-mprefer-vector-width=512',
        '-DSSM_CPU_CAPABILITY=avx512',
    } <= set(flags['scan.avx512.o'])


def test_dispatcher_runs_on_every_processor(build, csrc):
    flags = flags_by_object(build, csrc, 'x86_64')['scan_dispatch.o']
    assert not any(flag.startswith(('-m', '-DSSM_CPU_CAPABILITY')) for flag in flags)


@pytest.mark.parametrize('machine', ['aarch64', 'arm64', 'ppc64le', 'riscv64'])
def test_other_processors_get_the_baseline_alone(build, csrc, machine):
    flags = flags_by_object(build, csrc, machine)
    assert list(flags) == ['scan_dispatch.o', 'scan.baseline.o']
    assert '-DSSM_CPU_CAPABILITY=baseline' in flags['scan.baseline.o']
    assert not any(flag.startswith('-m') for argv in flags.values() for flag in argv)


@pytest.mark.parametrize('machine', ['x86_64', 'aarch64'])
def test_arithmetic_keeps_its_rules(build, csrc, machine):
    for argv in flags_by_object(build, csrc, machine).values():
        assert not {'-ffast-math', '-Ofast', '-march=native', '-funsafe-math-optimizations'} & set(argv)
        assert {'-O3', '-std=c++17', '-fPIC', '-fvisibility=hidden'} <= set(argv)


@pytest.mark.parametrize(
    ('arch_list', 'expected'),
    [
        ('8.0', ['compute_80,code=sm_80']),
        ('8.0;9.0a+PTX', ['compute_80,code=sm_80', 'compute_90a,code=sm_90a', 'compute_90a,code=compute_90a']),
        ('7.5 12.0', ['compute_75,code=sm_75', 'compute_120,code=sm_120']),
        ('8.6,8.6', ['compute_86,code=sm_86']),
    ],
)
def test_gencode_flags(build, arch_list, expected):
    assert build.gencode_flags(arch_list) == tuple(f'-gencode=arch={flag}' for flag in expected)


@pytest.mark.parametrize('arch_list', ['Hopper', '90', '8.0;sm_90', ' ; '])
def test_gencode_refuses_what_is_no_compute_capability(build, arch_list):
    with pytest.raises(build.BuildError, match='TORCH_CUDA_ARCH_LIST'):
        build.gencode_flags(arch_list)


def toolkit_of(build, version='13.1', archs=('75', '80', '90', '121')):
    return build.Toolkit(Path('/t/bin/nvcc'), version, (), archs)


def plan_of(build, force, **changed):
    complete = {
        'sources': ['scan.cu'],
        'torch_cuda': '13.0',
        'toolkit': toolkit_of(build),
        'environ_archs': '',
        'visible_archs': '9.0',
    }
    return build.plan_cuda(force, **(complete | changed))


@pytest.mark.parametrize(
    ('force', 'changed', 'reason'),
    [
        ('0', {}, 'FORCE_CUDA=0'),
        ('auto', {'sources': []}, 'no CUDA sources'),
        ('', {'torch_cuda': None}, 'CPU build'),
        ('auto', {'toolkit': None}, 'on the path; install the CUDA toolkit 13.0 and set CUDA_HOME'),
    ],
)
def test_cuda_is_left_out_with_a_reason(build, force, changed, reason):
    plan = plan_of(build, force, **changed)
    assert not plan.build and reason in plan.reason


def test_a_toolkit_of_another_major_version_is_not_used(build):
    plan = plan_of(build, '', toolkit=toolkit_of(build, '12.8'))
    assert not plan.build and plan.reason == (
        'nvcc is version 12.8, while torch was built for CUDA 13.0; set CUDA_HOME to a toolkit of CUDA 13, best 13.0, '
        'or install a torch built for CUDA 12'
    )
    with pytest.raises(build.BuildError, match='FORCE_CUDA=1, but nvcc is version 12.8'):
        plan_of(build, '1', toolkit=toolkit_of(build, '12.8'))


@pytest.mark.parametrize('force', ['', 'auto', '1'])
def test_cuda_is_built_where_everything_is_there(build, force):
    plan = plan_of(build, force)
    assert plan.build and plan.gencode == build.gencode_flags('9.0') and plan.archs == '9.0'
    assert 'nvcc 13.1, torch for CUDA 13.0, for 9.0 (the GPU at hand)' == plan.reason
    plan = plan_of(build, force, toolkit=dataclasses.replace(toolkit_of(build), host=('-ccbin', 'g++-11')))
    assert plan.reason.startswith('nvcc 13.1 with g++-11, torch for')


def test_forced_cuda_needs_neither_a_gpu_nor_torchs_cuda(build):
    plan = plan_of(build, '1', torch_cuda=None, visible_archs='')
    assert plan.build and plan.archs == '7.5;8.0;9.0+PTX'
    assert 'CPU build of torch' in plan.reason and 'no GPU is visible' in plan.reason


def test_the_variable_names_the_architectures(build):
    plan = plan_of(build, '', environ_archs='8.0')
    assert plan.archs == '8.0' and 'TORCH_CUDA_ARCH_LIST' in plan.reason


@pytest.mark.parametrize(
    ('changed', 'reason'),
    [
        ({'visible_archs': '13.0'}, r"does not compile for 13\.0 \(the GPU at hand\), only for 7\.5, .*'12\.1\+PTX'"),
        ({'environ_archs': '7.5;9.0a;15.0+PTX'}, r'does not compile for 15\.0 \(TORCH_CUDA_ARCH_LIST\)'),
        ({'environ_archs': '6.1 7.0'}, r'does not compile for 6\.1, 7\.0 .*; install a toolkit that does'),
    ],
)
def test_architectures_that_the_compiler_does_not_know_are_explained(build, changed, reason):
    plan = plan_of(build, '', **changed)
    assert not plan.build and re.search(reason, plan.reason), plan.reason
    with pytest.raises(build.BuildError, match=reason):
        plan_of(build, '1', **changed)


def test_a_toolkit_that_does_not_compile_is_not_used(build):
    toolkit = dataclasses.replace(toolkit_of(build), obstacle='nvcc 13.1 does not compile with c++')
    plan = plan_of(build, 'auto', toolkit=toolkit)
    assert not plan.build and plan.reason == toolkit.obstacle
    with pytest.raises(build.BuildError, match=r'FORCE_CUDA=1, but nvcc 13\.1 does not compile with c\+\+'):
        plan_of(build, '1', toolkit=toolkit)


def test_forced_cuda_fails_without_a_toolkit(build):
    with pytest.raises(build.BuildError, match='FORCE_CUDA=1, but there is no nvcc'):
        plan_of(build, '1', toolkit=None)


def test_a_toolkit_too_new_for_the_usual_architectures_is_explained(build):
    with pytest.raises(build.BuildError, match='TORCH_CUDA_ARCH_LIST'):
        plan_of(build, '1', visible_archs='', toolkit=toolkit_of(build, archs=('150',)))


def test_unknown_force_cuda_is_refused(build):
    with pytest.raises(build.BuildError, match="'yes'"):
        plan_of(build, 'yes')


# Answers as nvcc 11.8 does where no compiler fits but g++-11, and keeps the options that it was called with.
NVCC = """#!/bin/sh
case "$1" in
--version) echo 'Cuda compilation tools, release 11.8, V11.8.89'; exit;;
--list-gpu-arch) echo compute_75; echo compute_90; exit;;
esac
echo "$@" >> "$0.calls"
echo '#$ LIBRARIES=  "-L/t/stubs" "-L/t/lib"'
echo '#$ cudafe++ --display_error_number --allow_managed'
case "$*" in
*NVCCS_OWN*|'-ccbin /my/g++-11 '*) exit;;
-ccbin*' -v '*) echo "host_config.h:132:2: error: #error -- unsupported GNU version! gcc versions later than 11 are" \
    "not supported! The nvcc flag '-allow-unsupported-compiler' can override this. Use at your own risk."; exit 1;;
*) echo 'gcc: No such file or directory'; echo 'nvcc fatal   : Failed to preprocess host compiler properties.'; exit 1;;
esac
"""


@pytest.fixture
def toolkit_with(build, tmp_path):
    """Finds the stand-in for nvcc, or another, under the given variables."""
    nvcc = tmp_path / 'bin' / 'nvcc'
    nvcc.parent.mkdir()

    def find(script=NVCC, **environ):
        nvcc.write_text(script)
        nvcc.chmod(0o755)
        return build.find_toolkit({'CUDA_HOME': str(tmp_path), 'PATH': os.environ['PATH'], 'CXX': 'sh'} | environ)

    return find


def test_toolkit_is_read_from_the_compiler(build, toolkit_with, tmp_path):
    toolkit = toolkit_with(CUDAHOSTCXX='/my/g++-11')
    assert toolkit == build.Toolkit(
        tmp_path / 'bin' / 'nvcc', '11.8', ('/t/stubs', '/t/lib'), ('75', '90'), ('-ccbin', '/my/g++-11')
    )
    assert build.default_archs(toolkit) == '7.5;9.0+PTX'
    assert build.find_toolkit({'CUDA_HOME': str(tmp_path / 'nothing'), 'PATH': os.environ['PATH']}) is None
    assert toolkit_with('#!/bin/sh\nexit 1\n') is None


def test_a_host_compiler_too_new_for_nvcc_is_explained_with_the_remedy(toolkit_with):
    assert toolkit_with().obstacle == (
        'nvcc 11.8 does not compile with sh: unsupported GNU version! gcc versions later than 11 are not supported; '
        'name an older one in CUDAHOSTCXX, for example CUDAHOSTCXX=g++-11'
    )


def test_what_else_stops_nvcc_is_named(toolkit_with):
    lacking = NVCC.replace('gcc: No such', 'cuda_fp16.h:4100:10: fatal error: nv/target: No such')
    obstacle = toolkit_with(lacking, NVCC_PREPEND_FLAGS='-ccbin other').obstacle
    assert 'does not compile: cuda_fp16.h:4100:10: fatal error: nv/target: No such file or directory; ' in obstacle
    assert 'complete the CUDA toolkit' in obstacle
    assert 'does not compile: gcc: No such file or directory; ' in toolkit_with(NVCC_CCBIN='g++-99').obstacle


@pytest.mark.parametrize(
    ('environ', 'tried'),
    [
        ({'CUDAHOSTCXX': '/my/g++', 'NVCC_PREPEND_FLAGS': '-ccbin a'}, ['-ccbin /my/g++ -v']),
        ({'NVCC_APPEND_FLAGS': '--compiler-bindir=/other'}, ['-v']),
        ({'NVCC_CCBIN': '/other'}, ['-v']),
        ({'NVCC_APPEND_FLAGS': '-allow-unsupported-compiler'}, ['-ccbin sh -v', '-v']),
        ({'CXX': 'env sh -m64'}, ['-ccbin sh -v', '-v']),
    ],
)
def test_who_names_nvccs_host_compiler(toolkit_with, tmp_path, environ, tried):
    assert toolkit_with(**environ).obstacle
    calls = (tmp_path / 'bin' / 'nvcc.calls').read_text().splitlines()
    assert [call.partition(' -E ')[0] for call in calls] == tried


def test_nvccs_own_host_compiler_serves_where_cxx_is_too_new(toolkit_with):
    """As in Debian's package: its nvcc finds an older g++, and its headers are in the compiler's own folders."""
    toolkit = toolkit_with(NVCC.replace('*NVCCS_OWN*', '-v*'))
    assert toolkit.host == () and not toolkit.obstacle and toolkit.libraries == ('/t/stubs', '/t/lib')


def test_cuda_kernels_are_compiled_by_nvcc_alone(build, csrc):
    (csrc / 'cuda').mkdir()
    (csrc / 'cuda' / 'scan.cu').write_text('')
    toolkit = dataclasses.replace(toolkit_of(build), host=('-ccbin', 'g++'))
    (step,) = build.cuda_steps(csrc, csrc, toolkit, build.gencode_flags('8.0'))
    assert step.argv[:3] == ('/t/bin/nvcc', '-ccbin', 'g++')
    assert '-gencode=arch=compute_80,code=sm_80' in step.argv and '--use_fast_math' not in step.argv
    assert not any('torch' in flag for flag in step.argv)
    (other,) = build.cuda_steps(csrc, csrc, dataclasses.replace(toolkit, version='13.2'), build.gencode_flags('8.0'))
    assert other.argv != step.argv, 'objects of another nvcc behind the same path would be kept'


def test_cuda_library_carries_the_runtime(build):
    toolkit = build.Toolkit('/t/bin/nvcc', '13.0', ('/t/lib',), ('90',))
    argv = build.link_step('lib.so', [], ['c++'], toolkit).argv
    assert {'-lcudart_static', '-L/t/lib'} <= set(argv)
    # Nothing of torch's CUDA libraries: a CPU build of torch has none.
    assert not {'-lc10_cuda', '-ltorch_cuda'} & set(argv)
    assert not any('cuda' in flag for flag in build.link_step('lib.so', [], ['c++'], None).argv)


def test_source_hash_follows_names_and_contents(build, csrc):
    seen = {build.source_hash(csrc)}
    (csrc / 'shared.h').write_text('inline int shared() { return 2; }\n')
    seen.add(build.source_hash(csrc))
    (csrc / 'cpu' / 'scan.cpp').rename(csrc / 'cpu' / 'other.cpp')
    seen.add(build.source_hash(csrc))
    assert len(seen) == 3
    (csrc / 'notes.txt').write_text('no source')
    (csrc / 'benchmark').mkdir()
    (csrc / 'benchmark' / 'rate.cpp').write_text('// no part of the library')
    assert build.source_hash(csrc) in seen
    assert build.source_hash(csrc / 'nothing') is None


def steps_to_library(build, csrc, objects):
    steps = build.cpu_steps(csrc, objects, build.find_compiler(), 'aarch64')
    link = build.link_step(objects / 'lib.so', [step.output for step in steps], build.find_compiler(), None)
    # Linked without torch, so that the test takes no time.
    return [*steps, dataclasses.replace(link, argv=tuple(flag for flag in link.argv if not flag.startswith('-l')))]


@pytest.mark.parametrize('ninja', [True, False])
def test_sources_become_a_library(build, csrc, tmp_path, monkeypatch, ninja):
    if not ninja:
        monkeypatch.setattr(build, '_find_ninja', lambda environ: None)
    build.run_steps(steps_to_library(build, csrc, tmp_path), tmp_path)
    assert (tmp_path / 'lib.so').exists()
    assert (tmp_path / 'build.ninja').exists() == ninja


def test_changed_header_compiles_what_includes_it_and_no_more(build, csrc, tmp_path):
    steps = steps_to_library(build, csrc, tmp_path)
    build.run_steps(steps, tmp_path)
    before = {step.output.name: step.output.stat().st_mtime_ns for step in steps}
    build.run_steps(steps, tmp_path)
    assert before == {step.output.name: step.output.stat().st_mtime_ns for step in steps}
    (csrc / 'shared.h').write_text('inline int shared() { return 2; }\n')
    build.run_steps(steps, tmp_path)
    changed = {step.output.name for step in steps if step.output.stat().st_mtime_ns != before[step.output.name]}
    assert changed == {'scan.baseline.o', 'lib.so'}


def test_kernels_compiled_ahead_are_taken(build, csrc, tmp_path, monkeypatch):
    monkeypatch.setattr(build.platform, 'machine', lambda: 'aarch64')
    build.compile_kernels(tmp_path, csrc)
    *kernels, library = steps_to_library(build, csrc, tmp_path)
    before = [step.output.stat().st_mtime_ns for step in kernels]
    build.run_steps([*kernels, library], tmp_path)
    assert library.output.exists() and before == [step.output.stat().st_mtime_ns for step in kernels]


@pytest.mark.parametrize('ninja', [True, False])
def test_broken_source_is_reported(build, csrc, tmp_path, monkeypatch, ninja):
    if not ninja:
        monkeypatch.setattr(build, '_find_ninja', lambda environ: None)
    (csrc / 'cpu' / 'scan.cpp').write_text('int scan( {')
    with pytest.raises(build.BuildError, match='does not compile'):
        build.run_steps(steps_to_library(build, csrc, tmp_path), tmp_path)
    assert not (tmp_path / 'lib.so').exists()


def test_compiler_is_cxx_or_the_first_on_the_path(build, tmp_path):
    (tmp_path / 'g++').write_text('#!/bin/sh\n')
    (tmp_path / 'g++').chmod(0o755)
    assert build.find_compiler({'PATH': str(tmp_path)}) == ['g++']
    assert build.find_compiler({'PATH': str(tmp_path), 'CXX': f'{tmp_path}/g++ -m64'}) == [f'{tmp_path}/g++', '-m64']
    with pytest.raises(build.BuildError, match=r'no C\+\+ compiler found \(looked for icpx\)'):
        build.find_compiler({'PATH': str(tmp_path), 'CXX': 'icpx'})


def test_missing_torch_is_explained(build, tmp_path, monkeypatch):
    monkeypatch.setattr(build.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(build.BuildError, match='--no-build-isolation'):
        build.build(tmp_path, tmp_path)


def test_a_torch_too_old_is_named_with_the_oldest_served(build, root, tmp_path, monkeypatch):
    assert build.refusal_of('2.1.0+cpu') == ''
    monkeypatch.setattr(torch, '__version__', '2.0.1+cu118')
    message = r'torch 2\.0\.1\+cu118 is too old, 2\.1 is the oldest that is served; `pip install "torch>=2\.1"`'
    with pytest.raises(build.BuildError, match=message):
        build.build(tmp_path, tmp_path)
    with pytest.raises(ImportError, match=message):
        runpy.run_path(str(root / 'cuda_ops' / '_torch_compat.py'))


def test_record_never_describes_another_library(build, tmp_path, monkeypatch):
    library, package = tmp_path / 'new.so', tmp_path / 'package'
    library.write_bytes(b'new')
    build._install(library, {'torch': '1'}, package)
    assert (package / '_C.so').read_bytes() == b'new'
    assert json.loads((package / '_build_info.json').read_text()) == {'torch': '1'}
    assert sorted(path.name for path in package.iterdir()) == ['_C.so', '_build_info.json']

    def full(source, target):
        Path(target).write_bytes(b'n')
        raise OSError(28, 'No space left on device', str(target))

    library.write_bytes(b'newer')
    with monkeypatch.context() as patched:
        patched.setattr(build.shutil, 'copyfile', full)
        with pytest.raises(OSError, match='No space left'):
            build._install(library, {'torch': '2'}, package)
    assert (package / '_C.so').read_bytes() == b'new'
    assert json.loads((package / '_build_info.json').read_text()) == {'torch': '1'}
    assert sorted(path.name for path in package.iterdir()) == ['_C.so', '_build_info.json']

    def interrupted(path, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(build.Path, 'replace', interrupted)
    with pytest.raises(KeyboardInterrupt):
        build._install(library, {'torch': '2'}, package)
    assert [path.name for path in package.iterdir()] == ['_C.so']


@pytest.mark.skipif(
    os.environ.get('CI_PINS') != '1', reason='needs CI_PINS=1, as `make test` sets it: the library may be older'
)
def test_installed_library_is_of_these_sources_and_this_torch(build):
    info = json.loads(_library.INFO_PATH.read_text())
    assert info['torch'] == torch.__version__
    assert info.get('source_hash') == build.source_hash(), 'the ops on disk are of other sources: run `make setup`'


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_library_shares_torchs_thread_pool():
    script = (
        'import torch, cuda_ops, re\n'
        'assert cuda_ops._library.STATUS.compiled, cuda_ops._library.STATUS.reason\n'
        'maps = open("/proc/self/maps").read()\n'
        'print(*set(re.findall(r"\\S+/lib(?:gomp|omp|iomp)\\S*", maps)), sep="\\n")'
    )
    output = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True).stdout
    assert len(output.split()) == 1, output
