"""Images that are too small for detectors that choose a number of their positions."""

import pytest
import torch
from mmengine.config import Config, ConfigDict
from torch import nn

from ssm_backbones.apis.top_k import count_positions, explain_top_k
from ssm_backbones.data_check import check_data, trial
from ssm_backbones.data_check.classes import check_numbers
from ssm_backbones.data_check.finding import WARNING, Findings
from ssm_backbones.utils.errors import CommandError
from tests.data_check.conftest import errors

CLASSES = ('disc', 'rectangle', 'triangle', 'star', 'ring', 'cross')
DINO = dict(
    type='DINO',
    num_queries=86,
    as_two_stage=True,
    data_preprocessor=dict(type='DetDataPreprocessor', mean=[127.0] * 3, std=[60.0] * 3, pad_size_divisor=1),
    backbone=dict(type='VMamba', arch='test', out_indices=(1, 2, 3)),
    neck=dict(
        type='ChannelMapper', in_channels=[32, 64, 128], kernel_size=1, out_channels=16, num_outs=4, act_cfg=None
    ),
    bbox_head=dict(type='DINOHead', num_classes=6),
    test_cfg=dict(max_per_img=300),
)
WITHOUT_MASKS = {
    'train_dataloader.dataset.pipeline.1.with_mask': False,
    'val_dataloader.dataset.pipeline.2.with_mask': False,
    'val_dataloader.dataset.pipeline.1.scale': (64, 64),
    'val_evaluator.metric': ['bbox'],
}


@pytest.fixture
def dino(loaded):
    cfg = loaded('mmdet')
    cfg.model = ConfigDict(DINO)
    cfg.merge_from_dict(WITHOUT_MASKS)
    return cfg


def test_positions_are_those_of_the_neck(dino):
    """64, 16 and 4 of the backbone, and one of the neck's own."""
    assert count_positions(dino, 64, 64) == 85
    assert count_positions(dino, 64, 48) == 65


def test_images_with_fewer_positions_than_queries(dino):
    for mode in ('train', 'val'):
        (error,) = errors(check_data(dino, (mode,)))
        assert error.startswith(f'{mode}_dataloader.dataset.pipeline: makes 64x64 pixels of ') and '.jpg' in error
        assert '85 positions to choose model.num_queries=86 from' in error and 'to at most 85' in error
    dino.model.num_queries = 85
    assert not errors(check_data(dino))


def test_the_smallest_image_counts(dino):
    dino.model.num_queries = 80
    shrink = dict(type='RandomResize', scale=[(48, 48), (64, 64)], keep_ratio=False)
    dino.train_dataloader.dataset.pipeline[2] = shrink
    dino.train_dataloader.batch_size = 1
    (error,) = errors(check_data(dino, ('train',)))
    assert 'model.num_queries=80' in error
    # A larger image beside it may save it.
    dino.train_dataloader.batch_size = 2
    found = check_data(dino, ('train',))
    assert not errors(found)
    assert any(each.severity == WARNING and 'a batch of such images alone' in each.value for each in found)


def test_a_model_whose_positions_cannot_be_counted_is_no_error(dino, monkeypatch):
    monkeypatch.setattr(trial, 'count_positions', lambda *args: torch.ones(1, device='meta').item())
    assert not errors(check_data(dino, ('val',)))


@pytest.mark.parametrize(
    ('model', 'expected'),
    [
        (dict(num_queries=40, test_cfg=dict(max_per_img=300)), 'model.test_cfg.max_per_img: is 300, but model.num_q'),
        (dict(num_queries=50, test_cfg=dict(max_per_img=300)), None),
        (
            dict(num_queries=50, bbox_head=dict(loss_cls=dict(use_sigmoid=False)), test_cfg=dict(max_per_img=100)),
            'model.num_queries=50 and 6 classes give 50 objects',
        ),
        (
            dict(rpn_head=dict(num_proposals=10), test_cfg=dict(rcnn=dict(max_per_img=100))),
            'model.test_cfg.rcnn.max_per_img: is 100, but model.rpn_head.num_proposals=10',
        ),
        (
            dict(panoptic_head=dict(num_queries=10), test_cfg=dict(instance_on=True, max_per_image=100)),
            'model.test_cfg.max_per_image: is 100',
        ),
        (dict(panoptic_head=dict(num_queries=10), test_cfg=dict(max_per_image=100)), None),
        # Co-DETR's.
        (dict(query_head=dict(num_query=10), bbox_head=[dict(num_classes=6)], test_cfg=[dict(max_per_img=300)]), None),
    ],
)
def test_more_objects_than_queries_can_give(model, expected):
    findings = Findings()
    check_numbers(Config(dict(model=model, default_scope='mmdet')), CLASSES, (), findings)
    found = [str(finding) for finding in findings.found]
    assert (not found) if expected is None else (len(found) == 1 and expected in found[0]), found


class Detector(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.data_preprocessor = nn.Identity()
        self.dtype = dtype

    def forward(self, batch):
        scores = self.data_preprocessor(batch)['inputs'].flatten(1).to(self.dtype)
        return torch.topk(scores, 100)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_any_other_top_k_names_the_size(dtype):
    model = Detector(dtype)
    with pytest.raises(CommandError, match=r'topk\(scores, 100\)` \(forward in .*12x8 pixels') as found:
        with explain_top_k(model):
            model(dict(inputs=torch.zeros(1, 1, 8, 12)))
    assert 'Enlarge the images' in str(found.value)
    assert not model.data_preprocessor._forward_hooks


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match='shape'), explain_top_k(Detector(torch.float32)):
        torch.zeros(2).view(3)
