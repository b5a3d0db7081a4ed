_base_ = './vmamba-tiny_upernet_8xb2-160k_ade20k-512x512.py'

checkpoint = 'https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth'
model = dict(backbone=dict(arch='tiny-v0', drop_path_rate=0.3, init_cfg=dict(checkpoint=checkpoint)))
