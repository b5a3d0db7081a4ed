_base_ = './mamba2d-tiny_32xb128_in1k.py'

model = dict(
    backbone=dict(arch='small', drop_path_rate=0.4),
    head=dict(in_channels=576, dropout=0.4))
