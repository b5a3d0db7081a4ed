"""Every config's datasets and pipelines read stand-ins in the true layouts of ImageNet, COCO 2017 and ADE20K."""

from typing import Any

import pytest
from mmengine.config import ConfigDict
from mmengine.registry import DATA_SAMPLERS, DATASETS, EVALUATOR, DefaultScope

from ssm_backbones.apis.checks import check_paths
from tests.configs.catalogue import ZOO, config, pipeline

TRAIN, VAL = 6, 2
_seen: dict[str, Any] = {}


def samples(scope: str, loader: ConfigDict) -> tuple[int, str, Any]:
    """Size, type and first sample of a dataset; those that are alike are read once."""
    key = repr(pipeline([loader.dataset]))
    if key not in _seen:
        with DefaultScope.overwrite_default_scope(scope):
            dataset = DATASETS.build(loader.dataset)
            dataset.full_init()
            _seen[key] = len(dataset), type(dataset).__name__, dataset[0]
            DATA_SAMPLERS.build({**loader.sampler, 'dataset': dataset, 'seed': 0})
    return _seen[key]


def check_imagenet(train: dict[str, Any], test: dict[str, Any], cfg: ConfigDict) -> None:
    for sample in (train, test):
        assert tuple(sample['inputs'].shape) == (3, 224, 224)
        assert 0 <= int(sample['data_samples'].gt_label) < cfg.model.head.num_classes


def check_coco(train: dict[str, Any], test: dict[str, Any], cfg: ConfigDict) -> None:
    instances = train['data_samples'].gt_instances
    if 'mask_head' in cfg.model.get('roi_head', {}):
        assert len(instances.masks) == len(instances.bboxes)
    assert set(instances.labels.tolist()) <= set(range(6))
    height, width = test['inputs'].shape[1:]
    assert min(height, width) == 800 or max(height, width) == 1333


def check_ade20k(train: dict[str, Any], test: dict[str, Any], cfg: ConfigDict) -> None:
    # Smaller crops, of images that were scaled down, are padded in the batch.
    assert tuple(train['inputs'].shape[1:]) == tuple(train['data_samples'].gt_sem_seg.shape)
    assert max(train['inputs'].shape[1:]) <= 512
    # 0 means "other" in the files and is ignored; the first class is 0 here.
    assert set(train['data_samples'].gt_sem_seg.data.unique().tolist()) <= {*range(7), 255}
    assert min(test['inputs'].shape[1:]) == 512
    assert cfg.val_dataloader.dataset.data_root == 'data/ade/ADEChallengeData2016'


CHECKS = {
    'mmpretrain': ('ImageNet', check_imagenet),
    'mmdet': ('CocoDataset', check_coco),
    'mmseg': ('ADE20KDataset', check_ade20k),
}


@pytest.mark.parametrize('name', ZOO)
def test_datasets_and_pipelines(name, beside_data) -> None:
    cfg = config(name)
    check_paths(cfg, ('train', 'val', 'test'))
    kind, check = CHECKS[cfg.default_scope]
    read = [samples(cfg.default_scope, cfg[f'{mode}_dataloader']) for mode in ('train', 'val', 'test')]
    assert [(size, type_name) for size, type_name, _ in read] == [(TRAIN, kind), (VAL, kind), (VAL, kind)]
    check(read[0][2], read[2][2], cfg)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        EVALUATOR.build(dict(type='Evaluator', metrics=cfg.test_evaluator))
