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
