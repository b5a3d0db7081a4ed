"""Mamba2D: the published variants, its mixers against loops, its classifier head, and what its constructor offers."""

import copy
import hashlib
import json
import math
import re

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ssm_backbones import Mamba2D
from ssm_backbones.backbones.mamba2d import NormedStage, ScaledResidual
from ssm_backbones.layers.mamba2d_mixer import RotaryAttention, ScanMixer, StarReLU, rotary_angles, rotate_pairs

# Of the official checkpoints: parameters with the classifier head and without, tensors, and the first 16 digits of the
# SHA-256 of the sorted list of all tensors' names and shapes (as JSON).
PUBLISHED = {
    'nano': (7178496, 5887768, 404, '93d94cb05b3a03cc'),
    'tiny': (26523136, 23418392, 404, '694c66461ddf43ae'),
    'small': (50273636, 46633468, 763, '76211b93222e685c'),
}
# The official names, in the order in which the rules apply.
OFFICIAL_NAMES = (
    (r'^backbone\.patch_embed\.conv\.', 'backbone.ds.stem.conv.'),
    (r'^backbone\.patch_embed\.norm\.', 'backbone.ds.stem.post_norm.norm.'),
    (r'^backbone\.stages\.(\d)\.downsample\.', lambda match: f'backbone.ds.ds{int(match[1]) + 1}.conv.'),
    (r'\.blocks\.', '.'),
    (r'\.mixer\.local\.norm\.', '.mixer.local_norm.'),
    (r'\.mixer\.local\.expand\.', '.mixer.local_path.pwconv1.'),
    (r'\.mixer\.local\.reduce\.', '.mixer.local_path.pwconv2.'),
    (r'\.mixer\.local\.conv\.', '.mixer.local_path.dwconv.'),
    (r'\.mixer\.local\.act', '.mixer.local_path.act'),
    (r'\.mixer\.(top|left)\.A_log$', lambda match: f'.mixer.A{match[1][0].upper()}_log'),
    (r'\.mixer\.(top|left)\.dt_(\w+)$', lambda match: f'.mixer.dt_proj{match[1][0].upper()}.{match[2]}'),
    (r'\.mixer\.', '.token_mixer.'),
    (r'\.mlp\.', '.MLP.'),
    (r'\.residual(\d)\.', r'.res_scale\1.'),
    (r'^head\.norm1\.', 'norm.'),
    (r'^head\.norm2\.', 'head.norm.'),
)


def classifier(arch, dropout=0.0, **backbone):
    """The backbone in mmpretrain's classifier, with Mamba2D's own head."""
    from mmpretrain.registry import MODELS as CLASSIFIERS

    import ssm_backbones.heads  # noqa: F401

    width = (Mamba2D.ARCHS[arch] if isinstance(arch, str) else arch)['embed_dims'][-1]
    return CLASSIFIERS.build(
        dict(
            type='mmpretrain.ImageClassifier',
            backbone=dict(type='Mamba2D', arch=arch, out_indices=(3,), **backbone),
            head=dict(type='mmpretrain.Mamba2DClsHead', num_classes=1000, in_channels=width, dropout=dropout),
        )
    )


def official_name(name, depths):
    """The official checkpoints' name of a classifier's tensor."""
    stage_norm = re.fullmatch(r'backbone\.stages\.(\d)\.norm\.(\w+)', name)
    if stage_norm:
        return f'backbone.stages.{stage_norm[1]}.{depths[int(stage_norm[1])]}.{stage_norm[2]}'
    for pattern, replacement in OFFICIAL_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


@pytest.mark.parametrize('arch', PUBLISHED)
def test_variants_have_the_official_tensors(arch):
    parameters, without_head, tensors, digest = PUBLISHED[arch]
    with torch.device('meta'):
        model = classifier(arch)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in model.backbone.parameters()) == without_head
    named = sorted(
        [official_name(name, model.backbone.depths), list(tensor.shape)] for name, tensor in model.state_dict().items()
    )
    assert len({name for name, _ in named}) == tensors
    assert hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16] == digest


def test_floating_point_operations_of_the_tiny_variant():
    with torch.device('meta'):
        model = classifier('tiny').eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device='meta'))
    counts = {str(op): count for op, count in counter.get_flop_counts()['Global'].items()}
    # Three blocks on 56x56 pixels of 64 channels and three on 28x28 of 128, each with 16 states and two neighbours.
    # PyTorch counts a multiply-add as two.
    assert counts['cuda_ops.wavefront_scan'] == 2 * 3 * 18 * 16 * (56**2 * 64 + 28**2 * 128)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def layer_norm(x: Tensor, norm) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
    return x * norm.weight + norm.bias


def scan_mixer_by_loops(layer, x):
    """ScanMixer written from its equations, pixel by pixel. x (B, H, W, C)."""
    batch, height, width, channels = x.shape
    rank, states = layer.dt_rank, layer.d_state
    u = gelu(x @ layer.in_proj.weight.t() + layer.in_proj.bias)
    projected = u @ layer.x_proj.weight.t()
    h, pixels = {}, {}
    order = [(i, j) for i in range(height) for j in range(width)]
    step = 1
    if layer.reverse:
        order, step = order[::-1], -1
    for i, j in order:
        v, p = u[:, i, j], projected[:, i, j]
        above, before = h.get((i - step, j)), h.get((i, j - step))
        parts = []
        for k, (neighbour, state) in enumerate(((layer.top, above), (layer.left, before))):
            delta = p[:, k * rank : (k + 1) * rank] @ neighbour.dt_weight.t() + neighbour.dt_bias
            delta = torch.log1p(torch.exp(delta))[:, :, None]
            B = p[:, 2 * rank + k * states : 2 * rank + (k + 1) * states][:, None]
            if state is not None or (k == 1 and above is None):
                decayed = 0 if state is None else torch.exp(-delta * torch.exp(neighbour.A_log)) * state
                parts.append(decayed + delta * B * v[:, :, None])
        h[i, j] = sum(parts) / len(parts)
        C = p[:, 2 * rank + 2 * states :][:, None]
        pixels[i, j] = (h[i, j] * C).sum(2) + layer.D * v
    y = torch.stack([pixels[i, j] for i in range(height) for j in range(width)], dim=1).view(x.shape)
    y = gelu(y) @ layer.out_proj.weight.t() + layer.out_proj.bias

    def star_relu(v, act):
        return act.scale * torch.clamp(v, min=0) ** 2 + act.bias

    local = star_relu(layer_norm(x, layer.local.norm) @ layer.local.expand.weight.t(), layer.local.act1)
    padded = F.pad(local, (0, 0, 1, 1, 1, 1))
    local = sum(
        padded[:, i : i + height, j : j + width] * layer.local.conv.weight[:, 0, i, j]
        for i in range(3)
        for j in range(3)
    )
    return y + star_relu(local, layer.local.act2) @ layer.local.reduce.weight.t()


def attention_by_loops(layer, x):
    """RotaryAttention written out: pairs as complex numbers, one head at a time."""
    batch, height, width, channels = x.shape
    head = layer.head_dim
    qkv = (x @ layer.qkv.weight.t()).flatten(1, 2)
    speeds = [10000 ** (-4 * k / head) for k in range(head // 4)]
    angles = torch.tensor(
        [[i * s for s in speeds] + [j * s for s in speeds] for i in range(height) for j in range(width)], dtype=x.dtype
    )
    turn = torch.polar(torch.ones_like(angles), angles)
    outputs = []
    for n in range(channels // head):
        q, k, v = (qkv[..., part * channels + n * head : part * channels + (n + 1) * head] for part in range(3))
        q, k = (
            torch.view_as_real(
                torch.view_as_complex(each.reshape(batch, -1, head // 2, 2).contiguous()) * turn
            ).flatten(2)
            for each in (q, k)
        )
        q, k = layer_norm(q, layer.q_norm), layer_norm(k, layer.k_norm)
        weights = torch.softmax(q @ k.mT / math.sqrt(head), dim=-1)
        outputs.append(weights @ v)
    return torch.cat(outputs, dim=-1).view(x.shape) @ layer.proj.weight.t()


def randomised(layer, dtype=torch.float64):
    layer = layer.to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('size', [(3, 5), (4, 1), (1, 3), (1, 1)])
def test_scan_mixer_equals_loops_over_the_pixels(size, reverse):
    layer = randomised(ScanMixer(6, d_state=3, dt_rank=2, reverse=reverse))
    check_layer(layer, scan_mixer_by_loops, torch.randn(2, *size, 6, dtype=torch.float64))


@pytest.mark.parametrize('size', [(3, 5), (4, 1), (1, 3), (1, 1)])
def test_attention_equals_single_heads(size):
    layer = randomised(RotaryAttention(24, head_dim=8))
    check_layer(layer, attention_by_loops, torch.randn(2, *size, 24, dtype=torch.float64))


def check_layer(layer, by_loops, x):
    inputs = [x.requires_grad_(), *layer.parameters()]
    y, expected = layer(x), by_loops(layer, x)
    # float32 angles limit the precision of attention in float64.
    tolerance = dict(rtol=1e-5, atol=1e-5) if isinstance(layer, RotaryAttention) else dict(rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(y, expected, **tolerance)
    weights = torch.randn_like(y)
    # At a single pixel parts of the layer have no effect.
    ours, theirs = (
        torch.autograd.grad(result, inputs, weights, allow_unused=True, materialize_grads=True)
        for result in (y, expected)
    )
    for i, (grad, wanted) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(grad, wanted, **tolerance, msg=lambda text, i=i: f'input {i}: {text}')


def test_mixers_equal_loops_in_float32():
    for layer, by_loops, channels in (
        (ScanMixer(24, 4, 2), scan_mixer_by_loops, 24),
        (RotaryAttention(64), attention_by_loops, 64),
    ):
        x = torch.randn(2, 4, 6, channels)
        torch.testing.assert_close(layer(x), by_loops(layer, x), rtol=1e-4, atol=1e-4)


def test_rotated_products_depend_on_the_offset_alone():
    q, k = torch.randn(2, 8, dtype=torch.float64)
    cosine, sine = (value[:, 0].view(9, 11, 4) for value in rotary_angles(9, 11, 8, q.new_empty(0)))
    assert (cosine[0, 0] == 1).all() and (sine[0, 0] == 0).all()

    def turned(x, i, j):
        return rotate_pairs(x, cosine[i, j], sine[i, j])

    products = torch.stack([turned(q, i, j) @ turned(k, i + 2, j + 3) for i in range(7) for j in range(8)])
    torch.testing.assert_close(products, products[:1].expand_as(products), rtol=1e-5, atol=1e-5)
    assert (turned(q, 0, 0) @ turned(k, 3, 2) - products[0]).abs() > 1e-3


def test_star_relu_and_scaled_residual():
    act = StarReLU()
    x = torch.linspace(-2, 2, 9)
    assert torch.equal(act(x), x.clamp(min=0) ** 2)
    with torch.no_grad():
        act.scale.fill_(3)
        act.bias.fill_(-1)
    torch.testing.assert_close(act(x), 3 * x.clamp(min=0) ** 2 - 1)
    residual = ScaledResidual(3, drop_prob=0.25)
    x, branch = torch.randn(4000, 1, 2, 3), torch.ones(4000, 1, 2, 3)
    assert torch.equal(residual.eval()(x, branch), x + branch)
    added = residual.train()(x, branch) - x
    kept = added.flatten(1).mean(1) > 0.5
    torch.testing.assert_close(added[kept], branch[kept] / 0.75)
    assert added[~kept].abs().max() < 1e-6 and abs(kept.float().mean().item() - 0.75) < 0.03
    with torch.no_grad():
        residual.scale.copy_(torch.tensor([1.0, 2.0, -1.0]))
    torch.testing.assert_close(residual.eval()(x, branch), x * residual.scale + branch)


def small_model(mixers=('scan', 'attention', 'scan', 'attention'), **options):
    arch = dict(embed_dims=[32, 32, 64, 64], depths=[2, 1, 1, 1], d_state=4, mixers=list(mixers))
    return Mamba2D(arch, **options)


def test_odd_blocks_of_a_stage_scan_in_reverse_and_all_attend_in_later_stages():
    model = Mamba2D('small')
    for i, stage in enumerate(model.stages):
        assert len(stage.blocks) == Mamba2D.ARCHS['small']['depths'][i]
        for j, block in enumerate(stage.blocks):
            if i < 2:
                assert isinstance(block.mixer, ScanMixer) and block.mixer.reverse == (j % 2 == 1)
                assert (block.mixer.d_state, block.mixer.dt_rank) == (16, math.ceil((96, 192)[i] / 16))
            else:
                assert isinstance(block.mixer, RotaryAttention) and block.mixer.head_dim == 32


@pytest.mark.parametrize('mixers', [['scan'] * 4, ['attention'] * 4, ['attention', 'scan', 'scan', 'attention']])
def test_any_stage_takes_either_mixer(mixers):
    model = small_model(mixers)
    kinds = dict(scan=ScanMixer, attention=RotaryAttention)
    for stage, mixer in zip(model.stages, mixers, strict=True):
        assert all(isinstance(block.mixer, kinds[mixer]) for block in stage.blocks)
    maps = model(torch.randn(1, 3, 32, 40))
    assert [m.shape for m in maps] == [(1, 32, 8, 10), (1, 32, 4, 5), (1, 64, 2, 3), (1, 64, 1, 2)]


def test_mixers_of_dict_archs_default_to_attention_in_the_last_two_stages():
    def kinds(arch):
        return [type(stage.blocks[0].mixer) for stage in Mamba2D(arch, out_indices=-1).stages]

    assert kinds(dict(embed_dims=[8, 8, 32, 32], depths=[1] * 4)) == [ScanMixer, ScanMixer] + 2 * [RotaryAttention]
    assert kinds(dict(embed_dims=[32, 32], depths=[1, 1])) == [RotaryAttention] * 2
    with torch.device('meta'):
        shapes = [
            {name: p.shape for name, p in Mamba2D(arch).named_parameters()}
            for arch in ('tiny', dict(embed_dims=[64, 128, 320, 512], depths=[3, 3, 9, 3]))
        ]
    assert shapes[0] == shapes[1]


def transposed_state(state, width):
    """A model's state with kernels transposed, and with the halves of each head's channels swapped for q and k."""
    half = width // 2
    turned = {}
    for name, tensor in state.items():
        if tensor.ndim == 4:
            tensor = tensor.transpose(2, 3)
        elif name.endswith('qkv.weight'):
            q, k, v = tensor.chunk(3)
            q, k = (each.unflatten(0, (-1, 2, half)).flip(1).flatten(0, 2) for each in (q, k))
            tensor = torch.cat([q, k, v])
        elif '.q_norm.' in name or '.k_norm.' in name:
            tensor = tensor.roll(half)
        turned[name] = tensor
    return turned


def test_a_transposed_image_gives_transposed_maps_where_both_neighbours_are_alike():
    model = small_model().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for mixer in (module for module in model.modules() if isinstance(module, ScanMixer)):
            mixer.top.load_state_dict(mixer.left.state_dict())
            steps_top, steps_left, B_top, B_left, _ = mixer.x_proj.weight.split(
                [mixer.dt_rank] * 2 + [mixer.d_state] * 3
            )
            steps_top.copy_(steps_left)
            B_top.copy_(B_left)
    twin = copy.deepcopy(model)
    twin.load_state_dict(transposed_state(model.state_dict(), 32))
    x = torch.randn(1, 3, 44, 70, dtype=torch.float64)
    for m, t in zip(model(x), twin(x.transpose(2, 3)), strict=True):
        torch.testing.assert_close(t.transpose(2, 3), m, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(model(x.transpose(2, 3))[0].transpose(2, 3), model(x)[0])


def test_a_reversed_scan_sees_the_image_turned_round():
    layer = randomised(ScanMixer(6, 3, 2))
    twin = randomised(ScanMixer(6, 3, 2, reverse=True))
    twin.load_state_dict({name: t.flip(2, 3) if t.ndim == 4 else t for name, t in layer.state_dict().items()})
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(twin(x.flip(1, 2)).flip(1, 2), layer(x))
    assert not torch.allclose(layer(x.flip(1, 2)).flip(1, 2), layer(x))


def test_small_images_are_those_with_zeros_added():
    model = small_model().eval()
    x = torch.randn(1, 3, 2, 9)
    for m, p in zip(model(x), model(F.pad(x, (0, 0, 0, 1))), strict=True):
        assert torch.equal(m, p)


def test_a_map_is_the_output_of_the_stages_norm_and_feeds_the_next_stage():
    model = small_model().eval()
    normed, entered = {}, {}
    for i, stage in enumerate(model.stages):
        assert isinstance(stage, NormedStage)
        stage.norm.register_forward_hook(lambda module, args, output, i=i: normed.update({i: output}))
        stage.downsample.register_forward_pre_hook(lambda module, args, i=i: entered.update({i: args[0]}))
    for i, m in enumerate(model(torch.randn(1, 3, 32, 32))):
        # Convolutions take (B, C, H, W); the last stage has none.
        assert torch.equal(m, normed[i].permute(0, 3, 1, 2))
        assert torch.equal(entered[i] if i < 3 else entered[i].permute(0, 3, 1, 2), m)
        torch.testing.assert_close(m.mean(1), torch.zeros_like(m[:, 0]), rtol=0, atol=1e-5)
    assert not [name for name, _ in model.named_parameters() if name.startswith('norm')]


def test_layer_depths():
    model = Mamba2D('test')
    depth = {name: model.get_layer_depth(f'backbone.{name}', 'backbone.')[0] for name, _ in model.named_parameters()}
    assert model.get_layer_depth('backbone.patch_embed.norm.bias', 'backbone.') == (0, 8)
    assert depth['patch_embed.conv.weight'] == 0
    assert depth['stages.0.blocks.1.mixer.top.A_log'] == depth['stages.0.norm.weight'] == 2
    assert depth['stages.0.downsample.bias'] == 2
    assert depth['stages.3.blocks.0.mlp.fc1.weight'] == depth['stages.3.norm.bias'] == 6
    assert model.get_layer_depth('head.fc1.weight', 'backbone.') == (7, 8)


def test_drop_path_rises_over_all_blocks_and_acts_in_training_only():
    model = Mamba2D('test', drop_path_rate=0.5)
    rates = [block.residual1.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert rates == [block.residual2.drop_prob for stage in model.stages for block in stage.blocks]
    x = torch.randn(1, 3, 16, 16)
    assert not torch.equal(model(x)[3], model(x)[3])
    assert torch.equal(model.eval()(x)[3], model(x)[3])


@pytest.mark.parametrize(
    ('change', 'error', 'message'),
    [
        (dict(embed_dims=[16, 48]), ValueError, r'multiple of 32 channels, got embed_dims \[16, 48\]; change them, or'),
        (dict(embed_dims=[16, 32, 64]), ValueError, r'must name the same stages, got \(16, 32, 64\) and \(1, 1\)'),
        (dict(embed_dims=[16, 0]), ValueError, 'embed_dims must be at least 1, got 0'),
        (dict(embed_dims=32), TypeError, 'embed_dims takes a non-empty sequence of integers, got 32'),
        (dict(depths=[2, 0]), ValueError, 'depths must be at least 1, got 0'),
        (dict(d_state=0), ValueError, 'd_state must be at least 1, got 0'),
        (dict(mixers=['scan', 'conv']), ValueError, "a stage's mixer is 'scan' or 'attention', got 'conv'"),
        (dict(mixers=['scan']), ValueError, r"for each of the 2 stages, got \['scan'\]"),
        (dict(mixers='scan'), TypeError, "one for each stage, got 'scan'"),
        (dict(version='v2'), ValueError, "Mamba2D's arch dict has unknown version; its keys are embed_dims, depths"),
    ],
)
def test_wrong_arch_dicts_are_refused(change, error, message):
    arch = dict(embed_dims=[16, 32], depths=[1, 1], mixers=['scan', 'attention'])
    Mamba2D(arch, out_indices=0)
    with pytest.raises(error, match=message):
        Mamba2D({**arch, **change}, out_indices=0)


def test_unknown_names_and_missing_keys_are_refused():
    with pytest.raises(ValueError, match=r"Mamba2D has no arch 'smal' \(did you mean 'small'\?\)"):
        Mamba2D('smal')
    with pytest.raises(ValueError, match="Mamba2D's arch dict lacks depths"):
        Mamba2D(dict(embed_dims=[16]))
    with pytest.raises(ValueError, match="got 'tiny'"):
        check = dict(Mamba2D.ARCHS['test'], mixers=['tiny'] * 4)
        Mamba2D(check)


# The classifier head.


def test_the_head_follows_its_equation():
    head = classifier('test').head.double().eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(5, 64, 3, 2, dtype=torch.float64)
    pooled = layer_norm(x.mean((2, 3)), head.norm1)
    hidden = layer_norm(gelu(pooled @ head.fc1.weight.t() + head.fc1.bias), head.norm2)
    expected = hidden @ head.fc2.weight.t() + head.fc2.bias
    torch.testing.assert_close(head((torch.zeros(0), x)), expected)
    torch.testing.assert_close(head.pre_logits((x,)), hidden)


def test_the_classifier_trains_and_predicts():
    from mmpretrain.structures import DataSample

    model = classifier('test', dropout=0.5)
    model.init_weights()
    x = torch.randn(3, 3, 33, 40)
    samples = [DataSample().set_gt_label(i) for i in range(3)]
    model(x, samples, mode='loss')['loss'].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.head.parameters())
    scores = model.head((torch.randn(1, 64, 2, 2),)), model.head((torch.randn(1, 64, 2, 2),))
    assert not torch.equal(*scores)
    predicted = model.eval()(x, samples, mode='predict')
    assert all(sample.pred_score.shape == (1000,) for sample in predicted)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(num_classes=0), 'num_classes and in_channels must be at least 1, got 0 and 64'),
        (dict(in_channels=0), 'got 1000 and 0'),
        (dict(dropout=1.0), r'dropout must lie in \[0, 1\), got 1.0'),
    ],
)
def test_wrong_heads_are_refused(options, message):
    from ssm_backbones.heads import Mamba2DClsHead

    with pytest.raises(ValueError, match=message):
        Mamba2DClsHead(**dict(num_classes=1000, in_channels=64) | options)


def test_the_head_wants_the_map_itself():
    head = classifier('test').head
    for wrong in (torch.randn(2, 64), torch.randn(2, 32, 3, 3)):
        with pytest.raises(ValueError, match=r'takes maps \(B, 64, H, W\) and pools them itself, got \(2, '):
            head((wrong,))
