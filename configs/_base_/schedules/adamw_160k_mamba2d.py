# Mamba2D has more weight decay, clips gradients, and lets no parameter of one dimension decay.
_base_ = './adamw_160k.py'

optim_wrapper = dict(
    optimizer=dict(weight_decay=0.05), clip_grad=dict(max_norm=1.0), paramwise_cfg=dict(flat_decay_mult=0.0))
