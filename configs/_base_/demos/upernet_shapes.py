# The ADE20K configs' recipe on small images: smaller parts, and a shorter schedule in epochs. The first of them see the
# images at two thirds of their size, where a step is shorter and teaches as much. A family adds its backbone.
_base_ = [
    'mmseg::_base_/models/upernet_swin.py',
    '../datasets/shapes_semantic.py',
    '../schedules/adamw_160k.py',
    '../mmseg_runtime.py',
]

num_classes = 7
# Each process of a CPU normalises by its own images: sharing statistics would take nearly half of a step.
norm_cfg = dict(type='BN')
model = dict(
    # Batches of small images stay small.
    data_preprocessor=dict(size=None, size_divisor=32),
    backbone=dict(_delete_=True, out_indices=(0, 1, 2, 3)),
    # Most pixels are background and learnt soon; the loss is of the others.
    decode_head=dict(
        in_channels=[32, 64, 128, 256],
        channels=32,
        num_classes=num_classes,
        dropout_ratio=0.0,
        norm_cfg=norm_cfg,
        sampler=dict(type='OHEMPixelSampler', thresh=0.7, min_kept=300)),
    auxiliary_head=dict(in_channels=128, channels=16, num_classes=num_classes, norm_cfg=norm_cfg))

small_pipeline = [*_base_.train_pipeline[:2], dict(type='Resize', scale=(64, 64)), *_base_.train_pipeline[2:]]

max_epochs = 5
batch_size = 8
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=1,
    # A last batch of one image has one value per channel where the head pools all of it: too few for a norm.
    drop_last=True,
    sampler=dict(type='DefaultSampler'),
    dataset=dict(pipeline=small_pipeline))
val_dataloader = dict(batch_size=8, num_workers=1)
test_dataloader = val_dataloader
train_cfg = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=4e-3, betas=(0.9, 0.95)), clip_grad=dict(max_norm=1.0))
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
    # The norms of all processes count in what is evaluated and saved.
    dict(type='SyncBuffersHook'),
    dict(
        type='mmpretrain.SwitchRecipeHook',
        schedule=[dict(action_epoch=4, train_pipeline=_base_.train_pipeline)])
]
log_processor = dict(by_epoch=True)
default_hooks = dict(
    logger=dict(interval=20, log_metric_by_epoch=True),
    checkpoint=dict(by_epoch=True, interval=1, max_keep_ckpts=2))
auto_scale_lr = dict(base_batch_size=batch_size)
randomness = dict(seed=0)
