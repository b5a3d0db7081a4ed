"""Exports in smaller numbers: what is in them, and how far they are from PyTorch."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import cuda_ops
from cuda_ops import runtimes
from ssm_backbones.apis.config import load_config
from ssm_backbones.apis.images import find_images
from ssm_backbones.onnx_export import evaluate, precision
from ssm_backbones.onnx_export import export as exporting
from ssm_backbones.onnx_export.detector import pixels
from tests.versions import since_python_3_11

TOOL = Path(__file__).resolve().parents[2] / 'tools' / 'export_onnx.py'
SHAPE = (1, 3, 8, 12)


class Small(nn.Module):
    """Every kind of layer: before and after a scan, and those that its inputs come from."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.in_proj, self.x_proj, self.out_proj = nn.Linear(8, 8), nn.Linear(8, 12), nn.Linear(8, 8)
        self.A_log, self.D = nn.Parameter(torch.zeros(8, 2)), nn.Parameter(torch.ones(8))

    def forward(self, images):
        x = self.conv(self.stem(images).relu()).relu().permute(0, 2, 3, 1)
        x = self.in_proj(x)
        delta, B, C = nn.functional.silu(self.x_proj(x)).split([8, 2, 2], 3)
        return self.out_proj(cuda_ops.line_scan(x, delta, -self.A_log.float().exp(), B, C, self.D, axis='row'))


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """The module, and its file in float32."""
    torch.manual_seed(0)
    module, path = Small().eval(), tmp_path_factory.mktemp('small') / 'model.onnx'
    exporting.write_onnx(module, torch.randn(SHAPE), path)
    return module, path


def difference(module, path, images=SHAPE):
    return exporting.compare(exporting.open_session(path), module, images)['output']


def weights(path):
    return {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}


def test_float16(small, tmp_path) -> None:
    module, path = small[0], tmp_path / 'model.onnx'
    half = precision.in_float16(module)
    assert {each.dtype for each in module.parameters()} == {torch.float32}
    exporting.write_onnx(half, torch.randn(SHAPE), path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    graph = onnx.load(path).graph
    layers = [node.input[1] for node in graph.node if node.op_type in ('Conv', 'MatMul')]
    assert [weights(path)[name].dtype for name in layers] == [np.float16] * 5
    ends = [each.type.tensor_type.elem_type for each in (*graph.input, *graph.output)]
    assert ends == [onnx.TensorProto.FLOAT] * 2
    assert 1e-5 < difference(module, path) < 1e-2


def test_bfloat16(small, tmp_path) -> None:
    module, path = small
    precision.store_bfloat16(path, tmp_path / 'model.onnx')
    model = onnx.load(tmp_path / 'model.onnx')
    onnx.checker.check_model(model, full_check=True)
    stored = [each for each in model.graph.initializer if each.data_type == onnx.TensorProto.BFLOAT16]
    assert len(stored) == 5
    # As PyTorch rounds them.
    rounded = Small().eval()
    rounded.load_state_dict(
        {key: each.bfloat16().float() if each.dim() > 1 else each for key, each in module.state_dict().items()}
    )
    assert 10 * difference(rounded, tmp_path / 'model.onnx') < difference(module, tmp_path / 'model.onnx') < 1e-2


class Gated(nn.Module):
    """A scan with a layer for each of its inputs, and a gate behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.delta, self.gate, self.last = (nn.Linear(3, 3) for _ in range(4))
        self.B, self.C = nn.Linear(3, 2), nn.Linear(3, 2)
        self.A_log = nn.Parameter(torch.zeros(3, 2))

    def forward(self, images):
        x = images.permute(0, 2, 3, 1)
        given = (torch.tanh(layer(x)) for layer in (self.x, self.delta, self.B, self.C))
        u, delta, B, C = given
        y = cuda_ops.line_scan(u, delta, -self.A_log.float().exp(), B, C, axis='row', delta_softplus=True)
        return self.last(y * self.gate(x).sigmoid())


@pytest.mark.parametrize('form', [{}, {'loops': False}, {'custom_ops': True}], ids=str)
def test_the_inputs_of_scans_are_found_in_every_form(form, tmp_path) -> None:
    exporting.write_onnx(Gated().eval(), torch.randn(SHAPE), tmp_path / 'model.onnx', **form)
    graph = onnx.load(tmp_path / 'model.onnx').graph
    names = precision._layers(graph)
    assert len(names) == 6
    shapes = {each.name: tuple(each.dims) for each in graph.initializer}
    found = precision._inputs_of_scans(graph)
    assert len(found) == 4
    assert sorted(shapes[node.input[1]] for node in graph.node if node.name in found) == [(3, 2)] * 2 + [(3, 3)] * 2
    last = [node.name for node in graph.node if node.name in names][-1]
    assert last not in found


@since_python_3_11
@pytest.mark.parametrize('calibrated', [True, False])
def test_int8(calibrated, small, tmp_path) -> None:
    module, path = small
    images, out = [torch.randn(SHAPE) for _ in range(4)], tmp_path / 'int8.onnx'
    layers = precision.quantize(path, out, images if calibrated else None, exporting.open_session)
    # Scans have their inputs from in_proj and x_proj.
    assert len(layers.integer) == (2 if calibrated else 1) and 'conv' in layers.integer + layers.kept
    assert len(layers.kept) == 5 - len(layers.integer) and 'stem' in layers.kept
    integers = [each for name, each in weights(out).items() if each.dtype == np.int8 and each.ndim > 1]
    assert len(integers) == len(layers.integer)
    # 7 bits: two products of unsigned and signed bytes fit in 16 bits, as processors without VNNI add them.
    for each in integers:
        assert 32 < np.abs(each.astype(int)).max() <= 64 and 2 * 255 * 64 < 2**15
    found = exporting.open_session(out)
    assert 1e-4 < max(exporting.compare(found, module, image)['output'] for image in images) < 0.05
    (run,) = evaluate.ExportedModel.open(out, 'openvino').run(images[0].numpy())
    with torch.no_grad():
        expected = module(images[0]).numpy()
    assert np.abs(run - expected).max() < 0.05 * np.abs(expected).max()


@since_python_3_11
def test_layers_can_be_kept(small, tmp_path) -> None:
    _, path = small
    images = [torch.randn(SHAPE)]
    kept = precision.quantize(path, tmp_path / 'x.onnx', images, exporting.open_session, ['con*']).kept
    assert 'conv' in kept
    with pytest.raises(exporting.CommandError, match=r"no layer is named 'nothing'; the first ones are stem"):
        precision.quantize(path, tmp_path / 'x.onnx', images, exporting.open_session, ['nothing'])
    for given in (images, None):
        with pytest.raises(exporting.CommandError, match='none of 5 layers is left for 8-bit integers'):
            precision.quantize(path, tmp_path / 'none.onnx', given, exporting.open_session, ['*'])
    with pytest.raises(exporting.CommandError, match=r'onnxruntime fails for images \(1, 2, 8, 12\)'):
        precision.quantize(path, tmp_path / 'none.onnx', [torch.randn(1, 2, 8, 12)], exporting.open_session)
    assert not (tmp_path / 'none.onnx').exists()


def test_averages_stay_in_float32(tmp_path) -> None:
    """Those that pooling is exported as: a rounding of theirs would scale the map."""
    path = tmp_path / 'model.onnx'
    tensor = onnx.helper.make_tensor_value_info
    ends = [tensor('images', onnx.TensorProto.FLOAT, [1, 1, 9, 9]), tensor('output', onnx.TensorProto.FLOAT, None)]
    weight = onnx.numpy_helper.from_array(np.full((1, 1, 3, 3), 1 / 9, np.float32), 'weight')
    node = onnx.helper.make_node('Conv', ['images', 'weight'], ['output'], 'pool')
    graph = onnx.helper.make_graph([node], 'graph', ends[:1], ends[1:], [weight])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid('', 18)]), path)
    precision.store_bfloat16(path, path)
    assert weights(path)['weight'].dtype == np.float32


def test_an_old_onnxruntime_is_told_before_the_export(write_config, tool, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(exporting, '_module', lambda *args: pytest.fail('work was done in vain'))
    monkeypatch.setattr('onnxruntime.quantization.quantize_static', lambda: None)
    config = str(write_config('mmpretrain'))
    assert tool.main([config, '--precision', 'int8-dynamic', '--out', str(tmp_path / 'x.onnx')]) == 2
    assert '8-bit integers need a newer onnxruntime' in capsys.readouterr().err


@since_python_3_11
def test_custom_operators(small, tmp_path) -> None:
    runtimes.build(['onnxruntime'])
    module, _ = small
    files = {name: tmp_path / f'{name}.onnx' for name in ('float16', 'float32', 'int8', 'int8-dynamic')}
    for name, written in (('float16', precision.in_float16(module)), ('float32', module)):
        exporting.write_onnx(written, torch.randn(SHAPE), files[name], custom_ops=True)
    image = torch.randn(SHAPE)
    for name, images in (('int8', [image]), ('int8-dynamic', None)):
        precision.quantize(files['float32'], files[name], images, lambda path: exporting.open_session(path, True))
    for name, bound in (('float16', 1e-2), ('int8', 0.05), ('int8-dynamic', 0.05)):
        session = exporting.open_session(files[name], custom_ops=True)
        assert 1e-5 < exporting.compare(session, module, image)['output'] < bound


@pytest.mark.parametrize('host', ['mmpretrain', 'mmseg', 'mmdet'])
def test_calibration_takes_training_images(host, write_config) -> None:
    cfg = load_config(write_config(host))
    part = next(part for part, scope in exporting.PARTS.items() if scope == host)
    images = list(precision.Calibration(cfg, part, 5, (2, 40, 48)))
    assert len(images) == 5 and {each.shape for each in images} == {(2, 3, 40, 48)}
    # Spread over the data, which ImageNet has in the order of its classes.
    assert len({each.sum().item() for each in images}) == 5
    (image,) = precision.Calibration(cfg, part, 1)
    bounds = (0, 255) if host == 'mmdet' else (-127 / 60, 128 / 60)
    assert image.dtype == torch.float32 and bounds[0] <= image.min() < image.max() <= bounds[1]


def test_a_damaged_training_image_is_named(write_config, tmp_path) -> None:
    cfg = load_config(write_config('mmpretrain'))
    shutil.copytree(cfg.train_dataloader.dataset.data_root, tmp_path / 'data')
    cfg.train_dataloader.dataset.data_root = str(tmp_path / 'data')
    path = find_images('train', cfg)[0].path
    Path(path).write_bytes(b'text')
    with pytest.raises(exporting.CommandError, match=f'the training image {path} cannot be read: '):
        list(precision.Calibration(cfg, 'classifier', 1))


def test_bands_that_are_no_colours_are_not_exchanged() -> None:
    for bands, order in ((3, [2, 1, 0]), (5, [0, 1, 2, 3, 4])):
        assert pixels(torch.arange(bands)[:, None, None]).flatten().tolist() == order


def test_bad_options_are_told_first(write_config, tool, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(exporting, '_module', lambda *args: pytest.fail('work was done in vain'))
    config = str(write_config('mmpretrain'))
    for arguments, message in (
        (['--keep-float', 'x'], 'keep_float goes with int8 and int8-dynamic, not with float32'),
        (['--precision', 'int8', '--calibration-images', '0'], 'calibration_images must be at least 1'),
        (['--precision', 'int8', '--cfg-options', 'train_dataloader=None'], 'the config has no train_dataloader'),
    ):
        assert tool.main([config, '--out', str(tmp_path / 'x.onnx'), *arguments]) == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@since_python_3_11
@pytest.mark.parametrize('numbers', ['float16', 'bfloat16', 'int8', 'int8-dynamic'])
def test_tool(numbers, tool, write_config, tmp_path, capsys) -> None:
    config, path = str(write_config('mmpretrain')), tmp_path / 'x.onnx'
    assert tool.main([config, '--shape', '64', '64', '--precision', numbers, '--out', str(path)]) == 0
    text = capsys.readouterr().out
    assert (' layers in 8-bit integers: ' in text) == numbers.startswith('int8')
    assert evaluate.evaluate_onnx(config, str(path))['accuracy/top1'] >= 0
