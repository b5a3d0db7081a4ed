_base_ = './mask-rcnn_fpn.py'

model = dict(backbone=dict(type='V2M', arch='hier-small', drop_path_rate=0.2))
