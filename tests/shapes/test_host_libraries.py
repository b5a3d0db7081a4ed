"""mmdet's, mmseg's and mmpretrain's own data set classes read the formats."""

from pathlib import Path

import numpy as np
import pytest

from ssm_backbones.shapes import CLASSES, PALETTE, SEG_CLASSES, SEG_PALETTE
from ssm_backbones.shapes.options import ShapesOptions
from ssm_backbones.shapes.scene import draw_scene


def test_mmdet_reads_coco(root: Path, options: ShapesOptions) -> None:
    from mmcv.transforms import LoadImageFromFile
    from mmdet.datasets import CocoDataset
    from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs

    dataset = CocoDataset(
        data_root=str(root / 'coco'),
        ann_file='annotations/instances_train2017.json',
        data_prefix=dict(img='train2017/'),
        metainfo=dict(classes=CLASSES, palette=list(PALETTE)),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=[LoadImageFromFile(), LoadAnnotations(with_bbox=True, with_mask=True), PackDetInputs()],
    )
    assert len(dataset) == options.train
    crowds = 0
    for index in range(len(dataset)):
        item = dataset[index]
        scene = draw_scene(options.seed, 'train', index, options.size, options.largest)
        sample = item['data_samples']
        assert tuple(item['inputs'].shape[1:]) == scene.clutter.shape
        wanted = [instance for instance in scene.instances if not instance.crowd]
        assert sample.gt_instances.labels.tolist() == [instance.label for instance in wanted]
        crowds += len(sample.ignored_instances)
        assert len(sample.ignored_instances) == len(scene.instances) - len(wanted)
        for mask, instance in zip(sample.gt_instances.masks.masks, wanted, strict=True):
            np.testing.assert_array_equal(mask.astype(bool), instance.mask)
    assert crowds > 0


def test_mmseg_reads_ade20k(root: Path, options: ShapesOptions) -> None:
    from mmcv.transforms import LoadImageFromFile
    from mmseg.datasets import ADE20KDataset, BaseSegDataset
    from mmseg.datasets.transforms import LoadAnnotations, PackSegInputs

    arguments = dict(
        data_root=str(root / 'ade20k'),
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
        pipeline=[LoadImageFromFile(), LoadAnnotations(reduce_zero_label=True), PackSegInputs()],
    )
    metainfo = dict(classes=SEG_CLASSES, palette=[list(colour) for colour in SEG_PALETTE])
    dataset = BaseSegDataset(reduce_zero_label=True, metainfo=metainfo, **arguments)
    assert len(dataset) == options.val
    for index in range(len(dataset)):
        sample = dataset[index]['data_samples']
        labels = sample.gt_sem_seg.data[0].numpy()
        scene = draw_scene(options.seed, 'val', index, options.size, options.largest)
        wanted = np.zeros(scene.clutter.shape, dtype=int)
        wanted[scene.clutter] = 255
        for instance in scene.instances:
            wanted[instance.mask] = SEG_CLASSES.index(CLASSES[instance.label])
        np.testing.assert_array_equal(labels, wanted)
    # The layout is ADE20K's own: its class reads it as it stands (under its own 150 names).
    assert len(ADE20KDataset(**arguments)) == options.val


@pytest.mark.parametrize('split', ['train', 'val'])
def test_mmpretrain_reads_imagenet(root: Path, options: ShapesOptions, split: str) -> None:
    from mmcv.transforms import LoadImageFromFile
    from mmpretrain.datasets import CustomDataset, ImageNet
    from mmpretrain.datasets.transforms import PackInputs

    pipeline = [LoadImageFromFile(), PackInputs()]
    dataset = ImageNet(data_root=str(root / 'imagenet'), split=split, metainfo=dict(classes=CLASSES), pipeline=pipeline)
    assert len(dataset) == options.count(split)
    assert tuple(dataset.CLASSES) == CLASSES
    labels = [dataset[index]['data_samples'].gt_label.item() for index in range(len(dataset))]
    assert np.bincount(labels).tolist() == [len(range(label, options.count(split), 6)) for label in range(6)]
    custom = CustomDataset(data_root=str(root / 'imagenet'), data_prefix=split, pipeline=pipeline)
    assert [custom.get_data_info(index)['gt_label'] for index in range(len(custom))] == labels
