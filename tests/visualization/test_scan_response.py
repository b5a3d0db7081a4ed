"""Responses through the scans: the weights are those of the recurrences, and add up to what the models compute."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ssm_backbones import V2M, create_backbone
from ssm_backbones.layers.calls import apply_causal_conv, apply_conv
from ssm_backbones.visualization import ScanResponse, scan_response
from ssm_backbones.visualization.scan_response import default_scan_stage, scan_paths, scan_stages
from ssm_backbones.visualization.stages import runs_of

FAMILIES = ('vmamba-test', 'v2m-test', 'v2m-test-hier', 'mamba2d-test')


def lively(name: str, **options) -> nn.Module:
    """A model in float64 with weights that are all in play, steps of different sizes among them."""
    model = create_backbone(name, **options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def respond(model: nn.Module, image: torch.Tensor, point: tuple[int, int], sense: str = 'reads') -> ScanResponse:
    """The response of a pixel of the map."""
    stride = model.stage_strides[default_scan_stage(model)]
    found = scan_response(model, image, pixel=(stride * point[0] + stride - 1, stride * point[1]), sense=sense)
    assert found.point == point
    return found


def run(name: str, height: int, width: int):
    """A model's mixer, its input, and what runs within it."""
    model = lively(name)
    stage = default_scan_stage(model)
    mixer = model.stages[stage].blocks[-1].mixer
    size = model.stage_strides[stage]
    image = torch.randn(1, 3, height * size, width * size, dtype=torch.float64)
    modules = {'mixer': mixer, 'out_proj': mixer.out_proj}
    if hasattr(mixer, 'norm'):
        modules['norm'] = mixer.norm
    with torch.no_grad():
        runs = runs_of(model, image, modules)
    return model, image, mixer, runs


@pytest.mark.parametrize('name', FAMILIES)
def test_paths_add_up_to_what_the_model_computes(name: str) -> None:
    """With the input that the scan had, the paths give what the mixer hands on."""
    _, _, mixer, runs = run(name, 4, 5)
    x = runs['mixer'].given
    with torch.no_grad():
        paths, channels = scan_paths(mixer, x)
        if name == 'vmamba-test':
            u = F.silu(apply_conv(mixer.conv, mixer.in_proj(x)))
            expected = runs['norm'].given
        elif name == 'mamba2d-test':
            # The inverse of what follows the scan is not needed where what follows is applied.
            u = F.gelu(mixer.in_proj(x))
            whole = sum(path(u) for path in paths.values())
            torch.testing.assert_close(F.gelu(whole), runs['out_proj'].given)
            return
        elif name == 'v2m-test-hier':
            entered, _ = mixer.project_in(x)
            u = F.silu(apply_conv(mixer.conv, entered))
            expected = 2 * runs['norm'].given
        else:
            # A bias of the convolution between the scans is no part of any weight.
            mixer.column_conv.bias.zero_()
            paths, channels = scan_paths(mixer, x)
            entered, gate = mixer.project_in(x)
            right = {name: 'right' in name for name in paths}
            inputs = {name: F.silu(apply_causal_conv(mixer.row_conv, entered, 'row', right[name])) for name in paths}
            whole = sum(path(inputs[name]) for name, path in paths.items())
            torch.testing.assert_close(F.linear(whole * gate, 0.5 * mixer.out_proj.weight), mixer(x))
            return
        whole = sum(path(u) for path in paths.values())
    assert channels == u.shape[3]
    torch.testing.assert_close(whole, expected)


@pytest.mark.parametrize('name', FAMILIES)
def test_paths_are_linear_in_each_channel_alone(name: str) -> None:
    _, _, mixer, runs = run(name, 3, 4)
    with torch.no_grad():
        paths, channels = scan_paths(mixer, runs['mixer'].given)
        u, v = torch.randn(2, *runs['mixer'].given.shape[:3], channels, dtype=torch.float64)[:, :1]
        for path in paths.values():
            torch.testing.assert_close(path(2 * u - 3 * v), 2 * path(u) - 3 * path(v))
            u[..., 0] = 0
            assert path(u)[..., 0].abs().max() == 0


@pytest.mark.parametrize('sense', ['reads', 'feeds'])
def test_vmamba_by_the_formula(sense: str) -> None:
    """SS2D's weights, written out along every route: C^T (product of decays behind q up to p) d B."""
    model, image, mixer, runs = run('vmamba-test', 3, 4)
    found = respond(model, image, (1, 2), sense=sense)
    height, width = found.total.shape
    assert (height, width) == (3, 4)
    with torch.no_grad():
        u = F.silu(apply_conv(mixer.conv, mixer.in_proj(runs['mixer'].given)))[0]
        steps, B, C = mixer.x_proj(u).unflatten(-1, (4, -1)).split((mixer.dt_rank, mixer.d_state, mixer.d_state), -1)
        delta = F.softplus(torch.einsum('hwkr,ker->hwke', steps, mixer.dt_weight) + mixer.dt_bias)
        A = mixer.A.double()
    grid = [(i, j) for i in range(height) for j in range(width)]
    by_columns = [(i, j) for j in range(width) for i in range(height)]
    total = torch.zeros(height, width, u.shape[2], dtype=torch.float64)
    for k, order in enumerate((grid, by_columns, grid[::-1], by_columns[::-1])):
        expected = torch.zeros_like(total)
        for other in grid:
            p, q = ((1, 2), other) if sense == 'reads' else (other, (1, 2))
            first, last = order.index(q), order.index(p)
            if first > last:
                continue
            decay = torch.ones_like(A[k])
            for place in order[first + 1 : last + 1]:
                decay = decay * torch.exp(delta[place][k][:, None] * A[k])
            expected[other] = (C[p][k] * decay * B[q][k]).sum(1) * delta[q][k] + (mixer.D[k] if p == q else 0)
        np.testing.assert_allclose(found.paths[k], expected.abs().sum(2).detach(), rtol=1e-6, atol=1e-12)
        total += expected.detach()
    np.testing.assert_allclose(found.total, total.abs().sum(2), rtol=1e-6)


def test_mamba2d_by_the_recurrence() -> None:
    """The wavefront's weights, by running the two-neighbour recurrence on an impulse."""
    model, image, mixer, runs = run('mamba2d-test', 3, 4)
    found = respond(model, image, (1, 1), sense='feeds')
    with torch.no_grad():
        u = F.gelu(mixer.in_proj(runs['mixer'].given))[0]
        steps = mixer.x_proj(u).split((mixer.dt_rank, mixer.dt_rank, *[mixer.d_state] * 3), -1)
        top, left = mixer.top.delta(steps[0][None])[0], mixer.left.delta(steps[1][None])[0]
        AT, AL = mixer.top.A.double(), mixer.left.A.double()
        BT, BL, C = steps[2:]
        place, sign = (1, 1), -1 if mixer.reverse else 1
        h: dict[tuple[int, int], torch.Tensor] = {}
        expected = np.zeros((3, 4))
        for i in range(3)[::sign]:
            for j in range(4)[::sign]:
                x = float((i, j) == place)
                parts = []
                for before, d, A, B in (((i, j - sign), left, AL, BL), ((i - sign, j), top, AT, BT)):
                    decay = torch.exp(d[i, j][:, None] * A) * h[before] if before in h else 0
                    parts.append((before in h, decay + d[i, j][:, None] * B[i, j] * x))
                (has_left, from_left), (has_top, from_top) = parts
                h[i, j] = 0.5 * (from_left + from_top) if has_left and has_top else from_top if has_top else from_left
                expected[i, j] = float(((C[i, j] * h[i, j]).sum(1) + mixer.D * x).abs().sum())
    np.testing.assert_allclose(found.total, expected, rtol=1e-6)
    assert found.names == ('from the lower right' if mixer.reverse else 'from the upper left',)


@pytest.mark.parametrize('name', FAMILIES)
def test_paths_reach_what_they_should(name: str) -> None:
    """A corner fills its quadrant, a route all that it visits before; feeding is the other way round."""
    model = lively(name)
    image = (
        torch.randn(3, 96, 112, dtype=torch.float64)
        if name == 'v2m-test'
        else torch.randn(3, 40, 48, dtype=torch.float64)
    )
    reads = respond(model, image, (2, 3))
    height, width = reads.total.shape
    rows, columns = np.mgrid[:height, :width]
    up, down, left, right = rows <= 2, rows >= 2, columns <= 3, columns >= 3
    regions = {
        'from the upper left': up & left,
        'from the upper right': up & right,
        'from the lower left': down & left,
        'from the lower right': down & right,
        'row by row': (rows < 2) | (rows == 2) & left,
        'row by row, reversed': (rows > 2) | (rows == 2) & right,
        'column by column': (columns < 3) | (columns == 3) & up,
        'column by column, reversed': (columns > 3) | (columns == 3) & down,
    }
    assert len(reads.names) == (1 if name == 'mamba2d-test' else 4)
    feeds = respond(model, image, (2, 3), sense='feeds')
    for number, path in enumerate(reads.names):
        assert ((reads.paths[number] > 0) == regions[path]).all()
        turned = {'upper': 'lower', 'lower': 'upper', 'left': 'right', 'right': 'left'}
        behind = ' '.join(turned.get(word, word) for word in path.split())
        if 'by' in path:
            behind = path.removesuffix(', reversed') if 'reversed' in path else f'{path}, reversed'
        assert ((feeds.paths[number] > 0) == regions[behind]).all()
    # What one pixel reads of another is what the other feeds to it.
    back = respond(model, image, (1, 1), sense='feeds')
    np.testing.assert_allclose(back.paths[:, 2, 3], reads.paths[:, 1, 1], rtol=1e-6)
    assert (reads.total <= reads.paths.sum(0) * (1 + 1e-9)).all() and (reads.total > 0).any()


@pytest.mark.parametrize('cls_token', ['corner', 'center'])
def test_class_tokens_are_no_pixels(cls_token: str) -> None:
    model = V2M(arch='test', img_size=64, cls_token=cls_token).eval()
    found = respond(model, torch.randn(3, 64, 80), (0, 0))
    assert found.total.shape == (4, 5)
    # Only the corner lies before the first patch, and the tokens are not shown.
    only = np.zeros((4, 5), bool)
    only[0, 0] = True
    assert ((found.paths[found.names.index('from the upper left')] > 0) == only).all()


def test_stages_blocks_and_points_that_do_not_exist() -> None:
    model = create_backbone('mamba2d-test')
    image = torch.randn(3, 64, 64)
    attention = next(i for i in range(4) if i not in scan_stages(model))
    for options, message in (
        (dict(stage=9), r'stage 9 does not exist: the Mamba2D that was built has stages 0 to 3'),
        (dict(block=7), r'block 7 does not exist: stage 1 has'),
        (dict(stage=attention), 'mixes by RotaryAttention, which has no scan; stages that scan: 0, 1'),
        (dict(pixel=(64, 0)), 'row 64, column 0 lie outside the image as .*, which has 64 rows and 64 columns'),
        (dict(pixel=(-1, 0)), 'lie outside'),
        (dict(sense='smells'), "sense is one of reads, feeds, got 'smells'"),
    ):
        with pytest.raises(ValueError, match=message):
            scan_response(model, image, **options)
    with pytest.raises(ValueError, match='not finite'):
        scan_response(model, image * torch.inf)
    with pytest.raises(ValueError, match='expected one image'):
        scan_response(model, image.expand(2, 3, 64, 64))
