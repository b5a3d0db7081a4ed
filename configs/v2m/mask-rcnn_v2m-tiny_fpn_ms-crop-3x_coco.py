_base_ = './mask-rcnn_v2m-hier-small_fpn_ms-crop-3x_coco.py'

# A plain backbone has one resolution, of which its pyramid makes four.
model = dict(
    backbone=dict(arch='tiny', pyramid='single', out_indices=None, drop_path_rate=0.0),
    neck=dict(in_channels=[48, 96, 192, 192]))
