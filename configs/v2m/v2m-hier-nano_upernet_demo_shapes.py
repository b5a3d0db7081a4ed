_base_ = '../_base_/demos/upernet_shapes.py'

model = dict(
    backbone=dict(
        type='V2M',
        arch=dict(layout='hierarchical', embed_dims=32, depths=[1, 1, 2, 1], d_state=2, ssm_ratio=1.0)))
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))
