"""Create or complete the virtual environment: pinned packages and compiled ops (``make setup``).

This file and those it imports run before anything is installed: they use only the standard library and the syntax of
Python 3.6, so that an old Python gets a clear error. Every step leaves a stamp in the environment, a hash of its
inputs. Steps with a valid stamp are skipped, so that an interrupted set-up continues at the first step without one.
"""

import argparse
import contextlib
import glob
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time

from mmcv_setup import install_mmcv
from setup_commands import StepFailed, diagnose, run_logged, running, say, wait

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MINIMUM_PYTHON = (3, 10)
# The name of mmcv in each.
STACKS = {'openmmlab': 'mmcv', 'onedl': 'onedl-mmcv'}
PIP = '-m pip install --no-user --no-input --disable-pip-version-check --progress-bar off'.split()


class SetupError(Exception):
    """An error that ends the set-up; the message is one line that ends in the remedy."""


def load_build():
    """Load cuda_ops/_build.py, which needs neither torch nor the rest of the package, but a new enough Python."""
    spec = importlib.util.spec_from_file_location('cuda_ops_build', os.path.join(ROOT, 'cuda_ops', '_build.py'))
    build = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = build
    spec.loader.exec_module(build)
    return build


def nvcc_version(environ):
    """Return the CUDA toolkit's version, such as 13.0, of CUDA_HOME or on the path; None if none is there that runs."""
    nvcc = load_build().find_nvcc(environ)
    return nvcc and nvcc[1]


def check_python(include):
    """Check that Python has the venv module, its pip, and C headers."""
    missing = [f'module {name}' for name in ('venv', 'ensurepip') if importlib.util.find_spec(name) is None]
    if not os.path.exists(os.path.join(include, 'Python.h')):
        missing.append(f'file {include}/Python.h')
    if missing:
        python = 'python{}.{}'.format(*sys.version_info[:2])
        raise SetupError(
            f'{sys.executable} has no {" and no ".join(missing)}; install it, on Debian and Ubuntu with '
            f'`apt install {python}-venv {python}-dev`'
        )


class Setup:
    """The set-up of one virtual environment.

    Args:
        venv: Folder of the environment.
        stack: 'openmmlab' or 'onedl'.
        same_python: Refuse an existing environment of another Python version than the running one.
        run: Runs a command, as run_logged does.
        environ: The environment variables.
    """

    def __init__(self, venv, stack, same_python=False, run=run_logged, environ=os.environ):
        self.venv, self.stack, self.same_python, self.run = os.path.abspath(venv), stack, same_python, run
        self.folder = os.path.join(self.venv, '.setup')
        self.log = os.path.join(self.folder, 'setup.log')
        self.python = os.path.join(self.venv, 'bin', 'python')
        # Ninja and the other tools are in the environment's bin, and nothing may come from outside it.
        self.environ = {name: value for name, value in environ.items() if name not in ('PYTHONPATH', 'PYTHONHOME')}
        self.environ['PATH'] = os.path.join(self.venv, 'bin') + os.pathsep + environ.get('PATH', os.defpath)
        self.environ['VIRTUAL_ENV'] = self.venv

    def complete(self):
        """Run every step whose stamp does not hold; return the names of the steps run."""
        import fcntl

        ours = any(os.path.exists(os.path.join(self.venv, name)) for name in ('pyvenv.cfg', '.setup'))
        if os.path.lexists(self.venv) and not ours and not (os.path.isdir(self.venv) and not os.listdir(self.venv)):
            raise SetupError(
                f'{self.venv} exists and is no virtual environment; remove it or name another folder with VENV=...'
            )
        os.makedirs(self.folder, exist_ok=True)
        with open(os.path.join(self.folder, 'lock'), 'w') as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f'Another set-up of {self.venv} is running; waiting for it to end')
                fcntl.flock(lock, fcntl.LOCK_EX)
            return self._complete(os.path.join(self.folder, 'state.json'))

    def _complete(self, state_file):
        state = {}
        with contextlib.suppress(OSError, ValueError), open(state_file) as stream:
            state = json.load(stream)
        held = state.get('stack', self.stack)
        if held != self.stack:
            raise SetupError(
                f'{self.venv} holds the {held} packages, and {self.stack} ones go by the same names; use another '
                f'folder, for example VENV=.venv-{self.stack}'
            )
        version, running = self._version(), '{}.{}'.format(*sys.version_info[:2])
        if version and self.same_python and version != running:
            raise SetupError(
                f'{self.venv} has Python {version}, and PYTHON is {running}; remove the folder, or use another with '
                'VENV=...'
            )
        stamps = state.get('stamps', {}) if version else {}
        steps, key, due = self.steps(), f'{self.stack} {version or running}', []
        for number, (name, title, action, inputs) in enumerate(steps, 1):
            key = hashlib.sha256('\0'.join([key, name, *inputs]).encode()).hexdigest()
            if stamps.get(name) != key or (name == 'package' and not self._ops_in_place()):
                due.append((number, name, title, action, key))
        if not due:
            return []
        self._check_machine(new=version is None)
        open(self.log, 'w').close()
        say(f'Setting up {self.venv} ({self.stack} packages); the log is {self.log}')
        began = time.monotonic()
        for number, name, title, action, key in due:
            say(f'[{number}/{len(steps)}] {title}')
            step_began = time.monotonic()
            try:
                action()
            except StepFailed as failure:
                raise SetupError(f'{title.partition(":")[0]}: {diagnose(failure.args[0], self.log)}') from None
            say(f'      done in {time.monotonic() - step_began:.0f} s')
            stamps[name] = key
            with open(state_file + '.new', 'w') as stream:
                json.dump({'stack': self.stack, 'stamps': stamps}, stream, indent=1)
            os.replace(state_file + '.new', state_file)
        say(f'Set-up complete in {time.monotonic() - began:.0f} s.')
        return [name for _, name, *_ in due]

    def steps(self):
        """Name, title, action and inputs of each step, in order; a change of an input makes it due, and all later."""

        def content(*names):
            return [open(os.path.join(ROOT, name), encoding='utf-8').read() for name in names]

        def pip(*arguments):
            return lambda: self.pip(*arguments)

        stack, mmcv = f'requirements/{self.stack}.txt', STACKS[self.stack]
        nvcc = nvcc_version(self.environ)
        libraries = ['requirements/base.txt', 'requirements/dev.txt']
        pins = content('requirements/constraints.txt', stack)
        settings = [self.environ.get(name, '') for name in ('CXX', 'FORCE_CUDA', 'TORCH_CUDA_ARCH_LIST')]
        of_package = pip('--no-build-isolation', '--no-deps', '--verbose', '--editable', '.')
        sources = content('pyproject.toml', 'setup.py', 'cuda_ops/_build.py')
        # mmcv's own set-up imports torch, so that it comes last of the stack.
        hosts = [line for line in pins[1].splitlines() if not re.match(rf'\s*(#|$|{mmcv}\b)', line)]
        return [
            ('venv', 'virtual environment', self._make_venv, []),
            ('tools', 'build tools', pip('-r', 'requirements/build.txt'), content('requirements/build.txt')),
            (
                'libraries',
                'torch, host libraries and test tools: by the network; the kernels for CPUs are compiled meanwhile',
                lambda: self._install_libraries([*hosts, *(word for name in libraries for word in ('-r', name))]),
                [*pins, *content(*libraries)],
            ),
            (
                'mmcv',
                f'{mmcv}: compiled here for some minutes, or taken from what pip has kept of an earlier set-up',
                lambda: install_mmcv(self, mmcv, nvcc),
                [str(nvcc)],
            ),
            ('package', 'this package, the rest of its ops compiled', of_package, [*sources, *settings, ROOT]),
        ]

    def _install_libraries(self, wanted):
        """Install what needs no compiler, by one process, while the others compile what needs no torch.

        A failure there is left for the last step to tell, which compiles whatever is missing.
        """
        with running([self.python, '-I', 'cuda_ops/_build.py'], self.environ) as kernels:
            self.pip('--no-build-isolation', *wanted)
            wait(kernels, lambda: 'compiling the kernels for CPUs')

    def _check_machine(self, new):
        """Refuse what would fail later, before anything is downloaded."""
        if new:
            check_python(sysconfig.get_paths()['include'])
        # torch looks for c++, and setuptools for the compiler Python was built with, wherever else there is one.
        build = load_build()
        try:
            self.environ['CXX'] = ' '.join(build.find_compiler(self.environ))
        except build.BuildError as error:
            raise SetupError(str(error)) from None
        if not shutil.which((sysconfig.get_config_var('CC') or 'cc').split()[0], path=self.environ['PATH']):
            self.environ.setdefault('CC', self.environ['CXX'])

    def _make_venv(self):
        if self._version():
            return
        for name in set(os.listdir(self.venv)) - {'.setup'}:
            path = os.path.join(self.venv, name)
            os.remove(path) if os.path.islink(path) or not os.path.isdir(path) else shutil.rmtree(path)
        self.run([sys.executable, '-m', 'venv', self.venv], self.log, self.environ)

    def _ops_in_place(self):
        """Return whether the compiled library matches these sources and the installed torch."""
        folder = os.path.join(ROOT, 'cuda_ops')
        try:
            with open(os.path.join(folder, '_build_info.json')) as stream:
                info = json.load(stream)
            (version,) = glob.glob(os.path.join(glob.escape(self.venv), 'lib/python3*/site-packages/torch/version.py'))
            with open(version) as stream:
                fits = f"__version__ = '{info.get('torch')}'\n" in stream.read()
        except (OSError, ValueError):
            return False
        library = os.path.join(folder, '_C.so')
        return fits and os.path.exists(library) and info.get('source_hash') == load_build().source_hash()

    def _version(self):
        """Version of the environment's Python, such as 3.11; None where it or its pip does not run."""
        ask = [self.python, '-c', 'import pip, sys; print(*sys.version_info[:2], sep=".")']
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return subprocess.check_output(ask, stderr=subprocess.DEVNULL, env=self.environ).decode().strip()
        return None

    def pip(self, *arguments, environ=None):
        pins = ['-c', 'requirements/constraints.txt', '-c', f'requirements/{self.stack}.txt']
        return self.run_python(*PIP, *pins, *arguments, environ=environ)

    def run_python(self, *arguments, environ=None):
        return self.run([self.python, *arguments], self.log, environ or self.environ)


def interrupt(number, frame):
    """Raise KeyboardInterrupt on SIGTERM, as on Ctrl-C."""
    raise KeyboardInterrupt


def main(argv=None):
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description='Make or complete the virtual environment.')
    parser.add_argument('--venv', default=os.path.join(ROOT, '.venv'), help='its folder')
    parser.add_argument('--stack', default='openmmlab', choices=STACKS, help='host libraries')
    parser.add_argument('--this-python', action='store_true', help='use the Python that runs this and no other')
    arguments = parser.parse_args(argv)
    try:
        if os.name != 'posix':
            raise SetupError('Linux or macOS is needed; on Windows use its Linux subsystem (WSL)')
        if sys.version_info[:2] < MINIMUM_PYTHON:
            raise SetupError(
                'Python 3.10 or newer is needed, and {} is Python {}.{}; install a newer one and name it, for example '
                '`make PYTHON=python3.12 ...`'.format(sys.executable, *sys.version_info[:2])
            )
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, interrupt)
        if not Setup(arguments.venv, arguments.stack, arguments.this_python).complete():
            say(f'Set-up is up to date: {arguments.venv}')
    except (SetupError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\nThe set-up was interrupted; the same command carries on where it stopped.', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
