_base_ = 'mmseg::_base_/default_runtime.py'
# Makes the backbones available by type=, in mmseg's own tools too.
custom_imports = dict(imports=['ssm_backbones'], allow_failed_imports=False)
