"""The set-up: what it says when it cannot go on, and that it does each thing once."""

import ast
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import venv
from pathlib import Path

import pytest

LIB_GL = 'ImportError: libGL.so.1: cannot open shared object file: No such file or directory'


def command_line(root, *arguments, prefix=('tools/bootstrap.py',), **environ):
    """Run the set-up as make does, and return the finished process."""
    env = {'PATH': os.environ['PATH'], 'HOME': os.environ.get('HOME', '/'), **environ}
    return subprocess.run([sys.executable, *prefix, *arguments], capture_output=True, text=True, cwd=root, env=env)


def assert_one_line(finished, *parts):
    assert finished.returncode == 1
    assert 'Traceback' not in finished.stderr
    assert finished.stderr.startswith('error: ') and finished.stderr.count('\n') == 1, finished.stderr
    for part in parts:
        assert part in finished.stderr


# Before anything is installed


def test_old_python_can_read_the_script(root):
    files = ('bootstrap', 'setup_commands', 'mmcv_setup')
    nodes = []
    for name in files:
        nodes += ast.walk(ast.parse((root / 'tools' / f'{name}.py').read_text(), feature_version=(3, 6)))
    imported = {name.name.partition('.')[0] for node in nodes if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imported <= {*sys.stdlib_module_names, *files}


def test_old_python_is_one_line(root, tmp_path):
    pretend = (
        'import runpy, sys; sys.version_info = (3, 8, 10); sys.path.insert(0, "tools"); '
        'runpy.run_path("tools/bootstrap.py", run_name="__main__")'
    )
    finished = command_line(root, '--venv', str(tmp_path / 'env'), '--this-python', prefix=('-c', pretend))
    assert_one_line(finished, 'Python 3.10 or newer is needed', 'is Python 3.8', 'make PYTHON=')
    assert not (tmp_path / 'env').exists()


def test_no_compiler_is_one_line_before_anything_is_made(root, tmp_path):
    (tmp_path / 'bin').mkdir()
    finished = command_line(root, '--venv', str(tmp_path / 'env'), PATH=str(tmp_path / 'bin'))
    assert_one_line(finished, 'no C++ compiler found', 'apt install g++')
    assert not (tmp_path / 'env' / 'bin').exists()


def test_missing_compiler_in_cxx_is_named(root, tmp_path):
    finished = command_line(root, '--venv', str(tmp_path / 'env'), CXX='icpx -O2')
    assert_one_line(finished, 'looked for icpx')


@pytest.mark.parametrize('module', ['venv', 'ensurepip'])
def test_missing_module_names_the_package(bootstrap, monkeypatch, tmp_path, module):
    (tmp_path / 'Python.h').write_text('')
    bootstrap.check_python(str(tmp_path))
    found = bootstrap.importlib.util.find_spec
    monkeypatch.setattr(bootstrap.importlib.util, 'find_spec', lambda name: None if name == module else found(name))
    with pytest.raises(bootstrap.SetupError, match=rf'no module {module}; .*apt install python3\.\d+-venv'):
        bootstrap.check_python(str(tmp_path))


def test_missing_headers_name_the_package(bootstrap, tmp_path):
    with pytest.raises(bootstrap.SetupError, match=rf'no file {tmp_path}/Python\.h; .*python3\.\d+-dev'):
        bootstrap.check_python(str(tmp_path))


def test_unknown_stack_is_named(root, tmp_path):
    finished = command_line(root, '--stack', 'mm', '--venv', str(tmp_path / 'env'))
    assert finished.returncode == 2 and "invalid choice: 'mm'" in finished.stderr
    assert not (tmp_path / 'env').exists()


# What failed commands print


@pytest.mark.parametrize(
    ('output', 'cause', 'remedy'),
    [
        (
            "WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by 'NewConnectionError('"
            '<pip._vendor.urllib3.connection.HTTPSConnection object>: Failed to establish a new connection: [Errno -3] '
            "Temporary failure in name resolution')': /simple/ninja/\n"
            'ERROR: Could not find a version that satisfies the requirement ninja\n'
            'ERROR: No matching distribution found for ninja',
            'index cannot be reached',
            'HTTPS_PROXY',
        ),
        (
            "pip._vendor.urllib3.exceptions.ReadTimeoutError: HTTPSConnectionPool(host='index', port=443): "
            'Read timed out.',
            'index cannot be reached',
            'run the same command again',
        ),
        (
            'ERROR: HTTP error 503 while getting x\n503 Server Error: Service Unavailable',
            'index cannot be reached',
            'network',
        ),
        (
            "WARNING: Retrying after connection broken by 'SSLError(SSLCertVerificationError(1, '[SSL: "
            "CERTIFICATE_VERIFY_FAILED]'))'",
            'index cannot be reached',
            'network',
        ),
        (
            'ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device',
            'disk is full',
            'free',
        ),
        ('x.cpp:1: fatal error: error writing to /tmp/a.s: No space left on device', 'disk is full', 'free some space'),
        ('g++: fatal error: Killed signal terminated program cc1plus', 'not enough memory', 'MAX_JOBS=1'),
        (
            'ERROR: Could not find a version that satisfies the requirement torch==2.13.0\n'
            'ERROR: No matching distribution found for torch==2.13.0',
            'No matching distribution found for torch==2.13.0',
            '',
        ),
        (
            'ninja: build stopped\nbindings.cpp:7:1: error: expected }\nnote: see above',
            'bindings.cpp:7:1: error: expected }',
            '',
        ),
        ('', 'no output', ''),
    ],
)
def test_failed_command_is_one_line_with_the_remedy(commands, output, cause, remedy):
    message = commands.diagnose(output, '/env/.setup/setup.log')
    assert cause in message and remedy in message
    assert '\n' not in message and message.endswith('(full log: /env/.setup/setup.log)')


def test_pip_without_a_network_is_recognised(commands, tmp_path, free_port):
    environ = {name: value for name, value in os.environ.items() if not name.startswith('PIP_')}
    environ['PIP_CONFIG_FILE'] = os.devnull
    with pytest.raises(commands.StepFailed) as failure:
        commands.run_logged(
            [
                sys.executable,
                '-m',
                'pip',
                'download',
                '--retries',
                '1',
                '--no-cache-dir',
                '--index-url',
                f'https://127.0.0.1:{free_port}/simple',
                'torch',
            ],
            str(tmp_path / 'log'),
            environ,
        )
    assert 'index cannot be reached' in commands.diagnose(failure.value.args[0], 'log')


# Running commands


def test_command_output_is_logged_and_returned(commands, tmp_path):
    log = tmp_path / 'log'
    assert commands.run_logged(['sh', '-c', 'echo one; echo two >&2'], str(log), os.environ) == 'one\ntwo\n'
    with pytest.raises(commands.StepFailed) as failure:
        commands.run_logged(['sh', '-c', 'echo three; exit 3'], str(log), os.environ)
    assert failure.value.args[0] == 'three\n'
    assert log.read_text().count('$ sh -c') == 2


def test_long_command_says_how_far_it_is(commands, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands, 'HEARTBEAT_SECONDS', 0.2)
    for said, expected in (
        ('[3/86] c++ -c some.cpp\nsome warning', '[3/86]'),
        ('Collecting torch', 'Collecting torch'),
    ):
        commands.run_logged(['sh', '-c', f'echo "{said}"; sleep 0.5'], str(tmp_path / 'log'), os.environ)
        assert f'0 s so far: {expected}\n' in capsys.readouterr().out


def test_interrupted_command_ends_with_all_it_started(commands, tmp_path, monkeypatch):
    def interrupt(text):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, 'HEARTBEAT_SECONDS', 0.3)
    monkeypatch.setattr(commands, 'say', interrupt)
    with pytest.raises(KeyboardInterrupt):
        commands.run_logged(
            ['sh', '-c', f'sleep 60 & echo $! > {tmp_path}/pid; wait'], str(tmp_path / 'log'), os.environ
        )
    pid = int((tmp_path / 'pid').read_text())
    assert ends(pid)


def ends(pid):
    """Whether a process is gone within five seconds, or but waits for its parent to ask."""
    status = Path(f'/proc/{pid}/stat')
    deadline = time.monotonic() + 5
    while status.exists() and status.read_text().split()[2] != 'Z' and time.monotonic() < deadline:
        time.sleep(0.05)
    return not status.exists() or status.read_text().split()[2] == 'Z'


def test_ninja_gets_the_time_to_end_its_compilers(commands, tmp_path):
    """They are in process groups of their own, and the process that started ninja is gone before it."""
    slow = f"trap 'sleep 0.3; touch {tmp_path}/ended; exit' TERM; touch {tmp_path}/ready; while :; do sleep 0.01; done"
    with commands.running(['sh', '-c', f'({slow}) & exec sleep 60'], os.environ):
        while not (tmp_path / 'ready').exists():
            time.sleep(0.02)
    assert (tmp_path / 'ended').exists()


def test_waiting_for_the_background_says_so(commands, capsys, monkeypatch):
    monkeypatch.setattr(commands, 'HEARTBEAT_SECONDS', 0.1)
    with commands.running(['sleep', '0.3'], os.environ) as process:
        commands.wait(process, lambda: 'compiling')
    assert process.returncode == 0 and '0 s so far: compiling\n' in capsys.readouterr().out


def test_a_failure_ends_what_runs_in_the_background(commands, tmp_path):
    with commands.running(['sh', '-c', 'exit 3'], os.environ) as finished:
        assert finished.wait() == 3
    with pytest.raises(commands.StepFailed), commands.running(['sleep', '60'], os.environ) as process:
        assert process.poll() is None
        raise commands.StepFailed('pip')
    assert ends(process.pid)


# The steps, with commands that only pretend

STEPS = ['venv', 'tools', 'libraries', 'mmcv', 'package']


def make_venv(folder):
    """A virtual environment whose pip is but a name."""
    venv.create(folder, symlinks=True, with_pip=False)
    (packages,) = Path(folder).glob('lib/python*/site-packages')
    (packages / 'pip').mkdir(exist_ok=True)


class Pretender:
    """Stands in for run_logged: notes the commands and leaves what they would leave.

    Attributes:
        commands: what was run, with its environment.
        failures: by a part of a command, the exceptions its runs raise, first to last.
        answers: by a part of a command, what it prints.
    """

    def __init__(self, bootstrap, build):
        self.bootstrap = bootstrap
        self.build = build
        self.commands = []
        self.failures = {}
        self.answers = {'torch.cuda.is_available': 'False None'}

    def __call__(self, argv, log, environ):
        text = ' '.join(argv)
        self.commands.append((text, environ))
        for part, exceptions in self.failures.items():
            if part in text and exceptions:
                raise exceptions.pop(0)
        if ' -m venv ' in text:
            make_venv(argv[-1])
        if 'requirements/base.txt' in text:
            self.install_torch(argv[0], '2.13.0+cpu')
        if '--editable' in text:
            package = Path(self.bootstrap.ROOT, 'cuda_ops')
            (package / '_C.so').write_text('')
            info = {'torch': self.torch, 'source_hash': self.build.source_hash(package / 'csrc')}
            (package / '_build_info.json').write_text(json.dumps(info))
        return next((answer for part, answer in self.answers.items() if part in text), '')

    def install_torch(self, python, version):
        self.torch = version
        (packages,) = Path(python).parent.parent.glob('lib/python*/site-packages')
        (packages / 'torch').mkdir(exist_ok=True)
        (packages / 'torch' / 'version.py').write_text(f"__version__ = '{version}'\n")

    def ran(self, part):
        return [text for text, _ in self.commands if part in text]


@pytest.fixture
def checkout(root, tmp_path, bootstrap, monkeypatch):
    """A copy of the files that the set-up depends on."""
    copy = tmp_path / 'checkout'
    for name in (
        'pyproject.toml',
        'setup.py',
        'cuda_ops/_build.py',
        *(f'requirements/{file.name}' for file in (root / 'requirements').iterdir()),
    ):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text((root / name).read_text())
    (copy / 'cuda_ops' / 'csrc').mkdir()
    (copy / 'cuda_ops' / 'csrc' / 'scan.cpp').write_text('int scan();')
    monkeypatch.setattr(bootstrap, 'ROOT', str(copy))
    return copy


@pytest.fixture
def run(bootstrap, build, monkeypatch):
    pretender = Pretender(bootstrap, build)

    @contextlib.contextmanager
    def running(argv, environ):
        pretender(argv, None, environ)
        yield argv, environ

    monkeypatch.setattr(bootstrap, 'running', running)
    monkeypatch.setattr(bootstrap, 'wait', lambda process, progress: pretender(['wait', *process[0]], None, process[1]))
    return pretender


@pytest.fixture
def complete(bootstrap, checkout, run):
    """Complete the set-up of the copy and return the names of the steps run."""

    def call(stack='openmmlab', folder=checkout / '.venv', **options):
        return bootstrap.Setup(str(folder), stack, run=run, **options).complete()

    return call


def test_second_run_runs_nothing(complete, run):
    assert complete() == STEPS
    run.commands.clear()
    assert complete() == []
    assert run.commands == []


@pytest.mark.parametrize(
    'part', [' -m venv ', 'requirements/build.txt', 'requirements/base.txt', '--verbose mmcv', '--editable']
)
def test_interrupted_run_carries_on(complete, run, part):
    run.failures[part] = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        complete()
    done = len(run.commands)
    remaining = complete()
    assert remaining == STEPS[-len(remaining) :]
    assert any(part in text for text, _ in run.commands[done:])
    assert complete() == []


def test_failed_step_names_the_log_and_is_run_again(bootstrap, complete, run, checkout):
    run.failures['requirements/dev.txt'] = [bootstrap.StepFailed('OSError: [Errno 28] No space left on device')]
    with pytest.raises(bootstrap.SetupError, match=rf'disk is full.*{checkout}/\.venv/\.setup/setup\.log'):
        complete()
    assert complete() == STEPS[STEPS.index('libraries') :]


def test_changed_pins_are_installed(complete, checkout):
    complete()
    with (checkout / 'requirements' / 'dev.txt').open('a') as stream:
        stream.write('another\n')
    assert complete() == ['libraries', 'mmcv', 'package']
    with (checkout / 'requirements' / 'constraints.txt').open('a') as stream:
        stream.write('another==1\n')
    assert complete() == STEPS[2:]
    with (checkout / 'requirements' / 'build.txt').open('a') as stream:
        stream.write('another\n')
    assert complete() == STEPS[1:]


@pytest.mark.parametrize('change', ['source', 'library', 'record', 'torch'])
def test_ops_are_compiled_again_where_they_fit_no_longer(complete, run, checkout, change):
    complete()
    if change == 'source':
        (checkout / 'cuda_ops' / 'csrc' / 'scan.cpp').write_text('long scan();')
    elif change == 'torch':
        run.install_torch(str(checkout / '.venv' / 'bin' / 'python'), '2.14.0')
    else:
        (checkout / 'cuda_ops' / {'library': '_C.so', 'record': '_build_info.json'}[change]).unlink()
    assert complete() == ['package']
    assert complete() == []


def test_options_of_the_build_are_followed(complete):
    complete()
    environ = dict(os.environ, FORCE_CUDA='0', TORCH_CUDA_ARCH_LIST='9.0')
    assert complete(environ=environ) == ['package']


def test_broken_environment_is_made_anew(complete, checkout):
    complete()
    (checkout / '.venv' / 'bin' / 'python').unlink()
    (checkout / '.venv' / 'lib' / 'stale').write_text('')
    assert complete() == STEPS
    assert not (checkout / '.venv' / 'lib' / 'stale').exists()


def test_half_made_environment_is_made_anew(complete, run, checkout):
    # The interpreter is there, but installing pip was interrupted.
    run.failures[' -m venv '] = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        complete()
    venv.create(checkout / '.venv', symlinks=True, with_pip=False)
    assert complete() == STEPS
    assert len(run.ran(' -m venv ')) == 2


def test_environment_made_by_hand_is_taken(complete, run, checkout):
    make_venv(checkout / '.venv')
    complete()
    assert not run.ran(' -m venv ')


def test_folder_of_something_else_is_left_alone(bootstrap, complete, checkout):
    (checkout / 'photos').mkdir()
    (checkout / 'photos' / 'one.jpg').write_text('')
    with pytest.raises(bootstrap.SetupError, match='no virtual environment.*VENV='):
        complete(folder=checkout / 'photos')
    assert os.listdir(checkout / 'photos') == ['one.jpg']


def test_stacks_do_not_share_an_environment(bootstrap, complete, run, checkout):
    complete()
    with pytest.raises(bootstrap.SetupError, match='holds the openmmlab packages.*VENV=.venv-onedl'):
        complete('onedl')
    run.commands.clear()
    complete('onedl', checkout / '.venv-onedl')
    assert run.ran('onedl-mmcv') and not any(text.endswith((' mmcv', ' mmengine')) for text, _ in run.commands)


def test_environment_follows_the_checkout_that_uses_it(bootstrap, complete, checkout, tmp_path, monkeypatch):
    outside = tmp_path / 'env'
    complete(folder=outside)
    shutil.copytree(checkout, tmp_path / 'second')
    monkeypatch.setattr(bootstrap, 'ROOT', str(tmp_path / 'second'))
    assert complete(folder=outside) == ['package']


def test_named_python_must_be_the_environments(bootstrap, complete, monkeypatch):
    complete()
    monkeypatch.setattr(bootstrap.sys, 'version_info', (3, 99, 0))
    with pytest.raises(bootstrap.SetupError, match=r'PYTHON is 3\.99'):
        complete(same_python=True)


def test_kernels_are_compiled_while_torch_is_installed(complete, run):
    complete()
    order = [text for text, _ in run.commands if 'requirements/base.txt' in text or '_build.py' in text]
    assert ['_build.py' in text for text in order] == [True, False, True] and order[2].startswith('wait ')
    (libraries,) = run.ran('requirements/base.txt')
    words = libraries.split()
    assert 'mmengine==0.10.7' in words and 'mmdet==3.3.0' in words and 'setuptools<81' in words
    assert not any(word.startswith('mmcv') for word in words)


def test_mmcv_is_compiled_with_its_own_compiler(complete, run, checkout):
    """Its script shares torch's header between the files; everything else gets the compiler itself."""
    complete(environ=dict(os.environ, CXX='g++ -v'))
    state = checkout / '.venv' / '.setup'
    compilers = {environ['CXX'] for text, environ in run.commands if ' mmcv' in text and 'pip install' in text}
    assert compilers == {f'{state}/mmcv-c++'}
    assert {environ['CXX'] for text, environ in run.commands if '--editable' in text} == {'g++ -v'}
    assert (state / 'mmcv-c++').read_text().endswith(f'{state}/headers torch/types.h g++ -v -- "$@"\n')
    assert os.access(state / 'mmcv-c++', os.X_OK)
    assert not (state / 'headers').exists()


def test_mmcv_kept_for_another_torch_is_compiled_anew(bootstrap, complete, run):
    run.failures['import sys, mmcv.ops'] = [bootstrap.StepFailed('mmcv/_ext.so: undefined symbol: _ZN3c10')]
    complete()
    assert [' mmcv' in text for text in run.ran('--no-cache-dir --force-reinstall --no-deps')] == [True]


def test_mmcv_that_does_not_run_at_all_is_an_error(bootstrap, complete, run):
    run.failures['import sys, mmcv.ops'] = [
        bootstrap.StepFailed('ImportError: first'),
        bootstrap.StepFailed('ImportError: second'),
    ]
    with pytest.raises(bootstrap.SetupError, match='mmcv: .*ImportError: second'):
        complete()


def test_opencv_without_windows_where_their_libraries_are_missing(bootstrap, complete, run):
    run.failures['import cv2'] = [bootstrap.StepFailed(LIB_GL)]
    complete()
    assert run.ran('--force-reinstall --no-deps opencv-python-headless')


def test_other_opencv_trouble_is_not_hidden(bootstrap, complete, run):
    run.failures['import cv2'] = [bootstrap.StepFailed('ImportError: numpy.core.multiarray failed to import')]
    with pytest.raises(bootstrap.SetupError, match='numpy.core.multiarray'):
        complete()


def test_an_nvcc_that_does_not_run_is_none(bootstrap, tmp_path):
    assert bootstrap.nvcc_version({'PATH': str(tmp_path)}) is None
    nvcc = tmp_path / 'bin' / 'nvcc'
    nvcc.parent.mkdir()
    nvcc.touch(0o755)
    lines = {'#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.88': '13.0'}
    for line, version in {**lines, '#!/bin/sh\nexit 1': None, '#!/no/such/shell': None, 'no program': None}.items():
        nvcc.write_text(line + '\n')
        assert bootstrap.nvcc_version({'CUDA_HOME': str(tmp_path)}) == version


@pytest.mark.parametrize(('nvcc', 'says'), [(None, 'no CUDA toolkit'), ('12.8', 'version 12.8'), ('13.1', None)])
def test_mmcv_serves_the_gpu_where_it_can(bootstrap, complete, run, monkeypatch, capsys, nvcc, says):
    run.answers['torch.cuda.is_available'] = 'True 13.0'
    monkeypatch.setattr(bootstrap, 'nvcc_version', lambda path: nvcc)
    complete()
    (environ,) = [environ for text, environ in run.commands if text.endswith('--verbose mmcv')]
    assert (environ.get('CUDA_VISIBLE_DEVICES') == '') == (says is not None)
    out = capsys.readouterr().out
    assert 'There is a GPU' not in out if says is None else says in out and 'install the CUDA toolkit 13.0' in out


def test_mmcv_is_looked_at_again_when_a_toolkit_came(complete, monkeypatch, bootstrap):
    monkeypatch.setattr(bootstrap, 'nvcc_version', lambda path: None)
    complete()
    monkeypatch.setattr(bootstrap, 'nvcc_version', lambda path: '13.0')
    assert complete()[0] == 'mmcv'


def test_environments_tools_come_first(complete, run, checkout):
    complete(environ=dict(os.environ, PYTHONPATH='/elsewhere'))
    for _, environ in run.commands:
        assert environ['PATH'].startswith(f'{checkout}/.venv/bin{os.pathsep}')
        assert 'PYTHONPATH' not in environ


def test_second_set_up_waits_for_the_first(complete, run, checkout, capsys):
    state = checkout / '.venv' / '.setup'
    state.mkdir(parents=True)
    with (state / 'lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(target=complete)
        second.start()
        time.sleep(0.5)
        assert run.commands == [] and second.is_alive()
        assert 'waiting' in capsys.readouterr().out
        fcntl.flock(lock, fcntl.LOCK_UN)
    second.join(30)
    assert not second.is_alive() and run.ran('--editable')
