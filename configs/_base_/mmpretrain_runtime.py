_base_ = 'mmpretrain::_base_/default_runtime.py'
# Makes the backbones and Mamba2D's head available by type=, in mmpretrain's own tools too.
custom_imports = dict(imports=['ssm_backbones', 'ssm_backbones.heads'], allow_failed_imports=False)
