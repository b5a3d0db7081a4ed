# The generated shapes in ImageNet's format (python tools/make_shapes.py), read by mmpretrain's own data set class.
_base_ = 'mmpretrain::_base_/datasets/imagenet_bs64.py'

dataset = dict(
    data_root='data/shapes/imagenet/',
    metainfo=dict(classes=('disc', 'rectangle', 'triangle', 'star', 'ring', 'cross')))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=96, crop_ratio_range=(0.8, 1.0)),
    dict(type='RandomFlip', prob=[0.25, 0.25, 0.25], direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='PackInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='PackInputs')
]
data_preprocessor = dict(num_classes=6)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline, **dataset))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline, **dataset))
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1, ))
test_evaluator = val_evaluator
