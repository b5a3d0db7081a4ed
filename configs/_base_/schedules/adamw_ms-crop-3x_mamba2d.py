# Mamba2D clips gradients, and lets no parameter of one dimension decay.
_base_ = './adamw_ms-crop-3x.py'

optim_wrapper = dict(clip_grad=dict(max_norm=1.0), paramwise_cfg=dict(flat_decay_mult=0.0))
