_base_ = './mamba2d-tiny_upernet_8xb2-160k_ade20k-512x512.py'

checkpoint = 'https://github.com/cocoalex00/Mamba2D/releases/download/v2.0.0/M2D-N-backbone.ckpt'
model = dict(
    backbone=dict(arch='nano', drop_path_rate=0.175, init_cfg=dict(checkpoint=checkpoint)),
    decode_head=dict(in_channels=[32, 64, 160, 256]),
    auxiliary_head=dict(in_channels=160))
