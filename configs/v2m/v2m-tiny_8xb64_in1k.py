_base_ = [
    '../_base_/models/classifier_v2m.py',
    '../_base_/datasets/imagenet_bs64_repeated-augmentation.py',
    '../_base_/schedules/imagenet_bs512_adamw_v2m.py',
    '../_base_/mmpretrain_runtime.py',
]

model = dict(backbone=dict(arch='tiny', drop_path_rate=0.0), head=dict(in_channels=192))
optim_wrapper = dict(optimizer=dict(lr=5e-4, weight_decay=0.1))
