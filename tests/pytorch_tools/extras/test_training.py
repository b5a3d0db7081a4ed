"""Lightning, accelerate, captum, pytorch-grad-cam and Torch-Pruning."""

import importlib

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.pytorch_tools.models import FAMILIES, build, images, layers


class Classifier(nn.Module):
    def __init__(self, name='vmamba'):
        super().__init__()
        self.backbone = build(name)
        self.head = nn.Linear(self.backbone.out_channels[-1], 3)

    def forward(self, x):
        return self.head(self.backbone(x)[-1].mean((2, 3)))


def loader():
    return DataLoader(TensorDataset(images(), torch.tensor([0, 2])), batch_size=2)


def test_lightning(tmp_path):
    lightning = pytest.importorskip('lightning', reason='runs by `make tools`')

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Classifier()

        def training_step(self, batch):
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    module = Module()
    before = module.model.backbone.stages[0].blocks[0].mixer.in_proj.weight.clone()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator='cpu', logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(module, loader())
    assert not torch.equal(module.model.backbone.stages[0].blocks[0].mixer.in_proj.weight, before)


def test_accelerate():
    accelerate = pytest.importorskip('accelerate', reason='runs by `make tools`')
    accelerator = accelerate.Accelerator(cpu=True)
    model = Classifier()
    model, optimizer, data = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loader())
    x, y = next(iter(data))
    value = nn.functional.cross_entropy(model(x), y)
    accelerator.backward(value)
    optimizer.step()
    with torch.no_grad():
        assert nn.functional.cross_entropy(model(x), y) < value


def test_accelerates_offloaded_weights_are_read_by_calls():
    accelerate = pytest.importorskip('accelerate', reason='runs by `make tools`')
    model = build('v2m-plain').eval()
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


def test_captum():
    captum = pytest.importorskip('captum.attr', reason='runs by `make tools`')
    model = Classifier().eval()
    given = captum.IntegratedGradients(model).attribute(images(), target=1, n_steps=64)
    difference = (model(images()) - model(torch.zeros_like(images())))[:, 1]
    torch.testing.assert_close(given.sum((1, 2, 3)).float(), difference.detach(), rtol=0.1, atol=0.02)
    layer = model.backbone.stages[0].blocks[0].mlp.fc1
    assert captum.LayerActivation(model, layer).attribute(images()).shape[0] == 2


def test_torch_pruning_narrows_the_mlps():
    pruning = pytest.importorskip('torch_pruning', reason='runs by `make tools`')
    model = build('vmamba').eval()
    graph = pruning.DependencyGraph().build_dependency(model, example_inputs=images())
    layer = model.stages[0].blocks[0].mlp.fc1
    width = layer.out_features
    graph.get_pruning_group(layer, pruning.prune_linear_out_channels, idxs=[0, 1, 2]).prune()
    assert layer.out_features == width - 3
    assert model.stages[0].blocks[0].mlp.fc2.in_features == width - 3
    assert all(torch.isfinite(m).all() for m in model(images()))
    assert layers(model)
