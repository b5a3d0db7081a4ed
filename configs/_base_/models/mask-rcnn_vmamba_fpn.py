_base_ = './mask-rcnn_fpn.py'

model = dict(backbone=dict(type='VMamba', arch='tiny', drop_path_rate=0.2))
