"""A small model that has a name, for what does not depend on size."""

from tests.checkpoints.layouts import marked_tensors, random_tensors, vmamba_classifier, vmamba_pyramid

TEST_ARCH = dict(embed_dims=16, depths=[1, 1, 2, 1], ssm_ratio=1.0)


def classifier(**options):
    """The official tensors of a VMamba classifier of arch 'test' with 10 classes."""
    return random_tensors(vmamba_classifier(**{**TEST_ARCH, 'num_classes': 10, **options}))


def pyramid(**options):
    """The official tensors of its backbone in a detector."""
    return random_tensors(vmamba_pyramid(**{**TEST_ARCH, **options}))


def marked(start):
    """The classifier again, filled with numbers from ``start`` on, so that one set is told from another."""
    return marked_tensors(vmamba_classifier(**TEST_ARCH, num_classes=10), start)


def prefixed(prefix, tensors):
    """The same tensors with something before their names."""
    return {prefix + name: tensor for name, tensor in tensors.items()}
