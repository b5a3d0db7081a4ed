# Boxes alone, for annotations without masks: Mask R-CNN's recipe without its mask head. Not published.
_base_ = [
    '../_base_/models/faster-rcnn_fpn.py',
    'mmdet::_base_/datasets/coco_detection.py',
    '../_base_/schedules/adamw_1x.py',
    '../_base_/mmdet_runtime.py',
]

checkpoint = 'https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth'
model = dict(
    backbone=dict(
        type='VMamba',
        arch='tiny',
        drop_path_rate=0.2,
        init_cfg=dict(type='OfficialPretrained', checkpoint=checkpoint)))
