"""Build the project from source beside several versions of torch, test it there, and print a table (``make matrix``).

Each version gets an environment of its own under build/matrix, which is removed after its tests. PyPI's wheels for
Linux are builds for CUDA: they are tested on the CPU, with stand-ins for CUDA's libraries (tools/cuda_stubs.py). The
tests that need a library that is not installed there, such as mmdet, count as skipped.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from cuda_stubs import make_stand_ins

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / 'build' / 'matrix'
# Newest last; the last of each minor version, which PyPI has wheels of for Python 3.11.
VERSIONS = '2.1.2 2.2.2 2.3.1 2.4.1 2.5.1 2.6.0 2.7.1 2.8.0 2.9.1 2.10.0 2.11.0 2.12.1 2.13.0 2.14.1 2.15.0'.split()
LIBRARIES = 'mmengine==0.10.7 setuptools<81 numpy safetensors msgspec pytest hypothesis'.split()
LIBRARIES += 'onnx onnxruntime onnxscript filelock typing-extensions sympy networkx jinja2 fsspec'.split()
TESTS = ['tests/ops', 'tests/backbones', 'tests/checkpoints', 'tests/onnx_export', 'tests/test_torch_compat.py']
# They compile the CUDA kernels for a CPU, which has nothing to do with torch's version and takes minutes.
LEFT_OUT = ['tests/ops/test_emulated_kernels.py', 'tests/ops/test_memory.py']
OF_CUDA = re.compile(r'nvidia-|cuda-|triton|pytorch-triton')


class MatrixError(Exception):
    """A version cannot be tried; the message is one line."""


class Environment:
    """An environment of the running Python; an existing one that was completed is used as it is."""

    def __init__(self, name: str) -> None:
        self.folder = FOLDER / '{}-py{}.{}'.format(name, *sys.version_info[:2])
        self.python = self.folder / 'bin' / 'python'
        self.complete = self.folder / 'complete'
        self.log = FOLDER / f'{self.folder.name}.log'
        self.environ = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
        # No test here needs CUDA kernels, which take minutes to compile; make abi compiles their bindings.
        self.environ.setdefault('FORCE_CUDA', '0')
        # Whatever else the environment is held to, this version is wanted.
        self.environ |= {'PIP_CONSTRAINT': os.devnull, 'PATH': f'{self.python.parent}{os.pathsep}{os.environ["PATH"]}'}
        self.log.unlink(missing_ok=True)
        if not self.complete.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.run('-m', 'venv', '--without-pip', self.folder, python=sys.executable)

    def run(self, *arguments: str | Path, cwd: Path = ROOT, python: str | Path = '') -> str:
        """Run the environment's Python, or another, add what it prints to the log, and return it.

        Raises:
            MatrixError: if it fails.
        """
        command = [python or self.python, *arguments]
        result = subprocess.run(command, cwd=cwd, env=self.environ, capture_output=True, text=True, errors='replace')
        with self.log.open('a') as stream:
            stream.write(f'$ {" ".join(map(str, command))}\n{result.stdout}{result.stderr}')
        if result.returncode:
            last = (result.stderr.strip() or result.stdout.strip() or 'no output').splitlines()[-1]
            raise MatrixError(f'{last[:200]} (log: {self.log})')
        return result.stdout

    def pip(self, *arguments: str | Path) -> None:
        """Install into the environment by the pip of the Python that runs this."""
        command = ['-m', 'pip', '--python', self.python, 'install', '--no-input', '--disable-pip-version-check']
        self.run(*command, *arguments, python=sys.executable)

    def packages(self) -> Path:
        """The folder of its packages."""
        return Path(self.run('-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').strip())


def libraries() -> Environment:
    """Make the environment of what the tests need beside torch, which those of all versions see."""
    environment = Environment('libraries')
    if not environment.complete.exists():
        environment.pip(*LIBRARIES, '-r', 'requirements/build.txt')
        environment.complete.touch()
    return environment


class TorchEnvironment(Environment):
    """The environment of one version of torch."""

    def __init__(self, version: str) -> None:
        super().__init__(version)
        self.version = version

    def install(self, shared: Path) -> None:
        """Install torch, and what of its requirements is not in the shared packages, but for CUDA's."""
        if self.complete.exists():
            return
        packages = self.packages()
        (packages / 'shared.pth').write_text(f'{shared}\n')
        self.pip('--no-deps', f'torch=={self.version}')
        ask = 'import importlib.metadata; print(*importlib.metadata.requires("torch"), sep="\\n")'
        requirements = [line for line in self.run('-c', ask).splitlines() if 'extra ==' not in line]
        # What was compiled for NumPy 1 does not work with NumPy 2.
        numpy = ['numpy<2'] if parse(self.version) < (2, 3) else []
        self.pip(*(line for line in requirements if not OF_CUDA.match(line)), *numpy)
        make_stand_ins(packages / 'torch' / 'lib')
        self.complete.touch()

    def build(self, source: Path) -> str:
        """Build the project from source, and see that what was compiled is used."""
        self.pip('--no-build-isolation', '--no-deps', '--editable', source)
        # From here on the reference must not stand in for a library that does not load.
        self.environ['SSM_OPS_STRICT'] = '1'
        ask = 'import cuda_ops; status = cuda_ops.backend_status(); print(status.compiled, status.reason)'
        compiled, _, reason = self.run('-c', ask, cwd=source).strip().partition(' ')
        if compiled != 'True':
            raise MatrixError(f'the compiled library is not used: {reason}')
        return 'ok'

    def test(self, source: Path, arguments: list[str]) -> str:
        """Run the tests, and return pytest's count."""
        options = ['-q', '-p', 'no:cacheprovider', '-p', 'tests.missing_libraries', '-m', 'not slow', '--durations=0']
        options += [f'--ignore={path}' for path in LEFT_OUT]
        try:
            output = self.run('-m', 'pytest', *options, *arguments, cwd=source)
        except MatrixError:
            output = self.log.read_text()
        counts = re.findall(r'^(\d+ (?:passed|failed|error|skipped).*?)(?: in [\d.]+s.*)?$', output, re.MULTILINE)
        return counts[-1] if counts else f'did not run (log: {self.log})'


def parse(version: str) -> tuple[int, int]:
    major, minor = version.split('.')[:2]
    return int(major), int(minor)


def copy_sources(target: Path) -> Path:
    """Copy what git knows, and what it does not ignore, with times, so that objects stay valid; return the copy."""
    command = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    names = {name.decode() for name in listed.split(b'\0') if name}
    for name in names:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    # What the checkout no longer has.
    for folder in ('cuda_ops', 'ssm_backbones', 'tests'):
        for path in (target / folder).rglob('*.py'):
            if str(path.relative_to(target)) not in names:
                path.unlink()
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('versions', nargs='*', default=VERSIONS, help='of torch; by default the last of each minor one')
    parser.add_argument('--keep', action='store_true', help='keep the environments, and use those that are there')
    parser.add_argument('--tests', nargs='+', default=TESTS, help='arguments of pytest; by default the usual folders')
    args = parser.parse_args()
    python = '{}.{}.{}'.format(*sys.version_info[:3])
    FOLDER.mkdir(parents=True, exist_ok=True)
    source = copy_sources(FOLDER / 'source')
    try:
        shared = libraries()
        packages = shared.packages()
    except MatrixError as error:
        sys.exit(f'error: {error}')
    print(f'{"torch":<10} {"Python":<8} {"build":<6} tests', flush=True)
    good = True
    for version in args.versions:
        built, environment = 'fails', None
        try:
            environment = TorchEnvironment(version)
            environment.install(packages)
            built = environment.build(source)
            result = environment.test(source, args.tests)
        except (MatrixError, RuntimeError) as error:
            result = str(error)
        good &= built == 'ok' and 'passed' in result and not re.search('failed|error', result)
        print(f'{version:<10} {python:<8} {built:<6} {result}', flush=True)
        if environment and not args.keep:
            shutil.rmtree(environment.folder, ignore_errors=True)
    if not args.keep:
        shutil.rmtree(shared.folder, ignore_errors=True)
    sys.exit(not good)


if __name__ == '__main__':
    from children import end_children_on_sigterm

    end_children_on_sigterm()
    main()
