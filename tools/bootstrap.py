"""Make or complete the virtual environment: pinned packages, compiled ops. ``make setup`` runs it.

It is the one file that runs before anything is installed: standard library only, and its syntax is that of Python 3.6,
so that an old Python can say that it is too old. Every step leaves a stamp in the environment, a hash of what the step
depends on; a step whose stamp still holds is not run again, and an interrupted set-up carries on at the first that
has none.
"""

import argparse
import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MINIMUM_PYTHON = (3, 10)
HEARTBEAT_SECONDS = 30
# Compiling mmcv takes this many minutes of one core, and this much memory for each job.
MMCV_CORE_MINUTES = 20
GIGABYTES_PER_JOB = 1.5
STACKS = {'openmmlab': ['mmengine', 'mmcv'], 'onedl': ['onedl-mmengine', 'onedl-mmcv']}

FULL_DISK = r'No space left on device|Errno 28\b|Disk quota exceeded'
NO_MEMORY = r'Killed signal terminated program|internal compiler error: Killed|virtual memory exhausted|MemoryError'
NO_NETWORK = (r'NewConnectionError|ConnectTimeout|ReadTimeout|NameResolutionError|Failed to establish a new connection'
              r'|Temporary failure in name resolution|Name or service not known|Network is unreachable'
              r'|Connection refused|Connection reset by peer|Connection broken|connection timed out|ProxyError'
              r'|Cannot connect to proxy|SSLError|CERTIFICATE_VERIFY_FAILED|Max retries exceeded'
              r'|(?:50[234]|429) (?:Server|Client) Error')


class SetupError(Exception):
    """The set-up cannot go on; the message is one line that ends in the remedy."""


class StepFailed(Exception):
    """A command failed; carries what it printed."""

    def __init__(self, output):
        super().__init__('command failed')
        self.output = output


class Step:
    """One part of the set-up.

    Attributes:
        name: of the stamp and of the log.
        title: what the progress line says.
        action: called without arguments; raises StepFailed.
        inputs: strings the result depends on.
        gigabytes: disk space it takes, with a build of torch for the CPU (one for CUDA takes several more).
        compiles: whether a C++ compiler is needed.
        in_place: called without arguments; False where the result is missing in spite of a stamp.
    """

    def __init__(self, name, title, action, inputs, gigabytes=0.0, compiles=False, in_place=lambda: True):
        self.name = name
        self.title = title
        self.action = action
        self.inputs = inputs
        self.gigabytes = gigabytes
        self.compiles = compiles
        self.in_place = in_place


def check_python(version):
    """Refuse a Python that is too old."""
    if tuple(version[:2]) < MINIMUM_PYTHON:
        raise SetupError('Python 3.10 or newer is needed, and {} is Python {}.{}; install a newer one and name it, '
                         'for example `make PYTHON=python3.12 ...`'.format(sys.executable, version[0], version[1]))


def find_newer_python(path=None):
    """A Python on the path that is new enough, under its versioned name; None where there is none."""
    for minor in range(14, MINIMUM_PYTHON[1] - 1, -1):
        python = shutil.which('python3.{}'.format(minor), path=path)
        if python and subprocess.call([python, '-c', ''], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0:
            return python
    return None


def check_venv_module():
    """Refuse a Python whose venv module or its bundled pip is missing, as Debian packages them apart."""
    for module in ('venv', 'ensurepip'):
        if importlib.util.find_spec(module) is None:
            raise SetupError('{} has no `{}` module; install it, on Debian and Ubuntu with '
                             '`apt install python{}.{}-venv`'.format(sys.executable, module, *sys.version_info[:2]))


def check_compiler(environ):
    """Return the C++ compiler's command; refuse where there is none or it cannot compile C++17."""
    found = find_compiler(environ)
    if found is None:
        raise SetupError('no C++ compiler found ({}); install one, for example with `apt install g++` or '
                         '`dnf install gcc-c++`, or name it in CXX'.format(
                             'CXX is {}'.format(environ['CXX']) if environ.get('CXX')
                             else 'looked for c++, g++ and clang++'))
    program = '#include <optional>\nint main() { return std::optional<int>(0).value(); }\n'
    probe = subprocess.run([*found, '-std=c++17', '-fsyntax-only', '-x', 'c++', '-'], input=program, env=environ,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    if probe.returncode:
        raise SetupError('the C++ compiler {} cannot compile C++17; install a newer one (GCC 9 or Clang 10 at least) '
                         'or name another in CXX'.format(' '.join(found)))
    return found


def find_compiler(environ):
    """The C++ compiler's command: CXX where it is set, else the first of c++, g++, clang++ on the path, else None."""
    for command in [shlex.split(environ['CXX'])] if environ.get('CXX') else [['c++'], ['g++'], ['clang++']]:
        if shutil.which(command[0], path=environ.get('PATH')):
            return command
    return None


def check_headers(include, version):
    """Refuse a Python without its C headers, which mmcv is compiled against."""
    if not os.path.exists(os.path.join(include, 'Python.h')):
        raise SetupError("Python's C headers are missing ({}/Python.h); install them, on Debian and Ubuntu with "
                         '`apt install python{}.{}-dev`'.format(include, *version[:2]))


def check_disk(folders, free=lambda folder: shutil.disk_usage(folder).free):
    """Refuse where a disk has too little space.

    Args:
        folders: gigabytes needed by folder; folders of one file system are added up.
        free: gives the bytes free at a folder.
    """
    needed = {}
    for folder, gigabytes in folders.items():
        folder = os.path.abspath(folder)
        while not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        device = os.stat(folder).st_dev
        first, total = needed.get(device, (folder, 0.0))
        needed[device] = first, total + gigabytes
    for folder, gigabytes in needed.values():
        available = free(folder) / 1e9
        if available < gigabytes:
            raise SetupError('too little disk space: {:.1f} GB free at {}, and the set-up needs {:.1f} GB there; free '
                             'some, or put the environment elsewhere with VENV=...'.format(
                                 available, folder, gigabytes))


def diagnose(output, log):
    """One line with cause and remedy for what a failed command printed.

    Args:
        output: everything the command printed.
        log: path of the file that holds it.
    """
    see = ' (full log: {})'.format(log)
    if re.search(FULL_DISK, output):
        return ('the disk is full; free some space (it takes 3 GB, 10 with a torch for CUDA, and also writes to '
                '{}) and run the same command again{}'.format(tempfile.gettempdir(), see))
    if re.search(NO_MEMORY, output):
        return 'not enough memory to compile; close other programs or compile one file at a time with MAX_JOBS=1' + see
    if re.search(NO_NETWORK, output):
        return ('the package index cannot be reached; check the network (a proxy goes into HTTPS_PROXY, another index '
                'into PIP_INDEX_URL) and run the same command again' + see)
    missing = re.search(r'No matching distribution found for (\S+)|Cannot install (\S+) because', output)
    if missing:
        return ('the package index has no fitting {} for Python {}.{} on {} {}; try another Python with PYTHON=..., or '
                'another index with PIP_INDEX_URL'.format(missing.group(missing.lastindex), *sys.version_info[:2],
                                                          platform.system(), platform.machine()) + see)
    if re.search(r'Permission denied|Errno 13\b', output):
        return 'a file or folder may not be written; mend its permissions and run the same command again' + see
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r'(fatal |\S*:\d+:.* )?error\b', line, re.IGNORECASE)]
    last = (errors or lines or ['no output'])[-1]
    return 'it failed with: {}{}'.format(last[:300], see)


def spell(seconds):
    """A duration for people."""
    minutes, seconds = divmod(int(seconds), 60)
    return '{} min {} s'.format(minutes, seconds) if minutes else '{} s'.format(seconds)


def say(text):
    """Print at once, also into a pipe."""
    print(text, flush=True)


def progress(log):
    """The last thing a log tells: a compiler's count where there is one, else its last line."""
    with open(log, 'rb') as stream:
        stream.seek(max(0, os.path.getsize(log) - 4096))
        tail = stream.read().decode(errors='replace')
    counts = re.findall(r'\[\d+/\d+\]', tail)
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    return counts[-1] if counts else (lines or [''])[-1][:90]


def run_logged(argv, log, environ, keep=()):
    """Run a command with its output in a log, saying now and then how far it is.

    Args:
        argv: the command.
        log: path of a file to append the output to.
        environ: the command's environment.
        keep: open files the command inherits, so that a lock outlives a killed set-up while its command runs on.

    Returns:
        What the command printed.

    Raises:
        StepFailed: if it ends with an error.
    """
    with open(log, 'ab') as stream:
        stream.write('$ {}\n'.format(' '.join(map(shlex.quote, argv))).encode())
        stream.flush()
        start = stream.tell()
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT,
                                   env=environ, start_new_session=True, pass_fds=keep)
    began = time.monotonic()
    try:
        while True:
            try:
                failed = process.wait(HEARTBEAT_SECONDS)
                break
            except subprocess.TimeoutExpired:
                say('      {} so far: {}'.format(spell(time.monotonic() - began), progress(log)))
    except BaseException:
        stop(process)
        raise
    with open(log, 'rb') as stream:
        stream.seek(start)
        output = stream.read().decode(errors='replace')
    if failed:
        raise StepFailed(output)
    return output


def stop(process):
    """End a command and everything it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)


class Setup:
    """The set-up of one virtual environment.

    Args:
        venv: its folder.
        stack: 'openmmlab' or 'onedl'.
        same_python: refuse an existing environment of another Python version than the running one.
        run: runs a command, as run_logged does.
        environ: the environment variables.
    """

    def __init__(self, venv, stack, same_python=False, run=run_logged, environ=os.environ):
        self.venv = os.path.abspath(venv)
        self.stack = stack
        self.same_python = same_python
        self.run = run
        self.state_folder = os.path.join(self.venv, '.setup')
        self.python = os.path.join(self.venv, 'bin', 'python')
        self.log = os.path.join(self.state_folder, 'setup.log')
        self.lock = None
        # Ninja and the other tools are in the environment's bin, and nothing may come from outside it.
        self.environ = {name: value for name, value in environ.items() if name not in ('PYTHONPATH', 'PYTHONHOME')}
        self.environ['PATH'] = os.path.join(self.venv, 'bin') + os.pathsep + environ.get('PATH', os.defpath)
        self.environ['VIRTUAL_ENV'] = self.venv

    def complete(self):
        """Run every step whose stamp does not hold; return the names of the steps run."""
        self._check_folder()
        os.makedirs(self.state_folder, exist_ok=True)
        with self._locked():
            state = self._read_state()
            if state.get('stack', self.stack) != self.stack:
                raise SetupError('{} holds the {} packages, and {} ones go by the same names; use another folder, for '
                                 'example VENV=.venv-{}'.format(self.venv, state['stack'], self.stack, self.stack))
            return self._complete(state)

    def _complete(self, state):
        interpreter = self._probe()
        if interpreter is None:
            state = {}
        elif self.same_python and interpreter['version'][:2] != list(sys.version_info[:2]):
            raise SetupError('{} has Python {}.{}, and PYTHON is {}.{}; remove the folder, or use another with '
                             'VENV=...'.format(self.venv, *interpreter['version'][:2], *sys.version_info[:2]))
        stamps = state.setdefault('stamps', {})
        steps = self.steps()
        key = '{} {}.{}'.format(self.stack, *(interpreter or {'version': sys.version_info})['version'][:2])
        keys = {}
        for step in steps:
            key = hashlib.sha256('\0'.join([key, step.name, *step.inputs]).encode()).hexdigest()
            keys[step.name] = key
        due = [step for step in steps if stamps.get(step.name) != keys[step.name] or not step.in_place()]
        if not due:
            return []
        self._check_machine(due, interpreter)
        with open(self.log, 'w'):
            pass
        say('Setting up {} ({} packages); the log is {}'.format(self.venv, self.stack, self.log))
        began = time.monotonic()
        for step in due:
            if stamps.get(step.name) == keys[step.name] and step.in_place():
                continue
            say('[{}/{}] {}'.format(steps.index(step) + 1, len(steps), step.title))
            step_began = time.monotonic()
            try:
                step.action()
            except StepFailed as failure:
                raise SetupError('{}: {}'.format(step.title.partition(':')[0],
                                                 diagnose(failure.output, self.log))) from None
            say('      done in {}'.format(spell(time.monotonic() - step_began)))
            stamps[step.name] = keys[step.name]
            self._write_state(dict(state, stack=self.stack))
        say('Set-up complete in {}.'.format(spell(time.monotonic() - began)))
        return [step.name for step in due]

    def steps(self):
        """The steps, in order."""
        pins = [self._content('requirements/constraints.txt'), self._content('requirements/{}.txt'.format(self.stack))]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
        mmcv = STACKS[self.stack][-1]
        mmcv_title = ('{}: compiled here, since its authors publish no binary for this torch; about {} minutes on {} '
                      'cores, or seconds where pip has kept the result of an earlier set-up')
        return [
            Step('venv', 'virtual environment: a few seconds', self._make_venv, []),
            Step('tools', 'build tools: a few seconds', self._install_tools,
                 [pins[0], self._content('requirements/build.txt')], 0.1),
            Step('torch', 'torch and torchvision: half a minute to several, by the network', self._install_torch,
                 [pins[0], self._content('requirements/base.txt')], 1.2),
            Step('mmcv', mmcv_title.format(mmcv, max(1, round(MMCV_CORE_MINUTES / cores)), cores),
                 self._install_mmcv, [*pins, str(nvcc_version(find_nvcc(self.environ)))], 0.5, compiles=True),
            Step('libraries', 'detection, segmentation and classification libraries, and test tools: half a minute',
                 self._install_libraries, [*pins, self._content('requirements/dev.txt')], 0.6),
            Step('ops', 'the ops, compiled: about a minute', self._build_ops,
                 [self._content('cuda_ops/_build.py')] + [
                     self.environ.get(name, '') for name in ('CXX', 'FORCE_CUDA', 'TORCH_CUDA_ARCH_LIST')],
                 0.1, compiles=True, in_place=self._ops_in_place),
            Step('package', 'this package: a few seconds', self._install_package,
                 [self._content('pyproject.toml'), self._content('setup.py'), ROOT], compiles=True),
        ]

    def _check_folder(self):
        """Refuse a folder that is in use for something else."""
        ours = any(os.path.exists(os.path.join(self.venv, name)) for name in ('pyvenv.cfg', '.setup'))
        if os.path.lexists(self.venv) and not ours and not (os.path.isdir(self.venv) and not os.listdir(self.venv)):
            raise SetupError('{} exists and is no virtual environment; remove it or name another folder with '
                             'VENV=...'.format(self.venv))

    def _check_machine(self, due, interpreter):
        """Refuse what would fail later, before anything is downloaded."""
        if any(step.name == 'venv' for step in due) and interpreter is None:
            check_venv_module()
        if any(step.compiles for step in due):
            compiler = check_compiler(self.environ)
            # torch looks for c++, and setuptools for the compiler Python was built with, wherever else there is one.
            self.environ['CXX'] = ' '.join(compiler)
            if not shutil.which((sysconfig.get_config_var('CC') or 'cc').split()[0], path=self.environ['PATH']):
                self.environ.setdefault('CC', self.environ['CXX'])
        if any(step.name == 'mmcv' for step in due):
            probed = interpreter or json.loads(subprocess.check_output([sys.executable, '-c', PROBE]).decode())
            check_headers(probed['include'], probed['version'])
        check_disk({self.venv: sum(step.gigabytes for step in due),
                    tempfile.gettempdir(): 1.0 if any(step.gigabytes >= 0.5 for step in due) else 0.1})

    def _make_venv(self):
        if self._probe() is not None:
            with contextlib.suppress(StepFailed):
                self._python('-m', 'pip', '--version')
                return
        leftovers = [name for name in os.listdir(self.venv) if name != '.setup']
        if leftovers:
            say('      {} is incomplete or broken; making it anew'.format(self.venv))
        for name in leftovers:
            path = os.path.join(self.venv, name)
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.remove(path)
        self.run([sys.executable, '-m', 'venv', self.venv], self.log, self.environ, self._keep())

    def _install_tools(self):
        try:
            self._python('-m', 'pip', '--version')
        except StepFailed:
            # An upgrade of pip was interrupted between its removal and its installation.
            self._python('-m', 'ensurepip', '--upgrade')
        self._pip('-r', 'requirements/build.txt')

    def _install_torch(self):
        self._pip('-r', 'requirements/base.txt', 'torchvision', 'setuptools')

    def _install_mmcv(self):
        mmengine, mmcv = STACKS[self.stack]
        self._pip(mmengine)
        use_cuda = self._cuda_for_mmcv()
        environ = dict(self.environ)
        environ.setdefault('MAX_JOBS', str(compile_jobs()))
        if not use_cuda:
            environ['CUDA_VISIBLE_DEVICES'] = ''
        self._pip('--no-build-isolation', '--verbose', mmcv, environ=environ)
        self._mend_opencv()
        try:
            self._python('-c', CHECK_MMCV, str(int(use_cuda)))
        except StepFailed:
            say('      the {} that pip had kept was compiled for something else; compiling it anew'.format(mmcv))
            self._pip('--no-build-isolation', '--verbose', '--no-cache-dir', '--force-reinstall', '--no-deps', mmcv,
                      environ=environ)
            self._python('-c', CHECK_MMCV, str(int(use_cuda)))

    def _mend_opencv(self):
        try:
            self._python('-c', 'import cv2')
        except StepFailed as failure:
            if 'cannot open shared object file' not in failure.output:
                raise
            say("      OpenCV's windows need system libraries that are missing here (libGL); taking the build without")
            self._pip('--force-reinstall', '--no-deps', 'opencv-python-headless')

    def _cuda_for_mmcv(self):
        """Whether mmcv can be compiled for the GPU; says why not where there is one."""
        output = self._python('-c', 'import torch; print(torch.cuda.is_available(), torch.version.cuda)')
        available, wanted = output.split()[-2:]
        if available != 'True':
            return self.environ.get('FORCE_CUDA') == '1'
        found = nvcc_version(find_nvcc(self.environ))
        if found and found.partition('.')[0] == wanted.partition('.')[0]:
            return True
        say('      There is a GPU, but {}: mmcv is compiled for the CPU alone. To train detectors on the GPU, install '
            'the CUDA toolkit {} and run this again.'.format(
                'the CUDA toolkit is version {}'.format(found) if found else 'no CUDA toolkit (nvcc)', wanted))
        return False

    def _install_libraries(self):
        self._pip('--no-build-isolation', '-r', 'requirements/{}.txt'.format(self.stack), '-r', 'requirements/dev.txt')

    def _install_package(self):
        self._pip('--no-build-isolation', '--no-deps', '--verbose', '--editable', '.')

    def _build_ops(self):
        self._python('setup.py', 'build_ext', '--inplace')

    def _ops_in_place(self):
        """Whether the compiled library on disk is of these sources and the installed torch."""
        folder = os.path.join(ROOT, 'cuda_ops')
        try:
            with open(os.path.join(folder, '_build_info.json')) as stream:
                info = json.load(stream)
        except (OSError, ValueError):
            return False
        return (os.path.exists(os.path.join(folder, '_C.so')) and info.get('torch') == self._torch_version()
                and info.get('source_hash') == load_build_module().source_hash())

    def _torch_version(self):
        probed = self._probe()
        if probed is None:
            return None
        try:
            with open(os.path.join(probed['packages'], 'torch', 'version.py')) as stream:
                found = re.search(r"^__version__ = '([^']+)'", stream.read(), re.MULTILINE)
        except OSError:
            return None
        return found and found.group(1)

    def _probe(self):
        """Version and folders of the environment's Python, or None where it does not run."""
        try:
            output = subprocess.run([self.python, '-c', PROBE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                    env=self.environ, check=True).stdout
            probed = json.loads(output.decode())
        except (OSError, subprocess.CalledProcessError, ValueError):
            return None
        return probed if os.path.realpath(probed['prefix']) == os.path.realpath(self.venv) else None

    def _pip(self, *arguments, environ=None):
        command = [self.python, '-m', 'pip', 'install', '--no-user', '--no-input', '--disable-pip-version-check',
                   '--progress-bar', 'off', '-c', 'requirements/constraints.txt',
                   '-c', 'requirements/{}.txt'.format(self.stack)]
        return self.run([*command, *arguments], self.log, environ or self.environ, self._keep())

    def _python(self, *arguments):
        return self.run([self.python, *arguments], self.log, self.environ, self._keep())

    def _keep(self):
        return (self.lock.fileno(),) if self.lock else ()

    def _content(self, name):
        with open(os.path.join(ROOT, name), encoding='utf-8') as stream:
            return stream.read()

    def _read_state(self):
        try:
            with open(os.path.join(self.state_folder, 'state.json')) as stream:
                return json.load(stream)
        except (OSError, ValueError):
            return {}

    def _write_state(self, state):
        path = os.path.join(self.state_folder, 'state.json')
        with open(path + '.new', 'w') as stream:
            json.dump(state, stream, indent=1)
        os.replace(path + '.new', path)

    @contextlib.contextmanager
    def _locked(self):
        """Keep a second set-up of the same environment waiting."""
        import fcntl

        with open(os.path.join(self.state_folder, 'lock'), 'w') as self.lock:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say('Another set-up of {} is running; waiting for it to end'.format(self.venv))
                fcntl.flock(self.lock, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self.lock, fcntl.LOCK_UN)
        self.lock = None


PROBE = ('import json, sys, sysconfig; print(json.dumps(dict(version=list(sys.version_info[:3]), prefix=sys.prefix, '
         'include=sysconfig.get_paths()["include"], packages=sysconfig.get_paths()["purelib"])))')
CHECK_MMCV = ('import sys, mmcv.ops; built = mmcv.ops.get_compiling_cuda_version(); '
              'sys.exit(sys.argv[1] == "1" and built == "not available")')


def find_nvcc(environ):
    """The CUDA compiler, below CUDA_HOME or on the path, or None."""
    if environ.get('CUDA_HOME'):
        path = os.path.join(environ['CUDA_HOME'], 'bin', 'nvcc')
        return path if os.path.exists(path) else None
    return shutil.which('nvcc', path=environ.get('PATH'))


def nvcc_version(nvcc):
    """The CUDA toolkit's version, such as 13.0, or None."""
    if nvcc is None:
        return None
    output = subprocess.run([nvcc, '--version'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout.decode()
    found = re.search(r'release (\d+\.\d+)', output)
    return found and found.group(1)


def compile_jobs():
    """Compilers to run at once: one a core, as far as the memory goes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    try:
        memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9
    except (ValueError, OSError):
        return cores
    return max(1, min(cores, int(memory / GIGABYTES_PER_JOB)))


def load_build_module():
    """cuda_ops/_build.py, loaded by its path: it needs no torch, which importing the package would."""
    spec = importlib.util.spec_from_file_location('cuda_ops_build', os.path.join(ROOT, 'cuda_ops', '_build.py'))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def interrupt(number, frame):
    """Treat being asked to end like Ctrl-C."""
    raise KeyboardInterrupt


def main(argv=None):
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description='Make or complete the virtual environment.')
    parser.add_argument('--venv', default=os.path.join(ROOT, '.venv'), help='its folder')
    parser.add_argument('--stack', default='openmmlab', help='host libraries: ' + ' or '.join(STACKS))
    parser.add_argument('--this-python', action='store_true', help='use the Python that runs this and no other')
    arguments = parser.parse_args(argv)
    try:
        if os.name != 'posix':
            raise SetupError('Linux or macOS is needed; on Windows use its Linux subsystem (WSL)')
        if arguments.stack not in STACKS:
            raise SetupError('STACK is {}; it must be {}'.format(arguments.stack, ' or '.join(STACKS)))
        if sys.version_info[:2] < MINIMUM_PYTHON and not arguments.this_python:
            newer = find_newer_python()
            if newer:
                os.execv(newer, [newer] + sys.argv)
        check_python(sys.version_info)
        signal.signal(signal.SIGTERM, interrupt)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, interrupt)
        if not Setup(arguments.venv, arguments.stack, arguments.this_python).complete():
            say('Set-up is up to date: {}'.format(arguments.venv))
    except SetupError as error:
        print('error: {}'.format(error), file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno == errno.ENOSPC:
            print('error: the disk is full; free some space and run the same command again', file=sys.stderr)
        else:
            print('error: {}'.format(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\nThe set-up was interrupted; the same command carries on where it stopped.', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
