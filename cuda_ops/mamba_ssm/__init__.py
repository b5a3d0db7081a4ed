"""A drop-in for mamba-ssm's selective scan: programs written for it run by this package's scans, on CPU and GPU.

Importing this module is the request; without it nothing changes. Afterwards these modules are answered for, whether or
not mamba-ssm and causal-conv1d are installed::

    mamba_ssm.ops.selective_scan_interface    selective_scan_fn, mamba_inner_fn, and selective_scan_ref, mamba_inner_ref
    selective_scan_cuda                       fwd, bwd
    selective_scan_cuda_core                  fwd, bwd, as VMamba calls them
    selective_scan_cuda_oflex                 fwd, bwd, as VMamba calls them
    causal_conv1d                             causal_conv1d_fn, causal_conv1d_update

Import it before the program imports any of them, or run the program by ``python -m cuda_ops.mamba_ssm script.py``.
Other modules of an installed mamba-ssm, ``mamba_ssm.modules.mamba_simple`` for one, are found as before.
"""

from cuda_ops.mamba_ssm._modules import install, uninstall

__all__ = ['install', 'uninstall']

install()
