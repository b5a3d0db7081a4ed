_base_ = './v2m-tiny_8xb64_in1k.py'

model = dict(backbone=dict(arch='small', drop_path_rate=0.05), head=dict(in_channels=384))
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=0.05))
