_base_ = '../_base_/demos/upernet_shapes.py'

model = dict(
    backbone=dict(
        type='VMamba',
        arch=dict(embed_dims=32, depths=[1, 1, 2, 1], d_state=1, ssm_ratio=2.0, version='v2')))
