# Boxes alone, for annotations without masks: Mask R-CNN's recipe without its mask head. Not published.
_base_ = [
    '../_base_/models/faster-rcnn_fpn.py',
    'mmdet::_base_/datasets/coco_detection.py',
    '../_base_/schedules/adamw_1x.py',
    '../_base_/mmdet_runtime.py',
]

# V2M's authors published no weights. mask-rcnn_v2m-hier-small_fpn_1x_coco.py tells how to start from your own.
model = dict(backbone=dict(type='V2M', arch='hier-small', drop_path_rate=0.2))
