_base_ = './vmamba-tiny_upernet_8xb2-160k_ade20k-512x512.py'

checkpoint = 'https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/vssm_tiny_0230_ckpt_epoch_262.pth'
model = dict(backbone=dict(arch='tiny-s2l5', drop_path_rate=0.2, init_cfg=dict(checkpoint=checkpoint)))
