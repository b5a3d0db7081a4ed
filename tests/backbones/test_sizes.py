"""Sizes at the edges: tiny and huge maps, long images, many channels, empty batches, and sizes that change."""

import json

import pytest
import torch

from tests.backbones.test_families import build, map_shape
from tests.ops.helpers import run_python

# Prints the memory that each size takes at its peak, in bytes. Freed memory is given back at once, so that one size's
# is not another's.
MEASURE = """
import json, re, torch, cuda_ops

def memory(kind):
    return int(re.search(kind + r':\\s+(\\d+) kB', open('/proc/self/status').read())[1]) * 1024

def scan(kind, side):
    E, N, K = 2, 1, 4 if kind == 'cross_selective_scan' else 1
    grid = (1, side, side)
    x, A, D = torch.randn(*grid, E), -torch.rand(K, E, N), torch.randn(K, E)
    if kind == 'wavefront_scan':
        deltas = [torch.rand(*grid, E) for _ in range(2)]
        inputs = [x, *deltas, A[0], A[0].clone(), *(torch.randn(*grid, N) for _ in range(3)), D[0]]
    elif kind == 'selective_scan':
        flat = lambda channels: torch.randn(1, channels, side * side)
        inputs = [flat(E), flat(E).abs(), A[0], flat(N), flat(N), D[0]]
    else:
        shape = (*grid, K) if K > 1 else grid
        inputs = [x, torch.rand(*shape, E), A if K > 1 else A[0], torch.randn(*shape, N), torch.randn(*shape, N),
                  D if K > 1 else D[0]]
    inputs = [value.requires_grad_() for value in inputs]
    options = {'axis': 'row'} if kind == 'line_scan' else {}
    y = getattr(cuda_ops, kind)(*inputs, **options)
    assert all(value.isfinite().all() for value in torch.autograd.grad(y, inputs, torch.ones_like(y)))

def backbone(kind, side):
    arch = {
        'VMamba': dict(embed_dims=4, depths=[1], d_state=1, ssm_ratio=1.0, version='v2'),
        'V2M': dict(layout='hierarchical', embed_dims=4, depths=[1], d_state=1, ssm_ratio=1.0),
        'Mamba2D': dict(embed_dims=[8], depths=[1], d_state=1, mixers=['scan']),
    }[kind]
    import ssm_backbones
    model = getattr(ssm_backbones, kind)(arch, out_indices=0).eval()
    with torch.inference_mode():
        (found,) = model(torch.randn(1, 3, 4 * side, 4 * side))
    assert found.shape[2:] == (side, side) and found.isfinite().all()

kind, *sides = ARGUMENTS
run = scan if hasattr(cuda_ops, kind) else backbone
run(kind, 16)
peaks = {}
for side in map(int, sides):
    open('/proc/self/clear_refs', 'w').write('5')
    before = memory('VmRSS')
    run(kind, side)
    peaks[side] = memory('VmHWM') - before
print(json.dumps(peaks))
"""
NAMES = ['vmamba', 'vmamba-v0', 'v2m-plain', 'v2m-hier', 'mamba2d-mixed']
SCANS = ('cross_selective_scan', 'line_scan', 'selective_scan', 'wavefront_scan')


def bytes_per_pixel(kind: str, sides: list[int]) -> list[float]:
    code = MEASURE.replace('ARGUMENTS', repr([kind, *map(str, sides)]))
    result = run_python(code, MALLOC_MMAP_THRESHOLD_='65536', MALLOC_TRIM_THRESHOLD_='65536')
    assert result.returncode == 0, result.stderr[-3000:]
    peaks = json.loads(result.stdout.splitlines()[-1])
    return [peaks[str(side)] / side**2 for side in sides]


def test_memory_grows_with_the_pixels() -> None:
    small, large = bytes_per_pixel('cross_selective_scan', [128, 256])
    assert large < 1.2 * small


@pytest.mark.slow
@pytest.mark.parametrize('kind', [*SCANS, 'VMamba', 'V2M', 'Mamba2D'])
def test_maps_of_2048_pixels_a_side_take_memory_linear_in_the_pixels(kind: str) -> None:
    """That is an image of 8192 pixels a side."""
    per_pixel = bytes_per_pixel(kind, [256, 512, 1024, 2048])
    print(kind, [round(value) for value in per_pixel])
    assert max(per_pixel[1:]) < 1.15 * per_pixel[0]


@pytest.mark.parametrize('name', NAMES)
def test_an_empty_batch(name: str) -> None:
    model = build(name, out_indices=(0, 3))
    maps = model(torch.zeros(0, 3, 40, 36))
    assert [m.shape for m in maps] == [(0, *map_shape(name, index, (40, 36))) for index in (0, 3)]
    sum(m.sum() for m in maps).backward()
    assert not any(p.grad.count_nonzero() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize('name', NAMES)
def test_long_images_of_thirteen_channels(name: str) -> None:
    model = build(name, in_channels=13, out_indices=(0, 3))
    maps = model(torch.randn(1, 13, 3, 500))
    assert [m.shape[1:] for m in maps] == [map_shape(name, index, (3, 500)) for index in (0, 3)]
    sum((m * torch.randn_like(m)).sum() for m in maps).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize('size', [(20_000, 300), (300, 20_000)])
@pytest.mark.parametrize('name', NAMES)
def test_images_of_20000_by_300_pixels(name: str, size: tuple[int, int]) -> None:
    model = build(name, out_indices=(0, 3))
    with torch.inference_mode():
        maps = model(torch.randn(1, 3, *size))
    for index, m in zip((0, 3), maps, strict=True):
        assert m.shape[1:] == map_shape(name, index, size) and m.isfinite().all()


@pytest.mark.parametrize('name', NAMES)
def test_sizes_that_change_leave_no_trace(name: str) -> None:
    """An epoch of images of all sizes trains to the weights of one whose model is built anew for each of them."""
    sizes = [(33, 47), (64, 20), (1, 1), (33, 47), (80, 16)]

    def step(model: torch.nn.Module, size: tuple[int, int]) -> None:
        images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(size[1]))
        loss = sum((m * m.detach().cos()).mean() for m in model(images))
        grads = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, grad in zip(model.parameters(), grads, strict=True):
                parameter -= 0.01 * grad

    torch.manual_seed(0)
    model = build(name, out_indices=(0, 3)).eval()
    twin = build(name, out_indices=(0, 3)).eval()
    twin.load_state_dict(model.state_dict())
    for size in sizes:
        step(model, size)
        fresh = build(name, out_indices=(0, 3)).eval()
        fresh.load_state_dict(twin.state_dict())
        step(fresh, size)
        twin = fresh
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, other)
