"""V2M: the published variants, both layouts' options, and the plain one's tokens and pyramid."""

import copy
import math

import pytest
import torch
from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ssm_backbones import V2M
from ssm_backbones.backbones.v2m import HierarchicalV2M, PlainV2M
from ssm_backbones.layers.simple_pyramid import SimplePyramid
from ssm_backbones.layers.token_grid import TokenGrid

# Parameters in M with the classification head, and GFLOPs.
PUBLISHED = {'tiny': (7, 1.9), 'small': (26, 5.9), 'hier-small': (30, 5.4), 'hier-base': (50, 9.6)}
SIZES = [(1, 1), (1, 50), (64, 1), (5, 7), (31, 33), (37, 61)]
PLAIN_ARCH = dict(layout='plain', embed_dims=16, depth=2, d_state=2)
HIERARCHICAL_ARCH = dict(layout='hierarchical', embed_dims=16, depths=[1, 1], d_state=2, ssm_ratio=1.0)


def meta_classifier(arch, **options):
    """The backbone in mmpretrain's classifier, without memory."""
    from mmpretrain.registry import MODELS as CLASSIFIERS

    width = V2M.ARCHS[arch]['embed_dims'] * (1 if V2M.ARCHS[arch]['layout'] == 'plain' else 8)
    with torch.device('meta'):
        return CLASSIFIERS.build(
            dict(
                type='mmpretrain.ImageClassifier',
                backbone=dict(type='V2M', arch=arch, out_indices=-1, **options),
                neck=dict(type='mmpretrain.GlobalAveragePooling'),
                head=dict(type='mmpretrain.LinearClsHead', num_classes=1000, in_channels=width),
            )
        ).eval()


def gflops(model):
    """GFLOPs at 224x224, a multiply-add as one and a scan as 9 for each state, channel and position."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device='meta'))
    # PyTorch counts a multiply-add as two.
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize('arch', PUBLISHED)
def test_variants_have_the_published_parameters(arch):
    tolerance = 0.04 if V2M.ARCHS[arch]['layout'] == 'plain' else 0.05
    parameters = sum(p.numel() for p in meta_classifier(arch).parameters()) / 1e6
    assert parameters == pytest.approx(PUBLISHED[arch][0], rel=tolerance)


@pytest.mark.parametrize('arch', ['hier-small', 'hier-base'])
def test_hierarchical_variants_have_the_published_flops(arch):
    assert gflops(meta_classifier(arch)) == pytest.approx(PUBLISHED[arch][1], rel=0.05)


@pytest.mark.parametrize('arch', ['tiny', 'small'])
def test_plain_variants_have_the_published_flops_for_one_corner(arch):
    """Layer by layer: the published figures hold one corner's two scans; four corners that share work take six."""
    width, depth, states = (V2M.ARCHS[arch][key] for key in ('embed_dims', 'depth', 'd_state'))
    inner, rank, pixels = 2 * width, width // 16, 14 * 14
    projections_in_and_out = 3 * width * inner * pixels
    pass_projections = (inner * (rank + states) + rank * inner) * pixels
    scan = 9 * pixels * inner * states
    # A causal convolution of length 4 is computed with three zeros for the pixels ahead.
    convolution = 7 * inner * pixels
    patches_and_head = 3 * 16 * 16 * width * pixels + width * 1000

    def model(passes):
        block = projections_in_and_out + passes * (convolution + pass_projections + scan)
        return (patches_and_head + depth * block) / 1e9

    assert gflops(meta_classifier(arch)) == pytest.approx(model(passes=6), rel=1e-9)
    assert model(passes=2) == pytest.approx(PUBLISHED[arch][1], rel=0.1)


def test_archs_choose_the_layout():
    assert type(V2M('test')) is PlainV2M
    assert type(V2M('test-hier')) is HierarchicalV2M
    assert type(V2M(arch=PLAIN_ARCH)) is PlainV2M
    assert type(MODELS.build(dict(type='V2M', arch=HIERARCHICAL_ARCH, out_indices=0))) is HierarchicalV2M
    model = copy.deepcopy(V2M('test'))
    assert type(model) is PlainV2M and isinstance(model, V2M)
    with pytest.raises(ValueError, match="arch 'test-hier' is hierarchical, not plain; type='V2M' takes both"):
        PlainV2M('test-hier')


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('pyramid', ['single', 'multi'])
def test_pyramids_have_the_shapes_of_hierarchical_maps(pyramid, size):
    model = V2M('test', pyramid=pyramid)
    assert model.out_channels == (4, 8, 16, 16)
    maps = model(torch.randn(1, 3, *size))
    hierarchical = V2M('test-hier')(torch.randn(1, 3, *size))
    for m, other, channels in zip(maps, hierarchical, model.out_channels, strict=True):
        assert m.shape == (1, channels, *other.shape[2:])
        assert m.is_contiguous()


def test_out_channels_tell_what_is_returned():
    assert V2M('test', out_indices=(1, 2)).out_channels == (16, 16)
    assert V2M('test-hier', out_indices=(2, 0)).out_channels == (64, 16)


def test_plain_returns_its_last_block_unless_told_otherwise():
    assert V2M('test').out_indices == (3,)
    assert V2M('test', pyramid='single').out_indices == (3,)
    assert V2M('test', pyramid='multi').out_indices == (0, 1, 2, 3)
    with torch.device('meta'):
        assert V2M('tiny', pyramid='multi').out_indices == (5, 11, 17, 23)
        assert len(V2M('tiny', pyramid='single', out_indices=5).stages) == 6


@pytest.mark.parametrize('pyramid', ['single', 'multi'])
def test_pyramids_train_end_to_end(pyramid):
    """Each level learns to tell, at its own stride, where an image is bright."""
    model = V2M('test', pyramid=pyramid, img_size=64)
    heads = nn.ModuleList(nn.Conv2d(channels, 1, 1) for channels in model.out_channels)
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=1e-2)
    losses = []
    for _ in range(40):
        squares = (torch.rand(4, 1, 2, 2) > 0.5).float()
        images = F.interpolate(squares, (64, 64)).expand(-1, 3, -1, -1) * 2 - 1 + 0.1 * torch.randn(4, 3, 64, 64)
        loss = sum(
            F.binary_cross_entropy_with_logits(head(m), F.interpolate(squares, m.shape[2:]))
            for head, m in zip(heads, model(images), strict=True)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.35 * sum(losses[:3]) / 3


def test_pyramid_levels_come_from_their_blocks():
    torch.manual_seed(1)
    multi = V2M('test', pyramid='multi', out_indices=(2, 0, 3, 1)).eval()
    plain = V2M('test', out_indices=(2, 0, 3, 1)).eval()
    plain.load_state_dict(
        {name: tensor for name, tensor in multi.state_dict().items() if not name.startswith('pyramid.')}, strict=False
    )
    x = torch.randn(1, 3, 48, 64)
    maps = multi(x)
    # Level 2 is the chosen block's map itself, under a LayerNorm instead of the RMSNorm; level 3 is its pooled one.
    raw = {i: block for i, block in enumerate(block_outputs(plain, x))}
    torch.testing.assert_close(maps[2].permute(0, 2, 3, 1), F.layer_norm(raw[3], (16,)))
    pooled = F.max_pool2d(raw[1].permute(0, 3, 1, 2), 2, ceil_mode=True).permute(0, 2, 3, 1)
    torch.testing.assert_close(maps[3].permute(0, 2, 3, 1), F.layer_norm(pooled, (16,)))
    single = V2M('test', pyramid='single', out_indices=2).eval()
    single.load_state_dict({name: multi.state_dict()[name] for name in single.state_dict()})
    torch.testing.assert_close(single(x)[0], maps[0])


def block_outputs(model, x):
    x = model.patch_embed(x)
    for stage in model.stages:
        x = stage(x)
        yield x


def test_a_deconvolution_puts_each_pixels_square_in_its_place():
    pyramid = SimplePyramid(8)
    x = torch.zeros(1, 3, 4, 8)
    y = pyramid.levels[0](x)
    x[0, 1, 2] = 1
    changed = (pyramid.levels[0](x) - y).abs().amax(-1)[0] > 0
    expected = torch.zeros(12, 16, dtype=torch.bool)
    expected[4:8, 8:12] = True
    assert torch.equal(changed, expected)


def test_mmdets_fpn_takes_the_pyramid():
    from mmdet.registry import MODELS as DETECTION

    backbone = DETECTION.build(dict(type='V2M', arch='test', pyramid='single'))
    neck = DETECTION.build(dict(type='mmdet.FPN', in_channels=list(backbone.out_channels), out_channels=8, num_outs=5))
    maps = neck(backbone(torch.randn(1, 3, 96, 64)))
    assert [m.shape[2:] for m in maps] == [(24, 16), (12, 8), (6, 4), (3, 2), (2, 1)]


@pytest.mark.parametrize('cls_token', ['mean', 'corner', 'center'])
def test_class_outputs_serve_mmpretrains_classifier(cls_token):
    from mmpretrain.registry import MODELS as CLASSIFIERS
    from mmpretrain.structures import DataSample

    model = CLASSIFIERS.build(
        dict(
            type='mmpretrain.ImageClassifier',
            backbone=dict(type='V2M', arch='test', cls_token=cls_token, out_type='cls_token'),
            head=dict(type='mmpretrain.LinearClsHead', num_classes=5, in_channels=16),
        )
    )
    samples = [DataSample().set_gt_label(i) for i in range(3)]
    loss = model(torch.randn(3, 3, 48, 40), samples, mode='loss')['loss']
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters())


def test_the_mean_class_output_pools_the_map():
    model = V2M('test', out_type='cls_token', out_indices=(3, 1)).eval()
    maps = V2M('test', out_indices=(3, 1)).eval()
    maps.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 40, 56)
    for output, m in zip(model(x), maps(x), strict=True):
        torch.testing.assert_close(output, m.mean((2, 3)))


@pytest.mark.parametrize(('cls_token', 'row', 'column'), [('corner', 0, 0), ('center', 2, 1)])
def test_class_tokens_take_a_row_and_a_column(cls_token, row, column):
    grid = TokenGrid(3, 8, 16, (4, 3), cls_token)
    bare = TokenGrid(3, 8, 16, (4, 3), 'mean')
    bare.load_state_dict({name: t for name, t in grid.state_dict().items() if name != 'cls_token'})
    x = torch.randn(2, 3, 64, 48)
    tokens = grid(x)
    assert tokens.shape == (2, 5, 4, 8)
    assert (tokens[:, row] == grid.cls_token[0, 0]).all()
    assert (tokens[:, :, column] == grid.cls_token[0, 0]).all()
    assert torch.equal(grid.patches(tokens), bare(x))
    numbered = torch.arange(20.0).view(1, 5, 4, 1)
    assert grid.class_output(numbered).item() == 4 * row + column
    kept = [n for n in range(20) if n // 4 != row and n % 4 != column]
    assert grid.patches(numbered).flatten().tolist() == kept
    assert bare.patches(numbered) is numbered


@pytest.mark.parametrize('cls_token', ['corner', 'center'])
def test_the_class_output_sees_every_patch_and_the_maps_hold_none_of_the_tokens(cls_token):
    model = V2M('test', cls_token=cls_token, out_type='cls_token').eval()
    x = torch.randn(1, 3, 48, 64, requires_grad=True)
    (model(x)[0] * torch.randn(1, 16)).sum().backward()
    assert (F.avg_pool2d(x.grad.abs(), 16) > 0).all()
    maps = V2M('test', cls_token=cls_token).eval()
    maps.load_state_dict(model.state_dict())
    x = x.detach()
    m = maps(x)[0]
    assert m.shape == (1, 16, 3, 4)
    rest = maps.patch_embed.patches(maps.norm3(list(block_outputs(maps, x))[-1]))
    torch.testing.assert_close(m.permute(0, 2, 3, 1), rest)


def test_position_embeddings_are_resized_bicubically():
    grid = TokenGrid(3, 4, 16, (6, 8))
    with torch.no_grad():
        grid.projection.weight.zero_()
        grid.projection.bias.zero_()
    assert torch.equal(grid(torch.randn(2, 3, 96, 128))[1], grid.pos_embed[0])
    for size in [(96, 64), (33, 200), (16, 16)]:
        grid_size = tuple(math.ceil(s / 16) for s in size)
        expected = F.interpolate(grid.pos_embed.permute(0, 3, 1, 2), grid_size, mode='bicubic', align_corners=False)
        torch.testing.assert_close(grid(torch.randn(1, 3, *size)).permute(0, 3, 1, 2), expected)
    # A ramp along W stays one, and covers the same image.
    with torch.no_grad():
        grid.pos_embed.copy_(torch.arange(8.0)[None, None, :, None].expand_as(grid.pos_embed))
    resized = grid.position_embedding(5, 16)[0]
    ramp = (torch.arange(16.0) / 2 - 0.25)[None, :, None].expand_as(resized)
    torch.testing.assert_close(resized, ramp, atol=0.3, rtol=0)


@pytest.mark.parametrize('img_size', [48, (32, 80), [20, 1]])
def test_position_embeddings_are_made_for_the_image_size(img_size):
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    shape = V2M('test', img_size=img_size).patch_embed.pos_embed.shape
    assert shape == (1, math.ceil(height / 16), math.ceil(width / 16), 16)


def init_cfg_loads(model, weights, folder):
    """Save weights as a trained model's, and let mmengine load them as a config's backbone does."""
    torch.save(dict(state_dict={f'backbone.{name}': t for name, t in weights.items()}), folder / 'model.pth')
    model.init_cfg = dict(type='Pretrained', checkpoint=str(folder / 'model.pth'), prefix='backbone.')
    model.init_weights()


def load_from_loads(model, weights, folder):
    """Save weights as a trained model's, and let mmengine load them as a runner does."""
    torch.save(dict(state_dict={f'module.{name}': t for name, t in weights.items()}), folder / 'model.pth')
    load_checkpoint(model, str(folder / 'model.pth'), map_location='cpu')


def torch_loads(model, weights, folder):
    model.load_state_dict(weights)


@pytest.mark.parametrize('load', [init_cfg_loads, load_from_loads, torch_loads])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_saved_position_embeddings_are_resized_to_the_image_size(load, dtype, tmp_path, log):
    source, model = V2M('test', img_size=96).eval(), copy.deepcopy(V2M('test', img_size=(64, 128))).eval()
    saved = {name: t.to(dtype) for name, t in source.state_dict().items()}
    source.load_state_dict(saved)
    load(model, saved, tmp_path)
    assert [line for line in log if 'resized' in line] == ['patch_embed.pos_embed is resized from 6x6 to 4x8 patches.']
    assert saved['patch_embed.pos_embed'].shape == (1, 6, 6, 16)
    images = torch.randn(1, 3, 64, 128)
    tolerance = {} if dtype == torch.float32 else dict(atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(model(images), source(images), **tolerance)
    rest = {name: t for name, t in model.state_dict().items() if name != 'patch_embed.pos_embed'}
    assert all(torch.equal(t, source.state_dict()[name]) for name, t in rest.items())


@pytest.mark.parametrize(
    'saved',
    [
        torch.zeros(1, 6, 6, 8),
        torch.zeros(2, 6, 6, 16),
        torch.zeros(36, 16),
        torch.zeros(1, 0, 6, 16),
        torch.zeros(1, 6, 6, 16, dtype=torch.int64),
    ],
    ids=['channels', 'first', 'flat', 'empty', 'integers'],
)
def test_other_tensors_in_a_position_embedding_s_place_are_refused(saved, log):
    model = V2M('test', img_size=64)
    with pytest.raises(RuntimeError, match='size mismatch for patch_embed.pos_embed'):
        model.load_state_dict(model.state_dict() | {'patch_embed.pos_embed': saved})
    assert not log


def test_a_mirrored_image_gives_mirrored_maps_once_the_plain_stem_is_mirrored():
    model = V2M('test', img_size=(64, 48)).double()
    twin = copy.deepcopy(model)
    twin.patch_embed.projection.weight.data = model.patch_embed.projection.weight.data.flip(3)
    twin.patch_embed.pos_embed.data = model.patch_embed.pos_embed.data.flip(2)
    x = torch.randn(1, 3, 64, 48, dtype=torch.float64)
    torch.testing.assert_close(twin(x.flip(3))[0].flip(3), model(x)[0])
    assert not torch.allclose(model(x.flip(3))[0].flip(3), model(x)[0])


def test_a_mirrored_image_gives_mirrored_maps_once_the_windows_are_mirrored():
    model = V2M('test-hier').double()
    twin = copy.deepcopy(model)
    twin.load_state_dict({name: t.flip(2, 3) if t.ndim == 4 else t for name, t in model.state_dict().items()})
    # Halving by a padded 3x3 window treats both ends alike where the side is odd.
    x = torch.randn(1, 3, 33, 65, dtype=torch.float64)
    for m, t in zip(model(x), twin(x.flip(2, 3)), strict=True):
        torch.testing.assert_close(t.flip(2, 3), m)


def test_a_frozen_backbone_still_trains_its_pyramid():
    model = V2M('test', pyramid='single', frozen_stages=4)
    sum(m.sum() for m in model(torch.randn(1, 3, 32, 32))).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith('pyramid.'), name


def test_layer_depth_counts_blocks():
    depth = V2M('test', cls_token='corner', pyramid='single').get_layer_depth
    assert depth('backbone.patch_embed.projection.weight', 'backbone.') == (0, 6)
    assert depth('backbone.patch_embed.pos_embed', 'backbone.') == (0, 6)
    assert depth('backbone.patch_embed.cls_token', 'backbone.') == (0, 6)
    assert depth('backbone.stages.0.blocks.0.norm.weight', 'backbone.') == (1, 6)
    assert depth('backbone.stages.3.blocks.0.mixer.A_log', 'backbone.') == (4, 6)
    assert depth('backbone.pyramid.norms.0.weight', 'backbone.') == (5, 6)
    assert V2M('test').get_layer_depth('norm3.weight') == (5, 6)
    hierarchical = V2M('test-hier')
    assert hierarchical.get_layer_depth('stages.2.blocks.1.mixer.conv.weight') == (4, 7)
    assert {hierarchical.get_layer_depth(name)[0] for name, _ in hierarchical.named_parameters()} == set(range(7))


def test_drop_path_rises_over_the_blocks():
    rates = [stage.blocks[0].residual.drop_prob for stage in V2M('test', drop_path_rate=0.3).stages]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    rates = [
        block.residual.drop_prob for stage in V2M('test-hier', drop_path_rate=0.4).stages for block in stage.blocks
    ]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    ('arch', 'change', 'error', 'message'),
    [
        (PLAIN_ARCH, dict(layout='flat'), ValueError, "has the layout 'plain' or 'hierarchical', got 'flat'"),
        (PLAIN_ARCH, dict(embed_dims=0), ValueError, 'embed_dims must be at least 1, got 0'),
        (PLAIN_ARCH, dict(depth=0), ValueError, 'depth must be at least 1, got 0'),
        (PLAIN_ARCH, dict(depth=[2]), TypeError, r'depth takes integers, got \[2\]'),
        (PLAIN_ARCH, dict(d_state=0), ValueError, 'd_state must be at least 1, got 0'),
        (
            PLAIN_ARCH,
            dict(depths=[2]),
            ValueError,
            'has unknown depths; its keys are layout, embed_dims, depth, d_state',
        ),
        (HIERARCHICAL_ARCH, dict(embed_dims=15), ValueError, 'must be even, got 15'),
        (HIERARCHICAL_ARCH, dict(depths=[]), TypeError, r'non-empty sequence of integers, got \[\]'),
        (HIERARCHICAL_ARCH, dict(ssm_ratio=0.3), ValueError, 'whole number of channels, got 0.3 of 16'),
        (HIERARCHICAL_ARCH, dict(depth=2), ValueError, 'has unknown depth; its keys are layout, embed_dims, depths'),
    ],
)
def test_wrong_arch_dicts_are_refused(arch, change, error, message):
    V2M(arch, out_indices=0)
    with pytest.raises(error, match=message):
        V2M({**arch, **change}, out_indices=0)


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(arch='tinny'), ValueError, r"V2M has no arch 'tinny' \(did you mean 'tiny'\?\)"),
        (dict(arch=dict(embed_dims=16)), ValueError, "got None in {'embed_dims': 16}"),
        (dict(arch=7), TypeError, "V2M's arch is a name or a dict, got int: 7"),
        (dict(cls_token='middle'), ValueError, "cls_token is one of 'mean', 'corner', 'center', got 'middle'"),
        (dict(out_type='raw'), ValueError, "out_type is 'featmap' or 'cls_token', got 'raw'"),
        (dict(pyramid='fpn'), ValueError, "pyramid is None, 'single' or 'multi', got 'fpn'"),
        (
            dict(pyramid='single', out_type='cls_token'),
            ValueError,
            "out_type='cls_token' needs pyramid=None, got 'single'",
        ),
        (
            dict(pyramid='single', out_indices=(1, 2)),
            ValueError,
            r"pyramid='single' takes 1 of the blocks .* got \(1, 2\)",
        ),
        (
            dict(pyramid='multi', out_indices=(1, 2)),
            ValueError,
            r"pyramid='multi' takes 4 of the blocks .* got \(1, 2\)",
        ),
        (dict(pyramid='single', arch=dict(PLAIN_ARCH, embed_dims=18)), ValueError, 'must divide by 4, got 18'),
        (dict(out_indices=4), ValueError, 'out_indices must be between -4 and 3, got 4'),
        (dict(frozen_stages=5), ValueError, 'frozen_stages must be between -1 and 4, got 5'),
        (dict(drop_path_rate=1.0), ValueError, r'drop_path_rate must lie in \[0, 1\), got 1.0'),
        (dict(img_size=0), ValueError, 'img_size must be at least 1, got 0'),
        (dict(img_size='224'), TypeError, "img_size takes integers, got '224'"),
        (dict(img_size=(1, 2, 3)), ValueError, r'img_size is a side, or height and width, got \(1, 2, 3\)'),
        (dict(arch='test-hier', cls_token='mean'), TypeError, "unexpected keyword argument 'cls_token'"),
    ],
)
def test_wrong_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        V2M(**{'arch': 'test', **options})
