_base_ = [
    '../_base_/models/mask-rcnn_v2m_fpn.py',
    '../_base_/datasets/coco_instance_ms-crop.py',
    '../_base_/schedules/adamw_ms-crop-3x.py',
    '../_base_/mmdet_runtime.py',
]
