# What the three families' ImageNet classifiers share: mmpretrain's Swin recipe of label smoothing, Mixup and CutMix.
_base_ = 'mmpretrain::_base_/models/swin_transformer/tiny_224.py'

model = dict(
    backbone=dict(_delete_=True, out_indices=-1),
    head=dict(init_cfg=dict(_delete_=True, type='TruncNormal', layer='Linear', std=0.02, bias=0.0)),
    # Swin's initialises every linear layer and norm of the model; a backbone draws its own as its authors do.
    init_cfg=None)
