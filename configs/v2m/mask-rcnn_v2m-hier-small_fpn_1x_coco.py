_base_ = [
    '../_base_/models/mask-rcnn_v2m_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/schedules/adamw_1x.py',
    '../_base_/mmdet_runtime.py',
]

# V2M's authors published no weights. The recipe starts from a training on ImageNet of your own:
#   --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=PATH \
#       model.backbone.init_cfg.prefix=backbone.
