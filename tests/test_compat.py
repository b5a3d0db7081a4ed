"""The patches for clashes between the libraries."""

import functools
import importlib
import importlib.metadata
import os
import pickle
import subprocess
import sys
import types
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.logging import HistoryBuffer, MessageHub

from ssm_backbones import compat  # importing the package applies the patches
from ssm_backbones.compat import checkpoints, configs, libraries
from ssm_backbones.utils import torch_compat
from ssm_backbones.utils.torch_compat import release

ROOT = Path(__file__).resolve().parents[1]


class Call:
    """Pickles as a call of a function, which is how a checkpoint would run code."""

    def __init__(self, function, *args) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_torch_load_reads_what_mmengine_saves(tmp_path) -> None:
    hub = MessageHub('test_compat')
    for value in (1.0, 2.0, 4.0):
        hub.update_scalar('train/loss', value)
    hub.update_info('best_score', np.float64(0.5))
    hub.update_info('counts', np.arange(3))
    path = tmp_path / 'checkpoint.pth'
    torch.save(dict(state_dict={'weight': torch.ones(2)}, message_hub=hub.state_dict()), path)

    loaded = torch.load(path, weights_only=True)['message_hub']
    buffer = loaded['log_scalars']['train/loss']
    assert isinstance(buffer, HistoryBuffer)
    assert buffer.mean() == pytest.approx(7 / 3)
    assert buffer.statistics('max') == 4.0
    assert loaded['runtime_info']['best_score'] == 0.5
    assert loaded['runtime_info']['counts'].tolist() == [0, 1, 2]


@pytest.mark.skipif(release() < (2, 6), reason='before torch 2.6 nothing can be declared under a name')
def test_what_was_declared_safe_stays_so_when_another_ends_its_own_declaration(tmp_path) -> None:
    path = tmp_path / 'checkpoint.pth'
    torch.save({'buffer': HistoryBuffer([1.0], [1]), 'array': np.arange(2.0)}, path)
    with torch.serialization.safe_globals([HistoryBuffer, np.ndarray, np.dtype, type(np.dtype('f8'))]):
        pass
    assert torch.load(path, weights_only=True)['array'].tolist() == [0, 1]


@pytest.mark.parametrize('name', ['_core', 'core'])
def test_torch_load_reads_arrays_of_both_numpy_generations(name, tmp_path) -> None:
    path = tmp_path / 'checkpoint.pth'
    torch.save({'array': np.arange(4.0), 'scalar': np.float32(2.5)}, path)
    # NumPy names its own module in a pickle; the other generation's name has the same meaning.
    content = path.read_bytes()
    other = tmp_path / 'other.pth'
    if name == 'core':
        import zipfile

        with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, 'w') as target:
            for entry in source.infolist():
                target.writestr(entry, source.read(entry).replace(b'numpy._core.multiarray', b'numpy.core.multiarray'))
    else:
        other.write_bytes(content)
    loaded = torch.load(other, weights_only=True)
    assert loaded['array'].tolist() == [0, 1, 2, 3]
    assert loaded['scalar'] == 2.5


@pytest.mark.parametrize(
    'payload',
    [
        Call(os.system, 'true'),
        Call(getattr, HistoryBuffer, '__init__'),
        Call(getattr, HistoryBuffer, 'no_such_method'),
        Call(getattr, np.ndarray, 'tofile'),
    ],
    ids=['call', 'private method', 'unknown method', 'other class'],
)
def test_torch_load_still_refuses_code(payload, tmp_path) -> None:
    path = tmp_path / 'checkpoint.pth'
    torch.save({'payload': payload}, path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


@pytest.mark.parametrize('name', ['{folder}/evil-0123abcd.pth', 'https://example.com/evil-0123abcd.pth'])
def test_mmengine_runs_no_code_of_a_checkpoint(name, tmp_path, monkeypatch) -> None:
    """From a file, and from torch.hub's folder, where a download would put it."""
    from mmengine.runner.checkpoint import CheckpointLoader

    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    (tmp_path / 'checkpoints').mkdir()
    for folder in (tmp_path, tmp_path / 'checkpoints'):
        torch.save({'state_dict': Call(os.mkdir, str(tmp_path / 'ran'))}, folder / 'evil-0123abcd.pth')
    with pytest.raises(pickle.UnpicklingError):
        CheckpointLoader.load_checkpoint(name.format(folder=tmp_path))
    assert not (tmp_path / 'ran').exists()
    with pytest.raises(FileNotFoundError):
        CheckpointLoader.load_checkpoint(str(tmp_path / 'missing.pth'))


def test_mmengine_resumes_beside_a_torch_that_takes_no_safe_classes(tmp_path, monkeypatch) -> None:
    """As before torch 2.4."""
    from mmengine.runner.checkpoint import CheckpointLoader

    path = tmp_path / 'epoch_1.pth'
    torch.save({'message_hub': HistoryBuffer([2.0], [1])}, path)
    monkeypatch.setattr(torch_compat, 'release', lambda: (2, 3))
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        assert CheckpointLoader.load_checkpoint(str(path), map_location='cpu')['message_hub'].mean() == 2
    finally:
        torch.serialization.add_safe_globals(allowed)


def test_the_fork_s_second_try_reads_weights_only(tmp_path) -> None:
    path = tmp_path / 'evil.pth'
    torch.save(Call(os.mkdir, str(tmp_path / 'ran')), path)
    # As onedl-mmengine 0.10.12 does after a refusal.
    module = types.SimpleNamespace(torch=torch, load_url=torch.hub.load_state_dict_from_url)
    module._safe_torch_load = lambda file, map_location=None: module.torch.load(file, weights_only=False)
    checkpoints.read_weights_only(module)
    for load in (module._safe_torch_load, functools.partial(module.torch.load, weights_only=False)):
        with pytest.raises(pickle.UnpicklingError):
            load(path, map_location='cpu')
    assert not (tmp_path / 'ran').exists()
    assert module.torch.Tensor is torch.Tensor


FAKE_TORCHVISION = """
import torch
import importlib
import importlib.metadata
import os
try:
    torch.ops.load_library(os.path.join(os.path.dirname(__file__), {library!r}))
except OSError:
    pass
for name in ('nms', 'qnms'):
    torch.library.register_fake(f'torchvision::{{name}}')(lambda *args: None)
"""


def run_beside_broken_torchvision(folder: Path, code: str) -> subprocess.CompletedProcess:
    """Run code where torchvision looks like the CUDA wheel beside a CPU-only torch: its library cannot be loaded."""
    library = '_C' + EXTENSION_SUFFIXES[-1]
    package = folder / 'torchvision'
    package.mkdir()
    (package / '__init__.py').write_text(FAKE_TORCHVISION.format(library=library))
    (package / library).write_bytes(b'not a library')
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(folder), str(ROOT)])}
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=environment, timeout=120)


def test_a_torchvision_that_does_not_fit_torch_breaks_the_import(tmp_path) -> None:
    result = run_beside_broken_torchvision(tmp_path, 'import torchvision')
    assert 'torchvision::nms does not exist' in result.stderr


def test_a_torchvision_that_does_not_fit_torch_is_patched(tmp_path) -> None:
    code = (
        'import ssm_backbones.compat as c; [c.apply_patches() for _ in range(2)]; import torchvision; print("imported")'
    )
    result = run_beside_broken_torchvision(tmp_path, code)
    assert result.stdout.strip() == 'imported', result.stderr
    # Nothing that was asked for needs them: the doctor tells.
    assert not result.stderr


def test_importing_the_package_imports_no_host_library() -> None:
    code = (
        "import sys, ssm_backbones; print({'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'torchvision'} & set(sys.modules))"
    )
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=environment, timeout=120)
    assert result.stdout.strip() == 'set()', result.stderr


def test_mmseg_of_another_distribution_is_found_by_its_module(monkeypatch) -> None:
    def distribution(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, 'distribution', distribution)
    monkeypatch.setitem(MODULE2PACKAGE, 'mmseg', 'mmsegmentation')
    configs.find_mmseg_configs.__wrapped__()
    assert MODULE2PACKAGE['mmseg'] == 'mmseg'


@pytest.mark.parametrize('library', ['mmdet', 'mmseg'])
def test_mmcv_2_2_is_taken_by_libraries_that_ask_for_less(library, monkeypatch, caplog) -> None:
    if importlib.metadata.packages_distributions().get('mmcv') != ['mmcv']:
        pytest.skip("the fork's libraries go together")
    importlib.import_module(library)
    monkeypatch.setattr('mmcv.__version__', '2.2.0')
    monkeypatch.setattr(libraries, 'installed_version', lambda name: '2.2.0')
    monkeypatch.setattr(sys, 'meta_path', list(sys.meta_path))
    monkeypatch.delitem(sys.modules, library)
    with pytest.raises(AssertionError, match='MMCV==2.2.0 is used but incompatible'):
        importlib.import_module(library)
    with caplog.at_level('WARNING', logger='ssm_backbones.compat'):
        libraries.accept_mmcv_2_2.__wrapped__()
        assert importlib.util.find_spec(library) is not None and not caplog.messages
        importlib.import_module(library)
    assert sys.modules['mmcv'].__version__ == '2.2.0'
    assert caplog.messages == [
        f'{library} asks for mmcv below 2.2.0 and runs with mmcv 2.2.0, since ssm_backbones lets it.'
    ]


def eighths(*shape):
    """Numbers that every type holds."""
    return torch.randint(8, shape) / 8


def deform(x):
    from mmcv.ops import DeformConv2d

    layer = DeformConv2d(4, 4, 3, padding=1)
    return layer(x, eighths(2, 18, 9, 7).to(x.dtype))


def modulated_deform(x):
    from mmcv.ops import ModulatedDeformConv2d

    layer = ModulatedDeformConv2d(4, 4, 3, padding=1)
    return layer(x, eighths(2, 18, 9, 7).to(x.dtype), eighths(2, 9, 9, 7).to(x.dtype))


def roi_align(x):
    from mmcv.ops import RoIAlign

    return RoIAlign(3)(x, torch.tensor([[0, 1, 1, 6, 6], [1, 0, 2, 5, 5]], dtype=x.dtype))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('operator', [deform, modulated_deform, roi_align])
def test_mmcv_s_operators_compute_half_precision_in_float32(operator, dtype) -> None:
    compat.let_mmcv_take_bfloat16()
    x = torch.randn(2, 4, 9, 7).to(dtype)
    results = []
    for values in (x.float().requires_grad_(), x.clone().requires_grad_()):
        torch.manual_seed(1)
        out = operator(values)
        assert out.dtype == values.dtype
        out.float().square().sum().backward()
        results.append((out.detach().float(), values.grad.float()))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0.03, atol=0.03 * float(expected.abs().max()))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', ['nms', 'soft_nms'])
def test_mmcv_s_suppression_takes_half_precision(name, dtype) -> None:
    import mmcv.ops

    compat.let_mmcv_take_bfloat16()
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]])
    scores = torch.tensor([0.5, 0.875, 0.25])
    expected = getattr(mmcv.ops, name)(boxes, scores, 0.5)
    got = getattr(mmcv.ops, name)(boxes.to(dtype), scores.to(dtype), 0.5)
    assert got[1].tolist() == expected[1].tolist()
    torch.testing.assert_close(got[0].float(), expected[0], rtol=0.01, atol=0.01)


WITH_TRANSFORMERS_5 = """
import logging
logging.basicConfig(format='%(name)s: %(message)s')
import {first}
import ssm_backbones.compat
ssm_backbones.compat.apply_patches()
from mmpretrain.registry import MODELS
import mmpretrain.models
print(MODELS.get('ImageClassifier').__name__, callable(MODELS.get('Llava')))
"""


@pytest.fixture
def transformers_5(tmp_path) -> Path:
    """A folder with a stand-in that has none of the names that version 5 no longer has."""
    if importlib.metadata.packages_distributions().get('mmpretrain') != ['mmpretrain']:
        pytest.skip("the fork's multimodal models are not those of mmpretrain 1.2")
    (tmp_path / 'transformers.py').write_text('__version__ = "5.24.0"\n')
    metadata = tmp_path / 'transformers-5.24.0.dist-info' / 'METADATA'
    metadata.parent.mkdir()
    metadata.write_text('Metadata-Version: 2.1\nName: transformers\nVersion: 5.24.0\n')
    return tmp_path


@pytest.mark.parametrize('distribution', ['mmpretrain', 'onedl-mmpretrain'])
def test_mmpretrain_takes_its_multimodal_extra_for_missing_beside_transformers_5(
    distribution, transformers_5, monkeypatch, caplog
) -> None:
    versions = {distribution: '1.2.0', 'transformers': '5.24.0'}
    monkeypatch.setattr(libraries, 'installed_version', versions.get)
    name = 'mmpretrain.utils.dependency'
    kept = importlib.import_module(name)
    assert not kept.WITH_MULTIMODAL
    monkeypatch.setattr(sys.modules['mmpretrain.utils'], 'dependency', kept)
    monkeypatch.syspath_prepend(transformers_5)
    monkeypatch.delitem(sys.modules, name)
    assert importlib.import_module(name).WITH_MULTIMODAL
    monkeypatch.delitem(sys.modules, name)
    with caplog.at_level('WARNING', logger='ssm_backbones.compat'):
        libraries.leave_out_multimodal_models.__wrapped__()
        assert not caplog.messages
        again = importlib.import_module(name)
    assert again.WITH_MULTIMODAL is False and again.satisfy_requirement('transformers>=4.28.0')
    (message,) = caplog.messages
    assert "mmpretrain 1.2.0's multimodal models" in message and "install 'transformers<5'" in message


@pytest.mark.slow
@pytest.mark.parametrize('first', ['sys', 'mmpretrain'])
def test_mmpretrain_is_imported_beside_transformers_5(first, transformers_5) -> None:
    """Imported before this package or after it."""
    result = subprocess.run(
        [sys.executable, '-c', WITH_TRANSFORMERS_5.format(first=first)],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(transformers_5), str(ROOT)])},
        timeout=600,
    )
    assert result.stdout.strip() == 'ImageClassifier True', result.stderr
    assert "ssm_backbones.compat: mmpretrain 1.2.0's multimodal models" in result.stderr


def test_visualizers_draw_in_every_process(monkeypatch) -> None:
    from mmengine.visualization import Visualizer

    monkeypatch.setattr('mmengine.dist.utils.is_main_process', lambda: False)
    visualizer = Visualizer(name='every process')
    image = np.full((20, 30, 3), 7, np.uint8)
    visualizer.set_image(image)
    assert visualizer.get_image() is None
    compat.draw_in_every_process(visualizer)
    visualizer.set_image(image)
    assert np.array_equal(visualizer.get_image(), image)
    visualizer.dataset_meta = dict(classes=('disc',))
    assert visualizer.dataset_meta == dict(classes=('disc',))
