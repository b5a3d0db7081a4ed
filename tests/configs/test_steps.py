"""Representatives of each family and task, and each other head, train and test by the package's own commands.

The models are the configs' own in full; only pictures, batches and schedules are smaller.
"""

import math
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope

from ssm_backbones.engine import runner
from tests.configs.catalogue import config
from tests.configs.small_runs import RecordSteps, shrink

CONFIGS = (
    # A detector also in the quick tests.
    pytest.param('vmamba/vmamba-tiny_8xb128_in1k', marks=pytest.mark.slow),
    pytest.param('v2m/v2m-hier-small_8xb128_in1k', marks=pytest.mark.slow),
    pytest.param('v2m/v2m-tiny_8xb64_in1k', marks=pytest.mark.slow),
    pytest.param('mamba2d/mamba2d-nano_32xb128_in1k', marks=pytest.mark.slow),
    'vmamba/mask-rcnn_vmamba-tiny_fpn_ms-crop-3x_coco',
    pytest.param('v2m/mask-rcnn_v2m-hier-small_fpn_1x_coco', marks=pytest.mark.slow),
    pytest.param('v2m/mask-rcnn_v2m-tiny_fpn_1x_coco', marks=pytest.mark.slow),
    pytest.param('mamba2d/mask-rcnn_mamba2d-nano_fpn_1x_coco', marks=pytest.mark.slow),
    pytest.param('vmamba/vmamba-tiny_upernet_8xb2-160k_ade20k-512x512', marks=pytest.mark.slow),
    pytest.param('v2m/v2m-hier-small_upernet_8xb2-160k_ade20k-512x512', marks=pytest.mark.slow),
    pytest.param('v2m/v2m-tiny_upernet_8xb2-160k_ade20k-512x512', marks=pytest.mark.slow),
    pytest.param('mamba2d/mamba2d-nano_upernet_8xb2-160k_ade20k-512x512', marks=pytest.mark.slow),
    pytest.param('vmamba/cascade-mask-rcnn_vmamba-tiny_fpn_1x_coco', marks=pytest.mark.slow),
    pytest.param('vmamba/faster-rcnn_vmamba-tiny_fpn_1x_coco', marks=pytest.mark.slow),
    pytest.param('vmamba/dino-4scale_vmamba-tiny_8xb2-12e_coco', marks=pytest.mark.slow),
    pytest.param('vmamba/vmamba-tiny_segformer_8xb2-160k_ade20k-512x512', marks=pytest.mark.slow),
)
METRICS = {'mmpretrain': 'accuracy/top1', 'mmdet': 'coco/bbox_mAP', 'mmseg': 'mIoU'}


@pytest.mark.parametrize('name', CONFIGS)
def test_trains_and_tests(name, beside_data, tmp_path) -> None:
    cfg = config(name)
    shrink(cfg)
    path = tmp_path / f'{name.replace("/", "_")}.py'
    cfg.dump(path)
    done = runner.train(runner.TrainOptions(str(path), work_dir=str(tmp_path / 'work')))

    (record,) = [hook for hook in done.hooks if isinstance(hook, RecordSteps)]
    assert len(record.losses) == 2
    assert all(losses and all(math.isfinite(value) for value in losses.values()) for losses in record.losses)
    after = dict(done.model.backbone.named_parameters())
    assert not {f'backbone.{key}' for key in after} - record.reached
    # A gradient far below Adam's epsilon moves nothing that can be seen; such are some of the step sizes' biases.
    still = [key for key, value in record.before.items() if torch.equal(value, after[key])]
    assert not [key for key in still if key.endswith('.weight')]
    metrics = done.message_hub.log_scalars
    assert math.isfinite(metrics[f'val/{METRICS[cfg.default_scope]}'].current())


@pytest.mark.slow
@pytest.mark.parametrize('tta', [False, True], ids=['single-scale', 'multi-scale'])
def test_segmentation_tests_at_one_scale_and_at_many(tta, beside_data, tmp_path) -> None:
    cfg = config('mamba2d/mamba2d-nano_upernet_8xb2-160k_ade20k-512x512')
    shrink(cfg)
    path = tmp_path / 'multi_scale.py'
    cfg.dump(path)
    checkpoint = tmp_path / 'random.pth'
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), checkpoint)
    metrics = runner.test(
        runner.TestOptions(
            str(path), str(checkpoint), work_dir=str(tmp_path / 'work'), tta=tta, out=str(tmp_path / 'maps')
        )
    )
    assert math.isfinite(metrics['mIoU'])
    assert len(list(Path(tmp_path / 'maps').glob('*.png'))) == 2
