"""Build models, or their backbone and neck, from a config and a checkpoint for inference."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from ssm_backbones.apis.checks import check_checkpoint
from ssm_backbones.backbones.base import SSMBackbone
from ssm_backbones.checkpoints import load_backbone, read_checkpoint
from ssm_backbones.checkpoints.differences import explain
from ssm_backbones.checkpoints.loading import load_tensors
from ssm_backbones.checkpoints.locate import own_weights, without_wrappers
from ssm_backbones.utils.errors import CommandError

_PREPROCESSORS = {'mmpretrain': 'ClsDataPreprocessor', 'mmdet': 'DetDataPreprocessor', 'mmseg': 'SegDataPreProcessor'}


class FeatureExtractor(nn.Module):
    """A model's data preprocessor, backbone and optional neck: images in, feature maps out.

    Attributes:
        preprocessor: The host library's data preprocessor, which normalises and pads.
        backbone: The backbone.
        neck: The neck, or None.
    """

    def __init__(self, preprocessor: nn.Module, backbone: nn.Module, neck: nn.Module | None = None) -> None:
        super().__init__()
        self.preprocessor = preprocessor
        self.backbone = backbone
        self.neck = neck

    def preprocess(self, data: Mapping[str, Any]) -> Tensor:
        """Collate packed images (lists ``inputs`` and ``data_samples``) into a batch (B, C, H, W), float32."""
        return self.preprocessor(dict(data), False)['inputs']

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the feature maps (B, C_i, H_i, W_i) of preprocessed images (B, C, H, W)."""
        maps = self.backbone(images)
        if self.neck is not None:
            maps = self.neck(maps)
        return (maps,) if isinstance(maps, Tensor) else tuple(maps)


def build_extractor(cfg: Config, checkpoint: str | None, with_neck: bool = False) -> FeatureExtractor:
    """Build the backbone (and neck) of a config's model with the weights of a checkpoint, in evaluation mode.

    No parameter requires gradients, and synchronised batch norms become plain ones.

    Args:
        cfg: An mmpretrain, mmdet or mmseg config, from :func:`~ssm_backbones.apis.config.load_config`.
        checkpoint: The model's checkpoint or, without a neck, one of the backbone alone (official ones too). None keeps
            the initial weights.
        with_neck: Whether to include the neck.

    Raises:
        CommandError: If the model has no such part, or the checkpoint does not match.
    """
    model = cfg.model
    if 'backbone' not in model:
        raise CommandError(f'the model of the config, a {model.get("type")}, has no `backbone`.')
    if with_neck and model.get('neck') is None:
        raise CommandError(f'neck: the model of the config, a {model.get("type")}, has no neck.')
    check_checkpoint(checkpoint, 'checkpoint')
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        extractor = FeatureExtractor(
            MODELS.build(preprocessor_config(cfg)),
            MODELS.build(model.backbone),
            MODELS.build(model.neck) if with_neck else None,
        )
    extractor = revert_sync_batchnorm(extractor).eval().requires_grad_(False)
    if checkpoint is None:
        return extractor
    if isinstance(extractor.backbone, SSMBackbone):
        load_backbone(extractor.backbone, checkpoint)
    else:
        _load_strictly(extractor.backbone, checkpoint, 'backbone')
    if extractor.neck is not None:
        _load_strictly(extractor.neck, checkpoint, 'neck')
    return extractor


def build_model(cfg: Config, checkpoint: str | None = None, device: str = 'cpu') -> nn.Module:
    """Build a config's whole model, in evaluation mode.

    Args:
        cfg: An mmpretrain, mmdet or mmseg config, from :func:`~ssm_backbones.apis.config.load_config`.
        checkpoint: The model's checkpoint, which has to match exactly. None keeps the weights of the constructors.
        device: Device of the model; ``'meta'`` allocates no memory and cannot load a checkpoint.

    Raises:
        CommandError: If the checkpoint does not match.
    """
    check_checkpoint(checkpoint, 'checkpoint')
    importlib.import_module(f'{cfg.default_scope}.models')
    settings = deepcopy(cfg.model)
    settings.data_preprocessor = preprocessor_config(cfg)
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device(device):
        model = MODELS.build(settings)
    model = revert_sync_batchnorm(model).eval()
    if checkpoint is not None:
        _load_strictly(model, checkpoint)
    return model


def preprocessor_config(cfg: Config) -> dict[str, Any]:
    """Return the data preprocessor's config, from the model or the top level, with the library's default type."""
    settings = dict(cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {})
    settings.setdefault('type', _PREPROCESSORS[cfg.default_scope])
    # Mixing and resizing for training only; building them would need more settings.
    settings.pop('batch_augments', None)
    return settings


def fingerprint(extractor: FeatureExtractor, cfg: Config, pipeline: Sequence[Mapping[str, Any]]) -> str:
    """Hash everything that the features depend on: weights, settings and preprocessing.

    Returns:
        64 hexadecimal digits (SHA-256).
    """
    parts = dict(
        backbone=_plain(cfg.model.backbone),
        neck=_plain(cfg.model.neck) if extractor.neck is not None else None,
        preprocessor=_plain(preprocessor_config(cfg)),
        pipeline=_plain(pipeline),
    )
    return _digest(parts, extractor)


def model_fingerprint(model: nn.Module, cfg: Config, pipeline: Sequence[Mapping[str, Any]]) -> str:
    """Hash everything that a whole model's predictions depend on: weights, settings and preprocessing.

    Returns:
        64 hexadecimal digits (SHA-256).
    """
    parts = dict(model=_plain(cfg.model), preprocessor=_plain(preprocessor_config(cfg)), pipeline=_plain(pipeline))
    return _digest(parts, model)


def _digest(parts: Mapping[str, Any], model: nn.Module) -> str:
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """Return settings as plain values without ``init_cfg``, since the weights are hashed themselves."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if key != 'init_cfg'}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _load_strictly(module: nn.Module, checkpoint: str, part: str = '') -> None:
    """Load the whole model or the part with a given name, e.g. ``neck``.

    Raises:
        CheckpointError: If the checkpoint's tensors do not match exactly.
    """
    prefix = f'{part}.' if part else ''
    held = own_weights(read_checkpoint(checkpoint))
    tensors = without_wrappers(held, [f'{prefix}{name}' for name in module.state_dict()], checkpoint)
    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    load_tensors(
        module,
        inside,
        lambda mismatches: (
            f'{checkpoint} does not fit the model of the config: {explain(mismatches, prefix)}. '
            'Name the checkpoint that was trained with this config.'
        ),
    )
