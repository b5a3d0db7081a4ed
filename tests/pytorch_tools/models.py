"""A small model of each family for the tests of PyTorch's tools."""

import torch
from torch import nn

from ssm_backbones import V2M, Mamba2D, VMamba

FAMILIES = {
    'vmamba': (VMamba, dict(embed_dims=32, depths=[1, 1], d_state=1, ssm_ratio=1.0, version='v2')),
    'vmamba-v0': (VMamba, dict(embed_dims=32, depths=[1, 1], d_state=4, ssm_ratio=2.0, version='v0')),
    'v2m-plain': (V2M, dict(layout='plain', embed_dims=32, depth=2, d_state=2)),
    'v2m-hier': (V2M, dict(layout='hierarchical', embed_dims=32, depths=[1, 1], d_state=2, ssm_ratio=1.0)),
    'mamba2d': (Mamba2D, dict(embed_dims=[32, 32], depths=[2, 1], d_state=2, mixers=['scan', 'attention'])),
}
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)


def build(name, seed=0, **options):
    torch.manual_seed(seed)
    family, arch = FAMILIES[name]
    return family(arch, **(dict(out_indices=(0, 1)) | options))


def images(height=48, width=40):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(3))


def loss(model):
    # The gradient of a mean of squares behind a norm would vanish.
    return sum((m * m.detach().cos()).mean() for m in model(images()))


def layers(model):
    """Every projection and convolution, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}


def blocks(model):
    return [block for stage in model.stages for block in stage.blocks]
