"""The host libraries' own functions and inferencers load the authors' checkpoints converted, or refuse them."""

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from ssm_backbones.checkpoints import CheckpointError, convert_checkpoint
from tests.checkpoints.small import classifier, prefixed, pyramid


def init_detector(config, path):
    from mmdet.apis import init_detector

    return init_detector(str(config), str(path), device='cpu')


def det_inferencer(config, path):
    from mmdet.apis import DetInferencer

    return DetInferencer(str(config), str(path), device='cpu').model


def init_segmentor(config, path):
    from mmseg.apis import init_model

    return init_model(str(config), str(path), device='cpu')


def seg_inferencer(config, path):
    from mmseg.apis import MMSegInferencer

    return MMSegInferencer(str(config), str(path), device='cpu').model


def get_model(config, path):
    from mmpretrain import get_model

    return get_model(str(config), pretrained=str(path), device='cpu')


def classification_inferencer(config, path):
    from mmpretrain import ImageClassificationInferencer

    return ImageClassificationInferencer(str(config), pretrained=str(path), device='cpu').model


def load_from(config, path):
    """What the tools/train.py and tools/test.py of the three do."""
    cfg = Config.fromfile(config)
    cfg.load_from, cfg.work_dir = str(path), str(path.parent / 'work')
    runner = Runner.from_cfg(cfg)
    runner.load_or_resume()
    return runner.model


WHOLE = [
    ('mmdet', init_detector),
    ('mmdet', det_inferencer),
    ('mmdet', load_from),
    ('mmseg', init_segmentor),
    ('mmseg', seg_inferencer),
    ('mmseg', load_from),
]


@pytest.fixture
def save(tmp_path):
    def save(checkpoint):
        torch.save(checkpoint, tmp_path / 'official.pth')
        return tmp_path / 'official.pth'

    return save


@pytest.mark.parametrize(('host', 'load'), WHOLE)
def test_detectors_and_segmentors_of_the_authors_are_converted(host, load, write_config, save, forget_runs) -> None:
    forget_runs()
    config = write_config(host)
    official = prefixed('backbone.', pyramid())
    head = 'neck.fpn_convs.0.conv.weight' if host == 'mmdet' else 'decode_head.conv_seg.weight'
    shape = (32, 32, 3, 3) if host == 'mmdet' else (7, 16, 1, 1)
    meta = dict(dataset_meta=dict(classes=('a', 'b'), palette=[[0, 0, 0], [1, 1, 1]]))
    path = save(dict(meta=meta, state_dict={**official, head: torch.full(shape, 3.0)}))
    model = load(config, path)
    converted = convert_checkpoint({'state_dict': {**official, head: torch.ones(1)}})[0]['state_dict']
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in converted.items() if name != head)
    assert state[head].eq(3).all()


@pytest.mark.parametrize(
    ('host', 'load'),
    [*WHOLE, ('mmpretrain', get_model), ('mmpretrain', classification_inferencer), ('mmpretrain', load_from)],
)
def test_classifiers_of_the_authors_are_refused(host, load, write_config, save, forget_runs) -> None:
    """Their tensors lie where none of these looks, so that a random backbone was left behind."""
    forget_runs()
    path = save({'model': classifier(num_classes=6)})
    with pytest.raises(CheckpointError, match=r"none of the VMamba's tensors.*tools/convert_checkpoint\.py"):
        load(write_config(host), path)
