"""Build the one wheel: for every Python, for every torch from 2.10 on, for Linux of manylinux_2_28 and newer.

The environment needs torch 2.10 or newer, setuptools and a C++ compiler; `auditwheel` and `torch-abi-audit` check the
result where they are installed (requirements/wheel.txt). With FORCE_CUDA=1 and nvcc the CUDA kernels are in it, for
TORCH_CUDA_ARCH_LIST or all usual architectures; with FORCE_CUDA=0 they are not.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
POLICY = 'manylinux_2_28'
LIMIT = 100 * 2**20
RUN = """
import cuda_ops, ssm_backbones, torch
ssm_backbones.create_backbone('vmamba-test')(torch.rand(1, 3, 32, 32))[-1].sum().backward()
print(torch.__version__)
"""


class WheelError(Exception):
    """The wheel cannot be built or must not be given away; the message says why and what to do."""


def build(folder: Path) -> Path:
    """Build the wheel into an empty folder and return its path.

    Raises:
        WheelError: if the build fails.
    """
    arguments = ['--no-deps', '--no-build-isolation', '--wheel-dir', str(folder)]
    settings = f'--config-settings=--build-option=--plat-name={POLICY}_{platform.machine()}'
    command = [sys.executable, '-m', 'pip', 'wheel', *arguments, settings, str(ROOT)]
    environ = os.environ | {'SSM_OPS_PORTABLE': '1', 'FORCE_CUDA': os.environ.get('FORCE_CUDA') or 'auto'}
    if subprocess.run([*command, '--verbose'], env=environ).returncode:
        raise WheelError('the wheel was not built; the messages are above')
    (wheel,) = folder.glob('*.whl')
    return wheel


def check(wheel: Path) -> list[str]:
    """Check the tag, the library's record, its size, and what it needs; return what was found, a line each.

    Raises:
        WheelError: for a wheel that does not serve everything that it says.
    """
    if not re.search(rf'-py3-none-{POLICY}_\w+\.whl$', wheel.name):
        raise WheelError(f'{wheel.name} is not tagged py3-none-{POLICY}')
    if wheel.stat().st_size > LIMIT:
        raise WheelError(f'{wheel.name} has {wheel.stat().st_size / 2**20:.0f} MiB; package indexes take 100 MiB')
    with zipfile.ZipFile(wheel) as archive:
        info = json.loads(archive.read('cuda_ops/_build_info.json'))
    oldest = info['oldest_torch']
    if not oldest:
        raise WheelError(f'torch {info["torch"]} has no stable ABI; build with torch 2.10 or newer')
    cuda = f'CUDA {info["cuda"]["toolkit"]} for {info["cuda"]["arch_list"]}' if info['cuda'] else 'no CUDA kernels'
    audits = {
        'auditwheel': (['show', str(wheel)], rf'"{POLICY}_|"manylinux_2_(\d|1\d|2[0-7])_'),
        'torch-abi-audit': (['--check', 'torch'], r'\bSTABLE\b'),
    }
    found = [f'{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB, torch {oldest} and newer, {cuda}']
    with tempfile.TemporaryDirectory(prefix='wheel-') as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        audits['torch-abi-audit'][0].append(str(Path(folder, 'cuda_ops')))
        found += [_audit(command, *arguments) for command, arguments in audits.items()]
        found.append(_run(folder))
    return found


def _run(folder: str) -> str:
    """Let a backbone of an unpacked wheel run by its compiled scans, beside the torch of this environment."""
    environ = os.environ | {'SSM_OPS_STRICT': '1', 'PYTHONPATH': folder}
    result = subprocess.run([sys.executable, '-c', RUN], cwd=folder, env=environ, capture_output=True, text=True)
    if result.returncode:
        raise WheelError(f'the wheel does not run:\n{result.stderr.strip()}')
    return f'ran beside torch {result.stdout.strip()}'


def _audit(command: str, arguments: list[str], expected: str) -> str:
    """Let a checker look at the wheel: it must succeed, and say what is expected."""
    path = shutil.which(command, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get('PATH', '')]))
    if path is None:
        return f'not checked by {command}, which is not installed (requirements/wheel.txt)'
    result = subprocess.run([path, *arguments], capture_output=True, text=True)
    said = result.stdout + result.stderr
    if result.returncode or not re.search(expected, said):
        raise WheelError(f'{command} refuses {arguments[-1]}:\n{said.strip()}')
    return f'checked by {command}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--out', type=Path, default=ROOT / 'dist', help='folder for the wheel')
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory(prefix='wheel-') as folder:
        try:
            wheel = build(Path(folder))
            lines = check(wheel)
            out.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(wheel, out / f'{wheel.name}.part')
            (out / f'{wheel.name}.part').replace(out / wheel.name)
        except (WheelError, OSError) as error:
            sys.exit(f'error: {error}')
    print('\n'.join(lines), out / wheel.name, sep='\n')


if __name__ == '__main__':
    from children import end_children_on_sigterm

    end_children_on_sigterm()
    main()
