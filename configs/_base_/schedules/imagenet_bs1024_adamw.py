# VMamba's 300 epochs: Swin's recipe stepped by iteration, mixed precision, clipped gradients, averaged weights.
_base_ = ['mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py', './undecayed.py']

optim_wrapper = dict(
    type='AmpOptimWrapper',
    clip_grad=dict(max_norm=5.0),
    constructor='GroupedOptimWrapperConstructor',
    # Beside norms, biases and all else of one dimension, which Swin's recipe leaves alone.
    paramwise_cfg=dict(custom_keys=_base_.undecayed))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, begin=0, end=20, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=20, end=300, convert_to_iter_based=True)
]
custom_hooks = [dict(type='EMAHook', momentum=1e-4, priority='ABOVE_NORMAL')]
