_base_ = '../_base_/demos/mask-rcnn_shapes.py'

model = dict(
    backbone=dict(
        type='Mamba2D',
        arch=dict(embed_dims=[32, 64, 128, 256], depths=[1, 1, 2, 1], d_state=4)))
optim_wrapper = dict(paramwise_cfg=dict(flat_decay_mult=0.0))

# Three epochs are too few for it.
max_epochs = 5
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [_base_.param_scheduler[0], dict(_base_.param_scheduler[1], end=max_epochs)]
