# The generated shapes in COCO's format (python tools/make_shapes.py), read by mmdet's own data set class.
_base_ = 'mmdet::_base_/datasets/coco_instance.py'

data_root = 'data/shapes/coco/'
scale = (128, 128)
metainfo = dict(
    classes=('disc', 'rectangle', 'triangle', 'star', 'ring', 'cross'),
    palette=[(230, 60, 60), (60, 130, 240), (60, 190, 80), (245, 190, 40), (170, 80, 220), (40, 200, 210)])

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='RandomFlip', prob=[0.25, 0.25, 0.25], direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='PackDetInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))
]
train_dataloader = dict(
    dataset=dict(
        data_root=data_root, metainfo=metainfo, filter_cfg=dict(min_size=0), pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
test_evaluator = val_evaluator
