"""Files with the scans as this package's operators, in onnxruntime and OpenVINO."""

from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
import torch

import cuda_ops
from cuda_ops import runtimes
from ssm_backbones import V2M, Mamba2D, VMamba
from ssm_backbones.onnx_export import export as exporting

TOOL = Path(__file__).resolve().parents[2] / 'tools' / 'export_onnx.py'


@pytest.fixture(scope='module', autouse=True)
def libraries() -> None:
    """The op library's objects are linked, so that this compiles two small files at most."""
    runtimes.build()


class Scans(torch.nn.Module):
    """Every scan of the backbones, from images that give all their inputs."""

    def forward(self, images):
        x = images.permute(0, 2, 3, 1)
        delta = x[:, :, :, None] * torch.tensor([1.0, 0.5, -1.0, 2.0])[:, None]
        A, D, bias = -(1 + torch.arange(40.0).reshape(4, 5, 2) / 9), torch.arange(20.0).reshape(4, 5), torch.ones(4, 5)
        B, C = delta[..., :2], delta[..., 1:3]
        weight = torch.arange(40.0).reshape(4, 5, 2) / 20
        outputs = [
            cuda_ops.cross_selective_scan(x, B, A, B, C, D, bias, delta_weight=weight),
            cuda_ops.cross_selective_scan(x, delta.abs(), A, B, C, delta_softplus=False),
            cuda_ops.line_scan(x, x, A[0], x[..., :2], None, D[0], bias[0], axis='row'),
            cuda_ops.line_scan(x, x, A[0], None, x[..., :2], axis='column', reverse=True),
            cuda_ops.line_scan(x, x[..., :2], A[0], None, x[..., :2], delta_weight=weight[0], axis='column'),
        ]
        for reverse, skip in ((False, D[1]), (True, None)):
            projections = (x[..., :2], x[..., 1:3], x[..., 3:5])
            outputs.append(
                cuda_ops.wavefront_scan(x, x.abs(), 2 * x.abs(), A[0], A[1], *projections, skip, reverse=reverse)
            )
        return torch.stack(outputs)


def run_openvino(path, images):
    core = openvino.Core()
    core.add_extension(str(runtimes.library('openvino')))
    compiled = core.compile_model(core.read_model(path), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    return list(compiled({'images': images.numpy()}).values())


def run_onnxruntime(path, images):
    return exporting.open_session(path, custom_ops=True).run(None, {'images': images.numpy()})


RUNTIMES = {'onnxruntime': run_onnxruntime, 'openvino': run_openvino}


@pytest.fixture(scope='module')
def scans(tmp_path_factory):
    path = tmp_path_factory.mktemp('scans') / 'model.onnx'
    exporting.write_onnx(Scans(), torch.randn(1, 5, 6, 7), path, dynamic=True, custom_ops=True)
    return path


def test_a_scan_is_one_node(scans) -> None:
    model = onnx.load(scans)
    assert {each.domain: each.version for each in model.opset_import} == {'': 18, 'ssm_backbones': 1}
    kinds = [node.op_type for node in model.graph.node if node.domain]
    assert sorted(kinds) == ['RouteScan'] * 5 + ['WavefrontScan'] * 2


@pytest.mark.parametrize('runtime', RUNTIMES)
def test_scans(runtime, scans) -> None:
    for shape in ((2, 5, 9, 4), (1, 5, 3, 70), (1, 5, 1, 1)):
        images = torch.randn(shape)
        expected = Scans()(images).numpy()
        (found,) = RUNTIMES[runtime](scans, images)
        for number, (ours, theirs) in enumerate(zip(expected, found, strict=True)):
            assert np.abs(ours - theirs).max() <= 1e-6 * np.abs(ours).max(), (shape, number)


# The quick tests run every scan, and the slow ones every family.
@pytest.mark.slow
@pytest.mark.parametrize('family', [VMamba, V2M, Mamba2D])
def test_backbones(family, tmp_path) -> None:
    model, images = family('test').eval(), torch.randn(1, 3, 64, 96)
    exporting.write_onnx(model, images, tmp_path / 'model.onnx', custom_ops=True)
    with torch.no_grad():
        expected = model(images)
    for run in RUNTIMES.values():
        for ours, theirs in zip(expected, run(tmp_path / 'model.onnx', images), strict=True):
            assert np.abs(ours.numpy() - theirs).max() <= 1e-5 * ours.abs().max()


def write_wrong_file(path) -> dict[str, np.ndarray]:
    """Write a RouteScan whose delta has one channel too few, and return its inputs."""
    helper = onnx.helper
    shapes = dict(x=[1, 2, 3, 4], delta=[1, 1, 2, 3, 3], A=[1, 4, 2], B=[1, 1, 1, 1, 2], C=[1, 1, 1, 1, 2], D=[1, 4])
    shapes['delta_bias'] = [1, 4]
    inputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    output = helper.make_tensor_value_info('y', onnx.TensorProto.FLOAT, [1, 2, 3, 4])
    attributes = dict(routes=[0], per_line=1, delta_softplus=1)
    node = helper.make_node('RouteScan', list(shapes), ['y'], domain='ssm_backbones', **attributes)
    opsets = [helper.make_opsetid('', 18), helper.make_opsetid('ssm_backbones', 1)]
    graph = helper.make_graph([node], 'graph', inputs, [output])
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def test_wrong_shapes_are_told(tmp_path) -> None:
    feed = write_wrong_file(tmp_path / 'wrong.onnx')
    message = r'delta must have shape \(1, 1, 2, 3, 4\), got \(1, 1, 2, 3, 3\)'
    with pytest.raises(Exception, match=message):
        exporting.open_session(tmp_path / 'wrong.onnx', custom_ops=True).run(None, feed)
    core = openvino.Core()
    core.add_extension(str(runtimes.library('openvino')))
    with pytest.raises(RuntimeError, match=message):
        core.compile_model(core.read_model(tmp_path / 'wrong.onnx'), 'CPU')(feed)


def test_missing_and_outdated_libraries_are_told_first(tmp_path, monkeypatch, write_config, tool, capsys) -> None:
    with pytest.raises(runtimes.BuildError, match='make runtimes'):
        runtimes.library('onnxruntime', tmp_path)
    (tmp_path / 'libssm_openvino.so').touch()
    with pytest.raises(runtimes.BuildError, match=r'built for OpenVINO no known release, and this is 20'):
        runtimes.library('openvino', tmp_path)
    (tmp_path / 'openvino_release.txt').write_text('2020.1\n')
    with pytest.raises(runtimes.BuildError, match=r'built for OpenVINO 2020\.1, and this is 20'):
        runtimes.library('openvino', tmp_path)
    with pytest.raises(ValueError, match="got 'tflite'"):
        runtimes.library('tflite')
    monkeypatch.setattr(runtimes, 'FOLDER', tmp_path)
    monkeypatch.setattr(exporting, '_module', lambda *args: pytest.fail('work was done in vain'))
    config = str(write_config('mmdet'))
    assert tool.main([config, '--custom-ops', '--out', str(tmp_path / 'x.onnx')]) == 2
    assert 'custom_ops: ' in (error := capsys.readouterr().err) and 'make runtimes' in error
    assert tool.main([config, '--custom-ops', '--no-loops']) == 2
    assert 'exclude each other' in capsys.readouterr().err
