_base_ = './mask-rcnn_mamba2d-tiny_fpn_1x_coco.py'

checkpoint = 'https://github.com/cocoalex00/Mamba2D/releases/download/v2.0.0/M2D-N-backbone.ckpt'
model = dict(
    backbone=dict(arch='nano', drop_path_rate=0.175, init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=[32, 64, 160, 256]))
