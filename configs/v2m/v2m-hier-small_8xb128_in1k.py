_base_ = [
    '../_base_/models/classifier_v2m.py',
    '../_base_/datasets/imagenet_bs128.py',
    '../_base_/schedules/imagenet_bs1024_adamw.py',
    '../_base_/mmpretrain_runtime.py',
]
