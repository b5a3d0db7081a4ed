"""Batch normalisation over several CPU processes."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, distributed, nn

from ssm_backbones.engine.cpu_distributed import SharedBatchNorm, share_batch_norms

# A whole batch, of which each of two processes has its own part, unequal ones.
PARTS = (1, 4)
MOMENTA = (0.3, None)


def whole_batch() -> tuple[Tensor, Tensor]:
    """Inputs, and the weights of the loss."""
    generator = torch.Generator().manual_seed(1)
    return (
        3 + 2 * torch.randn(sum(PARTS), 3, 2, 5, generator=generator, dtype=torch.float64),
        torch.randn(sum(PARTS), 3, 2, 5, generator=generator, dtype=torch.float64),
    )


def norm(kind: type[nn.Module] = nn.SyncBatchNorm, momentum: float | None = 0.3) -> nn.Module:
    layer = kind(3, momentum=momentum, dtype=torch.float64)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(2))
    return layer


def run_part(rank: int, folder: str) -> None:
    """What one process does on its part; two steps each show that the running statistics add up."""
    distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=len(PARTS))
    x, weight = (tensor.split(PARTS)[rank] for tensor in whole_batch())
    results = {}
    for momentum in MOMENTA:
        layer = share_batch_norms(nn.Sequential(norm(momentum=momentum)))
        x = x.detach().requires_grad_()
        layer(x * 2)
        out = layer(x)
        (out * weight).sum().backward()
        grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
        for grad in grads.values():
            distributed.all_reduce(grad)  # as data parallel training adds them up
        results[momentum] = out.detach(), x.grad, grads, dict(layer.named_buffers())
    half = share_batch_norms(norm().float())(x.detach().bfloat16())
    torch.save((results, half), f'{folder}/{rank}.pth')
    distributed.destroy_process_group()


def test_processes_together_normalise_as_one(tmp_path) -> None:
    command = [sys.executable, __file__, str(tmp_path)]
    environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).resolve().parents[1])}
    processes = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(len(PARTS))]
    assert [process.wait(120) for process in processes] == [0, 0]
    parts, halves = zip(*(torch.load(tmp_path / f'{rank}.pth') for rank in range(len(PARTS))), strict=True)
    for momentum in MOMENTA:
        outs, x_grads, grads, buffers = zip(*(part[momentum] for part in parts), strict=True)
        x, weight = whole_batch()
        x.requires_grad_()
        one = nn.Sequential(norm(nn.BatchNorm2d, momentum))
        one(x * 2)
        expected = one(x)
        (expected * weight).sum().backward()
        torch.testing.assert_close(torch.cat(outs), expected.detach())
        torch.testing.assert_close(torch.cat(x_grads), x.grad)
        for rank in range(len(PARTS)):
            torch.testing.assert_close(grads[rank], {name: p.grad for name, p in one.named_parameters()})
            torch.testing.assert_close(buffers[rank], dict(one.named_buffers()))
    half = torch.cat(halves)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected.detach(), rtol=0.02, atol=0.05)


def test_every_layer_is_replaced_and_keeps_its_tensors() -> None:
    class SyncBatchNorm(nn.SyncBatchNorm):
        """mmcv's goes by this name too."""

    model = nn.ModuleDict(dict(a=nn.Sequential(nn.Conv2d(3, 3, 1), norm()), b=SyncBatchNorm(3, affine=False), c=norm()))
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shared = share_batch_norms(model)
    assert [type(module) for module in shared.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)] == [
        SharedBatchNorm
    ] * 3
    after = {**dict(shared.named_parameters()), **dict(shared.named_buffers())}
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(shared.eval()['c'](x), norm(nn.BatchNorm2d).eval()(x))


if __name__ == '__main__':
    run_part(int(sys.argv[2]), sys.argv[1])
