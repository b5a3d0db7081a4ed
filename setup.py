"""Build the package. What is declarative is in pyproject.toml; how the ops are compiled, in cuda_ops/_build.py."""

import importlib.util
import shutil
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).resolve().parent

# As pyproject.toml demands, which nothing heeds without build isolation.
if int(setuptools.__version__.partition('.')[0]) < 77:
    sys.exit(f"error: setuptools {setuptools.__version__} is too old; pip install -U 'setuptools>=77,<81'")

from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402


def load_build_module():
    """Load cuda_ops/_build.py by its path: importing the package would import torch and look for the library."""
    spec = importlib.util.spec_from_file_location('cuda_ops_build', ROOT / 'cuda_ops' / '_build.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


ops = load_build_module()


class BuildOps(build_ext):
    """Compile the op library. torch loads it by its path, so it is no Python module and bears no Python's tag."""

    def run(self):
        try:
            ops.build(self._package(), ops.BUILD_DIR)
        except (ops.BuildError, OSError) as error:
            sys.exit(f'error: {error}')

    def get_outputs(self):
        return [str(self._package() / name) for name in (ops.LIBRARY_NAME, ops.INFO_NAME)]

    def get_output_mapping(self):
        return {}

    def _package(self):
        return (ROOT if self.inplace else Path(self.build_lib)) / 'cuda_ops'


class BuildPackages(build_py):
    """Put configs and tools into the package too, in .mim, where mim and mmengine look for them."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / 'ssm_backbones' / '.mim'
        shutil.rmtree(target, ignore_errors=True)
        for folder in ('configs', 'tools'):
            shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns('__pycache__'))
        shutil.copyfile(ROOT / 'model-index.yml', target / 'model-index.yml')


class NameTheMainPackageFirst(egg_info):
    """Order top_level.txt: some of mim's and mmengine's versions take its first line for the package with .mim."""

    def run(self):
        super().run()
        names = sorted(self.distribution.packages, key=lambda name: name != 'ssm_backbones')
        top_level = dict.fromkeys(name.partition('.')[0] for name in names)
        Path(self.egg_info, 'top_level.txt').write_text('\n'.join(top_level) + '\n', encoding='utf-8')


class WheelForEveryPython(bdist_wheel):
    """Tag the wheel py3-none-PLATFORM: torch loads the op library, which knows nothing of Python."""

    def get_tag(self):
        return 'py3', 'none', super().get_tag()[2]


setup(
    ext_modules=[Extension('cuda_ops._C', sources=[])],
    cmdclass={
        'bdist_wheel': WheelForEveryPython,
        'build_ext': BuildOps,
        'build_py': BuildPackages,
        'egg_info': NameTheMainPackageFirst,
    },
)
