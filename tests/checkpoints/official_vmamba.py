"""VMamba as a function of the official tensors, by their official names: the oracle of the conversion.

Written from the paper (arXiv 2401.10166) and the layouts alone, on channel-first maps as the authors' code runs.
"""

import torch
from torch.nn import functional as F

STAGES = 4


def forward(tensors, images):
    """The four stages' maps before any output norm, (B, C, H, W) each.

    Args:
        tensors: official names to tensors, without a prefix.
        images: (B, 3, H, W), H and W divisible by 32.
    """
    v2 = 'patch_embed.5.weight' in tensors
    x = F.conv2d(images, *_both(tensors, 'patch_embed.0'), stride=2 if v2 else 4, padding=1 if v2 else 0)
    x = norm(tensors, 'patch_embed.2', x)
    if v2:
        x = F.conv2d(F.gelu(x), *_both(tensors, 'patch_embed.5'), stride=2, padding=1)
        x = norm(tensors, 'patch_embed.7', x)
    maps = []
    for s in range(STAGES):
        b = 0
        while f'layers.{s}.blocks.{b}.norm.weight' in tensors:
            x = _block(tensors, f'layers.{s}.blocks.{b}', x)
            b += 1
        maps.append(x)
        down = f'layers.{s}.downsample'
        if s + 1 == STAGES:
            break
        if v2:
            x = F.conv2d(x, *_both(tensors, f'{down}.1'), stride=2, padding=1)
            x = norm(tensors, f'{down}.3', x)
        else:
            corners = [x[:, :, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
            x = norm(tensors, f'{down}.1', torch.cat(corners, dim=1))
            x = linear(x, tensors[f'{down}.2.weight'])
    return maps


def classify(tensors, images):
    """The logits, (B, classes)."""
    x = norm(tensors, 'classifier.norm', forward(tensors, images)[-1])
    return F.linear(x.mean((2, 3)), *_both(tensors, 'classifier.head'))


def norm(tensors, name, x):
    """LayerNorm over the channels of (B, C, H, W)."""
    return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], *_both(tensors, name)).permute(0, 3, 1, 2)


def linear(x, weight, bias=None):
    """A linear layer on the channels of (B, C, H, W)."""
    return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


def _both(tensors, name):
    return tensors[f'{name}.weight'], tensors[f'{name}.bias']


def _block(tensors, name, x):
    x = x + _ss2d(tensors, f'{name}.op', norm(tensors, f'{name}.norm', x))
    if f'{name}.mlp.fc1.weight' in tensors:
        hidden = F.gelu(linear(norm(tensors, f'{name}.norm2', x), *_both(tensors, f'{name}.mlp.fc1')))
        x = x + linear(hidden, *_both(tensors, f'{name}.mlp.fc2'))
    return x


def _ss2d(tensors, name, x):
    t = {key.removeprefix(f'{name}.'): value for key, value in tensors.items() if key.startswith(f'{name}.')}
    batch, _, height, width = x.shape
    x = linear(x, t['in_proj.weight'])
    inner = t['out_norm.weight'].shape[0]
    z = x[:, inner:] if x.shape[1] > inner else None
    x = F.silu(F.conv2d(x[:, :inner], t['conv2d.weight'], t.get('conv2d.bias'), padding=1, groups=inner))

    states = t['A_logs'].shape[1]
    x_proj = t['x_proj_weight'] if 'x_proj_weight' in t else t['x_proj.weight'].view(4, -1, inner)
    dt_proj = t['dt_projs_weight'] if 'dt_projs_weight' in t else t['dt_projs.weight'].view(4, inner, -1)
    A, D = -t['A_logs'].exp().view(4, inner, states), t['Ds'].view(4, inner)
    rows, columns = x.flatten(2), x.transpose(2, 3).flatten(2)
    y = torch.zeros_like(x)
    for k, route in enumerate([rows, columns, rows.flip(2), columns.flip(2)]):
        rank = dt_proj.shape[2]
        steps, B, C = (x_proj[k] @ route).split([rank, states, states], dim=1)
        delta = F.softplus(dt_proj[k] @ steps + t['dt_projs_bias'][k][:, None])
        h = x.new_zeros(batch, inner, states)
        out = []
        for i in range(height * width):
            h = torch.exp(delta[:, :, i, None] * A[k]) * h + (delta * route)[:, :, i, None] * B[:, None, :, i]
            out.append((h * C[:, None, :, i]).sum(2) + D[k] * route[:, :, i])
        result = torch.stack(out, dim=2)
        result = result.flip(2) if k > 1 else result
        y = y + (result.view(x.shape) if k % 2 == 0 else result.view(batch, inner, width, height).transpose(2, 3))
    y = norm(tensors, f'{name}.out_norm', y)
    return linear(y if z is None else y * F.silu(z), t['out_proj.weight'])
