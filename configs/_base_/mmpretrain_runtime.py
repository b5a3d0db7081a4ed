_base_ = 'mmpretrain::_base_/default_runtime.py'
# Makes the backbones and Mamba2D's head available by type=, in mmpretrain's own tools too.
custom_imports = dict(imports=['ssm_backbones', 'ssm_backbones.heads'], allow_failed_imports=False)
# All 300 of a run would take 0.4 TB for VMamba-B, with averages and AdamW's states. The best one of a run is kept, too,
# by --cfg-options default_hooks.checkpoint.save_best=auto.
default_hooks = dict(checkpoint=dict(max_keep_ckpts=5))
