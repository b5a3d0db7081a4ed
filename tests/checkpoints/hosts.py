"""The host libraries' models around a backbone, without memory."""

import functools
from importlib import import_module

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.utils import get_installed_path


def build(library, config):
    """A model of one of the host libraries on the meta device."""
    import_module(f'{library}.models')
    registry = import_module(f'{library}.registry').MODELS
    with torch.device('meta'), DefaultScope.overwrite_default_scope(library):
        return registry.build(config)


def classifier(backbone, width, neck='GlobalAveragePooling', head='LinearClsHead'):
    """mmpretrain's classifier of 1000 classes."""
    import_module('ssm_backbones.heads')
    return build(
        'mmpretrain',
        dict(
            type='ImageClassifier',
            backbone=backbone,
            neck=neck and dict(type=neck),
            head=dict(type=head, num_classes=1000, in_channels=width),
        ),
    )


def detector(backbone, widths):
    """mmdet's Mask R-CNN with an FPN."""
    config = _base('mmdet', 'mask-rcnn_r50_fpn')
    config.backbone = backbone
    config.neck.in_channels = list(widths)
    return build('mmdet', config)


def segmentor(backbone, widths):
    """mmseg's UperNet with an auxiliary head on the third stage."""
    config = _base('mmseg', 'upernet_swin')
    config.backbone = backbone
    config.decode_head.update(in_channels=list(widths), num_classes=150, norm_cfg=dict(type='BN'))
    config.auxiliary_head.update(in_channels=widths[2], num_classes=150, norm_cfg=dict(type='BN'))
    return build('mmseg', config)


def _base(library, name):
    return _read(library, name).model.copy()


@functools.cache
def _read(library, name):
    config = Config.fromfile(f'{get_installed_path(library)}/.mim/configs/_base_/models/{name}.py')
    config.model.pop('pretrained', None)
    return config


def around(model):
    """The names, shapes and types of everything but the backbone."""
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith('backbone.')}
