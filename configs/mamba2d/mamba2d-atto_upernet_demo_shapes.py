_base_ = '../_base_/demos/upernet_shapes.py'

model = dict(
    backbone=dict(
        type='Mamba2D',
        arch=dict(embed_dims=[32, 64, 128, 256], depths=[1, 1, 2, 1], d_state=4)))
optim_wrapper = dict(optimizer=dict(lr=3e-3), paramwise_cfg=dict(flat_decay_mult=0.0))
