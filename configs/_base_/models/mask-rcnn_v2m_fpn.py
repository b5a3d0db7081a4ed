# mmdet's Mask R-CNN with hierarchical V2M in the place of the ResNet.
_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='V2M',
        arch='hier-small',
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]))
