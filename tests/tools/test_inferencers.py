"""The host libraries' inferencers in a process of their own."""

import subprocess
import sys

import pytest

CODE = {
    # With weights alone, nothing but this import says how the checkpoint is read.
    'mmdet': """
from mmdet.apis import DetInferencer
print(len(DetInferencer(weights=weights, device='cpu')(image, no_save_vis=True)['predictions']))
""",
    'mmseg': """
from mmseg.apis import MMSegInferencer
print(len([MMSegInferencer(config, weights, device='cpu')(image)['predictions']]))
""",
    'mmpretrain': """
from mmpretrain import ImageClassificationInferencer
print(len(ImageClassificationInferencer(config, pretrained=weights, device='cpu')(image)))
""",
}
IMAGES = {'mmdet': 'coco/val2017', 'mmseg': 'ade20k/images/validation', 'mmpretrain': 'imagenet/val'}


@pytest.mark.slow
@pytest.mark.parametrize('host', CODE)
def test_trained_checkpoints_open_after_an_import(host, train, write_config, shapes, environment, tmp_path):
    short = dict(mmseg='train_cfg = dict(max_iters=8, val_interval=99)').get(host, 'train_cfg = dict(max_epochs=1)')
    config = write_config(host, f'val_cfg = val_dataloader = val_evaluator = None\n{short}')
    train(config, tmp_path)
    weights = (tmp_path / 'last_checkpoint').read_text()
    image = next(path for path in (shapes / IMAGES[host]).rglob('*') if path.is_file())
    values = f'import ssm_backbones\nconfig, weights, image = {str(config)!r}, {weights!r}, {str(image)!r}\n'
    command = [sys.executable, '-W', 'ignore', '-c', values + CODE[host]]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    # After a progress bar.
    assert result.stdout.rstrip().endswith('1')
