_base_ = '../_base_/demos/classifier_shapes.py'

model = dict(
    backbone=dict(
        type='V2M',
        arch=dict(layout='plain', embed_dims=128, depth=4, d_state=4),
        img_size=96),
    head=dict(in_channels=128))
