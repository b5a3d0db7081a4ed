_base_ = '../_base_/demos/classifier_shapes.py'

model = dict(
    backbone=dict(
        type='V2M',
        arch=dict(layout='hierarchical', embed_dims=32, depths=[1, 1, 2, 1], d_state=2, ssm_ratio=1.0)))

# A fourth epoch of small images, whose steps are shorter: 300 steps of whole ones are enough for it.
custom_hooks = [
    dict(type='SwitchRecipeHook', schedule=[dict(action_epoch=5, train_pipeline=_base_.train_pipeline)])
]
