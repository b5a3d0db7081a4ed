_base_ = './mask-rcnn_vmamba-tiny_fpn_ms-crop-3x_coco.py'

checkpoint = 'https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/vssm_tiny_0230_ckpt_epoch_262.pth'
model = dict(backbone=dict(arch='tiny-s2l5', drop_path_rate=0.2, init_cfg=dict(checkpoint=checkpoint)))
