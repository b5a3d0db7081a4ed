"""Metrics of exported files: the predictions that they are of are the model's own."""

import json
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from ssm_backbones.apis.config import load_config
from ssm_backbones.apis.model import build_model
from ssm_backbones.onnx_export import evaluate
from ssm_backbones.onnx_export.detector import Detector
from ssm_backbones.onnx_export.export import Classifier, Segmentor
from ssm_backbones.prediction.predictor import number_of_classes
from ssm_backbones.utils.errors import CommandError

TOOL = Path(__file__).resolve().parents[2] / 'tools' / 'test_onnx.py'
PARTS = {'mmpretrain': ('classifier', Classifier), 'mmseg': ('segmentor', Segmentor), 'mmdet': ('detector', Detector)}


def exported(part, module, shape=('b', 3, 'h', 'w')):
    """What a file would compute, by PyTorch."""

    def run(images):
        outputs = module(torch.from_numpy(images))
        return [each.numpy() for each in (outputs if isinstance(outputs, tuple) else (outputs,))]

    return evaluate.ExportedModel(run, {'part': part}, shape)


@pytest.mark.parametrize('host', PARTS)
def test_predictions_are_the_model_s(host, write_config) -> None:
    cfg = load_config(write_config(host))
    model = build_model(cfg)
    part, kind = PARTS[host]
    data = next(iter(evaluate.test_loader(cfg)))
    with torch.no_grad():
        expected = model.test_step(deepcopy(data))
        # The weights of the model that is built there are others.
        found = evaluate.with_outputs_of(exported(part, kind(model)), cfg)(deepcopy(data))
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(expected, found, strict=True):
        if host == 'mmpretrain':
            torch.testing.assert_close(theirs.pred_score, ours.pred_score)
        elif host == 'mmseg':
            assert torch.equal(theirs.pred_sem_seg.data, ours.pred_sem_seg.data)
        else:
            ours, theirs = ours.pred_instances, theirs.pred_instances
            assert len(ours)
            torch.testing.assert_close(theirs.bboxes, ours.bboxes, rtol=1e-5, atol=1e-3)
            torch.testing.assert_close(theirs.scores, ours.scores)
            assert torch.equal(theirs.labels, ours.labels) and (theirs.masks != ours.masks).float().mean() <= 1e-3


def write_means(path, shape, **notes):
    """Write a file which gives the means of images, (B, C)."""
    tensor = onnx.helper.make_tensor_value_info
    ends = [tensor('images', onnx.TensorProto.FLOAT, shape), tensor('means', onnx.TensorProto.FLOAT, shape[:2])]
    nodes = [
        onnx.helper.make_node('GlobalAveragePool', ['images'], ['cells']),
        onnx.helper.make_node('Flatten', ['cells'], ['means']),
    ]
    graph = onnx.helper.make_graph(nodes, 'graph', ends[:1], ends[1:])
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid('', 18)])
    onnx.helper.set_model_props(model, notes)
    onnx.save(model, path)
    return path


@pytest.fixture
def means(tmp_path):
    """Such a file for two images at once."""
    return write_means(tmp_path / 'means.onnx', [2, 3, 4, 5])


@pytest.mark.parametrize('runtime', evaluate.RUNTIMES)
def test_any_number_of_images_is_run_where_the_batch_is_fixed(runtime, means) -> None:
    model = evaluate.ExportedModel.open(means, runtime)
    for count in (1, 2, 5):
        images = torch.randn(count, 3, 4, 5)
        (found,) = model(images)
        torch.testing.assert_close(found, images.mean((2, 3)))


def test_a_runtime_that_is_missing_is_told(means, monkeypatch) -> None:
    for name in evaluate.RUNTIMES:
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(CommandError, match=f'^{name} is not installed; pip install {name}$'):
            evaluate.ExportedModel.open(means, name)
        monkeypatch.undo()


@pytest.mark.parametrize('runtime', evaluate.RUNTIMES)
def test_tool(runtime, tool, write_config, tmp_path, capsys) -> None:
    """The command line, on a file whose metrics are known without it: colours are taken for shapes."""
    head = 'model = dict(head=dict(num_classes=3))'
    config = str(write_config('mmpretrain', head))
    path = write_means(tmp_path / 'classifier.onnx', ['b', 3, 64, 64], part='classifier')
    assert tool.main([config, str(path), '--runtime', runtime]) == 0
    right = count = 0
    for data in evaluate.test_loader(load_config(config)):
        for image, sample in zip(data['inputs'], data['data_samples'], strict=True):
            # RGB, which mmcv loads as BGR.
            right += int(image.float().mean((1, 2)).flip(0).argmax() == sample.gt_label)
            count += 1
    assert capsys.readouterr().out.splitlines()[-1] == f'accuracy/top1 {100 * right / count}'
    assert tool.main([config, str(tmp_path / 'nowhere.onnx')]) == 2
    assert 'nowhere.onnx does not exist' in capsys.readouterr().err
    small = write_means(tmp_path / 'small.onnx', ['b', 3, 32, 32], part='classifier')
    assert tool.main([config, str(small), '--runtime', runtime]) == 2
    assert 'an image is 64x64, and the file takes 32x32' in capsys.readouterr().err


def test_what_does_not_fit_is_told(write_config, tmp_path) -> None:
    cfg = load_config(write_config('mmpretrain'))
    with pytest.raises(CommandError, match=r'the file is a segmentor, and the config one of mmpretrain'):
        evaluate.with_outputs_of(exported('segmentor', None), cfg)
    with pytest.raises(CommandError, match=r'an image is 8x9, and the file takes 32x32'):
        exported('classifier', None, (1, 3, 32, 32))(torch.zeros(1, 3, 8, 9))
    with pytest.raises(CommandError, match='does not exist'):
        evaluate.ExportedModel.open(tmp_path / 'nowhere.onnx')
    (tmp_path / 'text.onnx').write_text('text')
    with pytest.raises(CommandError, match='cannot be read'):
        evaluate.ExportedModel.open(tmp_path / 'text.onnx')
    with pytest.raises(ValueError, match="got 'tflite'"):
        evaluate.ExportedModel.open(tmp_path / 'text.onnx', 'tflite')


def test_a_file_of_other_classes_is_told(write_config) -> None:
    for host, (part, _) in PARTS.items():
        cfg = load_config(write_config(host))
        wanted = number_of_classes(build_model(cfg, device='meta'))
        notes = {'part': part, 'classes': json.dumps(['a'] * (wanted + 1))}

        def run(images, count=wanted + 1, flat=host == 'mmpretrain'):
            return [np.zeros((len(images), count, *(() if flat else images.shape[2:])), np.float32)]

        with pytest.raises(CommandError, match=f"the file has {wanted + 1} classes, and the config's model {wanted};"):
            model = evaluate.with_outputs_of(evaluate.ExportedModel(run, notes, ('b', 3, 'h', 'w')), cfg)
            model(next(iter(evaluate.test_loader(cfg))))


@pytest.mark.parametrize('runtime', evaluate.RUNTIMES)
def test_images_that_the_runtime_rejects_are_named(runtime, means) -> None:
    model = evaluate.ExportedModel.open(means, runtime)
    with pytest.raises(CommandError, match=r'^the file fails for images \(2, 5, 4, 5\): .'):
        model(torch.zeros(2, 5, 4, 5))


def test_a_file_without_inputs_is_of_another_tool(write_config, tmp_path) -> None:
    value = onnx.helper.make_tensor_value_info('output', onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node('Constant', [], ['output'], value_floats=[1.0])
    graph = onnx.helper.make_graph([node], 'graph', [], [value])
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid('', 18)])
    onnx.save(model, tmp_path / 'x.onnx')
    with pytest.raises(CommandError, match='the file is a graph of another tool'):
        evaluate.with_outputs_of(
            evaluate.ExportedModel.open(tmp_path / 'x.onnx'), load_config(write_config('mmpretrain'))
        )
