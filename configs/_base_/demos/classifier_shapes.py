# The ImageNet configs' recipe on small images: smaller parts, a shorter schedule, and labels as they are, since 1500
# steps have no use for mixed images. The first epochs see the images at two thirds of their size, where a step takes
# half the time. A family adds its backbone.
_base_ = [
    '../models/classifier.py',
    '../datasets/shapes_classification.py',
    'mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py',
    '../schedules/undecayed.py',
    '../mmpretrain_runtime.py',
]

model = dict(
    head=dict(num_classes=6, in_channels=256, topk=(1, )),
    train_cfg=dict(_delete_=True))

small_pipeline = [
    dict(step, scale=64) if step['type'] == 'RandomResizedCrop' else step for step in _base_.train_pipeline
]

max_epochs = 5
batch_size = 32
train_dataloader = dict(batch_size=batch_size, num_workers=1, dataset=dict(pipeline=small_pipeline))
val_dataloader = dict(batch_size=batch_size, num_workers=1)
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
optim_wrapper = dict(
    optimizer=dict(lr=6e-4),
    clip_grad=dict(max_norm=5.0),
    constructor='GroupedOptimWrapperConstructor',
    paramwise_cfg=dict(custom_keys=_base_.undecayed))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        begin=0,
        end=max_epochs,
        eta_min_ratio=0.02,
        convert_to_iter_based=True)
]
custom_hooks = [
    dict(type='SwitchRecipeHook', schedule=[dict(action_epoch=4, train_pipeline=_base_.train_pipeline)])
]
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(max_keep_ckpts=2))
auto_scale_lr = dict(base_batch_size=batch_size)
randomness = dict(seed=0)
