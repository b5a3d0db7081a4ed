_base_ = '../_base_/demos/classifier_shapes.py'

model = dict(
    backbone=dict(
        type='Mamba2D',
        arch=dict(embed_dims=[32, 64, 128, 256], depths=[1, 1, 2, 1], d_state=4)),
    neck=None,
    head=dict(type='Mamba2DClsHead', init_cfg=None))
optim_wrapper = dict(optimizer=dict(lr=4e-4))
