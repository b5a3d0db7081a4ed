"""What each of several processes does in ``test_processes.py``.

``processes.py FOLDER RANK PROCESSES all|sample [CHECKPOINT]``; a sample has each family's model wrapped in one way.
"""

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

# Beside this script; "tests" may be a package of another project in a subprocess.
from models import FAMILIES, blocks, build, layers
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

# Divisible by the numbers of processes.
SAMPLES = 6
WAYS = ('blocks', 'layers')
OPTIONS: tuple[dict, ...] = (dict(), dict(with_cp=True), dict(frozen_stages=1), dict(out_indices=(1,)))


def batch() -> Tensor:
    return torch.randn(SAMPLES, 3, 48, 40, generator=torch.Generator().manual_seed(5))


def backward(model: nn.Module, images: Tensor) -> None:
    """Every sample has the same share in the loss."""
    sum((m.float() * m.float().detach().cos()).mean() for m in model(images)).backward()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    full = ((name, p.grad) for name, p in model.named_parameters())
    return {name.removeprefix('module.'): g.full_tensor() if hasattr(g, 'full_tensor') else g for name, g in full}


def compare(found: dict, expected: dict, what: str, tolerance: float = 2e-4) -> None:
    assert found.keys() == expected.keys(), what
    # Some gradients are zero but for rounding, such as that of a bias of attention's keys.
    rounding = 1e-3 * tolerance * max(value.abs().max() for value in expected.values() if value is not None)
    for name, value in expected.items():
        assert (value is None) == (found[name] is None), (what, name)
        if value is not None:
            error, scale = (found[name] - value).abs().max(), value.abs().max()
            assert error <= tolerance * scale + rounding, f'{what}: {name} is off by {error:.2g} of {scale:.2g}'


def data_parallel(name: str, images: Tensor, options: dict, static_graph: bool) -> None:
    """Gradients are those of one process with all images, and no parameter is left without one."""
    one = build(name, **options)
    backward(one, batch())
    model = nn.parallel.DistributedDataParallel(build(name, **options), static_graph=static_graph)
    # In the second pass DDP refuses parameters that had no gradient in the first.
    for _ in range(2):
        model.zero_grad()
        backward(model, images)
    compare(gradients(model), gradients(one), f'DDP {name} {options} static_graph={static_graph}')


def shard(name: str, units: str, seed: int = 0, **policy) -> nn.Module:
    model, mesh = build(name, seed, with_cp=units == 'blocks'), init_device_mesh('cpu', (dist.get_world_size(),))
    for unit in blocks(model) if units == 'blocks' else layers(model).values():
        fully_shard(unit, mesh=mesh, **policy)
    return fully_shard(model, mesh=mesh, **policy)


def fully_sharded(name: str, images: Tensor, ways: tuple[str, ...]) -> None:
    one = build(name)
    backward(one, batch())
    for units in ways:
        model = shard(name, units)
        backward(model, images)
        compare(gradients(model), gradients(one), f'FSDP2 {name} by {units}')
    half = shard(name, 'blocks', mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    backward(half, images)
    compare(gradients(half), gradients(one), f'FSDP2 {name} in bfloat16', tolerance=0.3)


def checkpoints(name: str, folder: Path, source: Path | None) -> None:
    """Save a sharded model; first, where there is a checkpoint, load it, though other processes have written it."""
    model = shard(name, 'blocks', seed=0 if source is None else 1)
    if source is not None:
        state = get_model_state_dict(model)
        dcp.load(state, checkpoint_id=source / name)
        set_model_state_dict(model, state)
    dcp.save(get_model_state_dict(model), checkpoint_id=folder / name)


def main(folder: str, rank: str, processes: str, extent: str, source: str | None = None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=int(rank), world_size=int(processes))
    images = batch().chunk(int(processes))[int(rank)]
    cases = [(options, static_graph) for options in OPTIONS for static_graph in (False, True)]
    torch.set_warn_always(True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for place, name in enumerate(FAMILIES):
            for case in cases if extent == 'all' else [cases[(3 * place + 1) % len(cases)]]:
                data_parallel(name, images, *case)
    torch.set_warn_always(False)
    assert not [str(warning.message) for warning in caught if 'stride' in str(warning.message)]
    for place, name in enumerate(FAMILIES):
        fully_sharded(name, images, WAYS if extent == 'all' else WAYS[place % 2 :][:1])
        checkpoints(name, Path(folder), source and Path(source))
    dist.destroy_process_group()


if __name__ == '__main__':
    main(*sys.argv[1:])
