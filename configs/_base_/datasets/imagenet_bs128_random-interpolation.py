# Training interpolates bilinearly or bicubically, drawn for each crop and for each of RandAugment's two policies.
# Testing sees the whole short side: the crop ratio is 1.
_base_ = './imagenet_bs128.py'

bgr_mean = [103.53, 116.28, 123.675]
bgr_std = [57.375, 57.12, 58.395]

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='RandomChoice',
        transforms=[[dict(type='RandomResizedCrop', scale=224, backend='pillow', interpolation=interpolation)]
                    for interpolation in ('bilinear', 'bicubic')]),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    *[
        dict(
            type='RandomChoice',
            transforms=[[
                dict(
                    type='RandAugment',
                    policies='timm_increasing',
                    num_policies=1,
                    total_level=10,
                    magnitude_level=9,
                    magnitude_std=0.5,
                    hparams=dict(pad_val=[104, 116, 124], interpolation=interpolation))
            ] for interpolation in ('bilinear', 'bicubic')]) for _ in range(2)
    ],
    dict(
        type='RandomErasing',
        erase_prob=0.25,
        mode='rand',
        min_area_ratio=0.02,
        max_area_ratio=1 / 3,
        fill_color=bgr_mean,
        fill_std=bgr_std),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=224, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
