"""Mamba2D as a function of the official tensors, by their official names: the oracle of the conversion.

Written from the paper's equations (arXiv 2412.16146) and the layouts alone, pixel by pixel.
"""

import torch
from torch.nn import functional as F

HEAD_WIDTH = 32


def forward(tensors, images):
    """The four stages' maps, (B, C, H, W) each, with the norm that ends the stage.

    Args:
        tensors: official names to tensors, of the backbone.
        images: (B, 3, H, W).
    """
    x = F.conv2d(images, *_both(tensors, 'ds.stem.conv'), stride=4, padding=2).permute(0, 2, 3, 1)
    x = _norm(tensors, 'ds.stem.post_norm.norm', x)
    maps = []
    for s in range(4):
        if s:
            x = F.conv2d(x.permute(0, 3, 1, 2), *_both(tensors, f'ds.ds{s}.conv'), stride=2, padding=1)
            x = x.permute(0, 2, 3, 1)
        b = 0
        while f'stages.{s}.{b}.norm1.weight' in tensors:
            x = _block(tensors, f'stages.{s}.{b}', x, reverse=b % 2 == 1)
            b += 1
        x = _norm(tensors, f'stages.{s}.{b}', x)
        maps.append(x.permute(0, 3, 1, 2))
    return maps


def classify(tensors, images):
    """The logits, (B, classes), from a whole classification checkpoint."""
    prefix = 'backbone.'
    backbone = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    x = _norm(tensors, 'norm', forward(backbone, images)[-1].mean((2, 3)))
    x = F.gelu(F.linear(x, *_both(tensors, 'head.fc1')))
    return F.linear(_norm(tensors, 'head.norm', x), *_both(tensors, 'head.fc2'))


def _both(tensors, name):
    return tensors[f'{name}.weight'], tensors[f'{name}.bias']


def _norm(tensors, name, x):
    return F.layer_norm(x, x.shape[-1:], *_both(tensors, name))


def _block(tensors, name, x, reverse):
    mixer = _attention if f'{name}.token_mixer.qkv.weight' in tensors else _scan_mixer
    t = {
        key.removeprefix(f'{name}.token_mixer.'): value
        for key, value in tensors.items()
        if key.startswith(f'{name}.token_mixer.')
    }
    x = x * tensors[f'{name}.res_scale1.scale'] + mixer(t, _norm(tensors, f'{name}.norm1', x), reverse)
    hidden = F.gelu(F.linear(_norm(tensors, f'{name}.norm2', x), *_both(tensors, f'{name}.MLP.fc1')))
    return x * tensors[f'{name}.res_scale2.scale'] + F.linear(hidden, *_both(tensors, f'{name}.MLP.fc2'))


def _scan_mixer(t, x, reverse):
    u = F.gelu(F.linear(x, *_both(t, 'in_proj')))
    rank, states = t['dt_projT.weight'].shape[1], t['AT_log'].shape[1]
    step_top, step_left, B_top, B_left, C = (u @ t['x_proj.weight'].t()).split(
        [rank, rank, states, states, states], dim=-1
    )
    delta_top, delta_left = (
        F.softplus(F.linear(step, *_both(t, name))) for step, name in ((step_top, 'dt_projT'), (step_left, 'dt_projL'))
    )
    A_top, A_left = -t['AT_log'].exp(), -t['AL_log'].exp()
    _, height, width, _ = x.shape
    h = {}
    y = torch.empty_like(u)
    for i in range(height):
        for j in range(width):
            at = (slice(None), height - 1 - i, width - 1 - j) if reverse else (slice(None), i, j)
            from_top = (
                torch.exp(delta_top[at][..., None] * A_top),
                i - 1,
                j,
                (delta_top[at] * u[at])[..., None] * B_top[at][:, None],
            )
            from_left = (
                torch.exp(delta_left[at][..., None] * A_left),
                i,
                j - 1,
                (delta_left[at] * u[at])[..., None] * B_left[at][:, None],
            )
            # At the edges one neighbour alone counts, in the corner the left one's input.
            sides = [from_left] if i == 0 else [from_top] if j == 0 else [from_top, from_left]
            h[i, j] = sum(decay * h.get((a, b), 0) + entry for decay, a, b, entry in sides) / len(sides)
            y[at] = (h[i, j] * C[at][:, None]).sum(-1) + t['D'] * u[at]
    return F.linear(F.gelu(y), *_both(t, 'out_proj')) + _local_path(t, x)


def _local_path(t, x):
    def star_relu(name, value):
        return t[f'local_path.{name}.scale'] * F.relu(value) ** 2 + t[f'local_path.{name}.bias']

    x = star_relu('act1', _norm(t, 'local_norm', x) @ t['local_path.pwconv1.weight'].t()).permute(0, 3, 1, 2)
    x = F.conv2d(x, t['local_path.dwconv.weight'], padding=1, groups=x.shape[1]).permute(0, 2, 3, 1)
    return star_relu('act2', x) @ t['local_path.pwconv2.weight'].t()


def _attention(t, x, reverse):
    batch, height, width, channels = x.shape
    qkv = (x @ t['qkv.weight'].t()).view(batch, height * width, 3, channels // HEAD_WIDTH, HEAD_WIDTH)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    q, k = _norm(t, 'q_norm', _rotated(q, width)), _norm(t, 'k_norm', _rotated(k, width))
    weights = (q @ k.transpose(-1, -2) / HEAD_WIDTH**0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(x.shape) @ t['proj.weight'].t()


def _rotated(x, width):
    """Turn the pairs of each head's channels: the first half by the row, the second by the column."""
    turned = torch.empty_like(x)
    half = HEAD_WIDTH // 2
    for position in range(x.shape[2]):
        for start, index in ((0, position // width), (half, position % width)):
            for pair in range(half // 2):
                angle = torch.tensor(index * 10000 ** (-2 * pair / half), dtype=x.dtype)
                a, b = start + 2 * pair, start + 2 * pair + 1
                turned[:, :, position, a] = x[:, :, position, a] * angle.cos() - x[:, :, position, b] * angle.sin()
                turned[:, :, position, b] = x[:, :, position, a] * angle.sin() + x[:, :, position, b] * angle.cos()
    return turned
