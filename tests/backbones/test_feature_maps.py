"""Every family's maps are what the host libraries' compiled operators can read."""

import pytest
import torch
from mmcv.ops import roi_align
from mmengine.registry import MODELS

import ssm_backbones  # noqa: F401  (registers the families)

FAMILIES = {
    'VMamba': dict(type='VMamba', arch='test'),
    'VMamba v0': dict(
        type='VMamba', arch=dict(embed_dims=16, depths=[1, 1, 1, 1], d_state=2, ssm_ratio=2.0, version='v0')
    ),
    'V2M': dict(type='V2M', arch='test', pyramid='single'),
    'V2M of one map': dict(type='V2M', arch='test'),
    'V2M hierarchical': dict(type='V2M', arch='test-hier'),
    'Mamba2D': dict(type='Mamba2D', arch='test'),
}


@pytest.mark.parametrize('config', FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize('grad', [False, True])
def test_maps_lie_in_the_default_layout(config, grad):
    torch.manual_seed(0)
    model = MODELS.build(config).eval()
    with torch.set_grad_enabled(grad):
        maps = model(torch.randn(2, 3, 64, 96))
    for x in maps:
        assert x.is_contiguous()
        # mmcv pools the memory as it lies; a box of the whole map, one sample a pixel, gives the map itself.
        height, width = x.shape[2:]
        whole = torch.tensor([[1.0, 0.0, 0.0, width, height]])
        pooled = roi_align(x, whole, (height, width), 1.0, 1, 'avg', True)
        torch.testing.assert_close(pooled[0], x[1])
