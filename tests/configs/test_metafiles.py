"""Metafiles and model-index: every config stands in exactly one, and nothing there is made up."""

import re

import pytest
import yaml

from tests.configs.catalogue import DEMOS, FOLDER, METAFILES, NAMES, ROOT, ZOO, config, entries

TASKS = {
    'mmpretrain': {('Image Classification', 'ImageNet-1k', ('Top 1 Accuracy',))},
    'mmdet': {('Object Detection', 'COCO', ('box AP',)), ('Instance Segmentation', 'COCO', ('mask AP',))},
    'mmseg': {('Semantic Segmentation', 'ADE20K', ('mIoU', 'mIoU(ms+flip)'))},
}
RELEASES = {
    'vmamba': 'https://github.com/MzeroMiko/VMamba/releases/download/%23v',
    'mamba2d': 'https://github.com/cocoalex00/Mamba2D/releases/download/v2.0.0/M2D-',
}
NO_WEIGHTS = 'none-published/'


def test_every_config_stands_in_its_family_s_metafile() -> None:
    # entries() refuses a name that stands twice.
    assert sorted(entries()) == NAMES


@pytest.mark.parametrize('family', METAFILES)
def test_collection(family) -> None:
    content = yaml.safe_load(METAFILES[family].read_text(encoding='utf-8'))
    (collection,) = content['Collections']
    assert collection['Name'].lower() == family
    assert 'published by the authors, not measured' in collection['Metadata']['Figures']
    assert {entry['In Collection'] for entry in content['Models']} == {collection['Name']}


def test_model_index_lists_every_metafile() -> None:
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text(encoding='utf-8'))
    assert index == {'Import': [f'configs/{family}/metafile.yml' for family in METAFILES]}


@pytest.mark.parametrize('name', NAMES)
def test_entry_names_the_config(name) -> None:
    assert entries()[name]['Config'] == f'configs/{name}.py'
    assert (ROOT / entries()[name]['Config']).is_file()


@pytest.mark.parametrize('name', NAMES)
def test_entry_tells_how_long_the_config_trains(name) -> None:
    told, cfg = entries()[name]['Metadata'], config(name)
    assert told.get('Epochs') == cfg.train_cfg.get('max_epochs')
    assert told.get('Iterations') == cfg.train_cfg.get('max_iters')


@pytest.mark.parametrize('name', ZOO)
def test_entry_tells_what_the_config_does(name) -> None:
    entry, cfg = entries()[name], config(name)
    told = entry['Metadata']
    assert told['Batch Size'] == cfg.auto_scale_lr.base_batch_size
    assert told['Training Data'] == {'mmpretrain': 'ImageNet-1k', 'mmdet': 'COCO', 'mmseg': 'ADE20K'}[cfg.default_scope]
    assert cfg.optim_wrapper.optimizer.type in told['Training Techniques']
    averaged = any(hook.type == 'EMAHook' for hook in cfg.get('custom_hooks', []))
    assert averaged == ('EMA' in told['Training Techniques'])


@pytest.mark.parametrize('name', ZOO)
def test_results_are_of_the_config_s_task_or_said_to_be_missing(name) -> None:
    entry = entries()[name]
    family = name.partition('/')[0]
    if entry['Metadata'].get('Figures') == 'none published':
        assert 'Results' not in entry and entry['Weights'] == NO_WEIGHTS
        return
    found = {(result['Task'], result['Dataset'], tuple(result['Metrics'])) for result in entry['Results']}
    assert found == TASKS[config(name).default_scope]
    # test_recipes.py compares the figures. V2M's authors published no weights.
    assert entry['Weights'].startswith(RELEASES.get(family, NO_WEIGHTS))


@pytest.mark.parametrize('name', DEMOS)
def test_demos_come_without_weights(name) -> None:
    assert entries()[name]['Weights'] == NO_WEIGHTS


def test_no_weights_stand_twice() -> None:
    weights = [entry['Weights'] for entry in entries().values() if entry['Weights'] != NO_WEIGHTS]
    assert len(weights) == len(set(weights)) > 0


@pytest.mark.parametrize('name', NAMES)
def test_names_follow_openmmlab(name) -> None:
    """The batch in a name is the recipe's, the schedule the training's, the parts those of the config."""
    cfg, stem = config(name), name.partition('/')[2]
    if name in DEMOS:
        return
    backbone = stem.partition('_upernet')[0] if cfg.default_scope == 'mmseg' else stem
    arch = cfg.model.backbone.arch
    assert re.search(rf'(^|_){name.partition("/")[0]}-{arch}(_|$)', backbone)
    batch = re.search(r'_(\d+)xb(\d+)[-_]', stem)
    gpus, images = map(int, batch.groups()) if batch else (8, 2)
    assert cfg.train_dataloader.batch_size == images
    assert cfg.auto_scale_lr.base_batch_size == gpus * images
    schedule = {'_1x_': 12, '-12e_': 12, '-3x_': 36, '-160k_': 160000, '_in1k': 300}
    (length,) = [value for key, value in schedule.items() if key in stem]
    assert length == cfg.train_cfg.get('max_epochs', cfg.train_cfg.get('max_iters'))


@pytest.mark.parametrize('name', ZOO)
def test_the_family_s_readme_gives_the_entry_s_figures(name) -> None:
    entry = entries()[name]
    family, _, stem = name.partition('/')
    readme = (FOLDER / family / 'README.md').read_text(encoding='utf-8')
    (row,) = [line for line in readme.splitlines() if line.startswith(f'| [{stem}]({stem}.py) |')]
    parameters, flops, metrics, weights = [cell.strip() for cell in row.split('|')[2:-1]]
    # tests/test_flops.py counts them.
    assert 5 < float(parameters) < 130 and 1 < float(flops) < 2000
    published = [str(value) for result in entry.get('Results', []) for value in result['Metrics'].values()]
    assert metrics == (' / '.join(published) or '–')
    # The entry of one without published weights ends in a slash.
    file = entry['Weights'].rpartition('/')[2]
    assert weights == (f'[`{file}`]({entry["Weights"]})' if file else '–')
