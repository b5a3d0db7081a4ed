# ImageNet in data/imagenet/ ({train,val}/SYNSET/*.JPEG), augmented as for Swin. The papers' colour jitter of 0.4 is not
# here: beside RandAugment, timm leaves it out too.
_base_ = 'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py'

train_dataloader = dict(batch_size=128)
val_dataloader = dict(batch_size=128)
test_dataloader = dict(batch_size=128)
