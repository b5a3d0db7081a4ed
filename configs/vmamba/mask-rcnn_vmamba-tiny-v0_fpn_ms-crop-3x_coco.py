_base_ = './mask-rcnn_vmamba-tiny_fpn_ms-crop-3x_coco.py'

checkpoint = 'https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth'
model = dict(backbone=dict(arch='tiny-v0', drop_path_rate=0.2, init_cfg=dict(checkpoint=checkpoint)))
