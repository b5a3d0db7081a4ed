"""Lightning, accelerate, captum, pytorch-grad-cam and mmpretrain's vis_cam."""

import importlib
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.pytorch_tools.models import FAMILIES, blocks, build, images, layers


class Classifier(nn.Module):
    def __init__(self, name='vmamba'):
        super().__init__()
        self.backbone = build(name)
        self.head = nn.Linear(self.backbone.out_channels[-1], 3)

    def forward(self, x):
        return self.head(self.backbone(x)[-1].mean((2, 3)))


def loader():
    return DataLoader(TensorDataset(images(), torch.tensor([0, 2])), batch_size=2)


@pytest.mark.parametrize('name', FAMILIES)
def test_lightning(name, tmp_path):
    lightning = pytest.importorskip('lightning', reason='runs by `make tools`')

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Classifier(name)

        def training_step(self, batch):
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    module = Module()
    before = {key: parameter.clone() for key, parameter in module.named_parameters()}
    trainer = lightning.Trainer(
        max_epochs=1, accelerator='cpu', logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(module, loader())
    changed = [key for key, parameter in module.named_parameters() if not torch.equal(parameter, before[key])]
    assert any(layer in key for key in changed for layer in layers(module.model.backbone))
    assert len(changed) > len(before) // 2


@pytest.mark.parametrize('name', FAMILIES)
def test_accelerate(name):
    accelerate = pytest.importorskip('accelerate', reason='runs by `make tools`')
    accelerator = accelerate.Accelerator(cpu=True)
    model = Classifier(name)
    model, optimizer, data = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loader())
    x, y = next(iter(data))
    value = nn.functional.cross_entropy(model(x), y)
    accelerator.backward(value)
    optimizer.step()
    with torch.no_grad():
        assert nn.functional.cross_entropy(model(x), y) < value


@pytest.mark.parametrize('name', FAMILIES)
def test_accelerates_offloaded_weights_are_read_by_calls(name):
    accelerate = pytest.importorskip('accelerate', reason='runs by `make tools`')
    model = build(name).eval()
    expected = model(images())
    offloaded = accelerate.cpu_offload(model, execution_device=torch.device('cpu'))
    with torch.no_grad():
        torch.testing.assert_close(offloaded(images()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', FAMILIES)
def test_grad_cam_takes_the_map_modules(name):
    cam = pytest.importorskip('pytorch_grad_cam', reason='runs by `make tools`')
    target = importlib.import_module('pytorch_grad_cam.utils.model_targets').ClassifierOutputTarget(1)
    model = Classifier(name).eval()
    module = list(model.backbone.output_modules.values())[-1]
    with cam.GradCAM(model, [model.backbone.get_submodule(module)]) as camera:
        found = camera(images(), [target, target])
    x = images()
    feature = model.backbone(x)[-1].detach().requires_grad_()
    model.head(feature.mean((2, 3)))[:, 1].sum().backward()
    expected = (feature.grad.mean((2, 3), keepdim=True) * feature).sum(1).relu().detach()
    expected = nn.functional.interpolate(expected[:, None], x.shape[2:], mode='bilinear')[:, 0]
    for one, other in zip(torch.tensor(found), expected, strict=True):
        # The first is scaled to [0, 1]; with axes exchanged the two would not correlate.
        if other.std() > 1e-6:
            assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1] > 0.98


@pytest.mark.parametrize('name', FAMILIES)
def test_grad_cam_refuses_layers_that_are_channel_last(name):
    cam = pytest.importorskip('pytorch_grad_cam', reason='runs by `make tools`')
    model = Classifier(name).eval()
    module = list(model.backbone.output_modules.values())[-1]
    block = blocks(model.backbone)[-1]
    for method in (cam.GradCAM, cam.GradCAMPlusPlus, cam.EigenCAM):
        with pytest.raises(ValueError, match=rf'channels.* Take backbone\.{module} as the target layer'):
            method(model, [block])
    cam.GradCAM(model, [block], reshape_transform=lambda x: x.permute(0, 3, 1, 2)).activations_and_grads.release()


@pytest.mark.parametrize('name', FAMILIES)
def test_captum(name):
    captum = pytest.importorskip('captum.attr', reason='runs by `make tools`')
    model = Classifier(name).eval()
    given = captum.IntegratedGradients(model).attribute(images(), target=1, n_steps=64)
    difference = (model(images()) - model(torch.zeros_like(images())))[:, 1]
    torch.testing.assert_close(given.sum((1, 2, 3)).float(), difference.detach(), rtol=0.1, atol=0.02)
    layer = next(iter(layers(model.backbone).values()))
    assert captum.LayerActivation(model, layer).attribute(images()).shape[0] == 2


def test_mmpretrain_s_vis_cam_draws_what_grad_cam_finds(write_config, shapes, tmp_path, monkeypatch):
    cam = pytest.importorskip('pytorch_grad_cam', reason='runs by `make tools`')
    show = importlib.import_module('pytorch_grad_cam.utils.image').show_cam_on_image
    mmpretrain = pytest.importorskip('mmpretrain', reason='needs mmpretrain')
    cv2 = importlib.import_module('cv2')
    config = write_config('mmpretrain')
    model = mmpretrain.get_model(str(config), device='cpu')
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'model.pth')
    image = sorted((shapes / 'imagenet' / 'val').rglob('*.JPEG'))[0]
    script = Path(mmpretrain.__file__).parent / '.mim' / 'tools' / 'visualization' / 'vis_cam.py'
    out = tmp_path / 'cam.png'
    command = [image, config, tmp_path / 'model.pth', '--target-layers', 'backbone.map3', '--save-path', out]
    monkeypatch.setattr(sys, 'argv', ['vis_cam.py', *map(str, command)])
    runpy.run_path(str(script), run_name='__main__')
    pixels = cv2.imread(str(image))
    x = (torch.from_numpy(pixels[:, :, ::-1].copy()).permute(2, 0, 1)[None].float() - 127) / 60
    with cam.GradCAM(model, [model.backbone.map3]) as camera:
        expected = show((pixels / 255).astype('float32'), camera(x, None)[0])
    assert abs(cv2.imread(str(out)).astype(int) - expected).max() <= 2
