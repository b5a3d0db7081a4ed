_base_ = './mask-rcnn_v2m-tiny_fpn_1x_coco.py'

model = dict(backbone=dict(arch='small', drop_path_rate=0.05), neck=dict(in_channels=[96, 192, 384, 384]))
