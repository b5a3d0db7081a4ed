"""Compile the bindings against the headers of several versions of torch, with and without CUDA, and print a table.

torch's wheels for macOS hold the same headers as those for Linux in a fraction of the size, and need no installation.
Each is downloaded once, by pip, into a cache outside of the checkout: SSM_TORCH_HEADERS, or the user's cache folder.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / 'cuda_ops' / 'csrc'
VERSIONS = ('2.1.2', '2.4.1', '2.6.0', '2.8.0', '2.10.0', '2.12.1', '2.13.0', '2.14.1', '2.15.0')


class HeaderError(Exception):
    """The headers of a version cannot be had; the message says why and what to do."""


def load_build() -> ModuleType:
    """Load cuda_ops/_build.py without torch."""
    spec = importlib.util.spec_from_file_location('cuda_ops_build', ROOT / 'cuda_ops' / '_build.py')
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def cache_folder() -> Path:
    """Where headers are kept."""
    given = os.environ.get('SSM_TORCH_HEADERS')
    if given:
        return Path(given)
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'ssm_backbones' / 'torch-headers'


def fetch_headers(version: str, cache: Path) -> Path:
    """Return the folder of a version's headers, downloading them where they are not in the cache.

    A folder gets its name when it is complete, so that what an interrupted download left is never used.

    Raises:
        HeaderError: if pip does not download the wheel, or it has no headers, or there is no space for them.
    """
    target = cache / version
    include = target / 'torch' / 'include'
    if target.is_dir():
        return include
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f'.{version}-', dir=cache) as folder:
            wheel = _download(version, Path(folder))
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if name.startswith('torch/include/')]
                if not names:
                    raise HeaderError(f'{wheel.name} holds no headers')
                fresh = Path(folder) / 'headers'
                archive.extractall(fresh, names)
            fresh.replace(target)
    except (OSError, zipfile.BadZipFile) as error:
        raise HeaderError(f'the headers of torch {version} cannot be put into {cache} ({error})') from error
    return include


def _download(version: str, folder: Path) -> Path:
    platforms = [f'--platform=macosx_{major}_0_arm64' for major in (11, 12, 13, 14)]
    options = ['--no-deps', '--only-binary=:all:', '--python-version=3.11', '--implementation=cp', *platforms]
    command = [sys.executable, '-m', 'pip', 'download', '--quiet', *options, '--dest', str(folder), f'torch=={version}']
    # Whatever else the environment is held to, this version is wanted.
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {'PIP_CONSTRAINT': os.devnull})
    wheels = list(folder.glob('torch-*.whl'))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ['it said nothing'])[-1]
        raise HeaderError(f'pip downloads no torch {version} for macOS: {reason}')
    return wheels[0]


def compile_bindings(build: ModuleType, version: str, include: Path, with_cuda: bool) -> str:
    """Check the bindings' syntax and types against headers; return the first error, empty where there is none."""
    folders = [include, include / 'torch' / 'csrc' / 'api' / 'include']
    flags = [f'-I{CSRC}', *build.binding_flags(version, folders)]
    if with_cuda:
        flags.append('-DSSM_WITH_CUDA')
    for source in sorted(CSRC.glob('*_bindings.cpp')):
        command = [*build.find_compiler(), *build.CXX_FLAGS, '-Werror', *flags, '-fsyntax-only', str(source)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            errors = [line for line in result.stderr.splitlines() if 'error' in line] or result.stderr.splitlines()
            return errors[0] if errors else f'{source.name} does not compile'
    return ''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('versions', nargs='*', default=VERSIONS, help='of torch; by default the usual ones')
    versions = parser.parse_args().versions
    build = load_build()
    cache = cache_folder()
    print(f'{"torch":<10} {"interface":<12} {"CPU":<6} {"CUDA":<6}', flush=True)
    failures = []
    for version in versions:
        try:
            include = fetch_headers(version, cache)
            results = {
                device: compile_bindings(build, version, include, device == 'CUDA') for device in ('CPU', 'CUDA')
            }
        except (HeaderError, build.BuildError, ValueError) as error:
            sys.exit(f'error: {error}')
        failures += [f'torch {version}, {device}: {error}' for device, error in results.items() if error]
        words = ['fails' if error else 'ok' for error in results.values()]
        # The current stream cannot be had before.
        if build.parse_release(version) < (2, 4):
            words[1] += '*'
        interface = 'stable ABI' if build.uses_stable_abi(version) else 'ATen'
        print(f'{version:<10} {interface:<12} {words[0]:<6} {words[1]:<6}', flush=True)
    print('* compiles; CUDA kernels run with torch 2.4 and newer')
    if failures:
        sys.exit('\n'.join(failures))


if __name__ == '__main__':
    from children import end_children_on_sigterm

    end_children_on_sigterm()
    main()
