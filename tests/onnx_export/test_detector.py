"""Whole detectors: the boxes and masks of mmdet's own prediction."""

import ast
import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch

from ssm_backbones.apis.config import load_config
from ssm_backbones.apis.model import build_model
from ssm_backbones.onnx_export import box_ops, detections
from ssm_backbones.onnx_export import export as exporting
from ssm_backbones.onnx_export.detector import Detector
from ssm_backbones.utils.errors import CommandError

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / 'tools' / 'export_onnx.py'

RETINA = """
    model = dict(
        _delete_=True, type='RetinaNet',
        data_preprocessor=dict(
            type='DetDataPreprocessor', mean=[120.0, 110.0, 100.0], std=[60.0, 50.0, 40.0], pad_size_divisor=32),
        backbone=dict(type='VMamba', arch='test', out_indices=(0, 1, 2, 3)),
        neck=dict(type='FPN', in_channels=[16, 32, 64, 128], out_channels=16, num_outs=4),
        bbox_head=dict(
            type='RetinaHead', num_classes=6, in_channels=16, stacked_convs=1, feat_channels=16,
            anchor_generator=dict(
                type='AnchorGenerator', octave_base_scale=4, scales_per_octave=3, ratios=[0.5, 1.0, 2.0],
                strides=[4, 8, 16, 32]),
            bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=[0.5] * 4)),
        test_cfg=dict(
            nms_pre=50, min_bbox_size=0, score_thr=0.3, nms=dict(type='nms', iou_threshold=0.5), max_per_img=20))
    """
MODELS = {
    'mask': '',
    'faster': "model = dict(type='FasterRCNN', roi_head=dict(mask_roi_extractor=None, mask_head=None))",
    'retina': RETINA,
}


def spread(model):
    """A model whose scores differ: those of new weights are nearly alike, or 1 in float32 where logits are large."""
    for name, parameter in model.named_parameters():
        if 'retina_' in name:
            parameter.data.mul_(0.1 if parameter.ndim > 1 else 0.0)
        elif parameter.ndim > 1:
            parameter.data.mul_(1.1)
    return model


def predicted(model, images):
    """mmdet's own objects in pixels (B, 3, H, W)."""
    from mmdet.structures import DetDataSample

    size = tuple(images.shape[2:])
    metas = dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0))
    # mmcv loads BGR.
    data: dict = dict(inputs=[each.flip(0) for each in images])
    data['data_samples'] = [DetDataSample(metainfo=dict(metas)) for _ in images]
    with torch.no_grad():
        data = model.data_preprocessor(data, False)
        return [each.pred_instances for each in model.predict(data['inputs'], data['data_samples'], rescale=True)]


@pytest.mark.parametrize('name', MODELS)
def test_objects_are_those_of_mmdet(name, write_config) -> None:
    model = spread(build_model(load_config(write_config('mmdet', MODELS[name]))))
    # One side is padded; a small image has fewer anchors than are selected.
    for shape in ((2, 3, 64, 75), (1, 3, 17, 32)):
        images = 255 * torch.rand(shape)
        with torch.no_grad():
            boxes, scores, labels, *masks = Detector(model)(images)
        assert len(masks) == (name == 'mask')
        for place, objects in enumerate(predicted(model, images)):
            count = len(objects)
            assert count and (scores[place] > 0).sum() == count
            torch.testing.assert_close(boxes[place, :count], objects.bboxes)
            torch.testing.assert_close(scores[place, :count], objects.scores)
            assert torch.equal(labels[place, :count], objects.labels)
            assert (labels[place, count:] == -1).all() and not boxes[place, count:].any()


def test_what_is_not_exported_is_named(write_config) -> None:
    for change, message in (
        ("model = dict(test_cfg=dict(rcnn=dict(nms=dict(type='soft_nms'))))", 'selected by nms=.*soft_nms'),
        ('model = dict(test_cfg=dict(rpn=dict(nms_pre=-1)))', 'sets no nms_pre'),
        ('model = dict(test_cfg=dict(rpn=None))', 'sets no nms_pre'),
        ('model = dict(rpn_head=dict(loss_cls=dict(use_sigmoid=False)))', 'scores by softmax'),
        ("model = dict(roi_head=dict(bbox_roi_extractor=dict(roi_layer=dict(pool_mode='max'))))", 'takes the max'),
    ):
        with pytest.raises(CommandError, match=message):
            Detector(build_model(load_config(write_config('mmdet', change))))


def test_class_names_with_commas_stay_whole(write_config) -> None:
    cfg = load_config(write_config('mmdet', MODELS['retina']))
    names = [f'a, {number}' for number in range(cfg.model.bbox_head.num_classes)]
    for mode in ('train', 'val', 'test'):
        cfg.merge_from_dict({f'{mode}_dataloader.dataset.metainfo': dict(classes=tuple(names))})
    assert json.loads(Detector(build_model(cfg)).notes(cfg)['classes']) == names


def test_objects_that_differ_are_counted() -> None:
    ours = np.float32([[0, 0, 9, 9], [1, 1, 5, 5], [0, 0, 0, 0]]), np.float32([0.9, 0.5, 0.0]), np.int64([2, 1, -1])
    assert detections.unmatched(ours, [each[::-1] for each in ours]) == 0
    for place, value in ((0, 0.1), (1, 0.01), (2, 1)):
        changed = [each.copy() for each in ours]
        changed[place][0] += np.asarray(value, changed[place].dtype)
        assert detections.unmatched(ours, changed) == detections.unmatched(changed, ours) == 1
    masks = np.ones((3, 2, 2), np.float32)
    assert detections.unmatched([*ours, masks], [*ours, masks - np.float32([[0, 0], [0, 0.1]])]) == 2


def example():
    path = ROOT / 'examples' / 'onnx_detection.py'
    imported = {name.partition('.')[0] for node in ast.walk(ast.parse(path.read_text())) for name in names(node)}
    assert not imported & {'torch', 'mmdet', 'mmcv', 'mmengine', 'ssm_backbones', 'cuda_ops'}
    assert len(path.read_text().splitlines()) <= 60
    spec = importlib.util.spec_from_file_location('onnx_detection', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names(node):
    if isinstance(node, ast.ImportFrom):
        return [node.module]
    return [each.name for each in node.names] if isinstance(node, ast.Import) else []


def test_the_example_says_what_it_cannot_read(tmp_path, capsys) -> None:
    (tmp_path / 'text').write_text('text')
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ('images', 'boxes')]
    node = onnx.helper.make_node('Identity', ['images'], ['boxes'])
    graph = onnx.helper.make_graph([node], 'graph', values[:1], values[1:])
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid('', 18)])
    onnx.save(model, tmp_path / 'classifier.onnx')
    onnx.helper.set_model_props(model, {'classes': '["disc"]'})
    onnx.save(model, tmp_path / 'detector.onnx')
    for name, message in (
        ('text', 'text is no detector of'),
        ('nowhere', 'nowhere is no detector of'),
        ('classifier.onnx', 'classifier.onnx is no detector of'),
        ('detector.onnx', 'text is no image'),
    ):
        with pytest.raises(SystemExit):
            example().main([str(tmp_path / name), str(tmp_path / 'text')])
        assert message in capsys.readouterr().err.splitlines()[-1], name


class Boxes(torch.nn.Module):
    """Suppression and RoIAlign of boxes that an image's pixels give: two corners and a score each."""

    def forward(self, images):
        corners, scores = images[:, :4].flatten(2).transpose(1, 2), images[:, 4].flatten(1)
        boxes = torch.cat([corners[..., :2], corners[..., :2] + 5 * corners[..., 2:].abs()], 2)
        numbers = torch.arange(images.shape[0], dtype=images.dtype)[:, None, None].expand(-1, 2, 1)
        rois = torch.cat([numbers, boxes[:, :2]], 2).flatten(0, 1)
        return box_ops.kept_boxes(boxes, scores, 0.3, 5), box_ops.roi_align(images, rois, 2, 3, 0.5, 0, True)


def test_operators(tmp_path) -> None:
    """In onnxruntime and OpenVINO, for batches of any size."""
    exporting.write_onnx(Boxes(), torch.randn(1, 5, 6, 7), tmp_path / 'model.onnx', dynamic=True)
    session = exporting.open_session(tmp_path / 'model.onnx')
    core = openvino.Core()
    model = core.compile_model(core.read_model(tmp_path / 'model.onnx'), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    for shape in ((2, 5, 9, 8), (1, 5, 6, 7)):
        images = torch.randn(shape)
        images[0, 4, 0] = -1.0
        expected = Boxes()(images)
        assert 2 <= expected[0].sum(1).min() and expected[0].sum(1).max() <= 5
        for found in (session.run(None, {'images': images.numpy()}), list(model({'images': images.numpy()}).values())):
            for ours, theirs in zip(expected, found, strict=True):
                np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['mask', 'retina'])
def test_file(name, tool, write_config, tmp_path, capsys) -> None:
    """Any number of images of any size, the example's masks, and no object without a counterpart."""
    config = write_config('mmdet', MODELS[name])
    model = spread(build_model(load_config(config)))
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'model.pth')
    path = tmp_path / 'out.onnx'
    command = [str(config), str(tmp_path / 'model.pth'), '--shape', '50', '64', '--out', str(path), '--dynamic']
    assert tool.main(command) == 0
    text = capsys.readouterr().out
    assert text.startswith(f'detector written to {path}') and text.count('without a counterpart') == 3
    images = (255 * torch.rand(1, 3, 70, 41)).round()
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    pixels = images[0].permute(1, 2, 0).numpy().astype(np.uint8)[:, :, ::-1]
    boxes, scores, _, *masks = example().detect(session, pixels, (70, 41))
    (objects,) = predicted(model, images)
    assert len(boxes) == len(objects)
    np.testing.assert_allclose(scores, objects.scores, atol=1e-4)
    np.testing.assert_allclose(boxes, objects.bboxes, atol=0.02)
    if masks:
        assert masks[0].any() and (masks[0] != objects.masks.numpy()).mean() <= 1e-3
