_base_ = './mask-rcnn_mamba2d-tiny_fpn_ms-crop-3x_coco.py'

checkpoint = 'https://github.com/cocoalex00/Mamba2D/releases/download/v2.0.0/M2D-S-backbone.ckpt'
model = dict(
    backbone=dict(arch='small', drop_path_rate=0.2, init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=[96, 192, 384, 576]))
