"""From the authors' file through a training of ours back to their names."""

import pytest
import torch

from ssm_backbones.checkpoints import restore_file
from tests.checkpoints.layouts import random_tensors, vmamba_classifier
from tests.checkpoints.small import TEST_ARCH

ARCHS = {'v2': TEST_ARCH, 'v0': dict(embed_dims=16, depths=[1, 1, 1, 1], ssm_ratio=2.0, d_state=2, version='v0')}


@pytest.mark.parametrize('version', ARCHS)
def test_a_trained_classifier_goes_back_by_the_names_it_came_with(version, train, write_config, tmp_path) -> None:
    arch = ARCHS[version]
    official = random_tensors(vmamba_classifier(**arch, num_classes=6))
    for name, tensor in official.items():
        # So that nothing explodes in the one epoch.
        official[name] = tensor * tensor[0].numel() ** -0.5 if tensor.ndim > 1 else tensor.abs()
    torch.save({'model': official}, tmp_path / 'official.pth')
    ours = dict(d_state=1, version='v2') | arch
    config = write_config(
        'mmpretrain',
        f"""
        model = dict(backbone=dict(
            _delete_=True, type='VMamba', arch={ours}, out_indices=(3, ),
            init_cfg=dict(type='OfficialPretrained', checkpoint='{tmp_path / 'official.pth'}')))
        train_dataloader = dict(batch_size=12)
        train_cfg = dict(max_epochs=1, val_interval=2)
    """,
    )
    train(config, work_dir=str(tmp_path / 'run'))
    restore_file(tmp_path / 'run' / 'epoch_1.pth', tmp_path / 'back.pth')
    back = torch.load(tmp_path / 'back.pth', weights_only=True)['model']
    assert {name: tensor.shape for name, tensor in back.items()} == {
        name: tensor.shape for name, tensor in official.items()
    }
    # The start was theirs, and one step of at most the learning rate led away from it.
    for name in ('layers.0.blocks.0.op.x_proj_weight', 'layers.0.blocks.0.op.dt_projs_weight', 'patch_embed.0.weight'):
        assert 0 < (back[name] - official[name]).abs().max() < 0.01, name
