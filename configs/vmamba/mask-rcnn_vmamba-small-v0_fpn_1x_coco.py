_base_ = './mask-rcnn_vmamba-tiny_fpn_1x_coco.py'

checkpoint = 'https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/vssmsmall_dp03_ckpt_epoch_238.pth'
model = dict(backbone=dict(arch='small-v0', drop_path_rate=0.2, init_cfg=dict(checkpoint=checkpoint)))
