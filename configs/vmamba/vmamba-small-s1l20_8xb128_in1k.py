_base_ = './vmamba-tiny_8xb128_in1k.py'

model = dict(backbone=dict(arch='small-s1l20', drop_path_rate=0.3))
