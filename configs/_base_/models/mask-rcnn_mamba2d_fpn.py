# mmdet's Mask R-CNN with Mamba2D in the place of the ResNet, and group norms in the FPN.
_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='Mamba2D',
        arch='tiny',
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.175),
    neck=dict(in_channels=[64, 128, 320, 512], norm_cfg=dict(type='GN', num_groups=32)))
