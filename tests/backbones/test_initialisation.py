"""Initialisation from scratch: every parameter of every published arch against the formula of its family's authors.

VMamba: linear layers from a truncated normal of deviation 0.02 and zero biases, but ``x_proj``, which is a plain
parameter in the authors' code, from PyTorch's default. Mamba2D: PyTorch's default throughout. V2M: PyTorch's default,
``out_proj`` divided by the root of the depth, a LeCun normal stem; its hierarchical layout is VMamba's around V2M's
mixer. All: convolutions from PyTorch's default, norms 1 and 0, the scans' own parameters as in Mamba.
"""

import copy
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_backbones import V2M, Mamba2D, VMamba
from tests.configs.catalogue import NAMES, config

FAMILIES = {'vmamba': VMamba, 'v2m': V2M, 'mamba2d': Mamba2D}
SEED = 1
TOLERANCE = 0.05
# Standard errors by which a tensor too small for the tolerance may be off.
SIGMAS = 5


class Drawn(NamedTuple):
    """Values brought to mean 0 and standard deviation 1 by the formula, and the range of the largest of many."""

    values: Tensor
    largest: tuple[float, float]


class Parameter(NamedTuple):
    """A tensor, the inputs of the layer that it belongs to, and the blocks of the backbone."""

    tensor: Tensor
    fan_in: int
    depth: int


# What a tensor has to equal, or is drawn from.
Formula = Callable[[Parameter], Tensor | Drawn]


def uniform(tensor: Tensor, bound: float) -> Drawn:
    return Drawn(tensor * (math.sqrt(3) / bound), (1.7, math.sqrt(3) * (1 + 1e-6)))


def default(p: Parameter) -> Drawn:
    """PyTorch's, of weights and biases of linear layers and convolutions."""
    return uniform(p.tensor, p.fan_in**-0.5)


def default_over_root_of_depth(p: Parameter) -> Drawn:
    return uniform(p.tensor, (p.fan_in * p.depth) ** -0.5)


def truncated_normal(p: Parameter) -> Drawn:
    """Of deviation 0.02, truncated so far off that it is a normal."""
    return Drawn(p.tensor / 0.02, (2.6, 8.0))


def lecun_normal(p: Parameter) -> Drawn:
    """Of deviation 1/sqrt(fan_in) after truncation at two deviations, which leaves 0.8796 of one."""
    return Drawn(p.tensor * math.sqrt(p.fan_in), (2.2, 2 / 0.8796))


def dt_weight(p: Parameter) -> Drawn:
    return uniform(p.tensor, p.tensor.shape[-1] ** -0.5)


def dt_bias(p: Parameter) -> Drawn:
    """The inverse softplus of step sizes that are log-uniform in [0.001, 0.1]."""
    low, high = math.log(1e-3), math.log(1e-1)
    return uniform(F.softplus(p.tensor.double()).log() - (low + high) / 2, (high - low) / 2 * (1 + 1e-4))


def A_log(p: Parameter) -> Tensor:
    return torch.arange(1.0, p.tensor.shape[-1] + 1).log().expand_as(p.tensor)


def ones(p: Parameter) -> Tensor:
    return torch.ones_like(p.tensor)


def zeros(p: Parameter) -> Tensor:
    return torch.zeros_like(p.tensor)


COMMON: dict[str, Formula] = {
    r'mixer\.(top\.|left\.)?A_log': A_log,
    r'mixer\.(top\.|left\.)?dt_weight': dt_weight,
    r'mixer\.(top\.|left\.)?dt_bias': dt_bias,
    r'mixer\.D': ones,
    r'norms?\.?\d*\.weight': ones,
    r'norms?\.?\d*\.bias': zeros,
    r'(conv|row_conv|column_conv|downsample)\.(weight|bias)': default,
}
MLP: dict[str, Formula] = {r'mlp\.fc[12]\.weight': truncated_normal, r'mlp\.fc[12]\.bias': zeros}
LINEAR_HEAD: dict[str, Formula] = {r'head\.fc\.weight': truncated_normal, r'head\.fc\.bias': zeros}
# The first that matches the end of a name counts.
RULES: dict[str, dict[str, Formula]] = {
    'vmamba': COMMON
    | MLP
    | {
        r'mixer\.x_proj\.weight': default,
        r'mixer\.(in_proj|out_proj)\.weight': truncated_normal,
        r'downsample\.reduction\.weight': truncated_normal,
    },
    'v2m': COMMON
    | MLP
    | {
        r'mixer\.(in_proj|x_proj|x_proj\.[01])\.weight': default,
        r'mixer\.out_proj\.weight': default_over_root_of_depth,
        r'patch_embed\.projection\.weight': lecun_normal,
        r'patch_embed\.projection\.bias': zeros,
        r'patch_embed\.(pos_embed|cls_token)': truncated_normal,
        r'pyramid\.levels\.0\.1\.weight': ones,
        r'pyramid\.levels\.0\.1\.bias': zeros,
    },
    'mamba2d': COMMON
    | {
        r'mixer\.(in_proj|x_proj|out_proj|qkv|proj|local\.expand|local\.reduce)\.(weight|bias)': default,
        r'mlp\.fc[12]\.(weight|bias)': default,
        r'mixer\.[qk]_norm\.weight': ones,
        r'mixer\.[qk]_norm\.bias': zeros,
        r'(act|residual)\d\.scale': ones,
        r'act\d\.bias': zeros,
    },
}
HEADS: dict[str, dict[str, Formula]] = {
    'vmamba': LINEAR_HEAD,
    'v2m': LINEAR_HEAD,
    'mamba2d': {r'head\.fc[12]\.(weight|bias)': default},
}


class Pool:
    """Equal kinds of tensors together: how many values, their sum, sum of squares, and the largest."""

    def __init__(self) -> None:
        self.count, self.sum, self.squares, self.largest = 0, 0.0, 0.0, 0.0
        self.expected = (0.0, math.inf)

    def add(self, drawn: Drawn) -> 'Pool':
        self.count += drawn.values.numel()
        self.sum += drawn.values.sum(dtype=torch.float64).item()
        self.squares += drawn.values.square().sum(dtype=torch.float64).item()
        self.largest = max(self.largest, drawn.values.abs().max().item())
        self.expected = drawn.largest
        return self

    def faults(self, name: str, sigmas: float = 0.0) -> Iterator[str]:
        mean = self.sum / self.count
        std = math.sqrt(max(self.squares / self.count - mean**2, 0.0))
        if abs(std - 1) > max(TOLERANCE, sigmas * 0.71 / math.sqrt(self.count)):
            yield f"{name}: {std:.3f} of the formula's standard deviation"
        if abs(mean) > max(TOLERANCE, SIGMAS / math.sqrt(self.count)):
            yield f'{name}: a mean of {mean:.3f} standard deviations'
        if self.largest > self.expected[1] or (self.count >= 1000 and self.largest < self.expected[0]):
            yield f'{name}: the largest has {self.largest:.3f} standard deviations'


def check(model: nn.Module, rules: dict[str, Formula], depth: int, pools: dict[str, Pool]) -> Iterator[str]:
    """What is wrong with a model's tensors one by one; they are added to the pools of their kinds."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, tensor in tensors.items():
        rule = next((rule for rule in rules if re.search(rf'(^|\.){rule}$', name)), None)
        if rule is None:
            yield f'{name} has no formula'
            continue
        layer, _, kind = name.rpartition('.')
        fan_in = tensors.get(f'{layer}.weight', tensor)[0].numel()
        expected = rules[rule](Parameter(tensor, fan_in, depth))
        if isinstance(expected, Tensor):
            if not torch.equal(tensor, expected):
                yield f'{name}: not {expected.flatten()[:4].tolist()}...'
            continue
        yield from Pool().add(expected).faults(name, SIGMAS)
        pools[f'{"biases" if kind == "bias" else "weights"} of {rule}'].add(expected)


def published(family: str) -> Iterator[tuple[str, nn.Module, int]]:
    """Name, model and depth of each published arch.

    Two blocks of each stage are enough where the depth is in no formula; some archs are the same then.
    """
    seen: list[Any] = []
    for name, arch in FAMILIES[family].ARCHS.items():
        if name.startswith('test'):
            continue
        plain = arch.get('layout') == 'plain'
        if family != 'v2m':
            arch = dict(arch, depths=[min(blocks, 2) for blocks in arch['depths']])
        if arch not in seen:
            seen.append(arch)
            # Class tokens and the pyramid are options of V2M's plain layout.
            options = dict(cls_token='corner', pyramid='single') if plain else {}
            yield name, FAMILIES[family](arch, **options), arch['depth'] if plain else sum(arch['depths'])


@pytest.mark.parametrize('family', FAMILIES)
def test_every_parameter_of_every_arch_is_drawn_as_the_authors_do(family):
    torch.manual_seed(SEED)
    pools: dict[str, Pool] = defaultdict(Pool)
    faults = [
        f'{name}: {fault}'
        for name, model, depth in published(family)
        for fault in check(model, RULES[family], depth, pools)
    ]
    faults += [fault for name, pool in pools.items() for fault in pool.faults(f'all {name}')]
    assert not faults, '\n'.join(faults)
    assert min(pool.count for pool in pools.values()) > 1000


def small_classifier(name: str) -> tuple[Config, int]:
    """A classifier's config with the small arch of its family and layout, and the depth of that."""
    cfg = config(name)
    backbone = cfg.model.backbone
    archs = FAMILIES[name.partition('/')[0]].ARCHS
    if isinstance(backbone.arch, str):
        arch = archs['test-hier' if 'hier' in backbone.arch else 'test']
        backbone.arch = dict(arch, version='v0') if backbone.arch.endswith('-v0') else arch
    dims, plain = backbone.arch['embed_dims'], 'depth' in backbone.arch
    cfg.model.head.in_channels = dims[-1] if isinstance(dims, list) else dims if plain else 8 * dims
    return cfg, backbone.arch['depth'] if plain else sum(backbone.arch['depths'])


@pytest.mark.parametrize('name', [name for name in NAMES if re.search('_in1k$|(nano|atto)_demo_shapes$', name)])
def test_classifiers_start_as_the_authors_do_once_mmengine_has_initialised_them(name):
    """``init_weights()`` is what mmengine's runner calls before training."""
    torch.manual_seed(SEED)
    cfg, depth = small_classifier(name)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    model.init_weights()
    family = name.partition('/')[0]
    faults = list(check(model, RULES[family] | HEADS[family], depth, defaultdict(Pool)))
    assert not faults, '\n'.join(faults)


@pytest.mark.parametrize(
    'name',
    [
        'vmamba/mask-rcnn_vmamba-nano_fpn_demo_shapes',
        'mamba2d/mask-rcnn_mamba2d-atto_fpn_demo_shapes',
        'vmamba/vmamba-nano_upernet_demo_shapes',
        'v2m/v2m-hier-nano_upernet_demo_shapes',
    ],
)
def test_detectors_and_segmentors_leave_the_backbone_as_it_was_drawn(name):
    cfg = config(name)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    drawn = copy.deepcopy(model.state_dict())
    model.init_weights()
    unchanged = {key for key, tensor in model.state_dict().items() if torch.equal(tensor, drawn[key])}
    assert {key for key in drawn if key.startswith('backbone.')} <= unchanged
    assert len(unchanged) < len(drawn)


def test_both_directions_of_mamba2d_start_with_the_same_step_sizes():
    mixer = Mamba2D('test').stages[0].blocks[0].mixer
    assert torch.equal(mixer.top.dt_bias, mixer.left.dt_bias)
    assert mixer.top.dt_bias is not mixer.left.dt_bias and not torch.equal(mixer.top.dt_weight, mixer.left.dt_weight)


def test_generic_initialisers_are_noticed():
    """A config's ``init_cfg`` for all linear layers, as mmpretrain's Swin has it, is wrong for each family."""
    for family, lost in (('vmamba', 'x_proj'), ('v2m', 'out_proj'), ('mamba2d', 'fc1')):
        model = FAMILIES[family]('test', init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.0))
        assert not list(check(model, RULES[family], 4, defaultdict(Pool)))
        model.init_weights()
        assert any(lost in fault for fault in check(model, RULES[family], 4, defaultdict(Pool)))
