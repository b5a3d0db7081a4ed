# Boxes alone, for annotations without masks: Mask R-CNN's recipe without its mask head. Not published.
_base_ = [
    '../_base_/models/faster-rcnn_fpn.py',
    'mmdet::_base_/datasets/coco_detection.py',
    '../_base_/schedules/adamw_1x_mamba2d.py',
    '../_base_/mmdet_runtime.py',
]

checkpoint = 'https://github.com/cocoalex00/Mamba2D/releases/download/v2.0.0/M2D-T-backbone.ckpt'
model = dict(
    backbone=dict(
        type='Mamba2D',
        arch='tiny',
        drop_path_rate=0.175,
        init_cfg=dict(type='OfficialPretrained', checkpoint=checkpoint)),
    neck=dict(in_channels=[64, 128, 320, 512], norm_cfg=dict(type='GN', num_groups=32)))
