"""Compile the op library: which sources, with which flags, into which files.

Imports the standard library alone, so that setup.py can load this file by its path before torch is known to be
installed, and so that reading back what a library was built from costs nothing. Kernels are compiled without torch's
headers; only the ``*_bindings.cpp`` see them.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CSRC = Path(__file__).resolve().parent / 'csrc'
# Where a checkout keeps objects.
BUILD_DIR = CSRC.parents[1] / 'build' / 'ops'
LIBRARY_NAME = '_C.so'
INFO_NAME = '_build_info.json'

# ISO C++ would forbid fused multiply-adds, which half of the kernels' arithmetic consists of.
CXX_FLAGS = ['-O3', '-std=c++17', '-ffp-contract=fast', '-fPIC', '-fvisibility=hidden', '-g0', '-Wall']
NVCC_FLAGS = ['-O3', '-std=c++17', '-Xcompiler', '-fPIC,-fvisibility=hidden']
X86_CAPABILITIES = {
    'baseline': [],
    'avx2': ['-mavx2', '-mfma'],
    'avx512': ['-mavx512f', '-mavx512bw', '-mavx512dq', '-mavx512vl', '-mfma', '-mprefer-vector-width=512'],
}
# Compute capabilities that a library for unknown GPUs is compiled for, from Turing on.
ARCHS = ('7.5', '8.0', '8.6', '8.9', '9.0', '10.0', '12.0')
# The first torch that is served.
OLDEST_TORCH = (2, 1)
# The first torch whose stable ABI has all that the bindings need.
STABLE_SINCE = (2, 10)
SOURCE_SUFFIXES = ('.cpp', '.h', '.cu', '.cuh', '.inc')
# In csrc: what only the benchmark compiles.
BENCHMARK_FOLDER = 'benchmark'
# 1 links a library that also runs on older Linux, as `make wheel` wants it.
PORTABLE_VARIABLE = 'SSM_OPS_PORTABLE'


class BuildError(Exception):
    """The library cannot be built; the message says why and what to do."""


@dataclass(frozen=True)
class Step:
    """One compiler run: ``argv`` makes ``output`` from ``inputs`` (and lists the headers it met in a depfile)."""

    output: Path
    inputs: tuple[Path, ...]
    argv: tuple[str, ...]


@dataclass(frozen=True)
class Toolkit:
    """A CUDA compiler, its version (e.g. 13.0), the folders of the runtime's libraries, and what it knows.

    Attributes:
        archs: the architectures it compiles for, without their dots.
        host: the options that name its host compiler; empty where it finds one by itself.
        obstacle: why it compiles nothing here, and what to do; empty where it does.
    """

    nvcc: Path
    version: str
    libraries: tuple[str, ...]
    archs: tuple[str, ...]
    host: tuple[str, ...] = ()
    obstacle: str = ''


@dataclass(frozen=True)
class CudaPlan:
    """Whether CUDA kernels are compiled, and why (not)."""

    build: bool
    reason: str
    gencode: tuple[str, ...] = ()
    archs: str = ''


def source_hash(csrc: Path = CSRC) -> str | None:
    """SHA-256 over the names and contents of the library's sources, or None where they are not installed."""
    files = sorted(
        path
        for path in csrc.rglob('*')
        if path.suffix in SOURCE_SUFFIXES and path.relative_to(csrc).parts[0] != BENCHMARK_FOLDER
    )
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        digest.update(f'{path.relative_to(csrc).as_posix()}\0{len(content)}\0'.encode())
        digest.update(content)
    return digest.hexdigest()


def cpu_capabilities(machine: str) -> dict[str, list[str]]:
    """Instruction sets the kernels are compiled for, baseline first, with the flags that select them."""
    if machine.lower() in ('x86_64', 'amd64'):
        return X86_CAPABILITIES
    return {'baseline': []}


def find_compiler(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The C++ compiler's command: ``CXX`` where it is set, else the first of c++, g++, clang++ on the path."""
    candidates = [shlex.split(environ['CXX'])] if environ.get('CXX') else [['c++'], ['g++'], ['clang++']]
    for command in candidates:
        if shutil.which(command[0], path=environ.get('PATH')):
            return command
    names = ', '.join(command[0] for command in candidates)
    raise BuildError(
        f'no C++ compiler found (looked for {names}); install one, for example with '
        '`apt install g++` or `dnf install gcc-c++`, or name it in CXX'
    )


def compiler_version(command: Sequence[str]) -> str:
    """The first line of the compiler's ``--version``."""
    try:
        output = subprocess.run([*command, '--version'], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f'the C++ compiler {shlex.join(command)} does not run: {error}') from None
    return output.partition('\n')[0].strip()


def gencode_flags(arch_list: str, origin: str = 'TORCH_CUDA_ARCH_LIST') -> tuple[str, ...]:
    """nvcc's ``-gencode`` flags for a list as in ``TORCH_CUDA_ARCH_LIST``, e.g. ``8.0;9.0a+PTX``.

    Raises:
        BuildError: for an entry that is not a compute capability with an optional ``+PTX``.
    """
    flags = []
    for entry in _entries(arch_list):
        match = re.fullmatch(r'(\d+)\.(\d)([af]?)(\+PTX)?', entry)
        if not match:
            raise BuildError(f"{origin} has the entry {entry!r}; write compute capabilities such as '8.0;9.0+PTX'")
        arch = ''.join(match.group(1, 2, 3))
        flags.append(f'-gencode=arch=compute_{arch},code=sm_{arch}')
        if match.group(4):
            flags.append(f'-gencode=arch=compute_{arch},code=compute_{arch}')
    if not flags:
        raise BuildError(f'{origin} names no architecture')
    return tuple(dict.fromkeys(flags))


def default_archs(toolkit: Toolkit) -> str:
    """The architectures compiled for where no GPU is visible: those of :data:`ARCHS` that the compiler knows, and PTX.

    Raises:
        BuildError: if the compiler knows none of them.
    """
    known = set(toolkit.archs)
    archs = [arch for arch in ARCHS if arch.replace('.', '') in known]
    if not archs:
        raise BuildError(
            f'nvcc {toolkit.version} knows none of the architectures {", ".join(ARCHS)}; name one that it '
            'knows in TORCH_CUDA_ARCH_LIST'
        )
    return ';'.join(archs) + '+PTX'


def plan_cuda(
    force: str,
    *,
    sources: Sequence[Path],
    torch_cuda: str | None,
    toolkit: Toolkit | None,
    environ_archs: str,
    visible_archs: str,
) -> CudaPlan:
    """Decide whether CUDA kernels are compiled, and for which architectures.

    The kernels need nothing of torch, and the bindings only what is in every build of torch. So ``FORCE_CUDA=1`` also
    serves where torch is a CPU build, or none of the machine's; such a library runs on the CPU.

    Args:
        force: ``FORCE_CUDA``: 1 demands them, 0 forbids them, ``auto`` or empty takes them where torch and toolkit fit.
        sources: the ``.cu`` files.
        torch_cuda: the CUDA version torch was built for, None for a CPU build of torch.
        toolkit: the CUDA compiler, None where there is none.
        environ_archs: ``TORCH_CUDA_ARCH_LIST``, empty where it is not set.
        visible_archs: the architectures of the GPUs at hand, likewise.

    Raises:
        BuildError: if ``force`` is unknown, or is 1 and there is no toolkit, or one of another major version than
            torch's, or one that does not compile with the host compiler or for the architectures.
    """
    if force not in ('', 'auto', '0', '1'):
        raise BuildError(f'FORCE_CUDA is {force!r}; it must be 1, 0 or auto')
    if force == '0':
        return CudaPlan(False, 'FORCE_CUDA=0')
    if not sources:
        return CudaPlan(False, 'there are no CUDA sources')
    if toolkit is None:
        obstacle = (
            'there is no nvcc that runs, below CUDA_HOME or, where that is not set, on the path; install the '
            f'CUDA toolkit{f" {torch_cuda}" if torch_cuda else ""} and set CUDA_HOME'
        )
    elif torch_cuda is None and force != '1':
        obstacle = 'the installed torch is a CPU build; FORCE_CUDA=1 compiles them all the same'
    elif torch_cuda and toolkit.version.partition('.')[0] != torch_cuda.partition('.')[0]:
        ours, torchs = (version.partition('.')[0] for version in (toolkit.version, torch_cuda))
        obstacle = (
            f'nvcc is version {toolkit.version}, while torch was built for CUDA {torch_cuda}; set CUDA_HOME to '
            f'a toolkit of CUDA {torchs}, best {torch_cuda}, or install a torch built for CUDA {ours}'
        )
    else:
        archs = environ_archs or visible_archs or default_archs(toolkit)
        why = (
            'TORCH_CUDA_ARCH_LIST'
            if environ_archs
            else 'the GPU at hand'
            if visible_archs
            else 'no GPU is visible, so all that this nvcc knows of the usual ones'
        )
        torch_is = f'torch for CUDA {torch_cuda}' if torch_cuda else 'FORCE_CUDA=1 with a CPU build of torch'
        gencode = gencode_flags(archs)
        obstacle = toolkit.obstacle or unknown_archs(toolkit, archs, why)
        if not obstacle:
            nvcc = f'nvcc {toolkit.version}{f" with {toolkit.host[-1]}" if toolkit.host else ""}'
            return CudaPlan(True, f'{nvcc}, {torch_is}, for {archs} ({why})', gencode, archs)
    if force == '1':
        raise BuildError(f'FORCE_CUDA=1, but {obstacle}')
    return CudaPlan(False, obstacle)


def unknown_archs(toolkit: Toolkit, archs: str, origin: str) -> str:
    """Why the compiler cannot compile for a list as in ``TORCH_CUDA_ARCH_LIST``, and what to do; empty where it can."""
    # Variants such as 9.0a are not listed by nvcc.
    numbers = [re.sub(r'\D', '', entry) for entry in _entries(archs)]
    unknown = sorted({number for number in numbers if number not in toolkit.archs}, key=int)
    if not unknown:
        return ''
    known = [_dotted(arch) for arch in sorted(toolkit.archs, key=int)]
    too_new = known and int(unknown[-1]) > int(max(toolkit.archs, key=int))
    remedy = (
        'install a newer toolkit, or set TORCH_CUDA_ARCH_LIST with '
        f"'{known[-1]}+PTX', which the driver translates for newer GPUs"
        if too_new
        else 'install a toolkit that does, or leave them out of TORCH_CUDA_ARCH_LIST (of ARCHS for make kernels)'
    )
    return (
        f'nvcc {toolkit.version} does not compile for {", ".join(map(_dotted, unknown))} ({origin}), only for '
        f'{", ".join(known)}; {remedy}'
    )


def find_nvcc(environ: Mapping[str, str] = os.environ) -> tuple[str, str] | None:
    """Path and version, such as 13.0, of the nvcc below ``CUDA_HOME`` where that is set, else of the one on the path.

    None where none runs.
    """
    nvcc = shutil.which(
        'nvcc', path=str(Path(environ['CUDA_HOME'], 'bin')) if environ.get('CUDA_HOME') else environ.get('PATH')
    )
    version = re.search(r'release (\d+\.\d+)', _ask([nvcc, '--version'], environ)[1]) if nvcc else None
    return (nvcc, version.group(1)) if nvcc and version else None


def find_toolkit(environ: Mapping[str, str] = os.environ) -> Toolkit | None:
    """The CUDA toolkit of the nvcc that ``find_nvcc`` finds; None where none runs.

    Its host compiler is ``CUDAHOSTCXX`` where that is set, or what nvcc's own variables name; else the compiler of
    everything else, and where nvcc refuses that, the one that nvcc finds by itself.
    """
    found = find_nvcc(environ)
    if found is None:
        return None
    nvcc, version = found
    archs = tuple(re.findall(r'compute_(\d+)', _ask([nvcc, '--list-gpu-arch'], environ)[1]))
    answers = []
    for host in _host_options(environ):
        # The nvcc on the path may be a script or a link anywhere, so the compiler itself is asked for its folders. The
        # headers are those that kernels include; the runtime's, which nvcc adds, refuse unfit host compilers.
        works, output = _ask(
            [nvcc, *host, '-v', '-E', '-x', 'cu', '-include', 'cuda_bf16.h', os.devnull, '-o', os.devnull], environ
        )
        folders = re.search(r'^#\$ LIBRARIES=(.*)$', output, re.MULTILINE)
        if works and folders:
            libraries = tuple(flag[2:] for flag in shlex.split(folders.group(1)))
            return Toolkit(Path(nvcc), version, libraries, archs, host)
        answers.append((host, output))
    return Toolkit(Path(nvcc), version, (), archs, obstacle=_refusal(version, *answers[0]))


def cpu_steps(csrc: Path, objects: Path, compiler: Sequence[str], machine: str) -> list[Step]:
    """Compile every kernel once per instruction set; a ``*_dispatch.cpp``, which chooses between them, once.

    The order is the linker's: where two objects carry the same inline function, the first one's is kept, and it must
    be one that every CPU can run.
    """
    sources = sorted((csrc / 'cpu').glob('*.cpp'))
    dispatch = [source for source in sources if source.stem.endswith('_dispatch')]
    kernels = [source for source in sources if source not in dispatch]
    steps = [_cxx(compiler, source, objects / f'{source.stem}.o', [f'-I{csrc}']) for source in dispatch]
    for capability, isa_flags in cpu_capabilities(machine).items():
        flags = [f'-I{csrc}', *isa_flags, f'-DSSM_CPU_CAPABILITY={capability}']
        steps += [_cxx(compiler, source, objects / f'{source.stem}.{capability}.o', flags) for source in kernels]
    return steps


def cuda_steps(csrc: Path, objects: Path, toolkit: Toolkit, gencode: Sequence[str]) -> list[Step]:
    """Compile every CUDA kernel by nvcc alone."""
    steps = []
    for source in sorted((csrc / 'cuda').glob('*.cu')):
        output = objects / f'{source.stem}.cuda.o'
        # Its version is named so that objects of another version at the same path are compiled anew.
        argv = [
            str(toolkit.nvcc),
            *toolkit.host,
            *NVCC_FLAGS,
            *gencode,
            f'-DSSM_NVCC={toolkit.version}',
            f'-I{csrc}',
            '--generate-dependencies-with-compile',
            '--dependency-output',
            f'{output}.d',
            '-c',
            str(source),
            '-o',
            str(output),
        ]
        steps.append(Step(output, (source,), tuple(argv)))
    return steps


def uses_stable_abi(torch_version: str) -> bool:
    """Whether bindings are compiled with torch's stable ABI: one library then serves every torch from 2.10 on."""
    return parse_release(torch_version) >= STABLE_SINCE


def parse_release(version: str) -> tuple[int, int]:
    """Major and minor version of torch.

    Raises:
        ValueError: if the version does not begin with them.
    """
    found = re.match(r'(\d+)\.(\d+)', version)
    if not found:
        raise ValueError(f'{version!r} is no version of torch')
    return int(found.group(1)), int(found.group(2))


def refusal_of(torch_version: str) -> str:
    """Why a torch is not served, and what to do; empty where it is."""
    if parse_release(torch_version) >= OLDEST_TORCH:
        return ''
    return 'torch {0} is too old, {1}.{2} is the oldest that is served; `pip install "torch>={1}.{2}"`'.format(
        torch_version, *OLDEST_TORCH
    )


def binding_flags(version: str, include: Sequence[Path], cxx11_abi: bool = True) -> list[str]:
    """Return the flags of ``*_bindings.cpp`` for a torch.

    Args:
        version: torch's, e.g. ``2.13.0+cpu``.
        include: the folders of its headers.
        cxx11_abi: whether it was compiled with the C++11 ABI; without meaning for the stable ABI.
    """
    flags = [flag for path in include for flag in ('-isystem', str(path))]
    if uses_stable_abi(version):
        major, minor = STABLE_SINCE
        return [*flags, '-DSSM_STABLE_ABI', f'-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000']
    return [*flags, *_openmp(), f'-D_GLIBCXX_USE_CXX11_ABI={int(cxx11_abi)}']


def binding_steps(csrc: Path, objects: Path, compiler: Sequence[str], torch: Any, with_cuda: bool) -> list[Step]:
    """Compile every ``*_bindings.cpp``, the only files with torch's headers; they need none of CUDA's."""
    from torch.utils.cpp_extension import include_paths

    include = [Path(path) for path in include_paths()]
    flags = [f'-I{csrc}', *binding_flags(torch.__version__, include, torch.compiled_with_cxx11_abi())]
    if with_cuda:
        flags.append('-DSSM_WITH_CUDA')
    return [
        _cxx(compiler, source, objects / f'{source.stem}.o', flags) for source in sorted(csrc.glob('*_bindings.cpp'))
    ]


def link_step(library: Path, objects: Sequence[Path], compiler: Sequence[str], toolkit: Toolkit | None) -> Step:
    """Link the library. It carries no path to torch: torch is in the process before the library is loaded."""
    import torch
    from torch.utils.cpp_extension import library_paths

    argv = [*compiler, '-shared', *map(str, objects), *(f'-L{path}' for path in library_paths())]
    if not uses_stable_abi(torch.__version__):
        argv += [*_openmp(), '-lc10']
    # libtorch names torch's CUDA library, where the current stream is looked up, and must stay although nothing else
    # is taken from it.
    argv += ['-Wl,--no-as-needed'] if sys.platform.startswith('linux') else []
    argv += ['-ltorch_cpu', '-ltorch']
    if toolkit:
        # The runtime is carried along, so that neither torch's nor the machine's version of it matters.
        argv += [*(f'-L{path}' for path in toolkit.libraries), '-lcudart_static', '-ldl', '-lrt', '-lpthread']
    return Step(library, tuple(objects), (*argv, '-o', str(library)))


def make_portable(steps: Sequence[Step], csrc: Path, objects: Path, compiler: Sequence[str]) -> list[Step]:
    """Let a library that is linked on a newer Linux run with the C and C++ libraries of manylinux_2_28.

    Args:
        steps: those of a library, the last of which links it.
        csrc: the sources.
        objects: folder for objects.
        compiler: the C++ compiler's command.
    """
    *compiled, link = steps
    functions = re.findall(r'^SSM_OLD_GLIBC\((\w+),', (csrc / 'portable_functions.inc').read_text(), re.MULTILINE)
    step = _cxx(compiler, csrc / 'portable.cpp', objects / 'portable.o', [])
    flags = ['-Wl,--gc-sections', *(f'-Wl,--wrap={name}' for name in functions)]
    argv = (*link.argv[:-2], str(step.output), *flags, *link.argv[-2:])
    return [*compiled, step, Step(link.output, (*link.inputs, step.output), argv)]


def build_benchmark(
    name: str, folder: Path, capability: str, csrc: Path = CSRC, environ: Mapping[str, str] = os.environ
) -> Path:
    """Compile a source of the benchmark as the CPU kernels are compiled; it is no part of the library.

    Args:
        name: of a file in ``csrc/benchmark``, without its ending.
        folder: where to put the shared object.
        capability: instruction set to compile for, one of :func:`cpu_capabilities`.
        csrc: the sources.
        environ: read for CXX.

    Raises:
        BuildError: if the sources are not installed, there is no compiler, or it does not compile them.
    """
    source = csrc / BENCHMARK_FOLDER / f'{name}.cpp'
    if not source.exists():
        raise BuildError(f'{source} is not installed; run the benchmark in a checkout')
    library = folder / f'{name}.so'
    argv = [
        *find_compiler(environ),
        *CXX_FLAGS,
        *cpu_capabilities(platform.machine())[capability],
        *_openmp(),
        f'-DSSM_CPU_CAPABILITY={capability}',
        '-shared',
        str(source),
        '-o',
        str(library),
    ]
    compiled, output = _ask(argv, environ)
    if not compiled:
        raise BuildError(f'{source.name} does not compile: {output.strip()[-500:]}')
    return library


def build(package: Path, build_dir: Path, csrc: Path = CSRC, environ: Mapping[str, str] = os.environ) -> None:
    """Compile the library and put it, with the record of what it was built from, into ``package``.

    Args:
        package: folder that receives ``_C.so`` and ``_build_info.json``.
        build_dir: folder for objects; what is up to date there is not compiled again.
        csrc: the sources.
        environ: read for CXX, FORCE_CUDA, TORCH_CUDA_ARCH_LIST, CUDA_HOME, CUDAHOSTCXX and MAX_JOBS;
            SSM_OPS_PORTABLE=1 links for older versions of Linux, too.

    Raises:
        BuildError: with the reason and the remedy in one line.
    """
    build_dir, csrc = build_dir.resolve(), csrc.resolve()  # ninja runs in the one
    torch = _import_torch()
    compiler = find_compiler(environ)
    version = compiler_version(compiler)
    machine = platform.machine()
    toolkit = find_toolkit(environ)
    sources = sorted((csrc / 'cuda').glob('*.cu'))
    cuda = plan_cuda(
        environ.get('FORCE_CUDA', ''),
        sources=sources,
        torch_cuda=torch.version.cuda,
        toolkit=toolkit,
        environ_archs=environ.get('TORCH_CUDA_ARCH_LIST', ''),
        visible_archs=_visible_archs(torch),
    )
    toolkit = toolkit if cuda.build else None
    print(f'cuda_ops: torch {torch.__version__}, {version}')
    print(f'cuda_ops: CPU kernels for {machine}: {", ".join(cpu_capabilities(machine))}')
    print(f'cuda_ops: CUDA kernels: {"yes" if cuda.build else "no"}: {cuda.reason}', flush=True)

    build_dir.mkdir(parents=True, exist_ok=True)
    with exclusive(build_dir / 'lock'):
        steps = [
            *binding_steps(csrc, build_dir, compiler, torch, cuda.build),
            *cpu_steps(csrc, build_dir, compiler, machine),
        ]
        if toolkit:
            steps += cuda_steps(csrc, build_dir, toolkit, cuda.gencode)
        library = build_dir / LIBRARY_NAME
        steps.append(link_step(library, [step.output for step in steps], compiler, toolkit))
        if environ.get(PORTABLE_VARIABLE) == '1':
            steps = make_portable(steps, csrc, build_dir, compiler)
        hashed = source_hash(csrc)
        run_steps(steps, build_dir, environ)
        info = {
            'torch': torch.__version__,
            'oldest_torch': '{}.{}'.format(*STABLE_SINCE) if uses_stable_abi(torch.__version__) else None,
            'cxx11_abi': torch.compiled_with_cxx11_abi(),
            'compiler': version,
            'machine': machine,
            'capabilities': list(cpu_capabilities(machine)),
            'cuda': {'toolkit': toolkit.version, 'arch_list': cuda.archs} if toolkit else None,
            'cuda_reason': cuda.reason,
            'source_hash': hashed,
        }
        _install(library, info, package)


def compile_kernels(build_dir: Path, csrc: Path = CSRC, environ: Mapping[str, str] = os.environ) -> None:
    """Compile the kernels for CPUs alone, which need no torch; a later :func:`build` takes those that are up to date.

    Raises:
        BuildError: as :func:`build` does.
    """
    build_dir, csrc = build_dir.resolve(), csrc.resolve()
    build_dir.mkdir(parents=True, exist_ok=True)
    with exclusive(build_dir / 'lock'):
        run_steps(cpu_steps(csrc, build_dir, find_compiler(environ), platform.machine()), build_dir, environ)


def run_steps(steps: Sequence[Step], build_dir: Path, environ: Mapping[str, str] = os.environ) -> None:
    """Run the steps, the last after all others: by ninja where there is one, else one after the other.

    Raises:
        BuildError: if a step fails; the compiler's own messages have been printed by then.
    """
    ninja = _find_ninja(environ)
    if ninja:
        (build_dir / 'build.ninja').write_text(ninja_file(steps))
        jobs = ['-j', environ['MAX_JOBS']] if environ.get('MAX_JOBS') else []
        failed = subprocess.run([ninja, '-C', str(build_dir), *jobs], env=dict(environ)).returncode
    else:
        failed = 0
        for number, step in enumerate(steps, 1):
            print(f'[{number}/{len(steps)}] {step.output.name}', flush=True)
            failed = failed or subprocess.run(step.argv, env=dict(environ)).returncode
    if failed:
        raise BuildError("the op library does not compile; the compiler's messages are above")


def ninja_file(steps: Sequence[Step]) -> str:
    """The steps as a ninja build file, with the headers each compiled file includes tracked by ninja."""
    lines = ['rule run', '  command = $argv', '  description = $name', '']
    # Ninja starts with the first. The last ones, kernels of the widest vectors, take longest, and would be waited for.
    for step in reversed(steps):
        inputs = ' '.join(map(_ninja_path, step.inputs))
        argv = shlex.join(step.argv).replace('$', '$$')
        lines += [f'build {_ninja_path(step.output)}: run {inputs}', f'  argv = {argv}', f'  name = {step.output.name}']
        if step.output.suffix == '.o':
            lines += ['  deps = gcc', f'  depfile = {step.output}.d'.replace('$', '$$')]
    return '\n'.join(lines) + '\n'


def _entries(arch_list: str) -> list[str]:
    return arch_list.replace(';', ' ').replace(',', ' ').split()


def _dotted(arch: str) -> str:
    return f'{arch[:-1]}.{arch[-1]}'


def _ask(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[bool, str]:
    """Whether a command succeeds, and what it says."""
    try:
        result = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(environ))
    except OSError as error:
        return False, str(error)
    return result.returncode == 0, result.stdout


def _host_options(environ: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Return the nvcc options for the host compiler, in the order to try them."""
    if environ.get('CUDAHOSTCXX'):
        return [('-ccbin', environ['CUDAHOSTCXX'])]
    # An option on the command line would win over these.
    of_nvcc = ' '.join(environ.get(name, '') for name in ('NVCC_PREPEND_FLAGS', 'NVCC_APPEND_FLAGS'))
    if environ.get('NVCC_CCBIN') or re.search(r'(?<!\S)(-ccbin|--compiler-bindir)', of_nvcc):
        return [()]
    # nvcc takes no options here, and a launcher such as ccache comes before the compiler.
    words = [word for word in find_compiler(environ) if not word.startswith('-')]
    return [('-ccbin', words[-1]), ()]


def _refusal(version: str, host: Sequence[str], output: str) -> str:
    """What stopped nvcc, in one line."""
    said = '\n'.join(line for line in output.splitlines() if not line.startswith('#$'))
    error = re.search(r'(.+: No such file or directory)|(?:error|fatal)\s*:(?: #error --)? *(.+)', said, re.IGNORECASE)
    reason = (error.group(1) or error.group(2) if error else said[-200:]).partition(' The nvcc flag')[0].strip(' \n.!')
    newest = re.search(r'gcc versions later than (\d+)', reason)
    remedy = (
        f'name an older one in CUDAHOSTCXX, for example CUDAHOSTCXX=g++-{newest.group(1)}'
        if newest
        else 'name a host compiler that it supports in CUDAHOSTCXX, or complete the CUDA toolkit'
    )
    return f'nvcc {version} does not compile{f" with {host[-1]}" if host else ""}: {reason}; {remedy}'


def _cxx(compiler: Sequence[str], source: Path, output: Path, flags: Sequence[str]) -> Step:
    argv = [*compiler, '-MMD', '-MF', f'{output}.d', *CXX_FLAGS, *flags, '-c', str(source), '-o', str(output)]
    return Step(output, (source,), tuple(argv))


def _openmp() -> list[str]:
    # Apple's clang has no -fopenmp; ATen's loops run on one thread there.
    return ['-fopenmp'] if sys.platform.startswith('linux') else []


def _ninja_path(path: Path) -> str:
    return re.sub(r'([$ :])', r'$\1', str(path))


def _find_ninja(environ: Mapping[str, str]) -> str | None:
    # The virtual environment's own ninja comes first: its folder is on no path unless the environment is activated.
    return shutil.which('ninja', path=os.pathsep.join([str(Path(sys.executable).parent), environ.get('PATH', '')]))


def _import_torch() -> Any:
    if importlib.util.find_spec('torch') is None:
        raise BuildError(
            'torch is needed to compile cuda_ops and is not installed where the build runs; install it '
            'first and switch build isolation off: `pip install --no-build-isolation ...`'
        )
    import torch

    if refusal := refusal_of(torch.__version__):
        raise BuildError(refusal)
    return torch


def _visible_archs(torch: Any) -> str:
    if not torch.cuda.is_available():
        return ''
    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return ';'.join(f'{major}.{minor}' for major, minor in sorted(found))


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock file, so that two builds of one checkout take turns."""
    import fcntl

    with path.open('w') as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _install(library: Path, info: Mapping[str, object], package: Path) -> None:
    """Put library and record in place, never a record beside a library that it does not describe.

    Where there is no space for them, what is there stays as it is.
    """
    package.mkdir(parents=True, exist_ok=True)
    record = package / INFO_NAME
    fresh, fresh_record = (package / f'{name}.{os.getpid()}' for name in (LIBRARY_NAME, INFO_NAME))
    try:
        shutil.copyfile(library, fresh)
        fresh.chmod(0o755)
        fresh_record.write_text(json.dumps(info, indent=2) + '\n')
        record.unlink(missing_ok=True)
        # A running process may have the old library mapped: replace the file, do not write into it.
        fresh.replace(package / LIBRARY_NAME)
        fresh_record.replace(record)
    finally:
        fresh.unlink(missing_ok=True)
        fresh_record.unlink(missing_ok=True)


if __name__ == '__main__':
    compile_kernels(BUILD_DIR)
