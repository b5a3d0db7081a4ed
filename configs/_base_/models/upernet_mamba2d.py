_base_ = './upernet.py'

model = dict(
    backbone=dict(type='Mamba2D', arch='tiny', drop_path_rate=0.175),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
    auxiliary_head=dict(in_channels=320))
