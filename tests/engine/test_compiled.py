"""mmengine's switch ``compile=True``, which compiles a model's whole training step."""

import pytest
import torch


@pytest.mark.slow
@pytest.mark.parametrize(('host', 'length'), [('mmpretrain', 'max_epochs'), ('mmseg', 'max_iters')])
def test_a_compiled_training_has_the_same_losses_and_plain_names(
    host, length, train, write_config, read_losses, tmp_path
):
    config = str(write_config(host))
    losses, names = [], []
    for compiled in ('False', 'True'):
        torch._dynamo.reset()
        work_dir = tmp_path / compiled
        train(config, work_dir, cfg_options={'compile': compiled == 'True', f'train_cfg.{length}': 2})
        losses.append(list(read_losses(work_dir).values()))
        checkpoint = (work_dir / 'last_checkpoint').read_text()
        names.append(list(torch.load(checkpoint, weights_only=False)['state_dict']))
    assert losses[0] and losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert names[0] == names[1]
