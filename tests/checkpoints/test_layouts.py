"""The stand-ins have exactly the names and shapes of the official checkpoints."""

import pytest

from tests.checkpoints.layouts import MAMBA2D, VMAMBA, digest, mamba2d_classifier, vmamba_classifier

# Of the true layouts: the number of tensors, and the digest of their names and shapes.
VMAMBA_DIGESTS = {
    'tiny-s1l8': (276, '648296d4fe0565f3'),
    'tiny-s2l5': (222, 'f5004bda2e0be70c'),
    'small-s2l15': (402, 'abeb064f31f35c84'),
    'small-s1l20': (492, 'dcbdcb85f0a128b3'),
    'base-s2l15': (402, '5c0454e81535f1a8'),
    'base-s1l20': (492, 'cfd16c321870b3e1'),
    'tiny-v0': (212, '57bae0034373e942'),
    'small-v0': (446, '72a1584e0a09e908'),
    'base-v0': (446, '12bd233dd1b0c4a1'),
}

MAMBA2D_DIGESTS = {
    'nano': (404, '93d94cb05b3a03cc'),
    'tiny': (404, '694c66461ddf43ae'),
    'small': (763, '76211b93222e685c'),
}


@pytest.mark.parametrize('variant', VMAMBA)
def test_vmamba_layouts_are_the_official_ones(variant):
    layout = vmamba_classifier(**VMAMBA[variant])
    assert (len(layout), digest(layout)) == VMAMBA_DIGESTS[variant]


@pytest.mark.parametrize('variant', MAMBA2D)
def test_mamba2d_layouts_are_the_official_ones(variant):
    layout = mamba2d_classifier(**MAMBA2D[variant])
    assert (len(layout), digest(layout)) == MAMBA2D_DIGESTS[variant]
