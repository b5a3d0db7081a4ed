_base_ = './v2m-hier-small_upernet_8xb2-160k_ade20k-512x512.py'

model = dict(backbone=dict(arch='hier-base', drop_path_rate=0.3))
