_base_ = './mask-rcnn_v2m-hier-small_fpn_ms-crop-3x_coco.py'

model = dict(backbone=dict(arch='hier-base', drop_path_rate=0.3))
