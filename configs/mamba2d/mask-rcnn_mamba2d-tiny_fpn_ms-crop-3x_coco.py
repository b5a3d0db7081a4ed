_base_ = [
    '../_base_/models/mask-rcnn_mamba2d_fpn.py',
    '../_base_/datasets/coco_instance_ms-crop.py',
    '../_base_/schedules/adamw_ms-crop-3x_mamba2d.py',
    '../_base_/mmdet_runtime.py',
]

checkpoint = 'https://github.com/cocoalex00/Mamba2D/releases/download/v2.0.0/M2D-T-backbone.ckpt'
model = dict(backbone=dict(init_cfg=dict(type='OfficialPretrained', checkpoint=checkpoint)))
