"""README.md and the pages under docs/ and configs/: blocks of Python run, configs train, links lead somewhere."""

import copy
import json
import math
import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.datasets import CocoDataset
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, DefaultScope
from PIL import Image
from torch import nn

import ssm_backbones
from ssm_backbones import V2M, Mamba2D, VMamba
from ssm_backbones.apis.config import load_config
from ssm_backbones.checkpoints import convert_checkpoint, convert_file
from ssm_backbones.engine.runner import TrainOptions, train
from ssm_backbones.flops import config_complexity
from ssm_backbones.shapes.generate import make_shapes
from ssm_backbones.shapes.options import ShapesOptions
from tests.checkpoints.layouts import (
    MAMBA2D,
    VMAMBA,
    mamba2d_classifier,
    random_tensors,
    vmamba_classifier,
    vmamba_pyramid,
)
from tests.checkpoints.small import classifier, prefixed, pyramid
from tests.configs.recipes import PUBLISHED, TASKS
from tests.configs.small_runs import RecordSteps, narrow_heads, shrink, shrink_proposals

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / 'docs' / 'use_with_other_heads.md'
README = ' '.join((ROOT / 'README.md').read_text(encoding='utf-8').split())
PAGES = [ROOT / 'README.md', *sorted(ROOT.glob('docs/*.md')), *sorted(ROOT.glob('configs/*/README.md'))]
BLOCKS = {
    f'{path.stem if path.parent.parent.name != "configs" else path.parent.name}-{number}': block
    for path in PAGES
    for number, block in enumerate(
        re.findall(r'^```python\n(.*?)^```$', path.read_text(encoding='utf-8'), re.MULTILINE | re.DOTALL)
    )
}
# Configs that only inherit are those of the zoo, which tests/configs trains.
INHERITED = [name for name, block in BLOCKS.items() if re.fullmatch(r"_base_ = '\S+'\n", block)]
CONFIGS = [name for name, block in BLOCKS.items() if block.startswith('_base_') and name not in INHERITED]
PARTS = [name for name, block in BLOCKS.items() if block.startswith('backbone=')]
INFERENCE = [name for name, block in BLOCKS.items() if 'DetInferencer' in block]
PREDICTION = [name for name, block in BLOCKS.items() if 'Predictor(' in block]
SCRIPTS = [name for name in BLOCKS if name not in INHERITED + CONFIGS + PARTS + INFERENCE + PREDICTION]
EPOCHS = 4
# The small arch that takes the full one's place, and its channels.
SMALL = {'VMamba': [16, 32, 64, 128], 'Mamba2D': [16, 24, 32, 64]}
SCAN_PARAMETERS = ('A_log', 'D', 'dt_bias')


@pytest.fixture(scope='module', autouse=True)
def _quick_starts(quick_starts):
    """For every run."""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with stand-ins for the files that the pages name: weights, and data of the same layouts."""
    folder = tmp_path_factory.mktemp('docs')
    torch.manual_seed(0)

    def shrunk(layout):
        # Near zero, so that a network of that depth stays finite.
        return {name: tensor * 0.02 for name, tensor in random_tensors(layout).items()}

    for name, variant in [
        ('vssm1_tiny_0230s_ckpt_epoch_264.pth', 'tiny-s1l8'),
        ('vssm_small_0229_ckpt_epoch_222.pth', 'small-s2l15'),
    ]:
        torch.save({'model': shrunk(vmamba_classifier(**VMAMBA[variant]))}, folder / name)
    torch.save({'state_dict': shrunk(mamba2d_classifier(**MAMBA2D['tiny']))}, folder / 'M2D-T-backbone.ckpt')
    official = {f'backbone.{name}': tensor for name, tensor in shrunk(vmamba_pyramid(**VMAMBA['tiny-s1l8'])).items()}
    detector, _ = convert_checkpoint({'state_dict': {**official, 'neck.weight': torch.ones(2)}})
    torch.save(detector, folder / 'my_detector.pth')

    shapes, data = folder / 'shapes', folder / 'data'
    make_shapes(shapes, ShapesOptions(seed=1, train=4, val=2, size=(96, 96), max_size=(96, 128)))
    (data / 'ade').mkdir(parents=True)
    (shapes / 'imagenet').rename(data / 'my_classes')
    (shapes / 'coco').rename(data / 'coco')
    names = CocoDataset.METAINFO['classes']
    # Half of the shapes are the classes of one's own that the pages name, and stand in COCO's order, too.
    ids = [names.index(name) + 1 for name in ('bird', 'cat', 'dog', 'person', 'bicycle', 'car')]
    for path in data.glob('coco/annotations/*.json'):
        content = json.loads(path.read_text())
        content['categories'] = [dict(id=number, name=name) for number, name in enumerate(names, 1)]
        for annotation in content['annotations']:
            annotation['category_id'] = ids[annotation['category_id'] - 1]
        path.write_text(json.dumps(content))
    (shapes / 'ade20k').rename(data / 'ade' / 'ADEChallengeData2016')
    for path in data.glob('ade/ADEChallengeData2016/images/*/*.jpg'):
        Image.open(path).convert('RGBA').save(path.with_suffix('.png'))
    return folder


def read(name, monkeypatch, folder):
    """A config block as a file of its own, whose weights lie in the working folder instead of behind a URL."""
    monkeypatch.chdir(folder)
    Path('my_config.py').write_text(re.sub(r"'https://\S+/", "'", BLOCKS[name]))
    return load_config('my_config.py')


def test_every_block_is_found():
    """None of Python stands in a fence that the pattern above does not read, and there are some of every kind."""
    assert sum(path.read_text(encoding='utf-8').lower().count('```py') for path in PAGES) == len(BLOCKS)
    assert INHERITED and CONFIGS and PARTS and INFERENCE and SCRIPTS


def links(path):
    """The targets of a page's links and images, its blocks of code left out."""
    text = re.sub(r'^```.*?^```$', '', path.read_text(encoding='utf-8'), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r'\]\(<?([^)\s>]+)', text)


@pytest.mark.parametrize('path', PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_links_within_the_project_lead_somewhere(path):
    for link in links(path):
        if re.match(r'[a-z]+:', link):
            continue
        target, _, section = link.partition('#')
        file = (path.parent / target) if target else path
        assert file.exists(), link
        if section:
            headings = re.findall(r'^#+ (.*)$', file.read_text(encoding='utf-8'), re.MULTILINE)
            assert section in {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}, link


@pytest.mark.parametrize('name', INHERITED)
def test_configs_that_only_inherit_are_the_zoo_s(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    Path('my_config.py').write_text(BLOCKS[name])
    whole, _, base = BLOCKS[name].strip().strip("'").partition('ssm_backbones::')
    assert whole and load_config('my_config.py').to_dict() == load_config(ROOT / 'configs' / base).to_dict()


@pytest.fixture
def street(shapes, tmp_path, monkeypatch):
    """The working folder, with an image that is called as in README.md; returns its width and height."""
    monkeypatch.chdir(tmp_path)
    with Image.open(sorted(shapes.glob('coco/val2017/*'))[0]) as image:
        image.save('street.jpg')
        return image.size


def save_official(name, model):
    """A whole model's file as the authors have them: small, its backbone under their names."""
    rest = {key: value for key, value in model.state_dict().items() if not key.startswith('backbone.')}
    official = {key: value * 0.2 for key, value in prefixed('backbone.', pyramid()).items()}
    meta = dict(dataset_meta=dict(classes=list('abcdefg'), palette=[[30 * i, 90, 200] for i in range(7)]))
    torch.save(dict(meta=meta, state_dict=official | rest), name)
    converted = convert_checkpoint(dict(state_dict=official | rest))[0]['state_dict']
    return {key: value for key, value in converted.items() if key.startswith('backbone.')}


def build(config):
    cfg = load_config(config)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return import_module(f'{cfg.default_scope}.registry').MODELS.build(cfg.model)


@pytest.mark.parametrize('name', PREDICTION)
def test_predictors_find_objects_and_draw_them(name, street, write_config):
    """The block as it stands, with a small model for the one that it names."""
    config, weights = re.search(r"Predictor\('(\S+)', '(\S+)'\)", BLOCKS[name]).groups()
    Path(config).write_text(f"_base_ = '{write_config('mmdet')}'\n")
    Path(weights).parent.mkdir(parents=True)
    torch.save(dict(state_dict=build(config).state_dict()), weights)
    namespace = {'__name__': 'snippet'}
    exec(compile(BLOCKS[name], name, 'exec'), namespace)
    assert len(namespace['result'].pred_instances)
    assert namespace['drawing'].shape == (*street[::-1], 3)


@pytest.mark.parametrize('name', INFERENCE)
def test_the_authors_detector_finds_boxes_and_draws_them(name, street, write_config, monkeypatch):
    """The block as it stands, with a small model for the one that it names."""
    (named,) = re.findall(r"config_file\('(\S+)'\)", BLOCKS[name])
    (weights,) = re.findall(r"'(\S+\.pth)'", BLOCKS[name])
    assert weights in (ROOT / 'configs' / 'vmamba' / 'metafile.yml').read_text(encoding='utf-8')
    assert Path(ssm_backbones.config_file(named)).is_file()
    config = str(write_config('mmdet'))
    monkeypatch.setattr(ssm_backbones, 'config_file', {named: config}.get)
    converted = save_official(weights, build(config))

    namespace = {'__name__': 'snippet'}
    exec(compile(BLOCKS[name], name, 'exec'), namespace)
    state = namespace['detector'].model.state_dict()
    assert converted and all(torch.equal(state[key], tensor) for key, tensor in converted.items())
    found = json.loads(Path('out/preds/street.json').read_text())
    boxes = np.array(found['bboxes'])
    assert len(boxes) == len(found['scores']) == len(found['masks']) == 10
    assert (boxes >= 0).all() and (boxes[:, 2:] > boxes[:, :2]).any()
    assert (boxes[:, [0, 2]] <= street[0]).all() and (boxes[:, [1, 3]] <= street[1]).all()
    with Image.open('out/vis/street.jpg') as drawn:
        assert drawn.size == street


def test_the_authors_segmentor_labels_an_image(street, write_config):
    from mmseg.apis import MMSegInferencer

    assert '`mmseg.apis.MMSegInferencer(config, checkpoint)` segments' in README
    config = str(write_config('mmseg'))
    save_official('segmentor.pth', build(config))
    labels = MMSegInferencer(config, 'segmentor.pth')('street.jpg', out_dir='out')['predictions']
    assert labels.shape == street[::-1] and set(np.unique(labels)) <= set(range(7))
    assert Path('out/vis/street.jpg').is_file()


def test_a_converted_classifier_classifies_an_image(street, write_config):
    from mmpretrain import ImageClassificationInferencer

    assert '`mmpretrain.ImageClassificationInferencer(config, pretrained=checkpoint)` classifies' in README
    tensors = {key: value * 0.2 for key, value in classifier(num_classes=6).items()}
    torch.save({'model': tensors}, 'official.pth')
    convert_file('official.pth', 'classifier.pth')
    inferencer = ImageClassificationInferencer(str(write_config('mmpretrain')), pretrained='classifier.pth')
    assert torch.equal(inferencer.model.head.fc.weight, tensors['classifier.head.weight'])
    (result,) = inferencer('street.jpg')
    assert result['pred_score'] == max(result['pred_scores']) and len(result['pred_scores']) == 6


@pytest.mark.parametrize('name', SCRIPTS)
def test_scripts_run_and_train(name, folder, monkeypatch, capsys):
    for library in ('timm', 'segmentation_models_pytorch', 'transformers'):
        if re.search(rf'^(import|from) {library}\b', BLOCKS[name], re.MULTILINE):
            pytest.importorskip(library, reason='make tools installs it')
    monkeypatch.chdir(folder)
    namespace = {'__name__': 'snippet'}
    exec(compile(BLOCKS[name], name, 'exec'), namespace)
    if 'optimizer' not in namespace:
        assert 'loss' not in namespace
        return
    losses = [float(line) for line in capsys.readouterr().out.splitlines() if re.fullmatch(r'\d+\.\d+', line)]
    assert sum(losses[-3:]) < sum(losses[:3])
    optimizer, model = namespace['optimizer'], namespace['model']
    assert isinstance(optimizer, torch.optim.AdamW)
    check_groups(
        model,
        {
            name: group
            for group in optimizer.param_groups
            for name, parameter in model.named_parameters()
            if any(parameter is each for each in group['params'])
        },
        lr=PUBLISHED['vmamba']['recipes']['coco']['lr'],
        decay=PUBLISHED['vmamba']['recipes']['coco']['weight_decay'],
    )


@pytest.mark.parametrize('name', PARTS)
def test_parts_of_configs_build(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    config = eval(f'dict({BLOCKS[name]})')['backbone']
    config['init_cfg']['checkpoint'] = 'vssm1_tiny_0230s_ckpt_epoch_264.pth'
    model = import_module('mmengine.registry').MODELS.build(config)
    before = model.stages[0].blocks[0].mixer.in_proj.weight.clone()
    model.init_weights()
    assert not before.equal(model.stages[0].blocks[0].mixer.in_proj.weight)


@pytest.mark.parametrize('name', CONFIGS)
def test_configs_build_run_and_load_their_weights(name, folder, monkeypatch):
    cfg = read(name, monkeypatch, folder)
    block = BLOCKS[name]
    # On small images and few proposals: the heads fit the maps.
    few = copy.deepcopy(cfg)
    if 'roi_head' in few.model:
        shrink_proposals(few.model)
    assert config_complexity(few, 128, 96).flops > 0

    registry = import_module(f'{cfg.default_scope}.registry').MODELS
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        backbone = registry.build(cfg.model.backbone)
        before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
        backbone.init_weights()
        changed = {name for name, tensor in backbone.state_dict().items() if not torch.equal(tensor, before[name])}
        whole = 'my_detector' in block or cfg.default_scope == 'mmpretrain'
        anew = set() if whole else {'norm0', 'norm1', 'norm2', 'norm3'}
        assert {name for name in before if name.partition('.')[0] not in anew} == changed
        if 'layer_decay_rate' in block:
            with torch.device('meta'):
                model = registry.build(cfg.model)
            wrapper = build_optim_wrapper(model, cfg.optim_wrapper.to_dict() | dict(type='OptimWrapper'))
            rates = {group['lr'] for group in wrapper.optimizer.param_groups}
            # The second stage's first block, of 14, is the lowest that is not frozen.
            assert min(rates) == pytest.approx(1e-4 * 0.9**12) and max(rates) == 1e-4


def check_groups(model, groups, lr, decay):
    """Every parameter learns at the recipe's rate, and decays as in the recipe or, as it says, not at all."""
    assert groups.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    norms = {f'backbone.{name}.' for name, module in model.backbone.named_modules() if isinstance(module, nn.LayerNorm)}
    for name, group in groups.items():
        owner, leaf = name.rpartition('.')[::2]
        assert group['lr'] == pytest.approx(lr(name) if callable(lr) else lr), name
        if f'{owner}.' in norms or leaf in SCAN_PARAMETERS:
            assert group['weight_decay'] == 0, name
        elif model.get_parameter(name).ndim > 1:
            assert group['weight_decay'] == decay, name


def small(cfg, epochs=EPOCHS):
    """The same config with the small arch of the family in the place of the full one, whose weights are not loaded.

    Necks, heads, images, batches and schedules are smaller, too. Without warm-up, at whose rates nothing would fall.
    """
    shrink(cfg, epochs=epochs, side=96)
    if cfg.default_scope != 'mmpretrain':
        narrow_heads(cfg.model, 32)
    backbone, widths = cfg.model.backbone, SMALL[cfg.model.backbone.type]
    backbone.arch = 'test'
    out_indices = backbone.get('out_indices', (0, 1, 2, 3))
    channels = [widths[i] for i in ([out_indices] if isinstance(out_indices, int) else out_indices)]
    if cfg.default_scope == 'mmpretrain':
        cfg.model.head.in_channels = channels[-1]
        cfg.train_dataloader.dataset.pop('indices')
    elif cfg.default_scope == 'mmdet':
        cfg.model.neck.in_channels = channels
    else:
        cfg.model.decode_head.in_channels = channels
        if 'auxiliary_head' in cfg.model:
            cfg.model.auxiliary_head.in_channels = channels[2]
    return cfg


def run(cfg, tmp_path):
    cfg.dump(tmp_path / 'small.py')
    runner = train(TrainOptions(str(tmp_path / 'small.py'), work_dir=str(tmp_path / 'work')))
    (record,) = [hook for hook in runner.hooks if isinstance(hook, RecordSteps)]
    return runner, record


@pytest.mark.parametrize('name', CONFIGS)
def test_configs_train(name, folder, monkeypatch, tmp_path):
    cfg = read(name, monkeypatch, folder)
    recipe = PUBLISHED[cfg.model.backbone.type.lower()]['recipes'][TASKS[cfg.default_scope]]
    assert 'init_cfg' in cfg.model.backbone and 'auto_scale_lr' in cfg
    base = recipe['lr'] * cfg.auto_scale_lr.base_batch_size / recipe['batch']

    def lr(name):
        if 'SegformerHead' in cfg.model.get('decode_head', dict(type=''))['type'] and name.startswith('decode_head.'):
            return 10 * base
        if 'layer_decay_rate' in cfg.optim_wrapper.get('paramwise_cfg', {}) and name.startswith('backbone.'):
            layer, layers = runner.model.backbone.get_layer_depth(name, 'backbone.')
            return base * 0.9 ** (layers - 1 - layer)
        return base

    runner, record = run(small(cfg), tmp_path)
    assert record.optimizer == 'AdamW'
    check_groups(runner.model, record.groups, lr, recipe['weight_decay'])
    # Several processes would stop at a parameter without a gradient.
    assert record.groups.keys() == record.touched
    assert len(record.losses) >= 2 * EPOCHS and record.end < record.start


def test_the_block_of_four_channels_serves_grey_images(folder, monkeypatch, tmp_path):
    (name,) = [name for name in CONFIGS if 'in_channels=4' in BLOCKS[name]]
    text, count = re.subn(r'in_channels=4', 'in_channels=1', BLOCKS[name])
    assert count == 2
    text = text.replace("'unchanged'", "'grayscale'")
    text = re.sub(r'mean=\[.*?\], std=\[.*?\]', 'mean=[120.0], std=[58.0]', text)
    monkeypatch.setitem(BLOCKS, name, text)
    cfg = read(name, monkeypatch, folder)
    with DefaultScope.overwrite_default_scope('mmseg'):
        import_module('mmseg.registry').MODELS.build(cfg.model.backbone).init_weights()
    _, record = run(small(cfg, epochs=1), tmp_path)
    assert len(record.losses) == 2


@pytest.mark.parametrize('name', [name for name in CONFIGS if 'EMAHook' in BLOCKS[name]])
def test_averages_forget_the_untrained_heads(name, folder, monkeypatch):
    """Of 1000 images in batches of two, within the config's epochs; the page says how long it takes."""
    cfg = read(name, monkeypatch, folder)
    (hook,) = [
        HOOKS.build({key: value for key, value in hook.items() if key != 'priority'}) for hook in cfg.custom_hooks
    ]
    model = nn.Linear(1, 1)
    average = import_module('mmengine.registry').MODELS.build(dict(hook.ema_cfg, model=model))
    iterations = cfg.train_cfg.max_epochs * 1000 // 2
    assert (1 - average.momentum) ** iterations < 1e-3
    text = ' '.join(PAGE.read_text(encoding='utf-8').split())
    said = re.search(r'below 1 % after (\d+) iterations with (\S+), but only after (\d+) (\d+) with (\S+),', text)
    assert float(said[2]) == average.momentum
    assert 1 - float(said[5]) == PUBLISHED['vmamba']['recipes']['imagenet']['ema']
    for iterations, momentum in ((said[1], said[2]), (said[3] + said[4], said[5])):
        assert int(iterations) == pytest.approx(math.log(0.01) / math.log1p(-float(momentum)), rel=0.01)


def test_the_table_of_channels_is_right():
    page = PAGE.read_text(encoding='utf-8')
    with torch.device('meta'):
        rows = [
            (
                'VMamba tiny, small; V2M hier-small, hier-base',
                [VMamba('tiny'), VMamba('small'), V2M('hier-small'), V2M('hier-base')],
            ),
            ('VMamba base', [VMamba('base')]),
            ('Mamba2D nano', [Mamba2D('nano')]),
            ('Mamba2D tiny', [Mamba2D('tiny')]),
            ('Mamba2D small', [Mamba2D('small')]),
        ]
        pyramids = [V2M(arch, pyramid='multi') for arch in ('tiny', 'small')]
    for label, backbones in rows:
        for backbone in backbones:
            assert f'| {label} | {", ".join(map(str, backbone.out_channels))} | 4, 8, 16, 32 |' in page
    assert [pyramid.out_channels for pyramid in pyramids] == [(48, 96, 192, 192), (96, 192, 384, 384)]
