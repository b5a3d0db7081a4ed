"""The examples do what they say."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from ssm_backbones.apis.config import load_config
from ssm_backbones.apis.model import build_model
from ssm_backbones.features.export import ExportOptions, export_features
from ssm_backbones.shapes.generate import make_shapes
from ssm_backbones.shapes.options import ShapesOptions

ROOT = Path(__file__).resolve().parents[2]

CONFIG = """
_base_ = ['mmseg::_base_/datasets/ade20k.py', 'mmseg::_base_/default_runtime.py']
custom_imports = dict(imports=['ssm_backbones'], allow_failed_imports=False)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', mean=[127.0] * 3, std=[60.0] * 3, bgr_to_rgb=True),
    backbone=dict(type='VMamba', arch='test'),
    decode_head=dict(
        type='FCNHead', in_channels=16, in_index=0, channels=16, num_convs=1, num_classes=7, norm_cfg=dict(type='BN')),
    train_cfg=dict(), test_cfg=dict(mode='whole'))
pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
data = dict(dataset=dict(type='BaseSegDataset', data_root='{data}', pipeline=pipeline))
train_dataloader = data
val_dataloader = data
test_dataloader = data
"""


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / 'examples' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_linear_head_on_exported_features(tmp_path, capsys) -> None:
    """It tells classes apart by the features of a backbone that was never trained."""
    make_shapes(tmp_path / 'shapes', ShapesOptions(seed=3, train=24, val=6, size=(64, 64)))
    config = tmp_path / 'config.py'
    config.write_text(CONFIG.replace('{data}', f'{tmp_path}/shapes/ade20k/'))
    torch.save({'state_dict': build_model(load_config(config), None).state_dict()}, tmp_path / 'model.pth')
    for split in ('train', 'val'):
        out = str(tmp_path / split)
        export_features(ExportOptions(str(config), str(tmp_path / 'model.pth'), split, out, dtype='fp16', workers=0))
    example = load('linear_segmentation')
    # Few images and a backbone that knows nothing: what shows is whether the head fits what it was shown.
    score = example.main([str(tmp_path / 'train'), str(tmp_path / 'train'), '--epochs', '30'])
    losses = re.search(r'^loss (\S+) -> (\S+),', capsys.readouterr().out, re.MULTILINE)
    assert losses and float(losses[2]) < 0.5 * float(losses[1])
    labels = torch.cat([item['labels'].flatten() for item in example.labelled(str(tmp_path / 'train'))])
    known = labels[labels != example.IGNORED]
    share = (known == known.mode().values).float().mean().item()
    assert score > 1.5 * share / len(known.unique()), 'the most frequent class alone would give the last quotient'
    unseen = example.main([str(tmp_path / 'train'), str(tmp_path / 'val'), '--epochs', '1'])
    assert 0.0 < unseen < 1.0


def test_linear_head_has_the_labels_of_what_the_model_saw(tmp_path) -> None:
    """The config crops and pads; the label maps have to follow."""
    make_shapes(tmp_path / 'shapes', ShapesOptions(seed=3, train=4, val=1, size=(64, 64)))
    config = tmp_path / 'config.py'
    config.write_text(
        CONFIG.replace('{data}', f'{tmp_path}/shapes/ade20k/')
        .replace('bgr_to_rgb=True)', 'bgr_to_rgb=True, test_cfg=dict(size_divisor=32))')
        .replace(
            "dict(type='LoadAnnotations'),",
            "dict(type='LoadAnnotations'), dict(type='CenterCrop', crop_size=(48, 40)),",
        )
    )
    torch.save({'state_dict': build_model(load_config(config), None).state_dict()}, tmp_path / 'model.pth')
    export_features(ExportOptions(str(config), str(tmp_path / 'model.pth'), 'train', str(tmp_path / 'out'), workers=0))
    example = load('linear_segmentation')
    for item in example.labelled(str(tmp_path / 'out')):
        (path,) = (tmp_path / 'shapes').rglob(f'annotations/*/{Path(item["id"]).stem}.png')
        whole = np.array(Image.open(path)).astype(int)
        assert item['labels'].shape == (64, 64) and (item['labels'][40:] == example.IGNORED).all()
        assert (item['labels'][:, 48:] == example.IGNORED).all()
        expected = np.where(whole == 0, example.IGNORED, whole - 1)[12:52, 8:56]
        np.testing.assert_array_equal(item['labels'][:40, :48], expected)
        assert len(np.unique(expected)) > 1
    head, losses = example.train(example.labelled(str(tmp_path / 'out')), 7, epochs=2)
    assert losses[1] < losses[0]


@pytest.mark.parametrize('name', ['vmamba-test', 'v2m-test-hier', 'mamba2d-test'])
def test_torchvision_head(name) -> None:
    example = load('torchvision_head')
    images = torch.randn(2, 3, 64, 48)
    labels = (F.avg_pool2d(images.mean(1, keepdim=True), 9, 1, 4)[:, 0] > 0).long()
    model = example.Segmentor(name, classes=2, width=16)
    losses = example.train_steps(model, images, labels, steps=15)
    assert losses[-1] < 0.9 * losses[0]
    assert all(parameter.grad is not None for parameter in model.backbone.parameters())
