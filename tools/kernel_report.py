"""Compile every CUDA kernel for every architecture, and print registers, shared memory and spills (``make kernels``).

Needs nvcc alone, neither torch nor a GPU. Each ``.cu`` file is compiled for each architecture by itself;
registers, shared memory, stack and spills are read from the assembler's report. Every kernel works on a fixed number of
states at a time and must keep them in registers: a spill, or a stack frame, in one of them is an error.
"""

import argparse
import concurrent.futures
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

_PACKAGE = Path(__file__).resolve().parents[1] / 'cuda_ops'
_CSRC = _PACKAGE / 'csrc'
_TYPES = {'f': 'float32', '6__half': 'float16', '13__nv_bfloat16': 'bfloat16'}


@dataclass(frozen=True)
class Usage:
    """Resources of one kernel on one architecture; shared memory is the static part."""

    kernel: str
    arch: str
    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def spills(self) -> bool:
        """Whether registers are spilled or a stack frame is used."""
        return bool(self.stack or self.spill_stores or self.spill_loads)


def readable_name(symbol: str) -> str:
    """Return e.g. ``scan_forward<bfloat16, 16>`` for a kernel's symbol."""
    rest, names = symbol.removeprefix('_ZN'), []
    while match := re.match(r'\d+', rest):
        end = match.end() + int(match.group())
        names.append(rest[match.end() : end])
        rest = rest[end:]
    name = names[-1] if names else symbol
    if not rest.startswith('I'):
        return name
    arguments, rest = [], rest[1:]
    while match := re.match(r'(f|6__half|13__nv_bfloat16)|L[ib](\d+)E', rest):
        arguments.append(_TYPES[match.group(1)] if match.group(1) else match.group(2))
        rest = rest[match.end() :]
    return f'{name}<{", ".join(arguments)}>'


def parse(log: str) -> list[Usage]:
    """Read the reports of ``ptxas -v``.

    Raises:
        ValueError: If there is no report in ``log``, or one that is not understood.
    """
    usages = []
    for entry in re.split(r'(?=ptxas info\s*: Compiling entry function )', log)[1:]:
        head = re.match(r"ptxas info\s*: Compiling entry function '(\S+)' for '(\S+)'", entry)
        memory = re.search(r'(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads', entry)
        registers = re.search(r'Used (\d+) registers', entry)
        if not head or not memory or not registers:
            raise ValueError(f'this report of ptxas is not understood: {entry[:300]!r}')
        shared = re.search(r'(\d+) bytes smem', entry)
        stack, stores, loads = map(int, memory.groups())
        usages.append(
            Usage(
                readable_name(head.group(1)),
                head.group(2),
                int(registers.group(1)),
                int(shared.group(1)) if shared else 0,
                stack,
                stores,
                loads,
            )
        )
    if not usages:
        raise ValueError(f'there is no report of ptxas in {log[:300]!r}')
    return usages


def compile_reports(
    nvcc: Path, archs: Sequence[str], host: Sequence[str] = (), csrc: Path = _CSRC, jobs: int = 1
) -> list[Usage]:
    """Compile every ``.cu`` file for every architecture.

    Args:
        nvcc: The compiler.
        archs: Compute capabilities without a dot, such as ``90``.
        host: The options that name the host compiler, none for nvcc's choice.
        csrc: The sources.
        jobs: Compilers to run at a time.

    Raises:
        RuntimeError: With the compiler's messages, if a file does not compile.
    """
    flags = _build_module().NVCC_FLAGS

    def compile_one(source: Path, arch: str, folder: str) -> list[Usage]:
        argv = [
            str(nvcc),
            *host,
            *flags,
            f'-gencode=arch=compute_{arch},code=sm_{arch}',
            f'-I{csrc}',
            '-Xptxas',
            '-v',
            '-c',
            str(source),
            '-o',
            str(Path(folder, f'{source.stem}.{arch}.o')),
        ]
        result = subprocess.run(argv, capture_output=True, text=True)
        log = result.stdout + result.stderr
        if result.returncode:
            raise RuntimeError(f'{source.name} does not compile for sm_{arch}:\n{log}')
        return parse(log) if 'entry function' in log else []

    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        tasks = [
            pool.submit(compile_one, source, arch, folder)
            for source in sorted((csrc / 'cuda').glob('*.cu'))
            for arch in archs
        ]
        return [usage for task in tasks for usage in task.result()]


def table(usages: Sequence[Usage]) -> str:
    """Markdown: a row for each kernel, for each architecture its registers, then the memory all of them take."""
    archs = sorted({usage.arch for usage in usages}, key=lambda arch: int(re.sub(r'\D', '', arch)))
    by_kernel: dict[str, dict[str, Usage]] = {}
    for usage in usages:
        by_kernel.setdefault(usage.kernel, {})[usage.arch] = usage
    header = [
        'kernel',
        *(f'registers {arch}' for arch in archs),
        'static shared',
        'stack',
        'spill stores',
        'spill loads',
    ]
    rows = [header, ['---', *['---:'] * (len(header) - 1)]]
    for kernel in sorted(by_kernel, key=_in_order):
        of_arch = by_kernel[kernel]
        rows.append(
            [
                kernel,
                *(str(of_arch[arch].registers) if arch in of_arch else '' for arch in archs),
                *(
                    str(max(getattr(usage, name) for usage in of_arch.values()))
                    for name in ('shared', 'stack', 'spill_stores', 'spill_loads')
                ),
            ]
        )
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def _in_order(kernel: str) -> list[object]:
    return [(int(part), '') if part.isdigit() else (0, part) for part in re.split(r'(\d+)', kernel)]


def _build_module() -> ModuleType:
    # By its path: importing the package would import torch.
    if 'cuda_ops_build' in sys.modules:
        return sys.modules['cuda_ops_build']
    path = _PACKAGE / '_build.py'
    spec = importlib.util.spec_from_file_location('cuda_ops_build', path)
    if not path.exists() or spec is None or spec.loader is None:
        sys.exit(f'error: {path} is not there; run this in a checkout')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 where a kernel spills or does not compile, 2 where nvcc cannot be used for what is asked."""
    build = _build_module()
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--archs', help='compute capabilities such as "8.0 9.0"; default: all that the build takes')
    parser.add_argument('--jobs', type=int, default=os.cpu_count() or 1, help='compilers at a time')
    options = parser.parse_args(arguments)
    try:
        toolkit = build.find_toolkit()
        if toolkit is None:
            raise build.BuildError('there is no nvcc that runs; put one on the path or set CUDA_HOME')
        arch_list = options.archs or build.default_archs(toolkit)
        gencode = build.gencode_flags(arch_list, '--archs')
        obstacle = toolkit.obstacle or build.unknown_archs(toolkit, arch_list, '--archs')
        if obstacle:
            raise build.BuildError(obstacle)
    except build.BuildError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    archs = list(dict.fromkeys(flag.rpartition('_')[2] for flag in gencode))
    print(f'nvcc {toolkit.version}, for {", ".join(f"sm_{arch}" for arch in archs)}', flush=True)
    try:
        usages = compile_reports(toolkit.nvcc, archs, toolkit.host, jobs=options.jobs)
    except RuntimeError as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    print(table(usages))
    spilled = [usage for usage in usages if usage.spills]
    for usage in spilled:
        print(
            f'error: {usage.kernel} on {usage.arch} has a stack of {usage.stack} bytes and spills '
            f'{usage.spill_stores} bytes',
            file=sys.stderr,
        )
    print(f'{len(usages)} kernels compiled, {len(spilled)} spill')
    return 1 if spilled else 0


if __name__ == '__main__':
    from children import end_children_on_sigterm

    end_children_on_sigterm()
    sys.exit(main())
