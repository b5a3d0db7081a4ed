_base_ = './mamba2d-tiny_32xb128_in1k.py'

model = dict(
    backbone=dict(arch='nano', drop_path_rate=0.0),
    head=dict(in_channels=256, dropout=0.0))
optim_wrapper = dict(optimizer=dict(weight_decay=0.025))
