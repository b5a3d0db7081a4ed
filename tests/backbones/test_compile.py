"""The backbones under torch.compile, torch.export and AOTInductor, with the compiled ops in the graph."""

import pytest
import torch

from ssm_backbones import V2M, Mamba2D, VMamba
from tests.versions import since_torch_2_4

pytestmark = since_torch_2_4

# Each scanning block once, and Mamba2D's in both directions: the graph of more of them is longer, and no other.
NAMES = {
    'vmamba': (VMamba, dict(embed_dims=8, depths=[1, 1], d_state=1, ssm_ratio=1.0, version='v2')),
    'v2m': (V2M, dict(layout='plain', embed_dims=8, depth=1, d_state=2)),
    'v2m-hier': (V2M, dict(layout='hierarchical', embed_dims=8, depths=[1, 1], d_state=2, ssm_ratio=1.0)),
    'mamba2d': (Mamba2D, dict(embed_dims=[8, 16], depths=[2, 1], d_state=2, mixers=['scan', 'scan'])),
}
# Tracing is slow: one family is in the quick tests.
SAMPLED = [pytest.param(name, marks=() if name == 'vmamba' else pytest.mark.slow) for name in NAMES]
SCANS = ('cuda_ops.route_scan', 'cuda_ops.wavefront_scan')


def build(name):
    family, arch = NAMES[name]
    return family(arch, **({} if name == 'v2m' else dict(out_indices=(0, 1))))


def scans_in(graph) -> int:
    return sum(str(node.target).startswith(SCANS) for node in graph.nodes)


@pytest.mark.parametrize('name', SAMPLED)
def test_one_graph(name) -> None:
    """fullgraph=True raises at a graph break; the graph holds the scans as operators, and serves other sizes."""
    model = build(name).eval()
    graphs = []

    def backend(module, inputs):
        graphs.append(module.graph)
        return module

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for shape in ((2, 3, 64, 96), (2, 3, 65, 100), (2, 3, 96, 64), (2, 3, 80, 80)):
            images = torch.randn(shape)
            for found, expected in zip(compiled(images), model(images), strict=True):
                torch.testing.assert_close(found, expected)
    assert graphs and all(scans_in(graph) for graph in graphs)


@pytest.mark.slow
def test_one_graph_with_gradients() -> None:
    """The one layout that tests/backbones/test_families.py compiles with checkpointing alone."""
    model = build('v2m-hier')
    images = torch.randn(1, 3, 32, 48)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    grads = []
    for run in (model, compiled):
        model.zero_grad()
        sum(each.square().mean() for each in run(images)).backward()
        grads.append({key: value.grad.clone() for key, value in model.named_parameters()})
    for key, value in grads[0].items():
        assert torch.allclose(grads[1][key], value, rtol=1e-4, atol=1e-6), key


@pytest.mark.parametrize('name', SAMPLED)
def test_exported_program(name, tmp_path) -> None:
    """Saved and loaded, with open batch and sides; the scans are operators in it."""
    model = build(name).eval()
    open_dims = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 3, 67, 131),), dynamic_shapes=(open_dims,), strict=False)
    assert scans_in(program.graph)
    torch.export.save(program, tmp_path / 'model.pt2')
    loaded = torch.export.load(tmp_path / 'model.pt2').module()
    images = torch.randn(3, 3, 93, 70)
    with torch.no_grad():
        for found, expected in zip(loaded(images), model(images), strict=True):
            torch.testing.assert_close(found, expected)


class Families(torch.nn.Module):
    """A stage of each family: one library of them all takes the C++ compiler a third of the time of three."""

    def __init__(self):
        super().__init__()
        self.models = torch.nn.ModuleList(
            [
                VMamba(dict(NAMES['vmamba'][1], depths=[1]), out_indices=(0,)),
                V2M(NAMES['v2m'][1], img_size=32),
                Mamba2D(dict(embed_dims=[8], depths=[2], d_state=2, mixers=['scan']), out_indices=(0,)),
            ]
        )

    def forward(self, images):
        return tuple(map for model in self.models for map in model(images))


@pytest.mark.slow
def test_ahead_of_time_compiled_library(tmp_path) -> None:
    """AOTInductor on the CPU: the compiled ops are called from the compiled library."""
    model = Families().eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        program = torch.export.export(model, (images,), strict=False)
        assert {str(node.target).removesuffix('.default') for node in program.graph.nodes} >= set(SCANS)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / 'model.pt2'))
        found, expected = torch._inductor.aoti_load_package(path)(images), model(images)
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
