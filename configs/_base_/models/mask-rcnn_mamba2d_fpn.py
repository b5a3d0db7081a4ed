# Mamba2D has group norms in the FPN.
_base_ = './mask-rcnn_fpn.py'

model = dict(
    backbone=dict(type='Mamba2D', arch='tiny', drop_path_rate=0.175),
    neck=dict(in_channels=[64, 128, 320, 512], norm_cfg=dict(type='GN', num_groups=32)))
