_base_ = '../_base_/demos/upernet_shapes.py'

model = dict(
    backbone=dict(
        type='V2M',
        arch=dict(layout='plain', embed_dims=128, depth=4, d_state=4),
        pyramid='multi',
        out_indices=None,
        img_size=96),
    decode_head=dict(in_channels=[32, 64, 128, 128]),
    auxiliary_head=dict(in_channels=128))
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))
