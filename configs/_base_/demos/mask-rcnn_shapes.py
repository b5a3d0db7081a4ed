# The COCO configs' recipe on small images: smaller parts, convolutions in the box head and a shorter schedule. A family
# adds its backbone.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    '../datasets/shapes_instance.py',
    '../schedules/adamw_1x.py',
    '../mmdet_runtime.py',
]

channels = 32
head_channels = 64
num_classes = 6
norm_cfg = dict(type='GN', num_groups=8)
model = dict(
    # Images are 102x128: multiples of 32 would add a quarter to them, multiples of 8 next to nothing.
    data_preprocessor=dict(pad_size_divisor=8),
    backbone=dict(_delete_=True, out_indices=(0, 1, 2, 3)),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=channels, num_outs=4, norm_cfg=norm_cfg),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(scales=[4], strides=[4, 8, 16, 32])),
    # Few images are seen in minutes, so boxes and masks are learnt from all classes together. Objects of up to 80
    # pixels are read from the finest map, where their outlines show, and classified by convolutions, which know a
    # corner wherever it is.
    roi_head=dict(
        bbox_roi_extractor=dict(
            roi_layer=dict(sampling_ratio=1), out_channels=channels, finest_scale=40),
        bbox_head=dict(
            type='ConvFCBBoxHead',
            num_shared_convs=2,
            num_shared_fcs=1,
            in_channels=channels,
            conv_out_channels=head_channels,
            fc_out_channels=256,
            num_classes=num_classes,
            reg_class_agnostic=True,
            norm_cfg=norm_cfg,
            # Boxes are found well before classes are told apart, so that classes and masks weigh more in the loss.
            loss_bbox=dict(loss_weight=0.4)),
        mask_roi_extractor=dict(
            roi_layer=dict(output_size=10, sampling_ratio=1), out_channels=channels, finest_scale=40),
        mask_head=dict(
            num_convs=2,
            in_channels=channels,
            conv_out_channels=head_channels,
            num_classes=num_classes,
            norm_cfg=norm_cfg,
            class_agnostic=True,
            loss_mask=dict(loss_weight=2.0))),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=150, max_per_img=50),
        rcnn=dict(mask_size=20, sampler=dict(num=24, pos_fraction=0.5))),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100), rcnn=dict(max_per_img=30)))

max_epochs = 3
batch_size = 4
train_dataloader = dict(batch_size=batch_size, num_workers=1)
val_dataloader = dict(batch_size=8, num_workers=1)
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=2e-3), clip_grad=dict(max_norm=10.0))
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
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(max_keep_ckpts=2))
auto_scale_lr = dict(base_batch_size=batch_size)
randomness = dict(seed=0)
