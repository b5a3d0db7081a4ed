# Mamba2D's head pools the map itself, and starts from PyTorch's defaults, as its authors' does.
_base_ = './classifier.py'

model = dict(
    backbone=dict(type='Mamba2D', arch='tiny', drop_path_rate=0.175),
    neck=None,
    head=dict(type='Mamba2DClsHead', in_channels=512, dropout=0.15, init_cfg=None))
