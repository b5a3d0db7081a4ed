# The generated shapes in ADE20K's format (python tools/make_shapes.py), read by mmseg's own data set class.
_base_ = 'mmseg::_base_/datasets/ade20k.py'

dataset = dict(
    type='BaseSegDataset',
    data_root='data/shapes/ade20k/',
    # Label 0 is clutter, which counts as nothing, as ADE20K's "other".
    reduce_zero_label=True,
    metainfo=dict(
        classes=('background', 'disc', 'rectangle', 'triangle', 'star', 'ring', 'cross'),
        palette=[(90, 90, 90), (230, 60, 60), (60, 130, 240), (60, 190, 80), (245, 190, 40), (170, 80, 220),
                 (40, 200, 210)]))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='RandomFlip', prob=[0.25, 0.25, 0.25], direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='PackSegInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs')
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline, **dataset))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline, **dataset))
test_dataloader = val_dataloader
