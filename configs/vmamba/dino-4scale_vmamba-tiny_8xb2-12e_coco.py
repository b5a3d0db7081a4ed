# mmdet's DINO with its own recipe. The figures of this combination are not published.
_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'

custom_imports = dict(imports=['ssm_backbones'], allow_failed_imports=False)
checkpoint = 'https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth'
model = dict(
    backbone=dict(
        _delete_=True,
        type='VMamba',
        arch='tiny',
        out_indices=(1, 2, 3),
        drop_path_rate=0.2,
        init_cfg=dict(type='OfficialPretrained', checkpoint=checkpoint)),
    neck=dict(in_channels=[192, 384, 768]))
# The recipe's tenth of the learning rate for the whole backbone, of which norms and the scan's parameters do not decay.
# The longest key that a name contains is the only one that counts, so each of these says both.
undecayed = [
    'norm', 'patch_embed.first.norm', 'patch_embed.second.norm',
    *[f'stages.{stage}.downsample.norm' for stage in range(3)],
    *[f'stages.{stage}.blocks.{block}.{part}' for stage, depth in enumerate([2, 2, 8, 2]) for block in range(depth)
      for part in ('norm', 'mixer.norm', 'mixer.A_log', 'mixer.D', 'mixer.dt_bias')]
]
optim_wrapper = dict(
    constructor='GroupedOptimWrapperConstructor',
    paramwise_cfg=dict(custom_keys={f'backbone.{name}': dict(lr_mult=0.1, decay_mult=0.0) for name in undecayed}))
