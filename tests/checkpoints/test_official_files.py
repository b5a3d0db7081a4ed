"""Stand-ins for every file that the authors published: recognised, converted, loaded strictly, and given back."""

import pytest
import torch
from mmengine.logging import HistoryBuffer

from ssm_backbones.checkpoints import (
    convert_checkpoint,
    convert_file,
    read_checkpoint,
    restore_checkpoint,
    restore_file,
)
from tests.checkpoints import hosts
from tests.checkpoints.layouts import (
    MAMBA2D,
    VMAMBA,
    mamba2d_backbone,
    mamba2d_classifier,
    marked_tensors,
    random_tensors,
    vmamba_classifier,
    vmamba_pyramid,
)

CLASSIFIERS = {
    'vssm1_tiny_0230s_ckpt_epoch_264.pth': 'tiny-s1l8',
    'vssm_tiny_0230_ckpt_epoch_262.pth': 'tiny-s2l5',
    'vssm_small_0229_ckpt_epoch_222.pth': 'small-s2l15',
    'vssm1_small_0229s_ckpt_epoch_240.pth': 'small-s1l20',
    'vssm_base_0229_ckpt_epoch_237.pth': 'base-s2l15',
    'vssm1_base_0229s_ckpt_epoch_225.pth': 'base-s1l20',
    'vssmtiny_dp01_ckpt_epoch_292.pth': 'tiny-v0',
    'vssmsmall_dp03_ckpt_epoch_238.pth': 'small-v0',
    'vssmbase_dp06_ckpt_epoch_241.pth': 'base-v0',
}
DETECTORS = {
    'mask_rcnn_vssm_fpn_coco_tiny_s_epoch_12.pth': 'tiny-s1l8',
    'mask_rcnn_vssm_fpn_coco_tiny_ms_3x_s_epoch_31.pth': 'tiny-s1l8',
    'mask_rcnn_vssm_fpn_coco_tiny_epoch_12.pth': 'tiny-s2l5',
    'mask_rcnn_vssm_fpn_coco_tiny_ms_3x_epoch_36.pth': 'tiny-s2l5',
    'mask_rcnn_vssm_fpn_coco_small_epoch_11.pth': 'small-s2l15',
    'mask_rcnn_vssm_fpn_coco_small_ms_3x_epoch_32.pth': 'small-s2l15',
    'mask_rcnn_vssm_fpn_coco_base_epoch_11.pth': 'base-s2l15',
    'vssmtiny_mask_rcnn_swin_fpn_coco_epoch_12.pth': 'tiny-v0',
    'vssmtiny_mask_rcnn_swin_fpn_coco_ms_3x_epoch_34.pth': 'tiny-v0',
    'vssmsmall_mask_rcnn_swin_fpn_coco_epoch_12.pth': 'small-v0',
    'vssmsmall_mask_rcnn_swin_fpn_coco_ms_3x_epoch_34.pth': 'small-v0',
    'vssmbase_mask_rcnn_swin_fpn_coco_epoch_12.pth': 'base-v0',
}
SEGMENTORS = {
    'upernet_vssm_4xb4-160k_ade20k-512x512_tiny_s_iter_160000.pth': 'tiny-s1l8',
    'upernet_vssm_4xb4-160k_ade20k-512x512_tiny_iter_160000.pth': 'tiny-s2l5',
    'upernet_vssm_4xb4-160k_ade20k-512x512_small_iter_144000.pth': 'small-s2l15',
    'upernet_vssm_4xb4-160k_ade20k-512x512_base_iter_160000.pth': 'base-s2l15',
    'vssmtiny_upernet_4xb4-160k_ade20k-512x512_iter_160000.pth': 'tiny-v0',
    'vssmsmall_upernet_4xb4-160k_ade20k-512x512_iter_160000.pth': 'small-v0',
    'vssmbase_upernet_4xb4-160k_ade20k-512x512_iter_128000.pth': 'base-v0',
}
MAMBA2D_CLASSIFIERS = {
    'M2D-N-backbone.ckpt': 'nano',
    'M2D-T-backbone.ckpt': 'tiny',
    'M2D-S-backbone.ckpt': 'small',
}
MAMBA2D_WHOLE = [
    (hosts.detector, 'M2D-N-mask-rcnn-1x.pth', 'nano'),
    (hosts.detector, 'M2D-N-mask-rcnn-3x.pth', 'nano'),
    (hosts.detector, 'M2D-T-mask-rcnn-1x.pth', 'tiny'),
    (hosts.detector, 'M2D-T-mask-rcnn-3x.pth', 'tiny'),
    (hosts.detector, 'M2D-S-mask-rcnn-1x.pth', 'small'),
    (hosts.detector, 'M2D-S-mask-rcnn-3x.pth', 'small'),
    (hosts.segmentor, 'M2D-N-upernet.pth', 'nano'),
    (hosts.segmentor, 'M2D-T-upernet.pth', 'tiny'),
    (hosts.segmentor, 'M2D-S-upernet.pth', 'small'),
]
VMAMBA_WHOLE = [(hosts.detector, *item) for item in DETECTORS.items()] + [
    (hosts.segmentor, *item) for item in SEGMENTORS.items()
]


def sampled(rows, variants=('tiny-s1l8', 'tiny-v0', 'nano')):
    """Mark those of other variants as slow."""
    return [pytest.param(*row, marks=() if row[-1] in variants else pytest.mark.slow) for row in rows]


def widths_of(variant):
    return [VMAMBA[variant]['embed_dims'] * 2**i for i in range(4)]


def saved(checkpoint, folder, name):
    path = folder / name
    torch.save(checkpoint, path)
    return path


def mark(tensor):
    """The number that fills a tensor whose elements share their memory."""
    assert not any(tensor.stride()), tensor.stride()
    return tensor[(0,) * tensor.ndim].item()


def assert_same(tensors, expected):
    """The same filled tensors in the same order."""
    assert list(tensors) == list(expected)
    for name, tensor in tensors.items():
        assert tensor.shape == expected[name].shape and tensor.dtype == expected[name].dtype, name
        assert mark(tensor) == mark(expected[name]), name


def assert_marks_moved(converted, official):
    """Each official tensor's mark lies in exactly one converted tensor, of as many numbers."""

    def sizes(tensors):
        return sorted((mark(tensor), tensor.numel()) for tensor in tensors)

    assert sizes(converted) == sizes(official)


@pytest.mark.parametrize(('name', 'variant'), sampled(CLASSIFIERS.items()))
def test_vmamba_classifiers(name, variant, tmp_path):
    official = marked_tensors(vmamba_classifier(**VMAMBA[variant]))
    source = saved({'model': official, 'max_accuracy': 82.6, 'epoch': 264}, tmp_path, name)
    report = convert_file(source, tmp_path / 'ours.pth')
    assert report.model == f'VMamba, arch={variant!r}' and report.kind == 'classifier'
    assert report.left_out == {'max_accuracy, epoch': 'no part of the weights'} and not report.initial

    state = read_checkpoint(tmp_path / 'ours.pth')['state_dict']
    assert_marks_moved(state.values(), official.values())
    model = hosts.classifier(dict(type='VMamba', arch=variant, out_indices=(3,)), widths_of(variant)[-1])
    model.load_state_dict(state, strict=True, assign=True)

    restore_file(tmp_path / 'ours.pth', tmp_path / 'back.pth')
    back = read_checkpoint(tmp_path / 'back.pth')
    assert list(back) == ['model']
    assert_same(back['model'], official)


@pytest.mark.parametrize(('name', 'variant'), sampled(MAMBA2D_CLASSIFIERS.items()))
def test_mamba2d_classifiers(name, variant, tmp_path):
    official = marked_tensors(mamba2d_classifier(**MAMBA2D[variant]))
    source = saved(
        {
            'epoch': 300,
            'pytorch-lightning_version': '2.4.0',
            'state_dict': official,
            'loops': {},
            'callbacks': {'ModelCheckpoint': {'best_model_score': torch.tensor(0.8)}},
            'optimizer_states': [{'state': {0: {'exp_avg': torch.zeros(2)}}}],
        },
        tmp_path,
        name,
    )
    report = convert_file(source, tmp_path / 'ours.pth')
    assert report.model == f'Mamba2D, arch={variant!r}' and report.kind == 'classifier' and not report.initial
    assert list(report.left_out) == ['epoch, pytorch-lightning_version, loops, callbacks, optimizer_states']

    state = read_checkpoint(tmp_path / 'ours.pth')['state_dict']
    assert_marks_moved(state.values(), official.values())
    model = hosts.classifier(
        dict(type='Mamba2D', arch=variant, out_indices=(3,)),
        MAMBA2D[variant]['embed_dims'][-1],
        neck=None,
        head='Mamba2DClsHead',
    )
    model.load_state_dict(state, strict=True, assign=True)

    restore_file(tmp_path / 'ours.pth', tmp_path / 'back.pth')
    back = read_checkpoint(tmp_path / 'back.pth')
    assert list(back) == ['state_dict']
    assert_same(back['state_dict'], official)


@pytest.mark.parametrize(('host', 'name', 'variant'), sampled(VMAMBA_WHOLE))
def test_vmamba_detectors_and_segmentors(host, name, variant, tmp_path):
    model = host(dict(type='VMamba', arch=variant), widths_of(variant))
    backbone = marked_tensors(vmamba_pyramid(**VMAMBA[variant]))
    check_whole_model(model, backbone, 'VMamba', variant, tmp_path / name)


@pytest.mark.parametrize(('host', 'name', 'variant'), sampled(MAMBA2D_WHOLE))
def test_mamba2d_detectors_and_segmentors(host, name, variant, tmp_path):
    model = host(dict(type='Mamba2D', arch=variant), MAMBA2D[variant]['embed_dims'])
    backbone = marked_tensors(mamba2d_backbone(**MAMBA2D[variant]))
    check_whole_model(model, backbone, 'Mamba2D', variant, tmp_path / name)


def check_whole_model(model, backbone, family, variant, source):
    """Convert a stand-in of an official detector or segmentor, load it into the model, and convert it back."""
    folder = source.parent
    rest = {
        key: torch.full((), -1.0 - i, dtype=tensor.dtype).expand(tensor.shape)
        for i, (key, tensor) in enumerate(hosts.around(model).items())
    }
    official = {**{f'backbone.{key}': tensor for key, tensor in backbone.items()}, **rest}
    meta = dict(epoch=12, iter=87960, dataset_meta=dict(classes=['person', 'bicycle']))
    hub = dict(log_scalars=dict(loss=HistoryBuffer([0.5], [1])), runtime_info=dict(iter=87960))
    torch.save(dict(meta=meta, state_dict=official, message_hub=hub, optimizer=dict(state={})), source)

    report = convert_file(source, folder / 'ours.pth')
    assert report.model == f'{family}, arch={variant!r}' and report.kind == 'whole model'
    assert report.tensors == {'backbone': len(backbone), 'passed through': len(rest)}
    assert list(report.left_out) == ['optimizer'] and not report.initial
    converted = read_checkpoint(folder / 'ours.pth')
    assert {key: converted['meta'][key] for key in meta} == meta
    assert converted['message_hub']['log_scalars']['loss'].current() == 0.5
    state = converted['state_dict']
    assert_same({key: state[key] for key in rest}, rest)
    assert_marks_moved([tensor for key, tensor in state.items() if key not in rest], backbone.values())
    model.load_state_dict(state, strict=True, assign=True)

    restore_file(folder / 'ours.pth', folder / 'back.pth')
    back = read_checkpoint(folder / 'back.pth')
    assert back['meta'] == meta
    assert_same(back['state_dict'], official)


def test_every_element_of_v2_goes_to_its_place():
    official = random_tensors(vmamba_classifier(**VMAMBA['tiny-s1l8']))
    ours = convert_checkpoint({'model': official})[0]['state_dict']
    block, our_block = 'layers.2.blocks.7', 'backbone.stages.2.blocks.7'
    width, inner = 384, 384
    expected = {
        'backbone.patch_embed.first.conv.weight': official['patch_embed.0.weight'],
        'backbone.patch_embed.first.norm.bias': official['patch_embed.2.bias'],
        'backbone.patch_embed.second.conv.bias': official['patch_embed.5.bias'],
        'backbone.patch_embed.second.norm.weight': official['patch_embed.7.weight'],
        f'{our_block}.norm1.weight': official[f'{block}.norm.weight'],
        f'{our_block}.norm2.bias': official[f'{block}.norm2.bias'],
        f'{our_block}.mlp.fc1.weight': official[f'{block}.mlp.fc1.weight'],
        f'{our_block}.mlp.fc2.bias': official[f'{block}.mlp.fc2.bias'],
        f'{our_block}.mixer.in_proj.weight': official[f'{block}.op.in_proj.weight'],
        f'{our_block}.mixer.conv.weight': official[f'{block}.op.conv2d.weight'],
        f'{our_block}.mixer.x_proj.weight': official[f'{block}.op.x_proj_weight'].view(-1, inner),
        f'{our_block}.mixer.dt_weight': official[f'{block}.op.dt_projs_weight'],
        f'{our_block}.mixer.dt_bias': official[f'{block}.op.dt_projs_bias'],
        f'{our_block}.mixer.A_log': official[f'{block}.op.A_logs'].view(4, inner, 1),
        f'{our_block}.mixer.D': official[f'{block}.op.Ds'].view(4, inner),
        f'{our_block}.mixer.norm.weight': official[f'{block}.op.out_norm.weight'],
        f'{our_block}.mixer.out_proj.weight': official[f'{block}.op.out_proj.weight'],
        'backbone.stages.2.downsample.conv.weight': official['layers.2.downsample.1.weight'],
        'backbone.stages.2.downsample.norm.bias': official['layers.2.downsample.3.bias'],
        'backbone.norm3.weight': official['classifier.norm.weight'],
        'head.fc.weight': official['classifier.head.weight'],
    }
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name
    assert width == ours[f'{our_block}.norm1.weight'].numel()
    assert_every_element(ours, official)
    back = restore_checkpoint({'state_dict': ours})[0]['model']
    assert back.keys() == official.keys() and all(torch.equal(back[name], official[name]) for name in back)


def test_every_element_of_v0_goes_to_its_place():
    official = random_tensors(vmamba_classifier(**VMAMBA['tiny-v0']))
    ours = convert_checkpoint({'model': official})[0]['state_dict']
    block, our_mixer = 'layers.1.blocks.1', 'backbone.stages.1.blocks.1.mixer'
    inner, rank, states = 384, 12, 16
    for k in range(4):
        rows = slice(k * (rank + 2 * states), (k + 1) * (rank + 2 * states))
        channels = slice(k * inner, (k + 1) * inner)
        assert torch.equal(ours[f'{our_mixer}.x_proj.weight'][rows], official[f'{block}.op.x_proj_weight'][k])
        assert torch.equal(ours[f'{our_mixer}.dt_weight'][k], official[f'{block}.op.dt_projs_weight'][k])
        assert torch.equal(ours[f'{our_mixer}.A_log'][k], official[f'{block}.op.A_logs'][channels])
        assert torch.equal(ours[f'{our_mixer}.D'][k], official[f'{block}.op.Ds'][channels])
    expected = {
        'backbone.patch_embed.projection.conv.weight': 'patch_embed.0.weight',
        'backbone.patch_embed.projection.norm.weight': 'patch_embed.2.weight',
        'backbone.stages.1.blocks.1.norm1.bias': f'{block}.norm.bias',
        f'{our_mixer}.conv.bias': f'{block}.op.conv2d.bias',
        'backbone.stages.1.downsample.norm.weight': 'layers.1.downsample.1.weight',
        'backbone.stages.1.downsample.reduction.weight': 'layers.1.downsample.2.weight',
    }
    for name, source in expected.items():
        assert torch.equal(ours[name], official[source]), name
    assert_every_element(ours, official)
    back = restore_checkpoint({'state_dict': ours})[0]['model']
    assert back.keys() == official.keys() and all(torch.equal(back[name], official[name]) for name in back)


def test_every_element_of_mamba2d_goes_to_its_place():
    official = random_tensors(mamba2d_classifier(**MAMBA2D['nano']))
    ours = convert_checkpoint({'state_dict': official})[0]['state_dict']
    scan, our_scan = 'backbone.stages.1.2', 'backbone.stages.1.blocks.2'
    attention, our_attention = 'backbone.stages.2.8', 'backbone.stages.2.blocks.8'
    expected = {
        'backbone.patch_embed.conv.weight': 'backbone.ds.stem.conv.weight',
        'backbone.patch_embed.norm.bias': 'backbone.ds.stem.post_norm.norm.bias',
        'backbone.stages.0.downsample.weight': 'backbone.ds.ds1.conv.weight',
        'backbone.stages.2.downsample.bias': 'backbone.ds.ds3.conv.bias',
        'backbone.stages.0.norm.weight': 'backbone.stages.0.3.weight',
        'backbone.stages.2.norm.bias': 'backbone.stages.2.9.bias',
        f'{our_scan}.norm1.weight': f'{scan}.norm1.weight',
        f'{our_scan}.mixer.top.A_log': f'{scan}.token_mixer.AT_log',
        f'{our_scan}.mixer.left.A_log': f'{scan}.token_mixer.AL_log',
        f'{our_scan}.mixer.top.dt_weight': f'{scan}.token_mixer.dt_projT.weight',
        f'{our_scan}.mixer.left.dt_bias': f'{scan}.token_mixer.dt_projL.bias',
        f'{our_scan}.mixer.D': f'{scan}.token_mixer.D',
        f'{our_scan}.mixer.x_proj.weight': f'{scan}.token_mixer.x_proj.weight',
        f'{our_scan}.mixer.local.norm.bias': f'{scan}.token_mixer.local_norm.bias',
        f'{our_scan}.mixer.local.expand.weight': f'{scan}.token_mixer.local_path.pwconv1.weight',
        f'{our_scan}.mixer.local.act2.scale': f'{scan}.token_mixer.local_path.act2.scale',
        f'{our_scan}.mixer.local.reduce.weight': f'{scan}.token_mixer.local_path.pwconv2.weight',
        f'{our_scan}.residual1.scale': f'{scan}.res_scale1.scale',
        f'{our_attention}.residual2.scale': f'{attention}.res_scale2.scale',
        f'{our_attention}.mixer.qkv.weight': f'{attention}.token_mixer.qkv.weight',
        f'{our_attention}.mixer.k_norm.weight': f'{attention}.token_mixer.k_norm.weight',
        f'{our_attention}.mlp.fc2.weight': f'{attention}.MLP.fc2.weight',
        'head.norm1.weight': 'norm.weight',
        'head.norm2.weight': 'head.norm.weight',
        'head.fc2.bias': 'head.fc2.bias',
    }
    for name, source in expected.items():
        assert torch.equal(ours[name], official[source]), name
    back = restore_checkpoint({'state_dict': ours})[0]['state_dict']
    assert back.keys() == official.keys() and all(torch.equal(back[name], official[name]) for name in back)


def assert_every_element(ours, official):
    """The converted tensors are the official ones, one by one, element by element in the same order."""

    def keyed(tensors):
        return {tuple(tensor.flatten()[:2].tolist()): tensor.flatten() for tensor in tensors}

    found, expected = keyed(ours.values()), keyed(official.values())
    assert len(found) == len(ours) == len(official) and found.keys() == expected.keys()
    for key, tensor in found.items():
        assert torch.equal(tensor, expected[key])
