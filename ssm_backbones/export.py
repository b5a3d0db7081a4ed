"""The scans in PyTorch's own operators, for programs of :mod:`torch.export` and any backend that takes them."""

from ssm_backbones.onnx_export.decompositions import decompositions

__all__ = ['decompositions']
