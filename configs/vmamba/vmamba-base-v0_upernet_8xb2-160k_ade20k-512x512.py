_base_ = './vmamba-tiny_upernet_8xb2-160k_ade20k-512x512.py'

checkpoint = 'https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/vssmbase_dp06_ckpt_epoch_241.pth'
model = dict(
    backbone=dict(arch='base-v0', drop_path_rate=0.3, init_cfg=dict(checkpoint=checkpoint)),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512))
