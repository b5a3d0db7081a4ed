"""What a config does, field by field, in the words of ``published.yaml``."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from mmengine.config import Config
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ssm_backbones import GroupedOptimWrapperConstructor, VMamba
from tests.configs.catalogue import ZOO, config, entries, model, pipeline

PUBLISHED = yaml.safe_load(Path(__file__).with_name('published.yaml').read_text(encoding='utf-8'))
TABLES = dict(imagenet='classification', coco='coco_mask_rcnn', ade20k='ade20k_upernet_160k')
TASKS = dict(mmpretrain='imagenet', mmdet='coco', mmseg='ade20k')
# The hierarchical V2M has VMamba's recipes, each those of the size of which the paper says it is.
SIBLINGS = {'hier-small': 'tiny-s1l8', 'hier-base': 'small-s2l15'}
ARCHITECTURE = ('embed_dims', 'depths', 'depth', 'layout', 'ssm_ratio', 'd_state', 'default_for')
NOT_IN_A_CONFIG = ('throughput', 'note')
HOSTS = {
    '1x': 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
    '3x': 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py',
    'ade20k': 'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    'imagenet': 'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py',
    'cascade': 'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
    'faster-rcnn': 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'dino': 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py',
    'segformer': 'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
}


@dataclass(frozen=True)
class Recipe:
    """A config of the zoo and where in ``published.yaml`` its model and recipe stand."""

    name: str

    @functools.cached_property
    def cfg(self) -> Config:
        return config(self.name)

    @property
    def family(self) -> str:
        return self.name.partition('/')[0]

    @property
    def task(self) -> str:
        return TASKS[self.cfg.default_scope]

    @property
    def arch(self) -> str:
        arch = self.cfg.model.backbone.arch
        return VMamba.ALIASES.get(arch, arch) if self.family == 'vmamba' else arch

    @property
    def schedule(self) -> str:
        return '3x' if '-3x_' in self.name else '1x'

    @property
    def plain(self) -> bool:
        return PUBLISHED[self.family]['classification'][self.arch].get('layout') == 'plain'

    @property
    def other_head(self) -> str | None:
        """The host library's model with which no author trained a backbone of this package."""
        found = [head for head in ('cascade', 'faster-rcnn', 'dino', 'segformer') if head in self.name]
        return found[0] if found else None

    @property
    def published_model(self) -> bool:
        """Whether the authors trained this model; with other heads, FSDP2 and plain V2M's pyramids they did not."""
        unpublished = self.other_head is not None or '_fsdp2_' in self.name
        return not unpublished and self.arch in PUBLISHED[self.family][TABLES[self.task]]

    @functools.cached_property
    def scheduler(self) -> tuple[Any, Any]:
        warmup, main = self.cfg.param_scheduler
        return warmup, main

    def published(self) -> dict[str, Any]:
        """Every published field of the recipe and of the model that the authors trained with it."""
        facts = PUBLISHED[self.family]
        follows = facts if self.family != 'v2m' else PUBLISHED['vmamba']
        recipe = follows['recipes'][self.task]
        if self.family == 'v2m' and self.plain and self.task == 'imagenet':
            recipe = {
                key: value[self.arch] if isinstance(value, Mapping) and self.arch in value else value
                for key, value in facts['recipes']['imagenet_plain'].items()
            }
        fields = {key: value for key, value in flatten(recipe) if key not in ('steps_1x', 'steps_3x')}
        if f'steps_{self.schedule}' in recipe:
            fields['steps'] = recipe[f'steps_{self.schedule}']
        classifier = facts['classification'][self.arch]
        fields |= {key: classifier[key] for key in ARCHITECTURE if key in classifier}
        if self.family == 'vmamba':
            fields |= facts[f'common_{"v0" if self.arch.endswith("v0") else "v2"}']
        rates = follows['recipes'].get('drop_path_downstream', {}).get(self.task, {})
        sibling = SIBLINGS.get(self.arch, self.arch)
        if self.family == 'v2m' and not self.plain and self.task == 'imagenet':
            fields['drop_path'] = follows['classification'][sibling]['drop_path']
        elif sibling in rates and not self.plain:
            fields['drop_path'] = rates[sibling]
        if self.other_head == 'dino':
            # mmdet's own recipe; test_recipes.py compares it.
            fields = {key: value for key, value in fields.items() if key in (*ARCHITECTURE, 'drop_path')}
        if self.other_head == 'segformer':
            del fields['auxiliary_on']
        if not self.published_model:
            return fields
        row = dict(facts[TABLES[self.task]][self.arch])
        if self.task == 'coco':
            row = {
                key.removesuffix(f'_{self.schedule}'): value
                for key, value in row.items()
                if not key.endswith(('1x', '3x')) or key.endswith(self.schedule)
            }
            row['metrics'] = row.pop(self.schedule)
        elif self.task == 'ade20k':
            row['metrics'] = row.pop('miou')
        else:
            row['metrics'] = [row.pop('top1')]
        if 'ckpt' in row:
            row['ckpt'] = f'{facts["release"]}/{row["ckpt"]}'
        return fields | {key: value for key, value in row.items() if key not in NOT_IN_A_CONFIG}

    def differences(self) -> dict[str, tuple[Any, Any]]:
        """The fields in which the config is not as published, with the published and the config's value."""
        found = {}
        for field, value in self.published().items():
            ours = READERS[field](self, value)
            same = ours == value
            if isinstance(value, float) and isinstance(ours, (int, float)):
                same = math.isclose(ours, value, rel_tol=1e-9)
            if not same:
                found[field] = (value, ours)
        return found


RECIPES = {name: Recipe(name) for name in ZOO}
READERS: dict[str, Callable[[Recipe, Any], Any]] = {}


def flatten(recipe: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            yield from ((f'{key}.{inner}', item) for inner, item in value.items())
        else:
            yield key, value


@functools.cache
def host(key: str) -> Config:
    """One of the host libraries' own configs, from which the papers' recipes come."""
    path, _ = Config._get_cfg_path(HOSTS[key], '')
    return Config.fromfile(path)


def reads(*fields: str) -> Callable[[Any], Any]:
    def register(reader: Any) -> Any:
        READERS.update(dict.fromkeys(fields, reader))
        return reader

    return register


def steps_of(recipe: Recipe, mode: str, kind: str) -> list[dict[str, Any]]:
    """Every transform of a type in a pipeline, also within random choices."""

    def walk(value: Any) -> Iterator[dict[str, Any]]:
        if isinstance(value, Mapping):
            if value.get('type') == kind:
                yield value
            for inner in value.values():
                yield from walk(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from walk(inner)

    return list(walk(pipeline(recipe.cfg[f'{mode}_dataloader'].dataset.pipeline)))


def interpolations(recipe: Recipe, mode: str) -> str:
    if mode == 'train':
        kinds = {step['interpolation'] for step in steps_of(recipe, mode, 'RandomResizedCrop')}
        policies = {step['hparams']['interpolation'] for step in steps_of(recipe, mode, 'RandAugment')}
        assert kinds == policies
    else:
        kinds = {step['interpolation'] for step in steps_of(recipe, mode, 'ResizeEdge')}
    return 'random' if kinds == {'bilinear', 'bicubic'} else ', '.join(sorted(kinds))


@reads('optimizer')
def _(recipe: Recipe, _: Any) -> str:
    return recipe.cfg.optim_wrapper.optimizer.type


@reads('lr')
def _(recipe: Recipe, _: Any) -> float:
    return recipe.cfg.optim_wrapper.optimizer.lr


@reads('betas')
def _(recipe: Recipe, _: Any) -> list[float]:
    return list(recipe.cfg.optim_wrapper.optimizer.betas)


@reads('weight_decay')
def _(recipe: Recipe, _: Any) -> float:
    return recipe.cfg.optim_wrapper.optimizer.weight_decay


@reads('clip_grad')
def _(recipe: Recipe, _: Any) -> float | None:
    clip = recipe.cfg.optim_wrapper.get('clip_grad')
    return clip and (clip['max_norm'] if set(clip) == {'max_norm'} else dict(clip))


@reads('amp')
def _(recipe: Recipe, _: Any) -> str | None:
    return dict(OptimWrapper=None, AmpOptimWrapper='float16', BFloat16OptimWrapper='bfloat16')[
        recipe.cfg.optim_wrapper.type
    ]


@reads('ema')
def _(recipe: Recipe, _: Any) -> float | None:
    hooks = [hook for hook in recipe.cfg.get('custom_hooks') or [] if hook.type == 'EMAHook']
    return 1 - hooks[0].momentum if hooks else None


@reads('batch')
def _(recipe: Recipe, _: Any) -> int:
    return recipe.cfg.auto_scale_lr.base_batch_size


@reads('epochs')
def _(recipe: Recipe, _: Any) -> int:
    return recipe.cfg.train_cfg.max_epochs


@reads('schedule')
def _(recipe: Recipe, _: Any) -> str:
    warmup, main = recipe.scheduler
    assert (warmup.type, warmup.begin, main.begin) == ('LinearLR', 0, warmup.end)
    if main.type == 'CosineAnnealingLR':
        assert main.end == recipe.cfg.train_cfg.max_epochs and main.by_epoch and main.convert_to_iter_based
        return 'cosine'
    assert (main.type, main.power, main.eta_min, main.end) == ('PolyLR', 1.0, 0.0, recipe.cfg.train_cfg.max_iters)
    return 'poly'


@reads('min_lr')
def _(recipe: Recipe, _: Any) -> float:
    return recipe.scheduler[1].eta_min


@reads('warmup_epochs')
def _(recipe: Recipe, _: Any) -> int:
    warmup = recipe.scheduler[0]
    assert warmup.by_epoch and warmup.convert_to_iter_based
    return warmup.end


@reads('warmup_fraction')
def _(recipe: Recipe, _: Any) -> float:
    return READERS['warmup_epochs'](recipe, None) / recipe.cfg.train_cfg.max_epochs


@reads('warmup_lr')
def _(recipe: Recipe, _: Any) -> float:
    return recipe.scheduler[0].start_factor * recipe.cfg.optim_wrapper.optimizer.lr


@reads('warmup_iters')
def _(recipe: Recipe, _: Any) -> int:
    assert not recipe.scheduler[0].by_epoch
    return recipe.scheduler[0].end


@reads('steps')
def _(recipe: Recipe, _: Any) -> list[int]:
    main = recipe.scheduler[1]
    assert (main.type, main.gamma, main.end) == ('MultiStepLR', 0.1, recipe.cfg.train_cfg.max_epochs)
    return main.milestones


@reads('augmentation.rand_augment')
def _(recipe: Recipe, value: str) -> str:
    drawn = steps_of(recipe, 'train', 'RandAugment')
    (policies,) = {
        (step['policies'], step['total_level'], step['magnitude_level'], step['magnitude_std']) for step in drawn
    }
    assert policies[:2] == ('timm_increasing', 10)
    # timm draws two of its operations. Where a choice of interpolation surrounds each, it is one of two each time.
    two = [step['num_policies'] for step in drawn] in ([2], [1, 1, 1, 1])
    words = [f'm{policies[2]}', f'mstd{policies[3]}', 'inc1'] if two else []
    return ' '.join(words[: len(value.split())])


@reads('augmentation.color_jitter')
def _(recipe: Recipe, _: Any) -> float | None:
    jitter = steps_of(recipe, 'train', 'ColorJitter')
    return jitter[0]['brightness'] if jitter else None


def _mixing(kind: str) -> Callable[[Recipe, Any], float]:
    return lambda recipe, _: {augment.type: augment.alpha for augment in recipe.cfg.model.train_cfg.augments}[kind]


READERS['augmentation.mixup'] = _mixing('Mixup')
READERS['augmentation.cutmix'] = _mixing('CutMix')


@reads('augmentation.switch_prob')
def _(recipe: Recipe, _: Any) -> float:
    train = recipe.cfg.model.train_cfg
    return train.probs[1] if 'probs' in train else 1 / len(train.augments)


@reads('augmentation.erasing')
def _(recipe: Recipe, _: Any) -> float:
    (step,) = steps_of(recipe, 'train', 'RandomErasing')
    assert step['mode'] == 'rand'
    return step['erase_prob']


@reads('augmentation.label_smoothing')
def _(recipe: Recipe, _: Any) -> float:
    loss = recipe.cfg.model.head.loss
    assert loss.type == 'LabelSmoothLoss'
    return loss.label_smooth_val


@reads('augmentation.repeated_augmentation')
def _(recipe: Recipe, _: Any) -> bool:
    sampler = recipe.cfg.train_dataloader.sampler
    return (sampler.type, sampler.get('num_repeats')) == ('RepeatAugSampler', 3)


@reads('augmentation.interpolation')
def _(recipe: Recipe, _: Any) -> str:
    return ', '.join(sorted({interpolations(recipe, mode) for mode in ('train', 'test')}))


@reads('augmentation.train_interpolation')
def _(recipe: Recipe, _: Any) -> str:
    return interpolations(recipe, 'train')


@reads('augmentation.test_interpolation')
def _(recipe: Recipe, _: Any) -> str:
    return interpolations(recipe, 'test')


@reads('test_crop_ratio')
def _(recipe: Recipe, _: Any) -> float:
    (resize,), (crop,) = (steps_of(recipe, 'test', kind) for kind in ('ResizeEdge', 'CenterCrop'))
    assert resize['edge'] == 'short'
    return crop['crop_size'] / resize['scale']


@reads('inherits')
def _(recipe: Recipe, value: str) -> str | list[str]:
    """The published phrase, or what of the host's own config is not so here."""
    trained = host(recipe.schedule if recipe.task == 'coco' else 'ade20k')
    own = ('clip_grad',) if 'clip_grad' in recipe.published() else ()
    # Boxes alone are read and evaluated in a way of their own.
    data = host('faster-rcnn') if recipe.other_head == 'faster-rcnn' else trained
    differing = compare(
        recipe.cfg,
        data,
        ('train_dataloader', 'val_dataloader', 'test_dataloader', 'val_evaluator', 'test_evaluator'),
    )
    differing += compare(recipe.cfg, trained, ('param_scheduler', 'tta_pipeline', 'tta_model'))
    # How often is validated changes nothing that is trained.
    differing += compare(
        dict(train_cfg=recipe.cfg.train_cfg), dict(train_cfg=trained.train_cfg), ('train_cfg',), but=('val_interval',)
    )
    # How parameters are grouped changes nothing that is trained.
    own = ('optimizer', 'constructor', 'paramwise_cfg', *own)
    differing += compare(recipe.cfg, trained, ('optim_wrapper',), but=own)
    if recipe.cfg.get('custom_hooks'):
        differing.append('custom_hooks')
    built = host(recipe.other_head).model if recipe.other_head else trained.model
    differing += compare(
        recipe.cfg.model,
        built,
        ('type', 'rpn_head', 'roi_head', 'train_cfg', 'test_cfg', 'decode_head', 'auxiliary_head', 'data_preprocessor'),
        but=('in_channels',),
    )
    return differing or value


def compare(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], keys: tuple[str, ...], but: tuple[str, ...] = ()
) -> list[str]:
    """Those of the keys whose values differ, without the named ones of their own keys."""

    def plain(value: Any) -> Any:
        (value,) = pipeline([value])
        return {key: inner for key, inner in value.items() if key not in but} if isinstance(value, dict) else value

    return [key for key in keys if plain(ours.get(key)) != plain(theirs.get(key))]


@reads('neck')
def _(recipe: Recipe, _: Any) -> str:
    neck = recipe.cfg.model.neck
    norm = neck.get('norm_cfg')
    assert neck.num_outs == 5
    return neck.type + (f' with {norm["type"]}({norm["num_groups"]})' if norm else '')


@reads('channels_in')
def _(recipe: Recipe, value: list[str]) -> Any:
    first, *_ = ours = recipe.cfg.model.decode_head.in_channels
    assert first == model(recipe.name).backbone.out_channels[0]
    return value if ours == [first, 2 * first, 4 * first, 8 * first] else ours


@reads('auxiliary_on')
def _(recipe: Recipe, _: Any) -> str:
    head = recipe.cfg.model.auxiliary_head
    assert head.in_channels == model(recipe.name).backbone.out_channels[head.in_index]
    return f'stage {head.in_index + 1}'


@reads('no_weight_decay')
def _(recipe: Recipe, value: str) -> str | list[str]:
    """The published phrase, or the kinds of parameters that the config spares otherwise."""
    built, full = model(recipe.name), recipe.cfg.optim_wrapper.optimizer.weight_decay
    groups = parameter_groups(recipe.name)
    differing = set()
    for name, parameter in built.named_parameters():
        decay = groups[name].get('weight_decay', full)
        assert decay in (0, full), name
        if (decay == 0) != _spared(value, name, parameter.ndim):
            differing.add(_kind(built, name))
    return sorted(differing) or value


def parameter_groups(name: str) -> dict[str, dict[str, Any]]:
    """What the optimizer is given for each parameter of a config's model; an optimizer itself takes longer."""
    wrapper = config(name).optim_wrapper.to_dict()
    assert wrapper.pop('constructor') == GroupedOptimWrapperConstructor.__name__
    constructor = GroupedOptimWrapperConstructor(
        {key: value for key, value in wrapper.items() if key != 'paramwise_cfg'}, wrapper['paramwise_cfg']
    )
    groups: list[dict[str, Any]] = []
    constructor.add_params(groups, model(name))
    by_id = {id(parameter): group for group in groups for parameter in group['params']}
    return {name: by_id[id(parameter)] for name, parameter in model(name).named_parameters()}


def _spared(rule: str, name: str, ndim: int) -> bool:
    """Whether the authors' rule spares a parameter, which is told by our name."""
    leaf = name.rpartition('.')[2]
    if rule == 'names with norm':
        # The authors' stem and downsampling are sequences, whose norms have a number for a name.
        return 'norm' in name and '.patch_embed.' not in name and '.downsample.' not in name
    flat = ndim == 1 or leaf == 'D' or leaf == 'bias'
    if rule == 'one dimension':
        return flat
    assert rule == 'one dimension, A, D'
    return flat or leaf == 'A_log'


def _kind(built: nn.Module, name: str) -> str:
    owner, _, leaf = name.rpartition('.')
    if leaf not in ('weight', 'bias'):
        return leaf
    norm = isinstance(built.get_submodule(owner), (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase))
    return 'norms' if norm else name


@reads('embed_dims')
def _(recipe: Recipe, value: Any) -> Any:
    widths = model(recipe.name).backbone.num_features
    return list(widths) if isinstance(value, list) else widths[0]


@reads('depths')
def _(recipe: Recipe, _: Any) -> list[int]:
    return list(model(recipe.name).backbone.depths)


@reads('depth')
def _(recipe: Recipe, _: Any) -> int:
    return sum(model(recipe.name).backbone.depths)


@reads('layout')
def _(recipe: Recipe, _: Any) -> str:
    # A plain one has a position embedding, and one grid.
    return (
        'plain'
        if any(name.endswith('pos_embed') for name in model(recipe.name).backbone.state_dict())
        else ('hierarchical')
    )


@reads('default_for')
def _(recipe: Recipe, value: str) -> str | None:
    return value if VMamba.ALIASES[value] == recipe.arch else None


def _blocks(recipe: Recipe) -> Iterator[tuple[int, nn.Module]]:
    backbone = model(recipe.name).backbone
    for stage, width in zip(backbone.stages, backbone.num_features, strict=False):
        for block in stage.blocks:
            yield width, block


def _of_every_block(read: Callable[[int, Any], Any]) -> Callable[[Recipe, Any], Any]:
    def reader(recipe: Recipe, _: Any) -> Any:
        (value,) = {read(width, block) for width, block in _blocks(recipe)}
        return value

    return reader


READERS |= {
    'ssm_ratio': _of_every_block(lambda width, block: block.mixer.D.shape[-1] / width),
    'd_state': _of_every_block(lambda width, block: block.mixer.A_log.shape[-1]),
    'dt_rank': _of_every_block(
        lambda width, block: (
            'ceil(embed_dims/16)'
            if block.mixer.dt_weight.shape[-1] == (-(-width // 16))
            else block.mixer.dt_weight.shape
        )
    ),
    'mlp_ratio': _of_every_block(
        lambda width, block: block.mlp.fc1.out_features / width if getattr(block, 'mlp', None) else 0
    ),
    'conv': _of_every_block(lambda width, block: block.mixer.conv.kernel_size[0]),
    'conv_bias': _of_every_block(lambda width, block: block.mixer.conv.bias is not None),
}


@reads('version')
def _(recipe: Recipe, _: Any) -> str:
    return VMamba.ARCHS[recipe.arch]['version']


@reads('drop_path')
def _(recipe: Recipe, _: Any) -> float:
    return recipe.cfg.model.backbone.drop_path_rate


@reads('head_dropout')
def _(recipe: Recipe, _: Any) -> float:
    return recipe.cfg.model.head.dropout


@reads('params')
def _(recipe: Recipe, _: Any) -> float:
    return entries()[recipe.name]['Metadata']['Parameters (M)']


@reads('flops')
def _(recipe: Recipe, _: Any) -> float:
    return entries()[recipe.name]['Metadata']['FLOPs (G)']


@reads('metrics')
def _(recipe: Recipe, _: Any) -> list[float]:
    return [value for result in entries()[recipe.name]['Results'] for value in result['Metrics'].values()]


@reads('ckpt')
def _(recipe: Recipe, _: Any) -> str:
    return entries()[recipe.name]['Weights']
