_base_ = './mask-rcnn_vmamba-tiny_fpn_1x_coco.py'

checkpoint = 'https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/vssmbase_dp06_ckpt_epoch_241.pth'
model = dict(
    backbone=dict(arch='base-v0', drop_path_rate=0.2, init_cfg=dict(checkpoint=checkpoint)),
    neck=dict(in_channels=[128, 256, 512, 1024]))
