"""What all backbones share, shown on the smallest VMamba."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import BaseTorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ssm_backbones import VMamba
from ssm_backbones.backbones.base import drop_path_schedule, resolve_arch, resolve_out_indices
from ssm_backbones.layers import calls
from ssm_backbones.layers.calls import apply_conv, apply_linear, apply_linear_gelu, conv2d
from ssm_backbones.layers.common import MLP, PatchEmbed, PatchMerging, Residual


@pytest.mark.parametrize(
    ('given', 'expected'),
    [
        ((0, 1, 2, 3), (0, 1, 2, 3)),
        ([3, 1], (3, 1)),
        ((-1, 0), (3, 0)),
        (-1, (3,)),
        (2, (2,)),
        ((np.int64(1),), (1,)),
    ],
)
def test_out_indices_keep_their_order_and_count_from_the_end(given, expected):
    assert resolve_out_indices(given, 4) == expected


@pytest.mark.parametrize(
    ('given', 'error', 'message'),
    [
        ((0, 4), ValueError, 'out_indices must be between -4 and 3, got 4'),
        (-5, ValueError, 'got -5'),
        ((3, -1), ValueError, r'names a stage twice: \(3, -1\)'),
        ((), ValueError, 'empty'),
        ((0.0,), TypeError, 'got 0.0'),
        ((True,), TypeError, 'got True'),
        ('0', TypeError, "got '0'"),
        (None, TypeError, 'got None'),
    ],
)
def test_wrong_out_indices_are_named(given, error, message):
    with pytest.raises(error, match=message):
        resolve_out_indices(given, 4)


@pytest.mark.parametrize(
    ('arch', 'error', 'message'),
    [
        ('larg', ValueError, r"Thing has no arch 'larg' \(did you mean 'large'\?\). Known: big, large; or pass a dict"),
        ('xyz', ValueError, "Thing has no arch 'xyz'. Known"),
        (dict(width=1), ValueError, 'lacks height'),
        (dict(width=1, height=2, depth=3), ValueError, 'has unknown depth; its keys are width, height'),
        (dict(width=1, depth=3), ValueError, 'lacks height and has unknown depth'),
        (7, TypeError, 'a name or a dict, got int: 7'),
    ],
)
def test_wrong_archs_are_named(arch, error, message):
    with pytest.raises(error, match=message):
        resolve_arch('Thing', arch, {'large': dict(width=1, height=2)}, {'big': 'large'}, ('width', 'height'))


def test_arch_settings_are_copies():
    table = {'large': dict(width=1)}
    resolve_arch('Thing', 'large', table, {}, ('width',))['width'] = 5
    assert table == {'large': dict(width=1)}


def test_drop_path_rises_linearly_over_all_blocks():
    assert drop_path_schedule(0.4, [2, 1, 2]) == [
        pytest.approx([0, 0.1]),
        pytest.approx([0.2]),
        pytest.approx([0.3, 0.4]),
    ]
    assert drop_path_schedule(0.4, [1]) == [[0.0]]
    for rate in (1.0, -0.1):
        with pytest.raises(ValueError, match=f'drop_path_rate must lie in .* got {rate}'):
            drop_path_schedule(rate, [2])
    model = VMamba('test', drop_path_rate=0.4)
    assert [block.residual.drop_prob for stage in model.stages for block in stage.blocks] == pytest.approx(
        [0, 0.1, 0.2, 0.3, 0.4]
    )


def test_residual_drops_whole_samples_and_keeps_the_mean():
    residual = Residual(0.25)
    x, branch = torch.randn(4000, 1, 2, 3), torch.ones(4000, 1, 2, 3)
    added = residual(x, branch) - x
    kept = added.flatten(1).mean(1) > 0.5
    torch.testing.assert_close(added[kept], branch[kept] / 0.75)
    assert (added[~kept] == 0).all()
    assert abs(kept.float().mean().item() - 0.75) < 0.03
    assert torch.equal(residual.eval()(x, branch), x + branch)


def test_drop_path_follows_the_seed():
    model = VMamba('test', out_indices=3, drop_path_rate=0.5)
    x = torch.randn(8, 3, 32, 32)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(x)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('size', [(3, 4), (1, 1), (1, 5), (5, 1)])
@pytest.mark.parametrize('is_blas_tuned', [True, False])
def test_pointwise_layers_are_linear_layers(is_blas_tuned, dtype, size, monkeypatch):
    monkeypatch.setattr(calls, '_IS_BLAS_TUNED', is_blas_tuned)
    layer = nn.Linear(6, 5).to(dtype)
    x = torch.randn(2, *size, 6, dtype=dtype)
    grad = torch.randn(2, *size, 5, dtype=dtype)
    results = []
    for function in (apply_linear, nn.Linear.__call__):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = function(layer, leaf)
        assert y.is_contiguous()
        y.backward(grad)
        results.append([y, leaf.grad, layer.weight.grad, layer.bias.grad])
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize('is_blas_tuned', [True, False])
def test_gelu_overwrites_what_nobody_else_reads(is_blas_tuned, monkeypatch):
    monkeypatch.setattr(calls, '_IS_BLAS_TUNED', is_blas_tuned)
    count = []
    in_place = calls._GELU_IN_PLACE
    monkeypatch.setattr(calls, '_GELU_IN_PLACE', lambda y: count.append(1) or in_place(y))
    layer, x = nn.Linear(6, 5), torch.randn(2, 3, 4, 6)
    linear = F.linear(x, layer.weight, layer.bias).detach()
    expected = F.gelu(linear)

    def check(overwrites):
        count.clear()
        before = x.clone()
        torch.testing.assert_close(apply_linear_gelu(layer, x), expected)
        assert bool(count) == overwrites
        assert torch.equal(x, before)

    check(overwrites=False)  # gradients are recorded
    with torch.inference_mode():
        check(overwrites=True)
    with torch.no_grad():
        check(overwrites=True)
        seen = []
        with layer.register_forward_hook(lambda _layer, _given, output: seen.append(output)):
            check(overwrites=False)
        # A hook that is gone once it was called.
        once = layer.register_forward_hook(lambda _layer, _given, output: (seen.append(output), once.remove()) and None)
        check(overwrites=False)
        assert len(seen) == 2
        for output in seen:
            torch.testing.assert_close(output, linear)
        for mode in (FlopCounterMode(display=False), BaseTorchFunctionMode()):
            with mode:
                check(overwrites=False)
        mapped = torch.func.vmap(lambda each: apply_linear_gelu(layer, each))
        torch.testing.assert_close(mapped(x[None])[0], expected)
        monkeypatch.setattr(F, 'gelu', lambda y: y)
        expected = linear
        check(overwrites=False)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('is_blas_tuned', [True, False])
def test_large_hidden_maps_are_made_in_parts_where_nobody_sees_them(is_blas_tuned, dtype, monkeypatch):
    monkeypatch.setattr(calls, '_IS_BLAS_TUNED', is_blas_tuned)
    layer, x = MLP(6, 16).to(dtype), torch.randn(2, 3, 7, 6).to(dtype)
    row = 16 * dtype.itemsize
    expected = layer(x).detach()
    hidden = []
    gelu = calls.apply_linear_gelu
    monkeypatch.setattr(calls, 'apply_linear_gelu', lambda *given: hidden.append(gelu(*given)) or hidden[-1])

    def pixels():
        hidden.clear()
        y = layer(x)
        assert y.is_contiguous()
        torch.testing.assert_close(y, expected)
        return [each[..., 0].numel() for each in hidden]

    with torch.no_grad():
        monkeypatch.setattr(calls, '_WHOLE_BYTES', 42 * row)
        monkeypatch.setattr(calls, '_PART_BYTES', 12 * row)
        assert pixels() == [42]
        monkeypatch.setattr(calls, '_WHOLE_BYTES', 42 * row - 1)
        assert pixels() == [12, 12, 12, 6]
        monkeypatch.setattr(calls, '_PART_BYTES', 1)
        assert pixels() == [1] * 42
        for linear in (layer.fc1, layer.fc2):
            with linear.register_forward_hook(lambda *_: None):
                assert pixels() == [42]
        with FlopCounterMode(display=False):
            assert pixels() == [42]
        subclass = x.as_subclass(type('Watched', (torch.Tensor,), {}))
        hidden.clear()
        layer(subclass)
        assert len(hidden) == 1
        for other in (x[:0], x.mT.contiguous().mT, x.flatten(1, 2), x.flatten(0, 2)):
            assert layer(other).shape == other.shape
    assert pixels() == [42]


@pytest.mark.parametrize('size', [(6, 7), (1, 1), (1, 5)])
def test_channel_last_convolution(size):
    layer = conv2d(4, 6, 3, stride=2, padding=1)
    assert layer.weight.is_contiguous()
    x = torch.randn(2, 4, *size)
    y = apply_conv(layer, x.permute(0, 2, 3, 1).contiguous())
    assert y.is_contiguous()
    torch.testing.assert_close(y.permute(0, 3, 1, 2), layer(x))


def test_patch_merging_takes_the_neighbours_in_order_and_fills_odd_sides_with_zeros():
    layer = PatchMerging(2, 3)
    layer.norm = nn.Identity()
    layer.reduction = nn.Identity()
    x = torch.randn(1, 3, 5, 2)
    y = layer(x)
    assert y.shape == (1, 2, 3, 8)
    for i in range(2):
        for j in range(3):
            for n, (row, column) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
                p, q = 2 * i + row, 2 * j + column
                expected = x[0, p, q] if p < 3 and q < 5 else torch.zeros(2)
                assert torch.equal(y[0, i, j, 2 * n : 2 * n + 2], expected)


def test_patch_embedding_fills_incomplete_patches_with_zeros():
    layer = PatchEmbed(3, 8, patch_size=4)
    x = torch.randn(1, 3, 5, 8)
    assert layer(x).shape == (1, 2, 2, 8)
    torch.testing.assert_close(layer(x), layer(F.pad(x, (0, 0, 0, 3))))
    torch.testing.assert_close(layer(x)[:, :1], layer(x[:, :, :4]))


def test_norm_eval_keeps_batch_norms_in_evaluation_mode():
    class WithBatchNorm(VMamba):
        def build_output_norm(self, stage):
            return nn.Sequential(nn.Identity(), nn.BatchNorm2d(self.num_features[stage]))

    for norm_eval in (False, True):
        model = WithBatchNorm('test', norm_eval=norm_eval).train()
        assert model.norm0[1].training != norm_eval
        assert model.training and model.stages[0].training


def test_a_subclass_that_forgets_its_output_norms_is_told():
    class Forgetful(VMamba):
        def _init_output_norms(self):
            pass

    with pytest.raises(RuntimeError, match=r'Forgetful has no norm0: its constructor has to end with self\._init_out'):
        Forgetful('test')(torch.zeros(1, 3, 32, 32))


def test_layer_depth_counts_blocks_as_mmpretrain_does():
    model = VMamba('test')
    depth = model.get_layer_depth
    assert depth('backbone.patch_embed.first.conv.weight', 'backbone.') == (0, 7)
    assert depth('backbone.stages.0.blocks.0.mixer.A_log', 'backbone.') == (1, 7)
    assert depth('backbone.stages.0.downsample.conv.weight', 'backbone.') == (1, 7)
    assert depth('backbone.stages.2.blocks.1.mlp.fc1.bias', 'backbone.') == (4, 7)
    assert depth('backbone.stages.2.downsample.norm.bias', 'backbone.') == (4, 7)
    assert depth('backbone.stages.3.blocks.0.norm1.weight', 'backbone.') == (5, 7)
    assert depth('backbone.norm0.weight', 'backbone.') == (6, 7)
    assert depth('head.fc.weight', 'backbone.') == (6, 7)
    assert depth('stages.1.blocks.0.norm1.weight') == (2, 7)
    assert {depth(name)[0] for name, _ in model.named_parameters()} == set(range(7))


def test_layer_depth_agrees_with_mmpretrains_swin():
    from mmpretrain.models import SwinTransformer

    swin = SwinTransformer(arch=dict(embed_dims=8, depths=[1, 1, 2, 1], num_heads=[1, 1, 1, 1]), img_size=32)
    ours = VMamba('test')
    pairs = [
        ('patch_embed.norm.bias', 'patch_embed.second.norm.bias'),
        ('stages.2.blocks.1.norm1.bias', 'stages.2.blocks.1.norm1.bias'),
        ('stages.1.downsample.norm.bias', 'stages.1.downsample.norm.bias'),
        ('norm3.bias', 'norm3.bias'),
    ]
    for theirs, mine in pairs:
        assert theirs in dict(swin.named_parameters())
        assert mine in dict(ours.named_parameters())
        assert ours.get_layer_depth('b.' + mine, 'b.') == swin.get_layer_depth('b.' + theirs, 'b.')


def test_stages_behind_the_last_chosen_one_are_not_built():
    torch.manual_seed(3)
    whole = VMamba('test').eval()
    part = VMamba('test', out_indices=(1, 0), drop_path_rate=0.4).eval()
    assert len(part.stages) == 2
    assert [block.residual.drop_prob for stage in part.stages for block in stage.blocks] == pytest.approx([0, 0.1])
    assert set(part.state_dict()) < set(whole.state_dict())
    part.load_state_dict({name: whole.state_dict()[name] for name in part.state_dict()})
    x = torch.randn(1, 3, 40, 24)
    first, second = whole(x)[:2]
    assert torch.equal(part(x)[0], second) and torch.equal(part(x)[1], first)
    assert part.get_layer_depth('norm1.weight') == (3, 4)


@pytest.mark.parametrize(
    ('option', 'error', 'message'),
    [
        (dict(in_channels=0), ValueError, 'in_channels must be at least 1, got 0'),
        (dict(in_channels='3'), TypeError, "in_channels takes integers, got '3'"),
        (dict(frozen_stages=5), ValueError, 'frozen_stages must be between -1 and 4, got 5'),
        (dict(frozen_stages=-2), ValueError, 'got -2'),
        (dict(out_indices=(4,)), ValueError, 'out_indices must be between -4 and 3, got 4'),
    ],
)
def test_wrong_options_are_refused(option, error, message):
    with pytest.raises(error, match=message):
        VMamba('test', **option)


def test_importing_the_package_registers_the_backbones_without_any_host_library():
    script = (
        'import sys, ssm_backbones; from mmengine.registry import MODELS; '
        "assert 'VMamba' in MODELS.module_dict; "
        "sys.exit(str([n for n in ('mmdet', 'mmseg', 'mmpretrain', 'mmcv', 'torchvision') if n in sys.modules]))"
    )
    result = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=False)
    assert result.stderr.strip().splitlines()[-1] == '[]', result.stderr
