# DeiT's data: of every image that an epoch takes, three differently augmented copies.
_base_ = 'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py'

train_dataloader = dict(sampler=dict(_delete_=True, type='RepeatAugSampler', shuffle=True, num_repeats=3))
