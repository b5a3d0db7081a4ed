"""Distributed wrappers, in a group of one process: what concerns a model's layers does not depend on their number."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from ssm_backbones.utils.torch_compat import release
from tests.pytorch_tools.models import FAMILIES, blocks, build, images, layers, loss

pytestmark = pytest.mark.skipif(release() < (2, 6), reason='fully_shard is public since torch 2.6')


@pytest.fixture
def group(tmp_path):
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize('static_graph', [False, True])
def test_ddp_warns_of_no_strides(group, static_graph):
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            for name in FAMILIES:
                model = nn.parallel.DistributedDataParallel(
                    build(name, with_cp=static_graph), static_graph=static_graph
                )
                for _ in range(2):
                    loss(model).backward()
    finally:
        torch.set_warn_always(False)
    assert not [str(warning.message) for warning in caught if 'strides' in str(warning.message)]


@pytest.mark.parametrize('units', [blocks, lambda model: layers(model).values()], ids=['blocks', 'layers'])
@pytest.mark.parametrize('name', FAMILIES)
def test_fsdp2_computes_the_same(group, name, units):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    expected, model = build(name), build(name)
    mesh = init_device_mesh('cpu', (1,))
    for unit in units(model):
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for twin in (expected, model):
        optimizer = torch.optim.SGD(twin.parameters(), lr=1e-3)
        loss(twin).backward()
        optimizer.step()
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found.full_tensor(), wanted.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('remedy', ['none', 'method', 'unit'])
@pytest.mark.parametrize('name', [name for name in FAMILIES if name != 'v2m-plain'])
def test_fsdp2_by_stage_names_the_downsampling_outside(group, name, remedy):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    expected, model, mesh = build(name), build(name), init_device_mesh('cpu', (1,))
    for stage in model.stages:
        if remedy == 'unit' and list(stage.downsample.parameters()):
            fully_shard(stage.downsample, mesh=mesh)
        fully_shard(stage, mesh=mesh)
        if remedy == 'method':
            register_fsdp_forward_method(stage, 'to_next')
    fully_shard(model, mesh=mesh)
    if remedy == 'none':
        with pytest.raises(RuntimeError, match="register_fsdp_forward_method.stage, 'to_next'"):
            loss(model)
        return
    for twin in (expected, model):
        loss(twin).backward()
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found.grad.full_tensor(), wanted.grad, rtol=1e-4, atol=1e-5)


def test_distributed_checkpoints_go_both_ways(group, tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain, sharded = build('vmamba'), build('vmamba', seed=1)
    dcp.save(plain.state_dict(), checkpoint_id=tmp_path / 'plain')
    fully_shard(sharded, mesh=init_device_mesh('cpu', (1,)))
    state = get_model_state_dict(sharded)
    dcp.load(state, checkpoint_id=tmp_path / 'plain')
    set_model_state_dict(sharded, state)
    back = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    assert back.keys() == plain.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in plain.state_dict().items())


@pytest.mark.parametrize('name', FAMILIES)
def test_activation_checkpointing_wrappers(name):
    model, expected = build(name), build(name)
    inside = set(blocks(model))
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda m: m in inside)
    torch.testing.assert_close(model(images()), expected(images()))
    loss(model).backward()
    loss(expected).backward()
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad)
