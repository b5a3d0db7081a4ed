"""Build backbones by name as plain PyTorch modules, without a config."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ssm_backbones.backbones import V2M, Mamba2D, VMamba
from ssm_backbones.backbones.base import SSMBackbone
from ssm_backbones.checkpoints import load_backbone
from ssm_backbones.checkpoints.published import published_classifier
from ssm_backbones.utils.errors import did_you_mean

_FAMILIES: dict[str, Any] = {'vmamba': VMamba, 'v2m': V2M, 'mamba2d': Mamba2D}


class FeatureInfo(Sequence[Mapping[str, Any]]):
    """Channels, strides and names of a backbone's maps, with the interface of timm's class of this name.

    Each item is a dict with ``num_chs`` (channels), ``reduction`` (stride: pixels of the image along a side of one
    pixel of the map), ``index`` (the out index) and ``module`` (the module that computes the map).

    Attributes:
        out_indices: The out indices, in the order of the maps.
    """

    def __init__(self, backbone: SSMBackbone) -> None:
        self.out_indices: tuple[int, ...] = tuple(backbone.output_modules)
        self._items = [
            dict(num_chs=channels, reduction=stride, index=index, module=module)
            for channels, stride, (index, module) in zip(
                backbone.out_channels, backbone.strides, backbone.output_modules.items(), strict=True
            )
        ]

    def __getitem__(self, index: Any) -> Any:
        return self._items[index]

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self._items)

    def channels(self, index: int | None = None) -> Any:
        """Return the channels of all maps, or of one."""
        return self._get('num_chs', index)

    def reduction(self, index: int | None = None) -> Any:
        """Return the strides of all maps, or of one."""
        return self._get('reduction', index)

    def module_name(self, index: int | None = None) -> Any:
        """Return the names of the modules that compute all maps, or one."""
        return self._get('module', index)

    def _get(self, key: str, index: int | None) -> Any:
        return [item[key] for item in self._items] if index is None else self._items[index][key]

    def __repr__(self) -> str:
        return f'FeatureInfo(channels={self.channels()}, reduction={self.reduction()})'


def list_backbones(pretrained: bool = False) -> list[str]:
    """Return the names that :func:`create_backbone` takes: family and arch.

    Args:
        pretrained: Only those whose weights the authors published, which ``create_backbone(name, pretrained=True)``
            downloads.
    """
    names = []
    for family, kind in _FAMILIES.items():
        archs = [*getattr(kind, 'ALIASES', {}), *kind.ARCHS]
        names += [
            f'{family}-{arch}'
            for arch in archs
            if not arch.startswith('test') and (not pretrained or published_classifier(kind, arch))
        ]
    return names


def create_backbone(
    name: str,
    pretrained: str | os.PathLike[str] | bool | None = None,
    *,
    out_indices: int | Sequence[int] | None = None,
    in_channels: int = 3,
    **options: Any,
) -> SSMBackbone:
    """Build a backbone by its name, optionally with weights from a checkpoint.

    Args:
        name: Family and arch, such as ``'vmamba-tiny'``, ``'v2m-hier-small'`` or ``'mamba2d-nano'``; see
            :func:`list_backbones`.
        pretrained: A checkpoint, path or URL: an official one, one of this package's tools (of the backbone, a
            classifier, a detector or a segmentor), or a state dict. True downloads the classifier that the authors
            published (see :func:`list_backbones`) once into ``torch.hub``'s folder. The stem of an official one is
            adapted to ``in_channels``.
        out_indices: Stages whose maps are returned; all of a hierarchical backbone, the last block of a plain one.
        in_channels: Channels of the images.
        options: Further arguments of the family's class, such as ``drop_path_rate``, ``frozen_stages``, ``with_cp``,
            and ``pyramid`` for a plain V2M.

    Returns:
        A module from floating-point images (B, in_channels, H, W), any H, W >= 1, to a tuple of maps
        (B, C_i, H_i, W_i). Its ``feature_info``, a :class:`FeatureInfo`, gives channels and strides.

    Raises:
        ValueError: If the name is unknown, an option is out of range, or ``pretrained`` is True and no weights were
            published.
        CheckpointError: If the checkpoint cannot be downloaded or read, or does not match. Without a network, the
            message says which file to put where.
    """
    family, _, arch = name.partition('-')
    if family not in _FAMILIES or not arch:
        known = list_backbones()
        raise ValueError(f'there is no backbone {name!r}{did_you_mean(name, known)}. Known: {", ".join(known)}')
    if out_indices is not None:
        options['out_indices'] = out_indices
    if pretrained is True:
        pretrained = published_classifier(_FAMILIES[family], arch)
        if pretrained is None:
            raise ValueError(
                f'pretrained=True: no weights of {name!r} were published, but of {", ".join(list_backbones(True))}. '
                'Give the path or URL of a checkpoint, or None to start from random weights.'
            )
    backbone: SSMBackbone = _FAMILIES[family](arch=arch, in_channels=in_channels, **options)
    if pretrained is not None and pretrained is not False:
        load_backbone(backbone, pretrained)
    backbone.feature_info = FeatureInfo(backbone)
    return backbone
