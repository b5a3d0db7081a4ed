_base_ = [
    '../_base_/models/classifier_mamba2d.py',
    '../_base_/datasets/imagenet_bs128_random-interpolation.py',
    '../_base_/schedules/imagenet_bs4096_adamw_mamba2d.py',
    '../_base_/mmpretrain_runtime.py',
]
