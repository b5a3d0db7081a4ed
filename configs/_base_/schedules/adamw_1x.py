# The 12-epoch recipe of Swin Transformer's Mask R-CNN, which VMamba's authors use too.
_base_ = 'mmdet::_base_/schedules/schedule_1x.py'

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    # The scan's own parameters are rates and gains, which nothing should pull towards zero.
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        custom_keys={
            'norm': dict(decay_mult=0.0),
            'mixer.D': dict(decay_mult=0.0),
            '.A_log': dict(decay_mult=0.0),
            '.dt_bias': dict(decay_mult=0.0)
        }))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1)
]
auto_scale_lr = dict(enable=False, base_batch_size=16)
