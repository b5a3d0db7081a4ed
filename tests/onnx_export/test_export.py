"""Export to ONNX: every family, standard operators alone, the same numbers in onnxruntime."""

import os
import signal
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic

import cuda_ops
from ssm_backbones import V2M, Mamba2D, VMamba
from ssm_backbones.apis.config import load_config
from ssm_backbones.apis.model import build_model
from ssm_backbones.onnx_export import export as exporting
from tests.versions import since_python_3_11

TOOL = Path(__file__).resolve().parents[2] / 'tools' / 'export_onnx.py'


def check_standard(path, loops=True) -> None:
    """Only ONNX's own operators, also within the loops; and the checker has no complaint."""
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [(each.domain, each.version) for each in model.opset_import] == [('', 18)]
    assert not model.functions
    graphs = [model.graph]
    kinds = set()
    while graphs:
        for node in graphs.pop().node:
            assert node.domain == '', node.op_type
            kinds.add(node.op_type)
            bodies = [attribute.g for attribute in node.attribute if attribute.HasField('g')]
            for body in bodies:
                # OpenVINO binds a body's inputs in the order of their first use.
                declared = [each.name for each in body.input]
                used = dict.fromkeys(name for step in body.node for name in step.input if name in declared)
                assert list(used) == declared, node.op_type
            graphs += bodies
    assert bool(kinds & {'Scan', 'Loop', 'If'}) == loops


# Each kind of block once, and in the first and second one twice, since blocks that are alike are translated once.
BACKBONES = {
    'vmamba': (VMamba, dict(embed_dims=16, depths=[2, 2], d_state=1, ssm_ratio=1.0, version='v2')),
    'v2m': (V2M, dict(layout='plain', embed_dims=16, depth=2, d_state=2)),
    'v2m-hier': (V2M, dict(layout='hierarchical', embed_dims=16, depths=[1, 1], d_state=2, ssm_ratio=1.0)),
    'mamba2d': (Mamba2D, dict(embed_dims=[16, 24], depths=[1, 1], d_state=2, mixers=['scan', 'scan'])),
}


# A plain V2M's mixer is one of those of a hierarchical V2M, and its graph is the longest.
@pytest.fixture(
    scope='module', params=[pytest.param(name, marks=[pytest.mark.slow] * (name == 'v2m')) for name in BACKBONES]
)
def backbone(request, tmp_path_factory):
    """A backbone, its file, and the shape of images that the file takes."""
    family, arch = BACKBONES[request.param]
    model = family(arch, **({} if request.param == 'v2m' else dict(out_indices=(0, 1)))).eval()
    images = torch.randn(1, 3, 40, 72)
    path = tmp_path_factory.mktemp('backbone') / 'model.onnx'
    assert exporting.write_onnx(model, images, path)[0] == 18
    return model, path, images.shape


def test_backbones(backbone) -> None:
    model, path, shape = backbone
    check_standard(path)
    differences = exporting.compare(exporting.open_session(path), model, shape)
    assert len(differences) == len(model.out_indices) and max(differences.values()) <= 1e-4


def check_openvino(model, path, shape) -> None:
    """The same numbers in OpenVINO."""
    import openvino  # which `make matrix` does without

    core = openvino.Core()
    # Without a hint it computes in bfloat16 where the processor does.
    compiled = core.compile_model(core.read_model(path), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    images = torch.randn(shape)
    found = compiled({'images': images.numpy()})
    with torch.no_grad():
        expected = model(images)
    expected = (expected,) if isinstance(expected, torch.Tensor) else expected
    assert len(compiled.outputs) == len(expected)
    for number, ours in enumerate(expected):
        assert np.abs(found[number] - ours.numpy()).max() <= 1e-4 * ours.abs().max(), number


def test_openvino(backbone) -> None:
    check_openvino(*backbone)


class Scans(torch.nn.Module):
    """A scan of each kind, the route scan with chunks, from images that give all their inputs."""

    def forward(self, images):
        x = images.permute(0, 2, 3, 1)
        delta, A = x[:, :, :, None].expand(-1, -1, -1, 4, -1), -torch.ones(4, 3, 2)
        y = cuda_ops.cross_selective_scan(x, delta, A, delta[..., :2], delta[..., 1:])
        y = y + cuda_ops.line_scan(x, x, A[0], None, x[..., :2], axis='column', reverse=True)
        x = x[:, :, :3]
        z = cuda_ops.wavefront_scan(x, x.abs(), x.abs(), A[0], A[1], x[..., :2], x[..., 1:], x[..., :2])
        return y + z.sum(2, keepdim=True)


def test_without_loops(tmp_path) -> None:
    # More positions than are unrolled without chunks.
    path, shape = tmp_path / 'model.onnx', (1, 3, 3, 11)
    exporting.write_onnx(Scans(), torch.randn(shape), path, loops=False)
    check_standard(path, loops=False)
    assert max(exporting.compare(exporting.open_session(path), Scans(), shape).values()) <= 1e-4
    check_openvino(Scans(), path, shape)


@since_python_3_11
def test_dynamic_quantisation(backbone, tmp_path) -> None:
    """With unsigned weights, since onnxruntime's kernels for signed ones saturate on processors without VNNI."""
    model, path, shape = backbone
    quantize_dynamic(path, tmp_path / 'quantised.onnx', weight_type=QuantType.QUInt8)
    differences = exporting.compare(exporting.open_session(tmp_path / 'quantised.onnx'), model, shape)
    assert 1e-4 < max(differences.values()) < 0.1


# Those that pad by the size of the image: what is left open has to stay open there.
@pytest.mark.slow
@pytest.mark.parametrize(
    'settings',
    [
        dict(
            type=V2M,
            arch=dict(layout='plain', embed_dims=16, depth=1, d_state=2),
            img_size=64,
            cls_token='center',
            pyramid='single',
        ),
        dict(type=VMamba, arch=dict(embed_dims=8, depths=[2, 1], d_state=2, ssm_ratio=2.0, version='v0')),
        dict(type=Mamba2D, arch=dict(embed_dims=[8, 32], depths=[2, 1], mixers=['scan', 'attention'], d_state=2)),
    ],
    ids=lambda settings: settings['type'].__name__,
)
def test_open_sizes(settings, tmp_path) -> None:
    kind = settings.pop('type')
    model = kind(**({} if kind is V2M else dict(out_indices=(0, 1))), **settings).eval()
    path = tmp_path / 'model.onnx'
    exporting.write_onnx(model, torch.randn(1, 3, 64, 64), path, dynamic=True)
    check_standard(path)
    session = exporting.open_session(path)
    for shape in ((2, 3, 64, 64), (1, 3, 65, 100), (3, 3, 130, 48), (1, 3, 33, 35)):
        assert max(exporting.compare(session, model, shape).values()) <= 1e-4, shape


# UPerNet, whose pooling has cells of sizes that follow from the image's, and the one head of a family's own.
CHANGES = {
    'mmseg': """
        model = dict(
            backbone=dict(_delete_=True, type='VMamba', out_indices=(0, 1), arch=dict(
                embed_dims=8, depths=[1, 1], d_state=2, ssm_ratio=1.0, version='v2')),
            decode_head=dict(
                _delete_=True, type='UPerHead', in_channels=[8, 16], in_index=[0, 1], pool_scales=(1, 2, 3, 6),
                channels=8, num_classes=7, norm_cfg=dict(type='BN'), align_corners=False))
        """,
    'mmpretrain': """
        custom_imports = dict(imports=['ssm_backbones', 'ssm_backbones.heads'])
        model = dict(
            backbone=dict(_delete_=True, type='Mamba2D', out_indices=(0,), arch=dict(
                embed_dims=[8], depths=[1], d_state=2, mixers=['scan'])),
            neck=None, head=dict(_delete_=True, type='Mamba2DClsHead', num_classes=6, in_channels=8))
        """,
    'mmdet': """
        model = dict(
            backbone=dict(_delete_=True, type='VMamba', out_indices=(0, 1), arch=dict(
                embed_dims=16, depths=[1, 1], d_state=1, ssm_ratio=1.0, version='v2')),
            neck=dict(in_channels=[16, 32]))
        """,
}


SLOW_HOSTS = [pytest.param(host, marks=pytest.mark.slow) for host in ('mmpretrain', 'mmseg')]


# The detector around the backbone: test_detector.py.
@pytest.mark.parametrize('host', ['mmdet', *SLOW_HOSTS])
def test_tool(host, tool, write_config, tmp_path, capsys) -> None:
    config = str(write_config(host, CHANGES[host]))
    model = build_model(load_config(config), None)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'model.pth')
    path = tmp_path / 'out.onnx'
    command = [config, str(tmp_path / 'model.pth'), '--shape', '50', '83', '--out', str(path)]
    assert tool.main([*command, *(['--part', 'backbone'] if host == 'mmdet' else ['--dynamic'])]) == 0
    text = capsys.readouterr().out
    part = {'mmpretrain': 'classifier', 'mmseg': 'segmentor', 'mmdet': 'backbone'}[host]
    assert text.startswith(f'{part} written to {path}: opset 18') and 'onnxruntime' in text
    assert text.count('images ') == (1 if host == 'mmdet' else 3)
    assert [each for each in tmp_path.iterdir() if each.name.endswith('.part')] == []
    check_standard(path)
    images = torch.randn(1, 3, 50, 83)
    (found, *_) = exporting.open_session(path).run(None, {'images': images.numpy()})
    with torch.no_grad():
        if host == 'mmseg':
            metas = [dict(ori_shape=(50, 83), img_shape=(50, 83), pad_shape=(50, 83), padding_size=[0] * 4)]
            expected = model.inference(images, metas)
        else:
            expected = model(images, mode='tensor') if host == 'mmpretrain' else model.backbone(images)[0]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-4)
    notes = {each.key: each.value for each in onnx.load(path).metadata_props}
    assert notes['part'] == part and 'mean' in notes


def test_what_differs_is_not_written(write_config, tool, tmp_path, capsys, monkeypatch) -> None:
    def write(module, images, path, *args):
        path.write_bytes(b'a graph')
        return 18, 1

    monkeypatch.setattr(exporting, 'write_onnx', write)
    monkeypatch.setattr(exporting, 'open_session', lambda path, custom_ops: path.read_bytes())
    monkeypatch.setattr(exporting, 'compare', lambda *args: {'map0': 1e-3, 'map1': 0.0})
    command = [str(write_config('mmdet')), '--part', 'backbone', '--out', str(tmp_path / 'x.onnx')]
    assert tool.main(command) == 2
    assert 'differ by 1.00e-03 in map0' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(exporting.CommandError, match='differ by nan'):
        exporting._check_differences({(1,): {'map0': float('nan')}})


def end(*args) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt(*args) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize('how', [end, interrupt])
def test_an_interrupted_export_leaves_nothing(how, write_config, tool, tmp_path, monkeypatch) -> None:
    def write(module, images, path, *args):
        path.write_bytes(b'half')
        how()
        return 18, 1

    monkeypatch.setattr(exporting, 'write_onnx', write)
    (tmp_path / 'x.onnx').write_bytes(b'of before')
    # Where it is not asked for, being asked to end is overheard, so that the test would go on to fail.
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert tool.main([str(write_config('mmdet')), '--out', str(tmp_path / 'x.onnx')]) == 130
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [path.name for path in tmp_path.iterdir()] == ['x.onnx']
    assert (tmp_path / 'x.onnx').read_bytes() == b'of before'


def test_an_unwritable_folder_is_told_first(write_config, tool, capsys, monkeypatch) -> None:
    monkeypatch.setattr(exporting, '_module', lambda *args: pytest.fail('work was done in vain'))
    assert tool.main([str(write_config('mmdet')), '--out', '/proc/x.onnx']) == 2
    assert 'out /proc/x.onnx cannot be written' in capsys.readouterr().err


class ByValue(torch.nn.Module):
    """What no graph can say: it goes by the pixels."""

    in_channels = 3

    def forward(self, images):
        return images if images.mean() > 0 else -images


class BySize(torch.nn.Module):
    """What no graph of open sizes can say."""

    def forward(self, images):
        return images.new_ones(int(images.shape[2]) // 2 if images.shape[2] % 2 else 1)


@pytest.mark.parametrize('kind, dynamic', [(ByValue, False), (BySize, True)])
def test_what_pytorch_cannot_export_is_told(kind, dynamic, write_config, tool, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(exporting, '_module', lambda *args: (kind(), 3))
    command = [str(write_config('mmdet')), '--out', str(tmp_path / 'x.onnx')]
    assert tool.main([*command, *(['--dynamic'] if dynamic else [])]) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_cascades_are_refused(write_config, tool, tmp_path, capsys) -> None:
    head = """dict(
        type='FCNHead', in_channels=16, in_index=0, channels=8, num_convs=1, num_classes=7,
        norm_cfg=dict(type='BN'), align_corners=False)"""
    changes = f"model = dict(type='CascadeEncoderDecoder', num_stages=2, decode_head=[{head}, {head}])"
    assert tool.main([str(write_config('mmseg', changes)), '--out', str(tmp_path / 'x.onnx')]) == 2
    error = capsys.readouterr().err
    assert 'part segmentor: the model of the config, a CascadeEncoderDecoder, has not one head' in error
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments(write_config, tool, tmp_path, capsys, monkeypatch) -> None:
    config = str(write_config('mmseg'))
    torch.save({'state_dict': {'backbone.weight': torch.ones(1)}}, tmp_path / 'other.pth')
    monkeypatch.setattr(exporting, 'write_onnx', lambda *args: pytest.fail('work was done in vain'))
    for arguments, message in (
        (['nowhere.pth'], 'checkpoint nowhere.pth does not exist'),
        ([str(tmp_path)], 'is a folder; name a file in it'),
        ([str(tmp_path / 'other.pth')], 'does not fit the model of the config'),
        (['--part', 'classifier'], 'the config is one of mmseg, which has no classifier'),
        (['--shape', '0', '5'], 'at least 1'),
        (['--dynamic', '--no-loops'], 'dynamic needs loops'),
        (['--batch-size', '0'], 'batch_size must be at least 1'),
        (['--out', str(tmp_path / 'no' / 'x.onnx')], 'its folder does not exist'),
        (['--out', str(tmp_path)], 'it is a folder'),
    ):
        assert tool.main([config, *arguments]) == 2
        assert message in capsys.readouterr().err


def test_an_operator_that_the_runtime_lacks_is_named(tmp_path) -> None:
    tensor = onnx.helper.make_tensor_value_info
    ends = [tensor(name, onnx.TensorProto.BFLOAT16, [2]) for name in ('images', 'output')]
    graph = onnx.helper.make_graph([onnx.helper.make_node('Exp', ['images'], ['output'])], 'graph', ends[:1], ends[1:])
    onnx.save(
        onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid('', 18)]),
        tmp_path / 'x.onnx',
    )
    with pytest.raises(exporting.CommandError, match=r'^onnxruntime \S+ does not take the file: .* Exp.*$'):
        exporting.open_session(tmp_path / 'x.onnx')


def test_a_head_of_other_widths_is_told_first(write_config, tool, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(exporting, 'write_onnx', lambda *args: pytest.fail('work was done in vain'))
    config = write_config('mmpretrain', 'model = dict(head=dict(in_channels=99))')
    assert tool.main([str(config), '--shape', '32', '32', '--out', str(tmp_path / 'x.onnx')]) == 2
    error = capsys.readouterr().err
    assert 'compare in_channels of its neck and head' in error and len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_lack_of_memory_is_told_in_its_own_words(write_config, tool, tmp_path, capsys) -> None:
    config = write_config('mmpretrain')
    assert tool.main([str(config), '--shape', '10000000', '10000000', '--out', str(tmp_path / 'x.onnx')]) == 2
    error = capsys.readouterr().err
    assert 'you tried to allocate' in error and error.endswith('lower shape or batch_size.\n'), error
    assert 'in_channels' not in error and len(error.splitlines()) == 1


def test_older_torch_is_refused(monkeypatch) -> None:
    exporting.require_onnx()
    monkeypatch.setattr(exporting, 'release', lambda: (2, 5))
    with pytest.raises(exporting.CommandError, match=r'needs torch 2\.6 or newer, and this is torch \d'):
        exporting.require_onnx()
