_base_ = [
    '../_base_/models/mask-rcnn_vmamba_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/schedules/adamw_1x.py',
    '../_base_/mmdet_runtime.py',
]

# COCO is expected in data/coco/, laid out as mmdet describes it. The recipe is meant for 8 GPUs with 2 pictures each;
# for another batch, give --auto-scale-lr.
#
# The published figures start from ImageNet weights. Weights of this package's own VMamba are given so:
#   --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=PATH
# and, where PATH is a whole model's checkpoint, model.backbone.init_cfg.prefix=backbone.
