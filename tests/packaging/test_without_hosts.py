"""Where torch, NumPy and safetensors are installed, and nothing else."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch
from mmengine.logging import HistoryBuffer
from packaging.requirements import Requirement

from ssm_backbones import create_backbone
from tests.checkpoints.small import classifier

SCRIPT = """
import logging
import sys
import warnings

sys.path[:0] = sys.argv[1:3]
folder = sys.argv[3]
warnings.simplefilter('error')

import torch

import ssm_backbones
from ssm_backbones.cli import train_main
from ssm_backbones.features import FeatureDataset
from ssm_backbones.flops import count_complexity
from ssm_backbones.export import decompositions

assert not {'mmengine', 'mmcv', 'PIL', 'yaml'} & {name.partition('.')[0] for name in sys.modules}
namespace = {}
exec('from ssm_backbones import *', namespace)
assert 'create_backbone' in namespace

images = torch.linspace(-1, 1, 3 * 32 * 40).view(1, 3, 32, 40)
for name in ('vmamba', 'v2m', 'mamba2d'):
    backbone = ssm_backbones.create_backbone(f'{name}-test', f'{folder}/{name}.pth').eval()
    backbone.init_weights()
    assert torch.equal(backbone(images)[-1], torch.load(f'{folder}/{name}-map.pth')), name
    assert count_complexity(backbone, lambda: backbone(images)).flops > 0
ssm_backbones.load_official(ssm_backbones.VMamba('test'), f'{folder}/official.pth')

weights = ssm_backbones.create_backbone('vmamba-test').state_dict()
del weights['norm2.weight'], weights['norm2.bias']
torch.save(weights, f'{folder}/partial.pth')
ssm_backbones.create_backbone('vmamba-test', f'{folder}/partial.pth')
logging.basicConfig(level=logging.INFO, format='%(name)s: %(message)s', stream=sys.stdout)
ssm_backbones.create_backbone('vmamba-test', f'{folder}/partial.pth')

for wrong in ("ssm_backbones.VMamba('test', init_cfg=dict(type='Pretrained', checkpoint='a.pth'))",
              'ssm_backbones.BFloat16OptimWrapper'):
    try:
        eval(wrong)
    except ImportError as error:
        print('refused:', error)
assert train_main(['config.py']) == 2
train_main(['config.py', '--cfg-options', 'a=1'])
"""


def link_needed(folder: Path) -> None:
    """Link what torch, NumPy and safetensors consist of, and all that they need, into a folder."""
    due, done = ['torch', 'numpy', 'safetensors'], set()
    while due:
        distribution = metadata.distribution(due.pop())
        if distribution.name in done:
            continue
        done.add(distribution.name)
        needed = map(Requirement, distribution.requires or ())
        due += [each.name for each in needed if not each.marker or each.marker.evaluate({'extra': ''})]
        for name in {file.parts[0] for file in distribution.files or ()} - {'..', '__pycache__'}:
            if not (folder / name).exists():
                (folder / name).symlink_to(distribution.locate_file(name))


def test_backbones_checkpoints_and_counts_need_no_host_library(root, tmp_path):
    site = tmp_path / 'site'
    site.mkdir()
    link_needed(site)
    images = torch.linspace(-1, 1, 3 * 32 * 40).view(1, 3, 32, 40)
    for name in ('vmamba', 'v2m', 'mamba2d'):
        backbone = create_backbone(f'{name}-test').eval()
        # As mmengine's runner saves it.
        history = {'message_hub': {'log_scalars': {'train/loss': HistoryBuffer([1.0, 2.0], [1, 1])}}}
        torch.save({'state_dict': backbone.state_dict(), **history}, tmp_path / f'{name}.pth')
        torch.save(backbone(images)[-1].detach(), tmp_path / f'{name}-map.pth')
    torch.save({'model': classifier()}, tmp_path / 'official.pth')
    command = [sys.executable, '-I', '-S', '-c', SCRIPT, str(site), str(root), str(tmp_path)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    remedy = "mmengine, which is not installed; install one stack of host libraries, `pip install 'ssm-backbones"
    initial, of_tool, *_, of_option = result.stderr.strip().splitlines()
    logged = [line for line in result.stdout.splitlines() if line.startswith('ssm_backbones: ')]
    assert initial.endswith('norm2 missing, kept as initialised.'), result.stderr
    assert logged == [f'ssm_backbones: {initial}']
    assert of_tool.startswith(f'error: this command needs {remedy}'), result.stderr
    assert f'error: --cfg-options needs {remedy}' in of_option and result.returncode == 2
    refused = [line for line in result.stdout.splitlines() if line.startswith('refused: ')]
    assert refused[0].startswith(f'refused: init_cfg needs {remedy}')
    assert refused[1].startswith(f'refused: BFloat16OptimWrapper needs {remedy}')
