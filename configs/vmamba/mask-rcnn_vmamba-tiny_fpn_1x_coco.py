_base_ = [
    '../_base_/models/mask-rcnn_vmamba_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/schedules/adamw_1x.py',
    '../_base_/mmdet_runtime.py',
]

# COCO is expected in data/coco/, laid out as mmdet describes it. The recipe is meant for 8 GPUs with 2 images each;
# for another batch, give --auto-scale-lr. Training starts from the authors' ImageNet weights, which are downloaded.
# Name a file by --cfg-options model.backbone.init_cfg.checkpoint=PATH, or do without by model.backbone.init_cfg=None.
checkpoint = 'https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth'
model = dict(backbone=dict(init_cfg=dict(type='OfficialPretrained', checkpoint=checkpoint)))
