"""Configs for one's own data, in the formats that people have: each trains, and learns what COCO's form does."""

import csv
import json
import math
import os
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS, DefaultScope
from PIL import Image

from ssm_backbones.apis.config import load_config
from ssm_backbones.project import NewProjectOptions, new_project
from ssm_backbones.project.recipe import choose_batch, choose_epochs
from ssm_backbones.project.sources import read_class_list
from ssm_backbones.utils.errors import CommandError

TOOL = Path(__file__).resolve().parents[2] / 'tools' / 'new_project.py'
# In the order of Pascal VOC's, whose classes no file lists.
NAMES = ['cross', 'disc', 'rectangle', 'ring', 'star', 'triangle']
COLOURS = [
    (0, 0, 0),
    (90, 90, 90),
    (230, 60, 60),
    (60, 130, 240),
    (60, 190, 80),
    (245, 190, 40),
    (170, 80, 220),
    (40, 200, 210),
]


def coco(shapes: Path, split: str) -> dict:
    return json.loads((shapes / 'coco' / 'annotations' / f'instances_{split}2017.json').read_text())


def boxes_of(content: dict, image: dict) -> list[tuple[str, list[float]]]:
    names = {each['id']: each['name'] for each in content['categories']}
    return [
        (names[each['category_id']], each['bbox']) for each in content['annotations'] if each['image_id'] == image['id']
    ]


def as_coco(shapes: Path, folder: Path, masks: bool = True) -> None:
    shutil.copytree(shapes / 'coco', folder)
    for path in folder.glob('annotations/*.json'):
        content = json.loads(path.read_text())
        if not masks:
            # What the other formats hold.
            content['categories'].sort(key=lambda each: NAMES.index(each['name']))
            for each in content['annotations']:
                each.update(segmentation=[], area=each['bbox'][2] * each['bbox'][3])
        path.write_text(json.dumps(content))


def as_yolo(shapes: Path, folder: Path) -> None:
    """Ultralytics' layout: a text file for each image, a line for each box, in shares of the image."""
    for split in ('train', 'val'):
        content = coco(shapes, split)
        shutil.copytree(shapes / 'coco' / f'{split}2017', folder / 'images' / split)
        (folder / 'labels' / split).mkdir(parents=True)
        for image in content['images']:
            lines = []
            for name, (x, y, w, h) in boxes_of(content, image):
                width, height = image['width'], image['height']
                values = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
                lines.append(' '.join([str(NAMES.index(name)), *(f'{value:.6f}' for value in values)]))
            (folder / 'labels' / split / f'{Path(image["file_name"]).stem}.txt').write_text('\n'.join(lines))
    names = '\n'.join(f'  {place}: {name}' for place, name in enumerate(NAMES))
    (folder / 'data.yaml').write_text(
        f'path: /another/machine\ntrain: images/train\nval: images/val\nnames:\n{names}\n'
    )


def as_voc(shapes: Path, folder: Path) -> None:
    """The devkit's layout, whose whole pixels are counted from 1."""
    for name in ('JPEGImages', 'Annotations', 'ImageSets/Main'):
        (folder / name).mkdir(parents=True)
    for split in ('train', 'val'):
        content, stems = coco(shapes, split), []
        for image in content['images']:
            stem = f'{split}_{Path(image["file_name"]).stem}'
            stems.append(stem)
            shutil.copy(shapes / 'coco' / f'{split}2017' / image['file_name'], folder / 'JPEGImages' / f'{stem}.jpg')
            root = ElementTree.Element('annotation')
            ElementTree.SubElement(root, 'filename').text = f'{stem}.jpg'
            for name, (x, y, w, h) in boxes_of(content, image):
                each = ElementTree.SubElement(root, 'object')
                ElementTree.SubElement(each, 'name').text = name
                box = ElementTree.SubElement(each, 'bndbox')
                for key, value in (('xmin', x + 1), ('ymin', y + 1), ('xmax', x + w), ('ymax', y + h)):
                    ElementTree.SubElement(box, key).text = str(round(value))
            ElementTree.ElementTree(root).write(folder / 'Annotations' / f'{stem}.xml')
        (folder / 'ImageSets' / 'Main' / f'{split}.txt').write_text('\n'.join(stems))


def make(tmp_path: Path, task: str, data: Path, **options):
    return new_project(NewProjectOptions(task, str(data), str(tmp_path / 'my_config.py'), 'vmamba-test', **options))


def objects(cfg, mode: str) -> list:
    """Names, boxes and their labels of all images of a split, as mmdet's data set has them, in its order."""
    settings = cfg[f'{mode}_dataloader'].dataset
    settings.update(pipeline=[], filter_cfg=None)
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = DATASETS.build(settings)
    names = dataset.metainfo['classes']
    found = []
    for place in range(len(dataset)):
        info = dataset.get_data_info(place)
        assert Path(info['img_path']).is_file()
        found.append(
            [(names[each['bbox_label']], each['bbox_label'], each['bbox']) for each in info['instances']],
        )
    return found


@pytest.mark.parametrize('write', [as_yolo, as_voc])
def test_converted_boxes_are_those_of_the_coco_form(write, shapes, tmp_path) -> None:
    pytest.importorskip('supervision', reason='YOLO and Pascal VOC are converted by supervision')
    write(shapes, tmp_path / 'data')
    as_coco(shapes, tmp_path / 'coco', masks=False)
    made = make(tmp_path, 'det', tmp_path / 'data')
    assert (made.found.images, made.found.val_images, made.found.masks) == (12, 4, False)
    assert made.found.classes == tuple(NAMES)
    (tmp_path / 'other').mkdir()
    reference = make(tmp_path / 'other', 'det', tmp_path / 'coco')
    assert made.base == reference.base == 'vmamba/faster-rcnn_vmamba-tiny_fpn_1x_coco.py'
    ours, theirs = load_config(made.config), load_config(reference.config)
    for mode in ('train', 'val'):
        assert objects(ours, mode) == objects(theirs, mode)
    # An annotation of id 0 is never matched by pycocotools.
    content = json.loads(Path(ours.val_evaluator.ann_file).read_text())
    assert min(each['id'] for each in content['annotations']) > 0


def test_polygons_become_masks_and_none_a_crowd(tmp_path) -> None:
    pytest.importorskip('supervision', reason='YOLO and Pascal VOC are converted by supervision')
    data = tmp_path / 'data'
    for split in ('train', 'val'):
        for kind in ('images', 'labels'):
            (data / kind / split).mkdir(parents=True)
        Image.new('RGB', (40, 40)).save(data / 'images' / split / 'a.jpg')
        # A square, and two triangles that meet in one point.
        lines = ['0 0.1 0.1 0.4 0.1 0.4 0.4 0.1 0.4', '1 0.5 0.5 0.9 0.9 0.9 0.5 0.5 0.9']
        (data / 'labels' / split / 'a.txt').write_text('\n'.join(lines))
    (data / 'data.yaml').write_text('train: images/train\nval: images/val\nnames: [one, two]\n')
    made = make(tmp_path, 'det', data)
    assert made.found.masks and made.found.classes == ('one', 'two')
    content = json.loads(Path(made.found.train['ann_file']).read_text())
    assert [each['iscrowd'] for each in content['annotations']] == [0, 0]
    assert all(each['segmentation'] for each in content['annotations'])


def test_converters_that_are_missing_are_named(shapes, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(__import__('sys').modules, 'supervision', None)
    as_yolo(shapes, tmp_path / 'data')
    with pytest.raises(CommandError, match='pip install'):
        make(tmp_path, 'det', tmp_path / 'data')
    assert not (tmp_path / 'my_config.py').exists()


def test_masks_are_learnt_where_all_objects_have_one(shapes, tmp_path) -> None:
    as_coco(shapes, tmp_path / 'data')
    made = make(tmp_path, 'det', tmp_path / 'data')
    assert made.found.masks and made.base.startswith('vmamba/mask-rcnn')
    cfg = load_config(made.config)
    assert cfg.model.roi_head.mask_head.num_classes == 6 and cfg.val_evaluator.metric == ['bbox', 'segm']
    path = tmp_path / 'data' / 'annotations' / 'instances_train2017.json'
    content = json.loads(path.read_text())
    del content['annotations'][0]['segmentation']
    path.write_text(json.dumps(content))
    (tmp_path / 'my_config.py').unlink()
    made = make(tmp_path, 'det', tmp_path / 'data')
    assert made.base.startswith('vmamba/faster-rcnn')
    assert any(note.startswith('1 of ') and 'boxes alone' in note for note in made.found.notes)


def test_classes_are_numbered_as_mmdet_does(shapes, tmp_path) -> None:
    """By the order in the file: a validation file of another order would exchange them."""
    as_coco(shapes, tmp_path / 'data', masks=False)
    before = make(tmp_path, 'det', tmp_path / 'data')
    expected = objects(load_config(before.config), 'val')
    path = tmp_path / 'data' / 'annotations' / 'instances_val2017.json'
    content = json.loads(path.read_text())
    content['categories'].reverse()
    path.write_text(json.dumps(content))
    before.config.unlink()
    made = make(tmp_path, 'det', tmp_path / 'data')
    assert objects(load_config(made.config), 'val') == expected
    assert made.found.val['ann_file'] != str(path)


def test_one_annotation_file_is_divided(shapes, tmp_path) -> None:
    shutil.copytree(shapes / 'coco' / 'train2017', tmp_path / 'data' / 'images')
    (tmp_path / 'data' / 'result.json').write_text(json.dumps(coco(shapes, 'train')))
    made = make(tmp_path, 'det', tmp_path / 'data', seed=1)
    assert (made.found.images, made.found.val_images) == (11, 1)
    cfg = load_config(made.config)
    assert len(objects(cfg, 'train')) == 11 and len(objects(cfg, 'val')) == 1
    assert 'no validation set was found' in made.found.notes[0]


@pytest.mark.parametrize(
    'form',
    [
        'colours',
        *(pytest.param(form, marks=pytest.mark.slow) for form in ('split', 'indices', 'palette', 'grey', 'binary')),
    ],
)
def test_label_maps_in_each_form(form, shapes, tmp_path) -> None:
    data = tmp_path / 'data'
    source = shapes / 'ade20k'
    truth = {}
    for split in ('training', 'validation'):
        pairs = (
            (data / 'images', data / 'masks') if form == 'split' else (data / 'images' / split, data / 'masks' / split)
        )
        for folder in pairs:
            folder.mkdir(parents=True, exist_ok=True)
        for image in (source / 'images' / split).glob('*.jpg'):
            shutil.copy(image, pairs[0] / image.name)
            labels = np.asarray(Image.open(source / 'annotations' / split / f'{image.stem}.png'))
            written = labels
            if form == 'binary':
                labels = (labels > 0).astype(np.uint8)
                written = labels * 255
            elif form == 'colours':
                written = np.array(COLOURS, np.uint8)[labels]
            elif form == 'grey':
                written = np.repeat(labels[:, :, None], 3, axis=2)
            picture = Image.fromarray(written)
            if form == 'palette':
                picture.putpalette([value for colour in COLOURS for value in colour])
            picture.save(pairs[1] / f'{image.stem}_mask.png')
            truth[image.stem] = labels
    if form == 'colours':
        lines = [f'{name} {r} {g} {b}' for name, (r, g, b) in zip(['other', 'ground', *NAMES], COLOURS, strict=True)]
        (data / 'classes.txt').write_text('\n'.join(lines))
    made = make(tmp_path, 'seg', data)
    assert made.found.images + made.found.val_images == 16
    cfg = load_config(made.config)
    count = 2 if form == 'binary' else 8
    assert len(made.found.classes) == cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == count
    if form in ('colours', 'palette'):
        assert cfg.palette == [list(colour) for colour in COLOURS]
    seen = 0
    for mode in ('train', 'val'):
        settings = cfg[f'{mode}_dataloader'].dataset
        settings.pipeline = [dict(type='LoadAnnotations', reduce_zero_label=False)]
        with DefaultScope.overwrite_default_scope('mmseg'):
            dataset = DATASETS.build(settings)
        for place in range(len(dataset)):
            info = dataset[place]
            assert np.array_equal(info['gt_seg_map'], truth[Path(info['img_path']).stem])
            seen += 1
    assert seen == 16


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda data: (data / 'masks' / 'a_mask.png').unlink(), '1 of 5 images .* have no label map'),
        (lambda data: (data / 'images' / 'a.jpg').rename(data / 'images' / 'a.png'), 'different suffixes'),
        (
            lambda data: Image.new('RGB', (8, 8), (1, 2, 3)).save(data / 'masks' / 'a_mask.png'),
            'are in colours, 2 of them',
        ),
        (lambda data: (data / 'classes.txt').write_text('sky\nsea\n'), 'has the value 3; .* names 2 classes'),
        (lambda data: shutil.rmtree(data / 'masks'), 'expected images/ and masks/'),
    ],
)
def test_label_maps_that_do_not_work(change, message, tmp_path) -> None:
    for folder in ('images', 'masks'):
        (tmp_path / 'data' / folder).mkdir(parents=True)
    for name in 'abcde':
        Image.new('RGB', (8, 8)).save(tmp_path / 'data' / 'images' / f'{name}.jpg')
        Image.new('L', (8, 8), 3).save(tmp_path / 'data' / 'masks' / f'{name}_mask.png')
    change(tmp_path / 'data')
    with pytest.raises(CommandError, match=message):
        make(tmp_path, 'seg', tmp_path / 'data')
    assert not (tmp_path / 'my_config.py').exists()


def test_class_lists(tmp_path) -> None:
    path = tmp_path / 'list.txt'
    path.write_text('# label:color_rgb:parts:actions\nroad:128,64,128::\ntraffic light 250 170 30\nsky\n\n')
    assert read_class_list(path) == [('road', (128, 64, 128)), ('traffic light', (250, 170, 30)), ('sky', None)]


@pytest.mark.parametrize(
    'form', ['table', *(pytest.param(form, marks=pytest.mark.slow) for form in ('tree', 'folders'))]
)
def test_classes_of_images(form, shapes, tmp_path) -> None:
    source, data = shapes / 'imagenet', tmp_path / 'data'
    if form == 'tree':
        data = source
    elif form == 'folders':
        shutil.copytree(source / 'train', data)
    else:
        data.mkdir()
        with open(data / 'labels.csv', 'w', newline='') as file:
            table = csv.writer(file)
            table.writerow(['Image', 'Label', 'split'])
            for path in sorted(source.glob('*/*/*.JPEG')):
                shutil.copy(path, data / path.name)
                table.writerow([path.name, path.parent.name, path.parent.parent.name])
    made = make(tmp_path, 'cls', data)
    cfg = load_config(made.config)
    assert (made.found.images, made.found.val_images) == ((6, 6) if form == 'folders' else (12, 4))
    assert cfg.model.head.num_classes == cfg.data_preprocessor.num_classes == 6
    for mode, count in (('train', made.found.images), ('val', made.found.val_images)):
        settings = cfg[f'{mode}_dataloader'].dataset
        settings.pipeline = []
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            dataset = DATASETS.build(settings)
        assert len(dataset) == count
        for place in range(count):
            info = dataset.get_data_info(place)
            assert Path(info['img_path']).is_file()
            assert dataset.CLASSES[info['gt_label']] in info['img_path']


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(task='dat'), 'task is one of'),
        (dict(data='nowhere'), 'is no folder'),
        (dict(out='my-config.py'), 'identifier'),
        (dict(backbone='vmamba-tinny', data='nowhere'), 'did you mean .tiny'),
        (dict(weights='nowhere.pth'), 'does not exist'),
        (dict(epochs=0), 'at least 1'),
        (dict(classes='list.txt'), 'task seg'),
    ],
)
def test_bad_options(options, message, shapes, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = dict(task='cls', data=str(shapes / 'imagenet'), out='mine.py') | options
    with pytest.raises(CommandError, match=message):
        new_project(NewProjectOptions(**given))
    assert not Path('mine.py').exists()


def test_a_config_is_not_overwritten(shapes, tmp_path) -> None:
    (tmp_path / 'my_config.py').write_text('mine = True\n')
    with pytest.raises(CommandError, match='exists'):
        make(tmp_path, 'cls', shapes / 'imagenet')
    assert (tmp_path / 'my_config.py').read_text() == 'mine = True\n'


def test_the_authors_weights_and_a_config_of_the_backbone_are_used(shapes, tmp_path, tool, capsys) -> None:
    out = tmp_path / 'mine.py'
    command = ['--task', 'det', '--data', str(shapes / 'coco'), '--out', str(out), '--backbone', 'mamba2d-nano']
    assert tool.main(command) == 0
    printed = capsys.readouterr().out
    assert '12 training and 4 validation images' in printed and f'train: python tools/train.py {out}' in printed
    cfg = load_config(out)
    assert cfg.model.backbone.arch == 'nano' and cfg.model.neck.in_channels == [32, 64, 160, 256]
    assert cfg.model.backbone.init_cfg.checkpoint.endswith('M2D-N-backbone.ckpt')


@pytest.mark.parametrize(
    ('task', 'images', 'epochs'),
    [
        ('det', 118_287, 12),
        ('det', 1000, 60),
        ('det', 10, 150),
        ('seg', 20_210, 128),
        ('cls', 1_281_167, 30),
        ('cls', 1, 200),
    ],
)
def test_fewer_images_are_seen_more_often(task, images, epochs) -> None:
    assert choose_epochs(task, images) == epochs


def test_batches_follow_the_memory(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    found = []
    for gibibytes in (4, 16, 64, 512):
        held = {'SC_PHYS_PAGES': gibibytes, 'SC_PAGE_SIZE': 2**30}
        monkeypatch.setattr(os, 'sysconf', held.get)
        found.append([choose_batch(task, 'vmamba-tiny', 100_000) for task in ('det', 'seg', 'cls')])
    assert found == sorted(found) and found[0][0] == 1 and found[-1] == [16, 16, 128]
    assert choose_batch('det', 'vmamba-base', 100_000) <= found[-1][0]
    assert choose_batch('det', 'vmamba-tiny', 5) == 2


@pytest.mark.parametrize('backbone', ['mamba2d-nano', pytest.param('v2m-tiny', marks=pytest.mark.slow)])
def test_backbones_without_a_config_for_boxes_lose_the_mask_head(backbone, shapes, tmp_path) -> None:
    as_coco(shapes, tmp_path / 'data', masks=False)
    made = new_project(NewProjectOptions('det', str(tmp_path / 'data'), str(tmp_path / 'mine.py'), backbone))
    cfg = load_config(made.config)
    assert cfg.model.type == 'FasterRCNN' and cfg.model.roi_head.mask_head is None
    assert [step.get('with_mask') for step in cfg.train_pipeline if step.type == 'LoadAnnotations'] == [False]
    assert cfg.train_dataloader.dataset.pipeline == cfg.train_pipeline and cfg.val_evaluator.metric == 'bbox'


SMALL = {
    'det': {
        'train_cfg.max_epochs': 1,
        'train_cfg.val_interval': 1,
        'model.train_cfg.rpn_proposal.max_per_img': 50,
        'model.train_cfg.rcnn.sampler.num': 16,
        'model.test_cfg.rpn.max_per_img': 50,
        'train_dataloader.dataset.pipeline.2.scale': (64, 64),
        'test_dataloader.dataset.pipeline.1.scale': (64, 64),
        'val_dataloader.dataset.pipeline.1.scale': (64, 64),
    },
    'seg': {
        'train_cfg.max_iters': 2,
        'train_cfg.val_interval': 2,
        'train_dataloader.dataset.pipeline.2.scale': (64, 64),
        'train_dataloader.dataset.pipeline.3.crop_size': (64, 64),
        'model.data_preprocessor.size': (64, 64),
        'val_dataloader.dataset.pipeline.1.scale': (64, 64),
    },
    'cls': {'train_cfg.max_epochs': 1, 'train_cfg.val_interval': 1},
}
FEW = {
    f'{mode}_dataloader.{key}': value
    for mode in ('train', 'val', 'test')
    for key, value in (('num_workers', 0), ('persistent_workers', False))
}


@pytest.mark.slow
@pytest.mark.parametrize(('task', 'data'), [('det', 'coco'), ('seg', 'ade20k'), ('cls', 'imagenet')])
def test_the_configs_train(task, data, shapes, tmp_path, train) -> None:
    made = make(tmp_path, task, shapes / data)
    runner = train(made.config, work_dir=str(tmp_path / 'work'), cfg_options={**FEW, **SMALL[task]})
    key = {'det': 'val/coco/bbox_mAP', 'seg': 'val/mIoU', 'cls': 'val/accuracy/top1'}[task]
    assert math.isfinite(runner.message_hub.log_scalars[key].current())


@pytest.mark.slow
def test_each_format_of_boxes_learns_as_much_as_coco_s(shapes, tmp_path, train) -> None:
    """The annotations are equal, and so is what is learnt from the same seed."""
    pytest.importorskip('supervision', reason='YOLO and Pascal VOC are converted by supervision')
    losses, precision = {}, {}
    for name, write in (('coco', lambda *where: as_coco(*where, masks=False)), ('yolo', as_yolo), ('voc', as_voc)):
        folder = tmp_path / name
        folder.mkdir()
        write(shapes, folder / 'data')
        made = make(folder, 'det', folder / 'data', epochs=4, batch_size=2)
        options = {**FEW, **SMALL['det'], 'train_cfg.max_epochs': 4, 'train_cfg.val_interval': 4, 'randomness.seed': 0}
        runner = train(made.config, work_dir=str(folder / 'work'), cfg_options=options)
        losses[name] = runner.message_hub.log_scalars['train/loss'].mean(6)
        precision[name] = runner.message_hub.log_scalars['val/coco/bbox_mAP'].current()
    for name in ('yolo', 'voc'):
        assert losses[name] == losses['coco']
        assert precision[name] == precision['coco']
