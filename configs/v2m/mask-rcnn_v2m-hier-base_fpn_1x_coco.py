_base_ = './mask-rcnn_v2m-hier-small_fpn_1x_coco.py'

model = dict(backbone=dict(arch='hier-base', drop_path_rate=0.3))
