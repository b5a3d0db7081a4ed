"""LoRA of peft, on every projection and convolution."""

import pytest
import torch
from torch import nn

from tests.pytorch_tools.models import FAMILIES, build, images, layers

peft = pytest.importorskip('peft', reason='runs by `make tools`')


LORA = (nn.Linear, nn.Conv2d, nn.Conv1d)


@pytest.mark.parametrize('name', FAMILIES)
def test_lora_has_effect_and_gradients_on_every_layer_and_merges(name):
    targets = {}
    for key, layer in layers(build(name)).items():
        # Each group of a depthwise convolution has to get a part of the rank.
        targets.setdefault((type(layer), getattr(layer, 'groups', 1)), []).append(key)
    for (kind, groups), chosen in targets.items():
        if kind not in LORA:
            continue
        config = peft.LoraConfig(target_modules=chosen, r=max(groups, 4), init_lora_weights=False)
        model = peft.get_peft_model(build(name).eval(), config)
        adapted = model(images())
        sum((m * m.detach().cos()).mean() for m in adapted).backward()
        trained = {key: parameter for key, parameter in model.named_parameters() if 'lora_' in key}
        assert len(trained) == 2 * len(chosen)
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained.values())
        with torch.no_grad(), model.disable_adapter():
            assert not torch.allclose(model(images())[-1], adapted[-1], rtol=0, atol=1e-5)
        if groups > 1:
            with pytest.raises(NotImplementedError, match='groups'):
                model.merge_and_unload()
        else:
            torch.testing.assert_close(model.merge_and_unload()(images()), adapted, rtol=1e-3, atol=1e-3)


def test_lora_compiles():
    config = peft.LoraConfig(target_modules=['in_proj', 'out_proj'], init_lora_weights=False)
    model = peft.get_peft_model(build('vmamba-v0').eval(), config)
    compiled = torch.compile(model, backend='aot_eager')
    torch.testing.assert_close(compiled(images()), model(images()), rtol=1e-4, atol=1e-4)
