"""Official names of VMamba's tensors, in all versions of the authors' code."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ssm_backbones.backbones.vmamba import VMamba
from ssm_backbones.checkpoints.families import Family, count, leading
from ssm_backbones.checkpoints.naming import Naming, Rule, Shape, Shapes, by_route, merged

_BLOCK, _OUR_BLOCK = 'layers.{s}.blocks.{b}', 'stages.{s}.blocks.{b}'


class VMambaFamily(Family):
    """VMamba v2 and v0.

    Its dialect is ``version``; ``scan``, whether the projections of the four routes are 'stacked', ``x_proj_weight``
    (4, F, E) and ``dt_projs_weight`` (4, E, R) as in all released files and in the code that reads them, or 'flat',
    ``x_proj.weight`` (4F, E) and ``dt_projs.weight`` (4E, R) as in the single-file ``vmamba.py`` of 2025, which reads
    both; ``names``, 'current', or 'first' for those of the code that trained the first release; ``norms``, the name of
    the output norms: 'classifier' (last stage only) or 'outnorm' (detectors and segmentors); and ``stages``, their
    number.
    """

    name = 'VMamba'
    model = VMamba
    main_key = 'model'
    classifier_prefix = ''
    norms_are_optional = True
    last_layer = 'head.fc'
    official_mark = re.compile(r'layers\.\d+\.blocks\.\d+\.(op|self_attention)\.A_logs')

    def is_ours(self, shapes: Shapes) -> bool:
        shape = shapes.get('stages.0.blocks.0.mixer.A_log', ())
        # V2M's mixers also have an A_log, for two passes instead of four routes.
        return len(shape) == 3 and shape[0] == 4

    def dialect(self, official: Iterable[str]) -> dict[str, Any]:
        names = list(official)
        return dict(
            version='v2' if any('.mlp.' in name for name in names) else 'v0',
            scan='stacked' if any(name.endswith(('.x_proj_weight', '.dt_projs_weight')) for name in names) else 'flat',
            names='first' if any('.self_attention.' in name for name in names) else 'current',
            norms='outnorm' if any(name.startswith('outnorm') for name in names) else 'classifier',
            stages=count(names, r'layers\.(\d+)\.'),
        )

    def default_dialect(self, settings: Mapping[str, Any], classifier: bool) -> dict[str, Any]:
        return dict(
            version=settings['version'],
            scan='stacked',
            names='current',
            norms='classifier' if classifier else 'outnorm',
            stages=len(settings['depths']),
        )

    def naming(self, dialect: Mapping[str, Any]) -> Naming:
        first = dialect['names'] == 'first'
        op, mixer = f'{_BLOCK}.{"self_attention" if first else "op"}', f'{_OUR_BLOCK}.mixer'
        if dialect['scan'] == 'stacked':
            projections = [
                Rule(f'{op}.x_proj_weight', f'{mixer}.x_proj.weight', by_route),
                Rule(f'{op}.dt_projs_weight', f'{mixer}.dt_weight'),
            ]
        else:
            projections = [
                Rule(f'{op}.x_proj', f'{mixer}.x_proj'),
                Rule(f'{op}.dt_projs.weight', f'{mixer}.dt_weight', merged),
            ]
        if dialect['norms'] == 'classifier':
            norms = Rule('norm' if first else 'classifier.norm', f'norm{dialect["stages"] - 1}')
        else:
            norms = Rule('outnorm{s}', 'norm{s}')
        return Naming(
            [
                *self._resampling(dialect['version'], first),
                Rule(f'{_BLOCK}.{"ln_1" if first else "norm"}', f'{_OUR_BLOCK}.norm1'),
                Rule(f'{_BLOCK}.norm2', f'{_OUR_BLOCK}.norm2'),
                Rule(f'{_BLOCK}.mlp', f'{_OUR_BLOCK}.mlp'),
                Rule(f'{op}.in_proj', f'{mixer}.in_proj'),
                Rule(f'{op}.conv2d', f'{mixer}.conv'),
                *projections,
                Rule(f'{op}.dt_projs_bias', f'{mixer}.dt_bias'),
                Rule(f'{op}.A_logs', f'{mixer}.A_log', merged),
                Rule(f'{op}.Ds', f'{mixer}.D', merged),
                Rule(f'{op}.out_norm', f'{mixer}.norm'),
                Rule(f'{op}.out_proj', f'{mixer}.out_proj'),
                norms,
            ]
        )

    @staticmethod
    def _resampling(version: str, first: bool) -> list[Rule]:
        down, our_down = 'layers.{s}.downsample', 'stages.{s}.downsample'
        if version == 'v2':
            return [
                Rule('patch_embed.0', 'patch_embed.first.conv'),
                Rule('patch_embed.2', 'patch_embed.first.norm'),
                Rule('patch_embed.5', 'patch_embed.second.conv'),
                Rule('patch_embed.7', 'patch_embed.second.norm'),
                Rule(f'{down}.1', f'{our_down}.conv'),
                Rule(f'{down}.3', f'{our_down}.norm'),
            ]
        if first:
            conv, norm, merging_norm, reduction = 'proj', 'norm', 'norm', 'reduction'
        else:
            conv, norm, merging_norm, reduction = '0', '2', '1', '2'
        return [
            Rule(f'patch_embed.{conv}', 'patch_embed.projection.conv'),
            Rule(f'patch_embed.{norm}', 'patch_embed.projection.norm'),
            Rule(f'{down}.{merging_norm}', f'{our_down}.norm'),
            Rule(f'{down}.{reduction}', f'{our_down}.reduction'),
        ]

    def head_naming(self, dialect: Mapping[str, Any]) -> Naming:
        return Naming([Rule('head' if dialect['names'] == 'first' else 'classifier.head', 'head.fc')])

    def settings(self, shapes: Shapes) -> dict[str, Any]:
        width = leading(shapes['stages.0.blocks.0.norm1.weight'])
        inner = leading(shapes['stages.0.blocks.0.mixer.norm.weight'])
        d_state = (0, *shapes['stages.0.blocks.0.mixer.A_log'])[-1]
        depths = [count(shapes, rf'stages\.{i}\.blocks\.(\d+)\.') for i in range(count(shapes, r'stages\.(\d+)\.'))]
        version = 'v2' if any('.mlp.' in name for name in shapes) else 'v0'
        return dict(embed_dims=width, depths=depths, d_state=d_state, ssm_ratio=inner / max(width, 1), version=version)

    def head_shapes(self, settings: Mapping[str, Any], num_classes: int) -> dict[str, Shape]:
        width = settings['embed_dims'] * 2 ** (len(settings['depths']) - 1)
        return {'head.fc.weight': (num_classes, width), 'head.fc.bias': (num_classes,)}

    def stem(self, names: Iterable[str]) -> str:
        v2, v0 = 'patch_embed.first.conv.weight', 'patch_embed.projection.conv.weight'
        return v0 if v0 in set(names) else v2
