"""Every field of every recipe is the authors', as ``published.yaml`` has it, or stands among the departures."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.configs.catalogue import ROOT, ZOO, config, model, pipeline
from tests.configs.recipes import PUBLISHED, READERS, RECIPES, TABLES, Recipe, compare, flatten, host, parameter_groups

PAGE = ' '.join((ROOT / 'docs' / 'recipes.md').read_text(encoding='utf-8').split())
SEG = [name for name in ZOO if '_upernet_' in name]
CLS = [name for name in ZOO if name.endswith('_in1k')]
DINO = 'vmamba/dino-4scale_vmamba-tiny_8xb2-12e_coco'


@dataclass(frozen=True)
class Departure:
    """What a config does otherwise than its authors, on purpose.

    Attributes:
        field: of ``published.yaml``.
        ours: what the config has instead; a function of the recipe where it is not the same for all.
        holds: for which recipes.
        reason: how docs/recipes.md begins to say it.
    """

    field: str
    ours: Any
    holds: Callable[[Recipe], bool]
    reason: str


SPARED = '**The parameters of the scans do not decay**'
DEPARTURES = (
    Departure(
        'augmentation.color_jitter', None, lambda recipe: not recipe.plain, '**No colour jitter beside RandAugment**'
    ),
    Departure(
        'no_weight_decay',
        ['A_log', 'dt_bias'],
        lambda recipe: recipe.family != 'mamba2d' and recipe.task == 'imagenet',
        SPARED,
    ),
    Departure(
        'no_weight_decay',
        ['A_log', 'D', 'dt_bias', 'norms'],
        lambda recipe: recipe.family != 'mamba2d' and recipe.task != 'imagenet' and not recipe.plain,
        SPARED,
    ),
    Departure(
        'no_weight_decay',
        ['A_log', 'D', 'dt_bias', 'norms', 'pos_embed'],
        lambda recipe: recipe.task != 'imagenet' and recipe.plain,
        SPARED,
    ),
    Departure(
        'channels_in',
        lambda recipe: [
            width // part for width in (model(recipe.name).backbone.num_features[0],) for part in (4, 2, 1, 1)
        ],
        lambda recipe: recipe.plain,
        '**Plain V2M in detectors and segmentors**',
    ),
)


@pytest.mark.parametrize('name', ZOO)
def test_every_field_is_as_published_or_a_known_departure(name) -> None:
    recipe = RECIPES[name]
    fields = recipe.published()
    known = {
        departure.field: departure.ours(recipe) if callable(departure.ours) else departure.ours
        for departure in DEPARTURES
        if departure.field in fields and departure.holds(recipe)
    }
    assert {field: ours for field, (_, ours) in recipe.differences().items()} == known


def test_every_published_field_has_its_recipe() -> None:
    """A field that is added to the facts is compared, and every model of theirs has a config."""
    compared: dict[str, set[str]] = {family: set() for family in PUBLISHED}
    models = set()
    for recipe in RECIPES.values():
        compared[recipe.family] |= recipe.published().keys()
        if recipe.family == 'v2m' and not recipe.plain:
            compared['vmamba'] |= recipe.published().keys()
        if recipe.published_model:
            models.add((recipe.family, recipe.task, recipe.arch, recipe.schedule if recipe.task == 'coco' else ''))
    for family, facts in PUBLISHED.items():
        recipes = {
            key.removesuffix('_plain'): value
            for key, value in facts['recipes'].items()
            if key in ('imagenet', 'imagenet_plain', 'coco', 'ade20k')
        }
        fields = {
            re.sub(r'^steps_[13]x$', 'steps', field)
            for recipe in recipes.values()
            for field, _ in flatten({key: value for key, value in recipe.items() if key not in ('lr', 'weight_decay')})
        }
        assert fields <= compared[family]
    assert set().union(*compared.values()) <= READERS.keys()
    assert models == {
        (family, task, arch, schedule)
        for family, facts in PUBLISHED.items()
        for task, table in TABLES.items()
        for arch, row in facts[table].items()
        for schedule in (('1x', '3x') if task == 'coco' else ('',))
        if schedule in row or not schedule
    }


@pytest.mark.parametrize('departure', DEPARTURES, ids=lambda departure: departure.field)
def test_departures_happen_and_the_page_says_so(departure) -> None:
    happen = [
        recipe for recipe in RECIPES.values() if departure.field in recipe.published() and departure.holds(recipe)
    ]
    assert happen and departure.reason in PAGE


def test_the_page_names_what_nobody_published() -> None:
    for name in ZOO:
        if not RECIPES[name].published_model and RECIPES[name].other_head:
            assert f'`{name.partition("/")[2]}`' in PAGE
    plain = {name: RECIPES[name] for name in ZOO if RECIPES[name].family == 'v2m' and RECIPES[name].plain}
    rates = {name: recipe.cfg.model.backbone.drop_path_rate for name, recipe in plain.items()}
    # That of the ImageNet recipe: no other one is published.
    assert rates == {
        name: PUBLISHED['v2m']['classification'][recipe.arch]['drop_path'] for name, recipe in plain.items()
    }


@pytest.mark.parametrize('name', CLS)
def test_heads_start_as_their_authors_do(name) -> None:
    head = config(name).model.head
    drawn = dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.0)
    assert head.init_cfg == (None if name.startswith('mamba2d/') else drawn)
    assert head.num_classes == 1000


@pytest.mark.parametrize('name', ZOO)
def test_no_initialiser_above_a_backbone_reaches_into_it(name) -> None:
    """mmengine applies a module's ``init_cfg`` to every layer below it."""
    built = model(name)
    assert not built.init_cfg
    kind = (built.backbone.init_cfg or dict(type=None))['type']
    weights = RECIPES[name].task != 'imagenet' and RECIPES[name].family != 'v2m'
    assert kind == ('OfficialPretrained' if weights else None)


@pytest.mark.parametrize('name', CLS)
def test_checkpoints_of_a_long_training_do_not_fill_the_disk(name) -> None:
    assert 0 < config(name).default_hooks.checkpoint.max_keep_ckpts <= 10


@pytest.mark.parametrize('name', CLS)
def test_imagenet_images(name) -> None:
    """Beside the fields that are published, the pipelines are mmpretrain's for Swin."""
    cfg, swin = config(name), host('imagenet')
    train, test = (pipeline(cfg[f'{mode}_dataloader'].dataset.pipeline) for mode in ('train', 'test'))
    host_train, host_test = (pipeline(swin[f'{mode}_dataloader'].dataset.pipeline) for mode in ('train', 'test'))
    if not name.startswith('mamba2d/'):
        assert (train, test) == (host_train, host_test)
        return
    # Each interpolating step is the host's own, drawn bilinear or bicubic; two draws of one policy are one of two.
    crop, policies = host_train[1], host_train[3] | dict(num_policies=1)
    crops = [[crop | dict(interpolation=kind)] for kind in ('bilinear', 'bicubic')]
    drawn = [
        [policies | dict(hparams=policies['hparams'] | dict(interpolation=kind))] for kind in ('bilinear', 'bicubic')
    ]
    choice = dict(type='RandomChoice', transforms=drawn)
    assert train == [
        host_train[0],
        dict(type='RandomChoice', transforms=crops),
        host_train[2],
        choice,
        choice,
        *host_train[4:],
    ]
    assert host_train[3]['num_policies'] == 2
    assert test == [host_test[0], host_test[1] | dict(scale=224), *host_test[2:]]


@pytest.mark.parametrize('name', SEG)
def test_ade20k_multi_scale_testing(name) -> None:
    cfg = config(name)
    scales, flips, *_ = cfg.tta_pipeline[-1].transforms
    assert [scale.scale_factor for scale in scales] == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    assert [flip.prob for flip in flips] == [0.0, 1.0]
    assert cfg.tta_model.type == 'SegTTAModel'


def test_dino_has_mmdet_s_own_recipe() -> None:
    cfg = config(DINO)
    assert (
        compare(
            cfg,
            host('dino'),
            (
                'train_dataloader',
                'val_dataloader',
                'test_dataloader',
                'val_evaluator',
                'param_scheduler',
                'train_cfg',
                'auto_scale_lr',
            ),
        )
        == []
    )
    assert compare(cfg, host('dino'), ('optim_wrapper',), but=('constructor', 'paramwise_cfg')) == []
    assert compare(cfg.model, host('dino').model, tuple(host('dino').model), but=('in_channels',)) == ['backbone']
    groups = parameter_groups(DINO)
    assert not {
        key for key, group in groups.items() if group.get('lr', 1e-4) != (1e-5 if key.startswith('backbone.') else 1e-4)
    }
    # What is mmdet's keeps mmdet's decay.
    assert not {
        key
        for key, group in groups.items()
        if not key.startswith('backbone.') and group.get('weight_decay', 1e-4) != 1e-4
    }
