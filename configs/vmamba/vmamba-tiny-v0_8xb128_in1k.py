_base_ = './vmamba-tiny_8xb128_in1k.py'

model = dict(backbone=dict(arch='tiny-v0', drop_path_rate=0.2))
# The authors trained this one without averaged weights.
custom_hooks = []
