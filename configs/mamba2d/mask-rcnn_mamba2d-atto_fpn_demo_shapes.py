_base_ = '../_base_/demos/mask-rcnn_shapes.py'

model = dict(
    backbone=dict(
        type='Mamba2D',
        arch=dict(embed_dims=[32, 64, 128, 256], depths=[1, 1, 2, 1], d_state=4)))
optim_wrapper = dict(paramwise_cfg=dict(flat_decay_mult=0.0))

# It learns more slowly than the others do.
max_epochs = 5
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        begin=0,
        end=max_epochs,
        eta_min_ratio=0.02,
        convert_to_iter_based=True)
]
