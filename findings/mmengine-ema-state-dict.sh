#!/bin/sh
# mmengine 0.10.7, torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11, x86-64
#
# In a checkpoint written with EMAHook, 'state_dict' holds the averaged weights and 'ema_state_dict' the trained ones,
# not averaged. Who reads 'ema_state_dict' for the averages, as its name and timm's and Lightning's files suggest,
# evaluates the wrong weights. (The hook exchanges the two when it saves and back when it resumes.)
#
# Seen, four steps that each add 1 to a weight of 0, momentum 0.5:
#   the model 4.0, its average 3.125; in the file: state_dict 3.125, ema_state_dict 4.0
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
from mmengine.model import BaseModel
from mmengine.runner import Runner


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, inputs, mode):
        return dict(loss=-self.weight)


runner = Runner(
    Model(), 'work',
    train_dataloader=dict(dataset=[0.0] * 4, batch_size=1, sampler=dict(type='DefaultSampler', shuffle=False)),
    train_cfg=dict(by_epoch=True, max_epochs=1),
    optim_wrapper=dict(optimizer=dict(type='SGD', lr=1.0)),
    custom_hooks=[dict(type='EMAHook', momentum=0.5)],
    log_level='ERROR')
runner.train()
average = next(hook for hook in runner.hooks if type(hook).__name__ == 'EMAHook').ema_model.module.weight.item()
file = torch.load('work/epoch_1.pth', weights_only=False)
seen = [runner.model.weight.item(), average, file['state_dict']['weight'].item(),
        file['ema_state_dict']['module.weight'].item()]
print('the model {}, its average {}; in the file: state_dict {}, ema_state_dict {}'.format(*seen))
sys.exit(seen != [4.0, 3.125, 3.125, 4.0])
EOF
