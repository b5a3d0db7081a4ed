"""Compile the CPU scans as operators of other runtimes: an onnxruntime library and an OpenVINO extension.

Both link the objects of the op library's CPU kernels. Neither needs torch; the OpenVINO extension needs the release of
OpenVINO that it was compiled with. Sources are compiled in a checkout (``make runtimes``).
"""

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cuda_ops import _build
from cuda_ops._build import BuildError

SOURCES = Path(__file__).resolve().parent
FOLDER = SOURCES.parent.parent / 'build' / 'runtimes'
RUNTIMES = ('onnxruntime', 'openvino')

__all__ = ['FOLDER', 'RUNTIMES', 'BuildError', 'build', 'library']


def library(runtime: str, folder: Path | None = None) -> Path:
    """Return the compiled library of a runtime, one of :data:`RUNTIMES`, in a folder (:data:`FOLDER`).

    Raises:
        ValueError: If there is no such runtime.
        BuildError: If the library was not built, or the OpenVINO extension for another release of OpenVINO than is
            installed.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f'runtime must be one of {", ".join(RUNTIMES)}, got {runtime!r}')
    folder = folder or FOLDER
    path = folder / f'libssm_{runtime}.so'
    if not path.exists():
        raise BuildError(f'{path} does not exist; build it with `make runtimes` in a checkout')
    if runtime == 'openvino':
        record, installed = _release_file(folder), _openvino_release()
        built = record.read_text().strip() if record.exists() else 'no known release'
        if built != installed:
            raise BuildError(f'{path} was built for OpenVINO {built}, and this is {installed}; run `make runtimes`')
    return path


def build(
    runtimes: Sequence[str] = RUNTIMES,
    folder: Path = FOLDER,
    objects: Path = _build.BUILD_DIR,
    environ: Mapping[str, str] = os.environ,
) -> list[Path]:
    """Compile the libraries of runtimes and return their paths.

    Args:
        runtimes: Names, of :data:`RUNTIMES`. OpenVINO has to be installed to compile its extension, onnxruntime not.
        folder: Folder that receives the libraries.
        objects: Folder for objects; that of the op library has the kernels' already.
        environ: Read for CXX and MAX_JOBS.

    Raises:
        BuildError: With the reason and the remedy in one line.
    """
    if not (SOURCES / 'scans.h').exists() or not _build.CSRC.is_dir():
        raise BuildError(f'{SOURCES} has no sources; operators of other runtimes are compiled in a checkout')
    compiler, objects = _build.find_compiler(environ), objects.resolve()
    if not sys.platform.startswith('linux'):
        raise BuildError(f'operators of other runtimes are compiled on Linux alone, and this is {sys.platform}')
    folder.mkdir(parents=True, exist_ok=True)
    objects.mkdir(parents=True, exist_ok=True)
    with _build.exclusive(objects / 'lock'):
        kernels = _build.cpu_steps(_build.CSRC, objects, compiler, platform.machine())
        steps = list(kernels)
        paths = []
        for runtime in runtimes:
            include, libraries = _openvino() if runtime == 'openvino' else ([], [])
            flags = [f'-I{_build.CSRC}', *(flag for path in include for flag in ('-isystem', str(path)))]
            if runtime == 'openvino':
                # Named so that the object is compiled anew for another release at the same path.
                flags.append(f'-DSSM_OPENVINO={_openvino_release()}')
            source, built = SOURCES / f'{runtime}.cpp', folder.resolve() / f'libssm_{runtime}.so'
            compiled = _build._cxx(compiler, source, objects / f'runtime_{runtime}.o', flags)
            inputs = (compiled.output, *(step.output for step in kernels))
            argv = (*compiler, '-shared', *map(str, [*inputs, *libraries]), '-Wl,--no-undefined', '-o', str(built))
            steps += [compiled, _build.Step(built, inputs, argv)]
            paths.append(built)
        _build.run_steps(steps, objects, environ)
        if 'openvino' in runtimes:
            _release_file(folder).write_text(_openvino_release() + '\n')
    return paths


def _release_file(folder: Path) -> Path:
    return folder / 'openvino_release.txt'


def _openvino_release() -> str:
    try:
        return importlib.metadata.version('openvino')
    except importlib.metadata.PackageNotFoundError:
        raise BuildError('openvino is not installed; pip install openvino') from None


def _openvino() -> tuple[list[Path], list[Path]]:
    """Return the folders of headers and the libraries of the installed OpenVINO, whose wheel has both."""
    found = importlib.util.find_spec('openvino')
    if found is None or not found.submodule_search_locations:
        raise BuildError('openvino is not installed; pip install openvino')
    package = Path(found.submodule_search_locations[0])
    names = ('libopenvino.so.*', 'libopenvino_onnx_frontend.so.*', 'libtbb.so.*')
    libraries = [path for name in names for path in sorted((package / 'libs').glob(name))[:1]]
    if len(libraries) < len(names) or not (package / 'include').is_dir():
        raise BuildError(f'{package} has no headers or libraries to link; install the openvino wheel of PyPI')
    return [package / 'include'], libraries
