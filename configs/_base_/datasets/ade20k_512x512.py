# ADE20K in data/ade/ADEChallengeData2016/, laid out as mmseg describes it, for 8 GPUs with 2 crops each.
_base_ = 'mmseg::_base_/datasets/ade20k.py'

train_dataloader = dict(batch_size=2)
