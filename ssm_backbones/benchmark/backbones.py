"""Backbones to compare, and the calls to measure."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_backbones import backbones
from ssm_backbones.benchmark.timing import Call
from ssm_backbones.benchmark.unavailable import Unavailable

# Each returns one map, the last: of stride 32, and of stride 16 where the model is a plain one.
BACKBONES: dict[str, dict[str, Any]] = {
    'vmamba-tiny': dict(type='VMamba', arch='tiny', out_indices=(3,)),
    'vmamba-tiny-s2l5': dict(type='VMamba', arch='tiny-s2l5', out_indices=(3,)),
    'vmamba-tiny-v0': dict(type='VMamba', arch='tiny-v0', out_indices=(3,)),
    'mamba2d-tiny': dict(type='Mamba2D', arch='tiny', out_indices=(3,)),
    'v2m-hier-small': dict(type='V2M', arch='hier-small', out_indices=(3,)),
    # Of a plain V2M out_indices would count blocks; without any it returns the last one's map, as DeiT does.
    'v2m-tiny': dict(type='V2M', arch='tiny'),
    'swin-tiny': dict(type='mmpretrain.SwinTransformer', arch='tiny', img_size=224, drop_path_rate=0.0),
    'convnext-tiny': dict(type='mmpretrain.ConvNeXt', arch='tiny', drop_path_rate=0.0),
    'convnext-tiny-timm': dict(
        type='mmpretrain.TIMMBackbone', model_name='convnext_tiny', features_only=True, out_indices=(3,)
    ),
    'mambaout-tiny': dict(
        type='mmpretrain.TIMMBackbone', model_name='mambaout_tiny', features_only=True, out_indices=(3,)
    ),
    'deit-tiny': dict(
        type='mmpretrain.VisionTransformer',
        arch='deit-tiny',
        img_size=224,
        patch_size=16,
        out_type='featmap',
        drop_path_rate=0.0,
    ),
}


def build_backbone(name: str, device: torch.device) -> nn.Module:
    """Build an entry of :data:`BACKBONES`; one of a host library makes that library register its models first.

    Raises:
        Unavailable: If the host library, or timm for one of timm's in it, is not installed.
    """
    config = BACKBONES[name]
    library, _, kind = config['type'].rpartition('.')
    for module in (*([f'{library}.models'] if library else []), *(['timm'] if kind == 'TIMMBackbone' else [])):
        try:
            importlib.import_module(module)
        except ImportError as error:
            package = module.partition('.')[0]
            raise Unavailable(f"{name} is {package}'s, which cannot be imported: {error}") from error
    if not library:
        options = {key: value for key, value in config.items() if key != 'type'}
        return getattr(backbones, config['type'])(**options).to(device)
    from mmengine.registry import MODELS

    return MODELS.build(dict(config)).to(device)


def backbone_call(
    name: str,
    batch: int,
    size: int,
    train: bool,
    device: torch.device,
    *,
    amp: bool = False,
    channels_last: bool = False,
    change: Callable[[nn.Module], None] | None = None,
) -> Call:
    """Prepare the forward pass of a backbone on random square images, or forward and backward with ``train``.

    Args:
        name: Key of :data:`BACKBONES`.
        batch: Batch size.
        size: Side of the images.
        train: Forward in training mode, and backward from the sum of the last map.
        device: Device to compute on.
        amp: Compute in bfloat16 autocast.
        channels_last: Images and weights in PyTorch's channels-last layout.
        change: Function that modifies the model before its use.
    """
    torch.manual_seed(0)
    model = build_backbone(name, device)
    if change is not None:
        change(model)
    model.train(train)
    images = torch.randn(batch, 3, size, size, device=device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.to(memory_format=torch.channels_last)

    def autocast() -> Any:
        return torch.autocast(device.type, torch.bfloat16) if amp else nullcontext()

    def forward() -> None:
        with torch.inference_mode(), autocast():
            model(images)

    def forward_and_backward() -> None:
        model.zero_grad(set_to_none=True)
        with autocast():
            loss = model(images)[-1].float().sum()
        loss.backward()

    return forward_and_backward if train else forward


def warm_backbone_call(name: str, size: int, device: torch.device) -> Call:
    """Prepare the forward pass of one image, after one of a small image for one-time allocations."""
    backbone_call(name, 1, 64, False, device)()
    return backbone_call(name, 1, size, False, device)


def use_fused_attention(model: nn.Module) -> None:
    """Let mmpretrain's Swin compute its attention by torch's ``scaled_dot_product_attention``, as its ViT does."""
    for module in model.modules():
        if type(module).__name__ == 'WindowMSA':
            module.forward = MethodType(_fused_window_attention, module)


def _fused_window_attention(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute ``WindowMSA.forward`` on tokens (windows of all images, positions, channels)."""
    windows, positions, channels = x.shape
    q, k, v = self.qkv(x).view(windows, positions, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
    bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
    bias = bias.view(1, positions, positions, self.num_heads).permute(0, 3, 1, 2)
    if mask is not None:
        bias = (bias + mask.unsqueeze(1)).repeat(windows // mask.shape[0], 1, 1, 1)
    dropout = self.attn_drop.p if self.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), dropout_p=dropout, scale=self.scale)
    return self.proj_drop(self.proj(out.transpose(1, 2).reshape(windows, positions, channels)))
