"""Create or complete the virtual environment: pinned packages and compiled ops (``make setup``).

This file runs before anything is installed: it uses only the standard library and the syntax of Python 3.6, so that an
old Python gets a clear error. Every step leaves a stamp in the environment, a hash of its inputs. Steps with a valid
stamp are skipped, so that an interrupted set-up continues at the first step without one.
"""

import argparse
import contextlib
import glob
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MINIMUM_PYTHON = (3, 10)
HEARTBEAT_SECONDS = 30
# Memory that a compiler takes for one of mmcv's files.
GIGABYTES_PER_JOB = 1.5
STACKS = {'openmmlab': ['mmengine', 'mmcv'], 'onedl': ['onedl-mmengine', 'onedl-mmcv']}
# What failed commands print, and the remedy.
CAUSES = [
    (
        r'No space left on device|Errno 28\b|Disk quota exceeded',
        'the disk is full; free some space (3 GB are needed, 10 with a torch for CUDA)',
    ),
    (
        r'Killed signal terminated program|internal compiler error: Killed|virtual memory exhausted|MemoryError',
        'not enough memory to compile; close other programs or compile one file at a time with MAX_JOBS=1',
    ),
    (
        r'NewConnectionError|ConnectTimeout|ReadTimeout|Failed to establish a new connection|name resolution'
        r'|Connection (refused|reset|broken|timed out)|ProxyError|SSLError|CERTIFICATE_VERIFY_FAILED'
        r'|Max retries exceeded|(50[234]|429) (Server|Client) Error',
        'the package index cannot be reached; check the network (a proxy goes '
        'into HTTPS_PROXY, another index into PIP_INDEX_URL)',
    ),
]


class SetupError(Exception):
    """An error that ends the set-up; the message is one line that ends in the remedy."""


class StepFailed(Exception):
    """A failed command; the argument is its output."""


def check_python(include):
    """Check that Python has the venv module, its pip, and C headers."""
    missing = ['module {}'.format(name) for name in ('venv', 'ensurepip') if importlib.util.find_spec(name) is None]
    if not os.path.exists(os.path.join(include, 'Python.h')):
        missing.append('file {}/Python.h'.format(include))
    if missing:
        raise SetupError(
            '{0} has no {1}; install it, on Debian and Ubuntu with `apt install python{2}.{3}-venv '
            'python{2}.{3}-dev`'.format(sys.executable, ' and no '.join(missing), *sys.version_info[:2])
        )


def find_compiler(environ):
    """Return the C++ compiler's command: CXX if set, else the first of c++, g++, clang++ that exists."""
    wanted = [shlex.split(environ['CXX'])] if environ.get('CXX') else [['c++'], ['g++'], ['clang++']]
    found = next((command for command in wanted if shutil.which(command[0], path=environ.get('PATH'))), None)
    if found is None:
        raise SetupError(
            'no C++ compiler found (looked for {}); install one, for example with `apt install g++` or '
            '`dnf install gcc-c++`, or name it in CXX'.format(', '.join(command[0] for command in wanted))
        )
    program = '#include <optional>\nint main() { return std::optional<int>(0).value(); }\n'
    probe = subprocess.run(
        [*found, '-std=c++17', '-fsyntax-only', '-x', 'c++', '-'],
        input=program,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
    )
    if probe.returncode:
        raise SetupError(
            'the C++ compiler {} cannot compile C++17; install a newer one (GCC 9 or Clang 10 at least) '
            'or name another in CXX'.format(' '.join(found))
        )
    return found


def diagnose(output, log):
    """Return one line with cause and remedy for the output of a failed command."""
    for pattern, cause in CAUSES:
        if re.search(pattern, output, re.IGNORECASE):
            return '{}, and run the same command again (full log: {})'.format(cause, log)
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r'(fatal |\S*:\d+:.* |\w*)error\b', line, re.IGNORECASE)]
    return 'it failed with: {} (full log: {})'.format((errors or lines or ['no output'])[-1][:300], log)


def spell(seconds):
    """Format a duration."""
    minutes, seconds = divmod(int(seconds), 60)
    return '{} min {} s'.format(minutes, seconds) if minutes else '{} s'.format(seconds)


def say(text):
    """Print and flush, also into a pipe."""
    print(text, flush=True)


def progress(log):
    """Return the last progress in a log: a compiler's count if there is one, else the last line."""
    with open(log, 'rb') as stream:
        stream.seek(max(0, os.path.getsize(log) - 4096))
        tail = stream.read().decode(errors='replace')
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    return (re.findall(r'\[\d+/\d+\]', tail) or lines or [''])[-1][:90]


def run_logged(argv, log, environ, keep=()):
    """Run a command with its output in a log, report its progress from time to time, and return its output.

    It inherits the open files ``keep``, so that a lock outlives a killed set-up while its command runs on.
    """
    with open(log, 'ab') as stream:
        stream.write('$ {}\n'.format(' '.join(map(shlex.quote, argv))).encode())
        stream.flush()
        start = stream.tell()
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environ,
            start_new_session=True,
            pass_fds=keep,
        )
    began = time.monotonic()
    try:
        while process.poll() is None:
            try:
                process.wait(HEARTBEAT_SECONDS)
            except subprocess.TimeoutExpired:
                say('      {} so far: {}'.format(spell(time.monotonic() - began), progress(log)))
    except BaseException:
        # Including its child processes.
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
        raise
    with open(log, 'rb') as stream:
        stream.seek(start)
        output = stream.read().decode(errors='replace')
    if process.returncode:
        raise StepFailed(output)
    return output


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
        self.venv = os.path.abspath(venv)
        self.stack = stack
        self.same_python = same_python
        self.run = run
        self.state_folder = os.path.join(self.venv, '.setup')
        self.state_file = os.path.join(self.state_folder, 'state.json')
        self.python = os.path.join(self.venv, 'bin', 'python')
        self.log = os.path.join(self.state_folder, 'setup.log')
        self.lock = None
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
                '{} exists and is no virtual environment; remove it or name another folder with VENV=...'.format(
                    self.venv
                )
            )
        os.makedirs(self.state_folder, exist_ok=True)
        with open(os.path.join(self.state_folder, 'lock'), 'w') as self.lock:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say('Another set-up of {} is running; waiting for it to end'.format(self.venv))
                fcntl.flock(self.lock, fcntl.LOCK_EX)
            return self._complete()

    def _complete(self):
        state = {}
        with contextlib.suppress(OSError, ValueError), open(self.state_file) as stream:
            state = json.load(stream)
        if state.get('stack', self.stack) != self.stack:
            raise SetupError(
                '{} holds the {} packages, and {} ones go by the same names; use another folder, for '
                'example VENV=.venv-{}'.format(self.venv, state['stack'], self.stack, self.stack)
            )
        version, running = self._version(), '{}.{}'.format(*sys.version_info[:2])
        if version is None:
            state = {}
        elif self.same_python and version != running:
            raise SetupError(
                '{} has Python {}, and PYTHON is {}; remove the folder, or use another with VENV=...'.format(
                    self.venv, version, running
                )
            )
        stamps = state.setdefault('stamps', {})
        steps = self.steps()
        key, due = '{} {}'.format(self.stack, version or running), []
        for step in steps:
            name, _, _, inputs = step
            key = hashlib.sha256('\0'.join([key, name, *inputs]).encode()).hexdigest()
            if stamps.get(name) != key or (name == 'ops' and not self._ops_in_place()):
                due.append((step, key))
        if not due:
            return []
        self._check_machine(new=version is None)
        with open(self.log, 'w'):
            pass
        say('Setting up {} ({} packages); the log is {}'.format(self.venv, self.stack, self.log))
        began = time.monotonic()
        for step, key in due:
            name, title, action, _ = step
            say('[{}/{}] {}'.format(steps.index(step) + 1, len(steps), title))
            step_began = time.monotonic()
            try:
                action()
            except StepFailed as failure:
                raise SetupError(title.partition(':')[0] + ': ' + diagnose(failure.args[0], self.log)) from None
            say('      done in {}'.format(spell(time.monotonic() - step_began)))
            stamps[name] = key
            with open(self.state_file + '.new', 'w') as stream:
                json.dump(dict(state, stack=self.stack), stream, indent=1)
            os.replace(self.state_file + '.new', self.state_file)
        say('Set-up complete in {}.'.format(spell(time.monotonic() - began)))
        return [step[0] for step, _ in due]

    def steps(self):
        """Name, title, action and inputs of each step, in order; a change of an input makes it due, and all later."""
        pins = [self._content('requirements/constraints.txt'), self._content('requirements/{}.txt'.format(self.stack))]
        settings = [self.environ.get(name, '') for name in ('CXX', 'FORCE_CUDA', 'TORCH_CUDA_ARCH_LIST')]
        return [
            ('venv', 'virtual environment: a few seconds', self._make_venv, []),
            (
                'tools',
                'build tools: a few seconds',
                lambda: self._pip('-r', 'requirements/build.txt'),
                [pins[0], self._content('requirements/build.txt')],
            ),
            (
                'torch',
                'torch and torchvision: half a minute to several, by the network',
                lambda: self._pip('-r', 'requirements/base.txt', 'torchvision', 'setuptools'),
                [pins[0], self._content('requirements/base.txt')],
            ),
            (
                'mmcv',
                '{}: compiled here, since its authors publish no binary for this torch; some minutes, or seconds '
                'where pip has kept the result of an earlier set-up'.format(STACKS[self.stack][-1]),
                self._install_mmcv,
                [*pins, str(nvcc_version(self.environ))],
            ),
            (
                'libraries',
                'detection, segmentation and classification libraries, and test tools: half a minute',
                lambda: self._pip(
                    '--no-build-isolation', '-r', 'requirements/{}.txt'.format(self.stack), '-r', 'requirements/dev.txt'
                ),
                [*pins, self._content('requirements/dev.txt')],
            ),
            (
                'ops',
                'the ops, compiled: about a minute',
                lambda: self._python('setup.py', 'build_ext', '--inplace'),
                [self._content('cuda_ops/_build.py'), *settings],
            ),
            (
                'package',
                'this package: a few seconds',
                lambda: self._pip('--no-build-isolation', '--no-deps', '--verbose', '--editable', '.'),
                [self._content('pyproject.toml'), self._content('setup.py'), ROOT],
            ),
        ]

    def _check_machine(self, new):
        """Refuse what would fail later, before anything is downloaded."""
        if new:
            check_python(sysconfig.get_paths()['include'])
        # torch looks for c++, and setuptools for the compiler Python was built with, wherever else there is one.
        self.environ['CXX'] = ' '.join(find_compiler(self.environ))
        if not shutil.which((sysconfig.get_config_var('CC') or 'cc').split()[0], path=self.environ['PATH']):
            self.environ.setdefault('CC', self.environ['CXX'])

    def _make_venv(self):
        if self._version():
            return
        for name in set(os.listdir(self.venv)) - {'.setup'}:
            path = os.path.join(self.venv, name)
            os.remove(path) if os.path.islink(path) or not os.path.isdir(path) else shutil.rmtree(path)
        self.run([sys.executable, '-m', 'venv', self.venv], self.log, self.environ, (self.lock.fileno(),))

    def _install_mmcv(self):
        mmengine, mmcv = STACKS[self.stack]
        self._pip(mmengine)
        use_cuda = self._cuda_for_mmcv()
        environ = dict(self.environ, CXX=self._mmcv_compiler())
        environ.setdefault('MAX_JOBS', str(compile_jobs()))
        if not use_cuda:
            environ['CUDA_VISIBLE_DEVICES'] = ''
        self._pip('--no-build-isolation', '--verbose', mmcv, environ=environ)
        self._replace_opencv()
        try:
            self._python('-c', CHECK_MMCV, str(int(use_cuda)))
        except StepFailed:
            say('      the {} that pip had kept was compiled for something else; compiling it again'.format(mmcv))
            self._pip(
                '--no-build-isolation',
                '--verbose',
                '--no-cache-dir',
                '--force-reinstall',
                '--no-deps',
                mmcv,
                environ=environ,
            )
            self._python('-c', CHECK_MMCV, str(int(use_cuda)))
        shutil.rmtree(os.path.join(self.state_folder, 'headers'))

    def _mmcv_compiler(self):
        """Write a script that compiles as the compiler does, torch's header once for all files; return its path."""
        compiler = shlex.split(self.environ['CXX'])
        folder, script = (os.path.join(self.state_folder, name) for name in ('headers', 'mmcv-c++'))
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        kind = subprocess.run([*compiler, '--version'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout
        # Clang's compiled headers are asked for in another way.
        header = '' if b'clang' in kind else 'torch/types.h'
        command = [sys.executable, os.path.join(ROOT, 'tools', 'mmcv_compiler.py'), folder, header, *compiler, '--']
        with open(script, 'w') as stream:
            stream.write('#!/bin/sh\nexec {} "$@"\n'.format(' '.join(map(shlex.quote, command))))
        os.chmod(script, 0o755)
        return script

    def _replace_opencv(self):
        try:
            self._python('-c', 'import cv2')
        except StepFailed as failure:
            if 'cannot open shared object file' not in failure.args[0]:
                raise
            say("      OpenCV's windows need system libraries that are missing here (libGL); taking the build without")
            self._pip('--force-reinstall', '--no-deps', 'opencv-python-headless')

    def _cuda_for_mmcv(self):
        """Return whether mmcv can be compiled for the GPU; if a GPU exists, print why not."""
        output = self._python('-c', 'import torch; print(torch.cuda.is_available(), torch.version.cuda)')
        available, wanted = output.split()[-2:]
        if available != 'True':
            return self.environ.get('FORCE_CUDA') == '1'
        found = nvcc_version(self.environ)
        if found and found.partition('.')[0] == wanted.partition('.')[0]:
            return True
        say(
            '      There is a GPU, but {}: mmcv is compiled for the CPU alone. To train detectors on the GPU, install '
            'the CUDA toolkit {} and run this again.'.format(
                'the CUDA toolkit is version {}'.format(found) if found else 'no CUDA toolkit (nvcc)', wanted
            )
        )
        return False

    def _ops_in_place(self):
        """Return whether the compiled library matches these sources and the installed torch."""
        folder = os.path.join(ROOT, 'cuda_ops')
        spec = importlib.util.spec_from_file_location('cuda_ops_build', os.path.join(folder, '_build.py'))
        build = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = build
        spec.loader.exec_module(build)
        try:
            with open(os.path.join(folder, '_build_info.json')) as stream:
                info = json.load(stream)
            (version,) = glob.glob(os.path.join(glob.escape(self.venv), 'lib/python3*/site-packages/torch/version.py'))
            with open(version) as stream:
                torch = "__version__ = '{}'\n".format(info.get('torch')) in stream.read()
        except (OSError, ValueError):
            return False
        return (
            torch and os.path.exists(os.path.join(folder, '_C.so')) and info.get('source_hash') == build.source_hash()
        )

    def _version(self):
        """Version of the environment's Python, such as 3.11; None where it or its pip does not run."""
        ask = 'import pip, sys; print(*sys.version_info[:2], sep=".")'
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return subprocess.check_output(
                [self.python, '-c', ask], stderr=subprocess.DEVNULL, env=self.environ, universal_newlines=True
            ).strip()
        return None

    def _pip(self, *arguments, environ=None):
        command = [
            self.python,
            '-m',
            'pip',
            'install',
            '--no-user',
            '--no-input',
            '--disable-pip-version-check',
            '--progress-bar',
            'off',
            '-c',
            'requirements/constraints.txt',
            '-c',
            'requirements/{}.txt'.format(self.stack),
        ]
        return self.run([*command, *arguments], self.log, environ or self.environ, (self.lock.fileno(),))

    def _python(self, *arguments):
        return self.run([self.python, *arguments], self.log, self.environ, (self.lock.fileno(),))

    def _content(self, name):
        with open(os.path.join(ROOT, name), encoding='utf-8') as stream:
            return stream.read()


CHECK_MMCV = (
    'import sys, mmcv.ops; built = mmcv.ops.get_compiling_cuda_version(); '
    'sys.exit(sys.argv[1] == "1" and built == "not available")'
)


def nvcc_version(environ):
    """Return the CUDA toolkit's version, such as 13.0, of CUDA_HOME or on the path, or None."""
    home = environ.get('CUDA_HOME')
    nvcc = shutil.which('nvcc', path=os.path.join(home, 'bin') if home else environ.get('PATH'))
    output = subprocess.check_output([nvcc, '--version']).decode() if nvcc else ''
    found = re.search(r'release (\d+\.\d+)', output)
    return found and found.group(1)


def compile_jobs():
    """Return the number of parallel compilers: one per core, limited by memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9
    return max(1, min(cores, int(memory / GIGABYTES_PER_JOB)))


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
                'Python 3.10 or newer is needed, and {} is Python {}.{}; install a newer one and name it, '
                'for example `make PYTHON=python3.12 ...`'.format(sys.executable, *sys.version_info[:2])
            )
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, interrupt)
        if not Setup(arguments.venv, arguments.stack, arguments.this_python).complete():
            say('Set-up is up to date: {}'.format(arguments.venv))
    except (SetupError, OSError) as error:
        print('error: {}'.format(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\nThe set-up was interrupted; the same command carries on where it stopped.', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
