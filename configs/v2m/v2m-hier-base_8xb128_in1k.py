_base_ = './v2m-hier-small_8xb128_in1k.py'

model = dict(backbone=dict(arch='hier-base', drop_path_rate=0.3))
