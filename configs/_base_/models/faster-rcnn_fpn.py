# mmdet's Faster R-CNN, for boxes without masks, with a backbone of VMamba-T's widths in the place of the ResNet.
_base_ = 'mmdet::_base_/models/faster-rcnn_r50_fpn.py'

model = dict(
    backbone=dict(_delete_=True, out_indices=(0, 1, 2, 3)),
    neck=dict(in_channels=[96, 192, 384, 768]))
