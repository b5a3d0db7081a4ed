"""Exporting needs torch 2.6, as the tool says of older ones (test_export.py)."""

from ssm_backbones.utils.torch_compat import release

collect_ignore_glob = ['test_*.py'] if release() < (2, 6) else []
