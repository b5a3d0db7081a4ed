"""What people do when they fine-tune, on small models of the host libraries: a training step, and what it did."""

from importlib import import_module

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.hooks import EMAHook
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmengine.runner import Runner, load_checkpoint
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from ssm_backbones import V2M, Mamba2D, VMamba
from ssm_backbones.apis.config import load_config
from ssm_backbones.checkpoints import convert_file
from tests.checkpoints.small import classifier as official_classifier
from tests.test_flops import CONFIGS

WIDTHS = {'VMamba': [16, 32, 64, 128], 'V2M': [16, 32, 64, 128], 'Mamba2D': [16, 24, 32, 64]}
ARCHS = {'VMamba': 'test', 'V2M': 'test-hier', 'Mamba2D': 'test'}


def build(scope, config):
    import_module(f'{scope}.models')
    with DefaultScope.overwrite_default_scope(scope):
        return import_module(f'{scope}.registry').MODELS.build(ConfigDict(config))


def segmentor(family='VMamba', num_classes=5, norm_cfg=None, preprocessor=None, **backbone):
    """UperNet, narrow."""
    head = dict(channels=8, num_classes=num_classes, norm_cfg=norm_cfg or dict(type='BN'), align_corners=False)
    return build(
        'mmseg',
        dict(
            type='EncoderDecoder',
            data_preprocessor=dict(type='SegDataPreProcessor', size=(64, 64), **preprocessor or {}),
            backbone=dict(type=family, arch=ARCHS[family], **backbone),
            decode_head=dict(
                type='UPerHead', in_channels=WIDTHS[family], in_index=[0, 1, 2, 3], pool_scales=(1, 2), **head
            ),
        ),
    )


def detector(norm_cfg=None, num_classes=5, **backbone):
    """Mask R-CNN, narrow, with the heads' shared convolutions where there is a norm for them."""
    options = {
        'model.backbone.arch': 'test',
        'model.neck.in_channels': WIDTHS['VMamba'],
        'model.neck.out_channels': 32,
        'model.rpn_head.in_channels': 32,
        'model.rpn_head.feat_channels': 32,
        'model.roi_head.bbox_roi_extractor.out_channels': 32,
        'model.roi_head.mask_roi_extractor.out_channels': 32,
        'model.roi_head.bbox_head.in_channels': 32,
        'model.roi_head.bbox_head.fc_out_channels': 32,
        'model.roi_head.bbox_head.num_classes': num_classes,
        'model.roi_head.mask_head.num_classes': num_classes,
        'model.roi_head.mask_head.in_channels': 32,
        'model.roi_head.mask_head.conv_out_channels': 32,
        'model.roi_head.mask_head.num_convs': 1,
        'default_scope': 'mmdet',
        **{f'model.backbone.{key}': value for key, value in backbone.items()},
    }
    if norm_cfg:
        options |= {
            'model.neck.norm_cfg': norm_cfg,
            'model.roi_head.bbox_head.type': 'Shared4Conv1FCBBoxHead',
            'model.roi_head.bbox_head.conv_out_channels': 32,
            'model.roi_head.bbox_head.norm_cfg': norm_cfg,
            'model.roi_head.mask_head.norm_cfg': norm_cfg,
        }
    return build('mmdet', load_config(CONFIGS / '_base_/models/mask-rcnn_vmamba_fpn.py', options).model)


def segmentation_batch(channels=3, num_classes=5):
    structures = import_module('mmseg.structures')
    samples = [structures.SegDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64))) for _ in range(2)]
    for sample in samples:
        sample.gt_sem_seg = import_module('mmengine.structures').PixelData(data=torch.randint(num_classes, (1, 64, 64)))
    return dict(
        inputs=[torch.randint(256, (channels, 64, 64), dtype=torch.uint8) for _ in samples], data_samples=samples
    )


def detection_batch():
    samples = []
    for _ in range(2):
        sample = import_module('mmdet.structures').DetDataSample(
            metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64), pad_shape=(64, 64), scale_factor=(1.0, 1.0))
        )
        masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
        masks[:, 8:56, 8:56] = 1
        sample.gt_instances = import_module('mmengine.structures').InstanceData(
            bboxes=torch.tensor([[8.0, 8.0, 56.0, 56.0]]),
            labels=torch.tensor([1]),
            masks=import_module('mmdet.structures.mask').BitmapMasks(masks.numpy(), 64, 64),
        )
        samples.append(sample)
    return dict(inputs=[torch.randint(256, (3, 64, 64), dtype=torch.uint8) for _ in samples], data_samples=samples)


def step(model, batch, **wrapper):
    """Take one training step and return which tensors it changed."""
    optim_wrapper = build_optim_wrapper(model, dict(optimizer=dict(type='SGD', lr=0.1), **wrapper))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    losses = model.train_step(batch, optim_wrapper)
    assert torch.isfinite(losses['loss'])
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def assert_loaded(model, tensors, but=()):
    """A backbone has these tensors, which may name it, and all of its own but those that are named."""
    for name, tensor in model.state_dict().items():
        if not name.startswith(tuple(but)):
            assert torch.equal(tensor, tensors[name]), name


@pytest.fixture
def official(tmp_path):
    """A stand-in for an official classification checkpoint, of arch 'test', and its tensors by our names."""
    torch.save({'model': official_classifier()}, tmp_path / 'official.pth')
    convert_file(tmp_path / 'official.pth', tmp_path / 'backbone.pth', backbone_only=True)
    return str(tmp_path / 'official.pth'), torch.load(tmp_path / 'backbone.pth', weights_only=True)['state_dict']


@pytest.mark.parametrize('family', WIDTHS)
def test_a_step_leaves_frozen_stages_alone_and_moves_the_rest(family):
    model = segmentor(family, frozen_stages=2, drop_path_rate=0.2)
    changed = step(model, segmentation_batch())
    frozen = ('backbone.patch_embed.', 'backbone.stages.0.', 'backbone.stages.1.', 'backbone.norm0.', 'backbone.norm1.')
    assert not any(name.startswith(frozen) for name in changed)
    for part in ('backbone.stages.2.blocks.0.', 'backbone.stages.3.blocks.0.', 'decode_head.'):
        assert any(name.startswith(part) for name in changed), part


class Saved:
    """The bytes that autograd keeps for the backward pass, each storage counted once."""

    def __init__(self):
        self.storages = {}

    def __enter__(self):
        self.hooks = saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def total(self):
        return sum(self.storages.values())


@pytest.mark.parametrize(
    'make',
    [
        lambda **options: VMamba(
            dict(embed_dims=32, depths=[2, 2, 4, 2], d_state=1, ssm_ratio=1.0, version='v2'), **options
        ),
        lambda **options: V2M(
            dict(layout='hierarchical', embed_dims=32, depths=[2, 2, 4, 2], d_state=2, ssm_ratio=1.0), **options
        ),
        lambda **options: V2M(dict(layout='plain', embed_dims=32, depth=8, d_state=4), **options),
        lambda **options: Mamba2D(dict(embed_dims=[32, 32, 64, 64], depths=[2, 2, 4, 2]), **options),
    ],
    ids=['VMamba', 'V2M-hierarchical', 'V2M-plain', 'Mamba2D'],
)
def test_checkpointing_keeps_a_fraction_and_changes_no_gradient(make):
    images, kept, gradients = torch.randn(2, 3, 96, 96), {}, {}
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = make(with_cp=with_cp, drop_path_rate=0.0)
        weights = sum(parameter.nbytes for parameter in model.parameters())
        with Saved() as saved:
            loss = sum(x.square().mean() for x in model(images))
        kept[with_cp] = saved.total - weights
        loss.backward()
        gradients[with_cp] = [parameter.grad for parameter in model.parameters()]
    assert kept[True] < 0.35 * kept[False]
    for with_cp, without in zip(gradients[True], gradients[False], strict=True):
        torch.testing.assert_close(with_cp, without)


class Batches(torch.utils.data.Dataset):
    """Six images for a segmentor."""

    def __init__(self):
        torch.manual_seed(0)
        batches = [segmentation_batch() for _ in range(3)]
        self.items = [
            dict(inputs=image, data_samples=sample)
            for batch in batches
            for image, sample in zip(batch['inputs'], batch['data_samples'], strict=True)
        ]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_weights_are_averaged_as_they_are_trained(tmp_path):
    """mmengine's EMA hook keeps averages of all of the backbone; checkpoints hold them in the weights' place."""
    torch.manual_seed(0)
    momentum, seen = 0.3, []
    model = segmentor()

    class Recorder(EMAHook):
        def after_train_iter(self, runner, *args, **kwargs):
            seen.append({name: tensor.clone() for name, tensor in runner.model.backbone.state_dict().items()})
            super().after_train_iter(runner, *args, **kwargs)

    loader = torch.utils.data.DataLoader(
        Batches(), batch_size=2, collate_fn=lambda items: {key: [item[key] for item in items] for key in items[0]}
    )
    with DefaultScope.overwrite_default_scope('mmseg'):
        Runner(
            model,
            str(tmp_path),
            train_dataloader=loader,
            train_cfg=dict(by_epoch=False, max_iters=3),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
            default_scope='mmseg',
            custom_hooks=[Recorder(momentum=momentum)],
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=3), logger=None),
        ).train()
    average = seen[0]
    for weights in seen[1:]:
        average = {name: (1 - momentum) * average[name] + momentum * weights[name] for name in average}
    file = tmp_path / 'iter_3.pth'
    backbone = VMamba('test', init_cfg=dict(type='Pretrained', checkpoint=str(file), prefix='backbone.'))
    backbone.init_weights()
    for name, tensor in backbone.state_dict().items():
        torch.testing.assert_close(tensor, average[name])
    last = seen[-1]['patch_embed.first.conv.weight']
    assert not torch.allclose(last, average['patch_embed.first.conv.weight'], rtol=1e-4, atol=0)


@pytest.mark.parametrize(('make', 'batch'), [(segmentor, segmentation_batch), (detector, detection_batch)])
@pytest.mark.parametrize('norm', ['GN', 'SyncBN'])
def test_norms_of_the_heads(make, batch, norm):
    model = make(norm_cfg=dict(type=norm, num_groups=4) if norm == 'GN' else dict(type=norm))
    kind = nn.GroupNorm if norm == 'GN' else nn.SyncBatchNorm
    norms = [name for name, module in model.named_modules() if isinstance(module, kind)]
    assert norms and not any(name.startswith('backbone.') for name in norms)
    if norm == 'SyncBN':
        # On a CPU there is nothing to synchronise with; the runner of one process does the same.
        model = revert_sync_batchnorm(model)
    changed = step(model, batch())
    assert any(name.startswith(norms[0]) for name in changed)


@pytest.mark.parametrize(
    ('make', 'heads'),
    [
        (segmentor, ['decode_head.conv_seg.']),
        (detector, ['roi_head.bbox_head.fc_cls.', 'roi_head.bbox_head.fc_reg.', 'roi_head.mask_head.conv_logits.']),
    ],
)
def test_a_checkpoint_of_other_classes_fills_all_but_the_last_layers(make, heads, tmp_path):
    torch.manual_seed(0)
    source, model = make(num_classes=5), make(num_classes=9)
    torch.save(dict(meta={}, state_dict=source.state_dict()), tmp_path / 'source.pth')
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # What load_from does.
    load_checkpoint(model, str(tmp_path / 'source.pth'), map_location='cpu')
    for name, tensor in model.state_dict().items():
        expected = before if name.startswith(tuple(heads)) else source.state_dict()
        assert torch.equal(tensor, expected[name]), name


def test_classification_weights_into_a_detectors_backbone_in_one_step(official):
    path, tensors = official
    model = detector(init_cfg=dict(type='OfficialPretrained', checkpoint=path))
    with DefaultScope.overwrite_default_scope('mmdet'):
        model.init_weights()
    assert_loaded(model.backbone, tensors, but=['norm'])
    assert all(getattr(model.backbone, f'norm{i}').weight.eq(1).all() for i in range(4))
    changed = step(model, detection_batch())
    assert any(name.startswith('backbone.patch_embed.') for name in changed)


def test_images_of_four_channels_with_weights_of_three(official):
    path, tensors = official
    model = segmentor(
        in_channels=4,
        preprocessor=dict(mean=[120.0], std=[60.0]),
        init_cfg=dict(type='OfficialPretrained', checkpoint=path, in_channels=4),
    )
    with DefaultScope.overwrite_default_scope('mmseg'):
        model.init_weights()
    stem = 'patch_embed.first.conv.weight'
    assert_loaded(model.backbone, tensors, but=[stem, 'norm'])
    weight = model.backbone.state_dict()[stem]
    torch.testing.assert_close(weight, tensors[stem][:, [0, 1, 2, 0]] * 0.75)
    assert f'backbone.{stem}' in step(model, segmentation_batch(channels=4))


def test_the_backbone_alone_out_of_a_whole_model(tmp_path):
    """From a trained segmentor into a detector, and from a classifier, which has the last output norm alone."""
    source = segmentor()
    step(source, segmentation_batch())
    torch.save(dict(meta={}, state_dict=source.state_dict()), tmp_path / 'segmentor.pth')
    model = detector(init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'segmentor.pth'), prefix='backbone.'))
    with DefaultScope.overwrite_default_scope('mmdet'):
        model.init_weights()
    assert_loaded(model.backbone, source.backbone.state_dict())

    classifier = VMamba('test', out_indices=3)
    torch.save(
        dict(state_dict={f'backbone.{name}': tensor for name, tensor in classifier.state_dict().items()}),
        tmp_path / 'classifier.pth',
    )
    backbone = VMamba(
        'test', init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'classifier.pth'), prefix='backbone.')
    )
    backbone.init_weights()
    assert_loaded(backbone, classifier.state_dict(), but=['norm0', 'norm1', 'norm2'])
