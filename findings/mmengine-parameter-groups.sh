#!/bin/sh
# mmengine 0.10.7, torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11, x86-64
#
# Any option of paramwise_cfg, norm_decay_mult=0 for instance, gives each parameter a group of its own, also where all
# options are equal. An optimizer updates group by group, so `foreach`, which PyTorch takes by itself on GPUs to update
# all tensors by a few calls, makes its calls for each tensor, and gains nothing. A constructor that joins the groups of
# equal options (DefaultOptimWrapperConstructor's add_params, overridden) makes few again.
#
# Seen, 50 linear layers and 50 norms, AdamW(foreach=True); groups, and foreach calls in a step:
#   no option: 1 group, 9 calls
#   norm_decay_mult=0: 200 groups, 1700 calls
#   the same, groups of equal options joined: 2 groups, 17 calls
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile numpy==2.4.6 torch==2.13.0 mmengine==0.10.7 'setuptools<81'
cd "$dir"
venv/bin/python -W ignore - <<'EOF'
import sys

import torch
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

MMLogger.get_instance('mmengine', log_level='ERROR')


class Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += '_foreach_' in str(func)
        return func(*args, **(kwargs or {}))


def step(optimizer):
    optimizer.step()  # makes the state
    with Count() as count:
        optimizer.step()
    return len(optimizer.param_groups), count.calls


model = nn.Sequential(*[layer for _ in range(50) for layer in (nn.Linear(8, 8), nn.LayerNorm(8))])
for parameter in model.parameters():
    parameter.grad = torch.ones_like(parameter)
adamw = dict(type='AdamW', lr=1e-3, weight_decay=0.05, foreach=True)
plain = build_optim_wrapper(model, dict(optimizer=dict(adamw))).optimizer
each = build_optim_wrapper(model, dict(optimizer=dict(adamw), paramwise_cfg=dict(norm_decay_mult=0.0))).optimizer
joined = {}
for group in each.param_groups:
    joined.setdefault(group['weight_decay'], []).extend(group['params'])
joined = torch.optim.AdamW(
    [dict(params=parameters, weight_decay=decay) for decay, parameters in joined.items()], lr=1e-3, foreach=True)
seen = []
names = ('no option', 'norm_decay_mult=0', 'the same, groups of equal options joined')
for name, optimizer in zip(names, (plain, each, joined)):
    seen.append(step(optimizer))
    print('{}: {} group{}, {} calls'.format(name, seen[-1][0], 's'[seen[-1][0] == 1:], seen[-1][1]))
sys.exit(seen != [(1, 9), (200, 1700), (2, 17)])
EOF
