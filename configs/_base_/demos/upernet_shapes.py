# The ADE20K configs' recipe on small images: smaller parts and a shorter schedule. A family adds its backbone.
_base_ = [
    'mmseg::_base_/models/upernet_swin.py',
    '../datasets/shapes_semantic.py',
    '../schedules/adamw_160k.py',
    '../mmseg_runtime.py',
]

num_classes = 7
model = dict(
    data_preprocessor=dict(size=(96, 96)),
    backbone=dict(_delete_=True, out_indices=(0, 1, 2, 3)),
    # Most pixels are background and learnt soon; the loss is of the others.
    decode_head=dict(
        in_channels=[32, 64, 128, 256],
        channels=64,
        num_classes=num_classes,
        dropout_ratio=0.0,
        sampler=dict(type='OHEMPixelSampler', thresh=0.7, min_kept=4000)),
    auxiliary_head=dict(in_channels=128, channels=32, num_classes=num_classes))

max_iters = 2000
train_dataloader = dict(batch_size=16, num_workers=1)
val_dataloader = dict(batch_size=8, num_workers=1)
test_dataloader = val_dataloader
train_cfg = dict(max_iters=max_iters, val_interval=400)
optim_wrapper = dict(optimizer=dict(lr=2e-3), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', eta_min=2e-5, power=1.0, begin=50, end=max_iters, by_epoch=False)
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=400, max_keep_ckpts=2))
randomness = dict(seed=0)
