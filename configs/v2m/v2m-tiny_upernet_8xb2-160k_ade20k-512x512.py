_base_ = './v2m-hier-small_upernet_8xb2-160k_ade20k-512x512.py'

# A plain backbone has one resolution, of which its pyramid makes four, each of another depth.
model = dict(
    backbone=dict(arch='tiny', pyramid='multi', out_indices=None, drop_path_rate=0.0),
    decode_head=dict(in_channels=[48, 96, 192, 192]),
    auxiliary_head=dict(in_channels=192))
optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))
