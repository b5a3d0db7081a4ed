# Mamba2D's 300 epochs: bfloat16, a warm-up over the first 5 %, gradients as they are.
_base_ = './imagenet_bs1024_adamw.py'

optim_wrapper = dict(type='BFloat16OptimWrapper', optimizer=dict(lr=4e-3), clip_grad=None)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=True, begin=0, end=15, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=True, begin=15, end=300, convert_to_iter_based=True)
]
custom_hooks = [dict(type='EMAHook', momentum=1e-3, priority='ABOVE_NORMAL')]
auto_scale_lr = dict(base_batch_size=4096)
