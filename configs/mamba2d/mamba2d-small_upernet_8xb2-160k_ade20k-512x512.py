_base_ = './mamba2d-tiny_upernet_8xb2-160k_ade20k-512x512.py'

checkpoint = 'https://github.com/cocoalex00/Mamba2D/releases/download/v2.0.0/M2D-S-backbone.ckpt'
model = dict(
    backbone=dict(arch='small', drop_path_rate=0.2, init_cfg=dict(checkpoint=checkpoint)),
    decode_head=dict(in_channels=[96, 192, 384, 576]),
    auxiliary_head=dict(in_channels=384))
