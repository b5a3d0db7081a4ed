"""Official names of Mamba2D's tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ssm_backbones.backbones.mamba2d import Mamba2D
from ssm_backbones.checkpoints.families import Family, count, leading
from ssm_backbones.checkpoints.naming import Naming, Rule, Shape, Shapes

_BLOCK, _OUR_BLOCK = 'stages.{s}.{b}', 'stages.{s}.blocks.{b}'
_HIDDEN_RATIO = 4


class Mamba2DFamily(Family):
    """Mamba2D.

    Its dialect is ``depths``, the blocks of each stage: in the official names, the norm that ends a stage has the
    number after its last block.
    """

    name = 'Mamba2D'
    model = Mamba2D
    main_key = 'state_dict'
    classifier_prefix = 'backbone.'
    norms_are_optional = False
    last_layer = 'head.fc2'
    official_mark = re.compile(r'stages\.\d+\.\d+\.token_mixer\.AT_log')

    def is_ours(self, shapes: Shapes) -> bool:
        return any(name.endswith('.mixer.top.A_log') for name in shapes)

    def dialect(self, official: Iterable[str]) -> dict[str, Any]:
        names = list(official)
        stages = count(names, r'stages\.(\d+)\.')
        # The norm at a stage's end has no module below its number.
        return dict(depths=[count(names, rf'stages\.{i}\.(\d+)\.\w+\.\w') for i in range(stages)])

    def default_dialect(self, settings: Mapping[str, Any], classifier: bool) -> dict[str, Any]:
        return dict(depths=list(settings['depths']))

    def naming(self, dialect: Mapping[str, Any]) -> Naming:
        mixer, our_mixer = f'{_BLOCK}.token_mixer', f'{_OUR_BLOCK}.mixer'
        rules = [Rule('ds.stem.conv', 'patch_embed.conv'), Rule('ds.stem.post_norm.norm', 'patch_embed.norm')]
        for i, depth in enumerate(dialect['depths']):
            rules += [
                Rule(f'stages.{i}.{depth}', f'stages.{i}.norm'),
                Rule(f'ds.ds{i + 1}.conv', f'stages.{i}.downsample'),
            ]
        for side, our_side in (('T', 'top'), ('L', 'left')):
            rules += [
                Rule(f'{mixer}.A{side}_log', f'{our_mixer}.{our_side}.A_log'),
                Rule(f'{mixer}.dt_proj{side}.weight', f'{our_mixer}.{our_side}.dt_weight'),
                Rule(f'{mixer}.dt_proj{side}.bias', f'{our_mixer}.{our_side}.dt_bias'),
            ]
        rules += [
            Rule(f'{mixer}.{name}', f'{our_mixer}.{ours}')
            for name, ours in (
                ('local_norm', 'local.norm'),
                ('local_path.pwconv1', 'local.expand'),
                ('local_path.dwconv', 'local.conv'),
                ('local_path.pwconv2', 'local.reduce'),
                ('local_path.act1', 'local.act1'),
                ('local_path.act2', 'local.act2'),
            )
        ]
        rules += [
            Rule(f'{mixer}.{name}', f'{our_mixer}.{name}')
            for name in ('D', 'in_proj', 'x_proj', 'out_proj', 'qkv', 'q_norm', 'k_norm', 'proj')
        ]
        return Naming(
            [
                *rules,
                *(
                    Rule(f'{_BLOCK}.{name}', f'{_OUR_BLOCK}.{ours}')
                    for name, ours in (
                        ('norm1', 'norm1'),
                        ('norm2', 'norm2'),
                        ('res_scale1', 'residual1'),
                        ('res_scale2', 'residual2'),
                        ('MLP', 'mlp'),
                    )
                ),
            ]
        )

    def head_naming(self, dialect: Mapping[str, Any]) -> Naming:
        return Naming(
            [
                Rule('norm', 'head.norm1'),
                Rule('head.fc1', 'head.fc1'),
                Rule('head.norm', 'head.norm2'),
                Rule('head.fc2', 'head.fc2'),
            ]
        )

    def settings(self, shapes: Shapes) -> dict[str, Any]:
        stages = range(count(shapes, r'stages\.(\d+)\.'))
        mixers = ['attention' if f'stages.{i}.blocks.0.mixer.qkv.weight' in shapes else 'scan' for i in stages]
        first_scan = f'stages.{mixers.index("scan")}' if 'scan' in mixers else 'stages.0'
        return dict(
            embed_dims=[leading(shapes[f'stages.{i}.norm.weight']) for i in stages],
            depths=[count(shapes, rf'stages\.{i}\.blocks\.(\d+)\.') for i in stages],
            mixers=mixers,
            d_state=(0, *shapes[f'{first_scan}.blocks.0.mixer.top.A_log'])[-1],
        )

    def head_shapes(self, settings: Mapping[str, Any], num_classes: int) -> dict[str, Shape]:
        width = settings['embed_dims'][-1]
        hidden = _HIDDEN_RATIO * width
        return {
            'head.norm1.weight': (width,),
            'head.norm1.bias': (width,),
            'head.fc1.weight': (hidden, width),
            'head.fc1.bias': (hidden,),
            'head.norm2.weight': (hidden,),
            'head.norm2.bias': (hidden,),
            'head.fc2.weight': (num_classes, hidden),
            'head.fc2.bias': (num_classes,),
        }

    def stem(self, names: Iterable[str]) -> str:
        return 'patch_embed.conv.weight'
