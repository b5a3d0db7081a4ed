"""Register the models with timm: an entry point and default configs for every name."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models._builder import pretrained_cfg_for_features
from torch import nn

from ssm_backbones.backbones import V2M, Mamba2D, VMamba
from ssm_backbones.backbones.base import SSMBackbone
from ssm_backbones.checkpoints import CheckpointError
from ssm_backbones.checkpoints.published import published_classifier
from ssm_backbones.timm.classifier import SSMClassifier
from ssm_backbones.timm.features import SSMFeatures
from ssm_backbones.timm.weights import load_weights

_PAPERS = {VMamba: 'arXiv:2401.10166', V2M: 'arXiv:2410.10382', Mamba2D: 'arXiv:2412.16146'}
# Sources of weights that timm saved itself, from this model's state dict.
_TIMM_SOURCES = ('hf-hub', 'local-dir')


def _names() -> dict[str, tuple[type[SSMBackbone], str]]:
    """Return the family and arch of every name: those of ``create_backbone``, spelt with underscores."""
    families: tuple[Any, ...] = (VMamba, V2M, Mamba2D)
    return {
        f'{family.__name__.lower()}_{arch}'.replace('-', '_'): (family, arch)
        for family in families
        for arch in [*getattr(family, 'ALIASES', {}), *family.ARCHS]
    }


MODELS = _names()
"""Family and arch by timm's name of the model."""


def _default_cfg(family: type[SSMBackbone], arch: str) -> dict[str, Any]:
    settings = family.ARCHS[getattr(family, 'ALIASES', {}).get(arch, arch)]
    plain, first_release = settings.get('layout') == 'plain', settings.get('version') == 'v0'
    if family is Mamba2D:
        first_conv = 'conv'
    elif plain:
        first_conv = 'projection'
    else:
        first_conv = 'projection.conv' if first_release else 'first.conv'
    return dict(
        url=published_classifier(family, arch),
        # How the authors test: on the whole short side, or on a crop of 224 from 256 pixels.
        crop_pct=1.0 if family is Mamba2D else 0.875,
        interpolation='bicubic',
        input_size=(3, 224, 224),
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        num_classes=1000,
        pool_size=(14, 14) if plain else (7, 7),
        first_conv=f'backbone.patch_embed.{first_conv}',
        classifier='head.fc2' if family is Mamba2D else 'head.fc',
        paper_ids=_PAPERS[family],
    )


def _create(name: str, pretrained: bool | str | os.PathLike[str], cache_dir: Any = None, **options: Any) -> nn.Module:
    family, arch = MODELS[name]
    cfg = resolve_pretrained_cfg(name, options.pop('pretrained_cfg', None), options.pop('pretrained_cfg_overlay', None))
    native = pretrained is True and cfg.source in _TIMM_SOURCES
    checkpoint: Any = None
    if not isinstance(pretrained, bool):
        checkpoint = pretrained
    elif pretrained and not native:
        checkpoint = cfg.state_dict or cfg.file or cfg.url
        if checkpoint is None:
            raise CheckpointError(
                f'pretrained=True: no weights of {name!r} were published. Give the path or URL of a checkpoint as '
                'pretrained, or False to start from random weights.'
            )
        if checkpoint == cfg.url and cache_dir is not None:
            raise ValueError("cache_dir is not used: weights are kept in torch.hub's folder; set TORCH_HOME instead")
    # timm's own feature extractors take the maps of a classifier's stages.
    wrapped = options.get('feature_cls') is not None
    kind: Any = SSMFeatures if options.get('features_only') and not wrapped else SSMClassifier
    if kind is SSMFeatures:
        del options['features_only']

    def build(**settings: Any) -> nn.Module:
        model = kind(family, arch, **settings)
        if checkpoint is not None:
            load_weights(model, checkpoint, cfg.first_conv)
        return model

    model: nn.Module = build_model_with_cfg(
        build,
        name,
        native,
        pretrained_cfg=cfg.to_dict(),
        feature_cfg=dict(out_indices=3),
        cache_dir=cache_dir,
        **options,
    )
    if kind is SSMFeatures:
        model.pretrained_cfg = model.default_cfg = pretrained_cfg_for_features(model.pretrained_cfg)
    return model


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool | str | os.PathLike[str] = False, **options: Any) -> nn.Module:
        return _create(name, pretrained, **options)

    family, arch = MODELS[name]
    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{family.__name__}, arch {arch!r}; pretrained is True, or a checkpoint's path or URL."
    return create


__all__ = ['MODELS']
# timm reads them where the entry points are defined.
default_cfgs = generate_default_cfgs(
    {
        f'{name}.in1k' if published_classifier(family, arch) else name: _default_cfg(family, arch)
        for name, (family, arch) in MODELS.items()
    }
)
for _name in MODELS:
    register_model(_entrypoint(_name))
