"""How ``bootstrap.py`` gets mmcv, which is compiled for the torch that is installed, by ``mmcv_compiler.py``.

Only the standard library and the syntax of Python 3.6, as there.
"""

import os
import shlex
import shutil
import subprocess
import sys

from setup_commands import StepFailed, say

COMPILER = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'mmcv_compiler.py')
# Memory that a compiler takes for one of mmcv's files.
GIGABYTES_PER_JOB = 1.5
ANEW = '--no-cache-dir --force-reinstall --no-deps'.split()
CHECK_MMCV = (
    'import sys, mmcv.ops; built = mmcv.ops.get_compiling_cuda_version(); '
    'sys.exit(sys.argv[1] == "1" and built == "not available")'
)


def install_mmcv(setup, mmcv, nvcc):
    """Install mmcv into the environment, and an OpenCV that runs.

    Args:
        setup: A Setup of bootstrap.py.
        mmcv: The name of the package.
        nvcc: The version of the CUDA toolkit, or None.

    Raises:
        StepFailed: If pip, OpenCV or the compiled mmcv fails.
    """
    use_cuda = serves_gpu(setup, nvcc)
    environ = dict(setup.environ, CXX=write_compiler(setup), **({} if use_cuda else {'CUDA_VISIBLE_DEVICES': ''}))
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9
    environ.setdefault('MAX_JOBS', str(max(1, min(os.cpu_count() or 1, int(memory / GIGABYTES_PER_JOB)))))
    setup.pip('--no-build-isolation', '--verbose', mmcv, environ=environ)
    try:
        setup.run_python('-c', 'import cv2')
    except StepFailed as failure:
        if 'cannot open shared object file' not in failure.args[0]:
            raise
        say("      OpenCV's windows need system libraries that are missing here (libGL); taking the build without")
        setup.pip('--force-reinstall', '--no-deps', 'opencv-python-headless')
    try:
        setup.run_python('-c', CHECK_MMCV, str(int(use_cuda)))
    except StepFailed:
        say(f'      the {mmcv} that pip had kept was compiled for something else; compiling it again')
        setup.pip('--no-build-isolation', '--verbose', *ANEW, mmcv, environ=environ)
        setup.run_python('-c', CHECK_MMCV, str(int(use_cuda)))
    shutil.rmtree(os.path.join(setup.folder, 'headers'))


def write_compiler(setup):
    """Write a script that compiles as the compiler does, torch's header once for all files; return its path."""
    compiler = shlex.split(setup.environ['CXX'])
    headers, script = (os.path.join(setup.folder, name) for name in ('headers', 'mmcv-c++'))
    shutil.rmtree(headers, ignore_errors=True)
    os.makedirs(headers)
    kind = subprocess.run([*compiler, '--version'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout
    # Clang's compiled headers are asked for in another way.
    header = '' if b'clang' in kind else 'torch/types.h'
    command = [sys.executable, COMPILER, headers, header, *compiler, '--']
    with open(script, 'w') as stream:
        stream.write(f'#!/bin/sh\nexec {" ".join(map(shlex.quote, command))} "$@"\n')
    os.chmod(script, 0o755)
    return script


def serves_gpu(setup, found):
    """Return whether mmcv can be compiled for the GPU; if a GPU exists, print why not."""
    output = setup.run_python('-c', 'import torch; print(torch.cuda.is_available(), torch.version.cuda)')
    available, wanted = output.split()[-2:]
    if available != 'True':
        return setup.environ.get('FORCE_CUDA') == '1'
    if found and found.partition('.')[0] == wanted.partition('.')[0]:
        return True
    toolkit = f'the CUDA toolkit is version {found}' if found else 'no CUDA toolkit (nvcc)'
    say(
        f'      There is a GPU, but {toolkit}: mmcv is compiled for the CPU alone. To train detectors on the GPU, '
        f'install the CUDA toolkit {wanted} and run this again.'
    )
    return False
