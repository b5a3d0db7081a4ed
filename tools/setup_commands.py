"""Commands of the set-up: their output goes into a log, their progress is printed, and a failure gets its remedy.

Only the standard library and the syntax of Python 3.6, as in ``bootstrap.py``.
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HEARTBEAT_SECONDS = 30
GRACE_SECONDS = 5
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


class StepFailed(Exception):
    """A failed command; the argument is its output."""


def diagnose(output, log):
    """Return one line with cause and remedy for the output of a failed command."""
    for pattern, cause in CAUSES:
        if re.search(pattern, output, re.IGNORECASE):
            return f'{cause}, and run the same command again (full log: {log})'
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r'(fatal |\S*:\d+:.* |\w*)error\b', line, re.IGNORECASE)]
    return f'it failed with: {(errors or lines or ["no output"])[-1][:300]} (full log: {log})'


def say(text):
    """Print and flush, also into a pipe."""
    print(text, flush=True)


def start(argv, **options):
    """Start a command in a session of its own, so that ``stop`` ends its child processes with it."""
    return subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True, **options)


def wait(process, progress):
    """Wait for a command, and say from time to time how far it is, by a function that returns a text."""
    began = time.monotonic()
    while process.poll() is None:
        try:
            process.wait(HEARTBEAT_SECONDS)
        except subprocess.TimeoutExpired:
            say(f'      {time.monotonic() - began:.0f} s so far: {progress()[:90]}')


def stop(process):
    """End a command that was started by ``start``, including its child processes.

    Ninja keeps its compilers in groups of their own, and ends them when it is asked to; so it gets the time for that,
    even where the process that started it is gone.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        # macOS answers PermissionError where all that is left waits for its parent to ask.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
            deadline = time.monotonic() + GRACE_SECONDS
            while time.monotonic() < deadline:
                process.poll()
                os.killpg(process.pid, 0)  # raises when none of them is left
                time.sleep(0.02)


@contextlib.contextmanager
def running(argv, environ):
    """Run a command in the background, without its output; leaving the block ends it."""
    process = start(argv, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        if process.poll() is None:
            stop(process)


def run_logged(argv, log, environ):
    """Run a command with its output in a log, report its progress from time to time, and return its output."""
    with open(log, 'ab') as stream:
        stream.write(f'$ {" ".join(map(shlex.quote, argv))}\n'.encode())
        stream.flush()
        began_at = stream.tell()
        process = start(argv, env=environ, stdout=stream, stderr=subprocess.STDOUT)

    def output():
        with open(log, 'rb') as stream:
            stream.seek(began_at)
            return stream.read().decode(errors='replace')

    def progress():
        tail = output()[-4096:]
        # A compiler's count if there is one, else the last line.
        return (re.findall(r'\[\d+/\d+\]', tail) or [tail.strip().rpartition('\n')[2]])[-1]

    try:
        wait(process, progress)
    except BaseException:
        stop(process)
        raise
    if process.returncode:
        raise StepFailed(output())
    return output()
