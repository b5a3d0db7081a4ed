_base_ = [
    '../_base_/models/upernet_mamba2d.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/adamw_160k_mamba2d.py',
    '../_base_/mmseg_runtime.py',
]

checkpoint = 'https://github.com/cocoalex00/Mamba2D/releases/download/v2.0.0/M2D-T-backbone.ckpt'
model = dict(backbone=dict(init_cfg=dict(type='OfficialPretrained', checkpoint=checkpoint)))
