#!/bin/sh
# mmengine 0.10.7, torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11, x86-64
#
# CheckpointHook(published_keys=...) ends a training by writing the weights alone into a file named epoch_1-XXXXXXXX.pth,
# as PyTorch's and OpenMMLab's downloads are named. There these digits are the first of the file's SHA-256, by which
# torch.hub.load_state_dict_from_url(check_hash=True) and sha256sum verify it. Here they are of other bytes, a pickle of
# the dict that is never written, so that every such check refuses the intact file.
#
# Seen:
#   in the name and of the file: different
#   RuntimeError: invalid hash value
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile numpy==2.4.6 torch==2.13.0 mmengine==0.10.7 'setuptools<81'
cat > "$dir/publish.py" <<'EOF'
import hashlib
import sys
from pathlib import Path

import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, inputs, mode='tensor'):
        return {'loss': self.layer(inputs).sum()}


work_dir = Path(sys.argv[1])
Runner(
    model=Model(),
    work_dir=str(work_dir),
    train_dataloader=torch.utils.data.DataLoader([{'inputs': torch.ones(2)}]),
    train_cfg={'by_epoch': True, 'max_epochs': 1},
    optim_wrapper={'optimizer': {'type': 'SGD', 'lr': 0.1}},
    default_hooks={'checkpoint': {'type': 'CheckpointHook', 'interval': 1, 'published_keys': ['state_dict']}},
    log_level='ERROR',
).train()
(published,) = work_dir.glob('epoch_1-*.pth')
digits = published.stem.partition('-')[2]
same = hashlib.sha256(published.read_bytes()).hexdigest().startswith(digits)
print('in the name and of the file:', 'the same' if same else 'different')
try:
    torch.hub.load_state_dict_from_url(published.as_uri(), model_dir=str(work_dir / 'hub'), check_hash=True, progress=False)
    refused = False
except RuntimeError as error:
    refused = str(error).startswith('invalid hash value')
    print(f'RuntimeError: {str(error)[:18]}')
sys.exit(same or not refused)
EOF
# mmengine reads its own checkpoint here, which holds more than weights.
TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 "$dir/venv/bin/python" -W ignore "$dir/publish.py" "$dir/work"
