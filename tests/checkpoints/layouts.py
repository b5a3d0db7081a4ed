"""The official checkpoints' names and shapes for any settings, written out as the authors' code lays them out.

test_layouts.py compares them with those of the published files.
"""

import math

import torch

VMAMBA = {
    'tiny-s1l8': dict(embed_dims=96, depths=[2, 2, 8, 2], ssm_ratio=1.0),
    'tiny-s2l5': dict(embed_dims=96, depths=[2, 2, 5, 2], ssm_ratio=2.0),
    'small-s2l15': dict(embed_dims=96, depths=[2, 2, 15, 2], ssm_ratio=2.0),
    'small-s1l20': dict(embed_dims=96, depths=[2, 2, 20, 2], ssm_ratio=1.0),
    'base-s2l15': dict(embed_dims=128, depths=[2, 2, 15, 2], ssm_ratio=2.0),
    'base-s1l20': dict(embed_dims=128, depths=[2, 2, 20, 2], ssm_ratio=1.0),
    'tiny-v0': dict(embed_dims=96, depths=[2, 2, 9, 2], version='v0'),
    'small-v0': dict(embed_dims=96, depths=[2, 2, 27, 2], version='v0'),
    'base-v0': dict(embed_dims=128, depths=[2, 2, 27, 2], version='v0'),
}

MAMBA2D = {
    'nano': dict(embed_dims=[32, 64, 160, 256], depths=[3, 3, 9, 3]),
    'tiny': dict(embed_dims=[64, 128, 320, 512], depths=[3, 3, 9, 3]),
    'small': dict(embed_dims=[96, 192, 384, 576], depths=[3, 12, 14, 3]),
}


def vmamba_backbone(embed_dims, depths, ssm_ratio=2.0, d_state=None, version='v2', in_channels=3):
    """VMamba's stem and stages, without any norm of outputs."""
    v2 = version == 'v2'
    states = d_state or (1 if v2 else 16)
    layout = {}

    def add(name, weight, bias=None):
        layout[f'{name}.weight'] = weight
        if bias is not None:
            layout[f'{name}.bias'] = [bias]

    if v2:
        half = embed_dims // 2
        add('patch_embed.0', [half, in_channels, 3, 3], half)
        add('patch_embed.2', [half], half)
        add('patch_embed.5', [embed_dims, half, 3, 3], embed_dims)
        add('patch_embed.7', [embed_dims], embed_dims)
    else:
        add('patch_embed.0', [embed_dims, in_channels, 4, 4], embed_dims)
        add('patch_embed.2', [embed_dims], embed_dims)
    for s, depth in enumerate(depths):
        width = embed_dims * 2**s
        inner, rank = int(ssm_ratio * width), math.ceil(width / 16)
        for b in range(depth):
            block = f'layers.{s}.blocks.{b}'
            op = f'{block}.op'
            add(f'{block}.norm', [width], width)
            layout[f'{op}.A_logs'] = [4 * inner, states]
            layout[f'{op}.Ds'] = [4 * inner]
            layout[f'{op}.dt_projs_bias'] = [4, inner]
            add(f'{op}.out_norm', [inner], inner)
            add(f'{op}.in_proj', [inner if v2 else 2 * inner, width])
            add(f'{op}.conv2d', [inner, 1, 3, 3], None if v2 else inner)
            layout[f'{op}.x_proj_weight'] = [4, rank + 2 * states, inner]
            layout[f'{op}.dt_projs_weight'] = [4, inner, rank]
            add(f'{op}.out_proj', [width, inner])
            if v2:
                add(f'{block}.norm2', [width], width)
                add(f'{block}.mlp.fc1', [4 * width, width], 4 * width)
                add(f'{block}.mlp.fc2', [width, 4 * width], width)
        if s + 1 == len(depths):
            break
        if v2:
            add(f'layers.{s}.downsample.1', [2 * width, width, 3, 3], 2 * width)
            add(f'layers.{s}.downsample.3', [2 * width], 2 * width)
        else:
            add(f'layers.{s}.downsample.1', [4 * width], 4 * width)
            add(f'layers.{s}.downsample.2', [2 * width, 4 * width])
    return layout


def vmamba_classifier(*, embed_dims, depths, num_classes=1000, **options):
    """What the authors' classification checkpoints hold."""
    width = embed_dims * 2 ** (len(depths) - 1)
    return {
        **vmamba_backbone(embed_dims, depths, **options),
        'classifier.norm.weight': [width],
        'classifier.norm.bias': [width],
        'classifier.head.weight': [num_classes, width],
        'classifier.head.bias': [num_classes],
    }


def vmamba_pyramid(*, embed_dims, depths, out_indices=(0, 1, 2, 3), **options):
    """The backbone in the authors' detectors and segmentors: no classifier, a norm for each output."""
    layout = vmamba_backbone(embed_dims, depths, **options)
    for i in out_indices:
        layout[f'outnorm{i}.weight'] = layout[f'outnorm{i}.bias'] = [embed_dims * 2**i]
    return layout


def mamba2d_backbone(embed_dims, depths, d_state=16, head_width=32, in_channels=3):
    """Mamba2D's backbone; scans in the first two stages, attention in the last two."""
    layout = {}

    def add(name, weight, bias=None):
        layout[f'{name}.weight'] = weight
        if bias is not None:
            layout[f'{name}.bias'] = [bias]

    add('ds.stem.conv', [embed_dims[0], in_channels, 7, 7], embed_dims[0])
    add('ds.stem.post_norm.norm', [embed_dims[0]], embed_dims[0])
    for s in (1, 2, 3):
        add(f'ds.ds{s}.conv', [embed_dims[s], embed_dims[s - 1], 3, 3], embed_dims[s])
    for s, (width, depth) in enumerate(zip(embed_dims, depths, strict=True)):
        rank = math.ceil(width / 16)
        for b in range(depth):
            block = f'stages.{s}.{b}'
            mixer = f'{block}.token_mixer'
            add(f'{block}.norm1', [width], width)
            if s < 2:
                layout[f'{mixer}.AT_log'] = layout[f'{mixer}.AL_log'] = [width, d_state]
                layout[f'{mixer}.D'] = [width]
                add(f'{mixer}.local_norm', [width], width)
                add(f'{mixer}.local_path.pwconv1', [2 * width, width])
                add(f'{mixer}.local_path.dwconv', [2 * width, 1, 3, 3])
                add(f'{mixer}.local_path.pwconv2', [width, 2 * width])
                for act in ('act1', 'act2'):
                    layout[f'{mixer}.local_path.{act}.scale'] = layout[f'{mixer}.local_path.{act}.bias'] = [1]
                add(f'{mixer}.in_proj', [width, width], width)
                add(f'{mixer}.x_proj', [2 * rank + 3 * d_state, width])
                add(f'{mixer}.dt_projT', [width, rank], width)
                add(f'{mixer}.dt_projL', [width, rank], width)
                add(f'{mixer}.out_proj', [width, width], width)
            else:
                add(f'{mixer}.qkv', [3 * width, width])
                add(f'{mixer}.proj', [width, width])
                add(f'{mixer}.q_norm', [head_width], head_width)
                add(f'{mixer}.k_norm', [head_width], head_width)
            layout[f'{block}.res_scale1.scale'] = layout[f'{block}.res_scale2.scale'] = [width]
            add(f'{block}.norm2', [width], width)
            add(f'{block}.MLP.fc1', [4 * width, width], 4 * width)
            add(f'{block}.MLP.fc2', [width, 4 * width], width)
        add(f'stages.{s}.{depth}', [width], width)
    return layout


def mamba2d_classifier(*, embed_dims, num_classes=1000, **options):
    """What the authors' classification checkpoints hold."""
    width = embed_dims[-1]
    layout = {f'backbone.{name}': shape for name, shape in mamba2d_backbone(embed_dims, **options).items()}
    for name, shape, bias in [
        ('norm', [width], width),
        ('head.fc1', [4 * width, width], 4 * width),
        ('head.norm', [4 * width], 4 * width),
        ('head.fc2', [num_classes, 4 * width], num_classes),
    ]:
        layout[f'{name}.weight'], layout[f'{name}.bias'] = shape, [bias]
    return layout


def random_tensors(layout, dtype=torch.float32):
    """A tensor of numbers around zero for each name."""
    return {name: torch.randn(shape, dtype=dtype) for name, shape in layout.items()}


def marked_tensors(layout, start=0.0):
    """A tensor for each name, filled with a number of its own, which takes the memory of a single one."""
    return {name: torch.full((), start + i).expand(shape) for i, (name, shape) in enumerate(layout.items())}
