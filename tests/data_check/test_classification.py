"""Folders of classes and lists of labels, Mixup's and the evaluators' numbers of classes."""

import shutil

import pytest

from ssm_backbones.data_check import WARNING
from ssm_backbones.data_check.classes import class_names
from ssm_backbones.data_check.finding import Findings
from tests.data_check.conftest import errors


def without_last_class(*splits):
    def change(folder):
        for split in splits:
            shutil.rmtree(sorted((folder / split).iterdir())[-1])

    return change


def emptied(folder):
    for path in sorted((folder / 'train').iterdir())[0].iterdir():
        path.unlink()


def test_the_generated_data_are_right(check):
    found = check('mmpretrain')
    assert not errors(found)


def test_another_number_of_folders(check):
    (error,) = errors(check('mmpretrain', without_last_class('train'), modes=['train']))
    assert error.startswith('train_dataloader.dataset') and 'has 5 folders' in error and 'metainfo' in error


def test_folders_that_differ_between_training_and_validation(check):
    """Without names in the config, either tree gives its own."""
    trees = {
        f'{mode}_dataloader.dataset': dict(
            _delete_=True, type='CustomDataset', data_prefix='{root}/' + mode, pipeline=[]
        )
        for mode in ('train', 'val')
    }
    found = errors(check('mmpretrain', without_last_class('val'), trees))
    assert any(error.startswith('val_dataloader.dataset: has 5 folders') for error in found), found


def test_classes_without_an_image(check):
    found = check('mmpretrain', emptied, modes=['train'])
    assert [f.severity for f in found if 'has no image' in f.value] == [WARNING]


MIXUP = {'model.train_cfg': dict(augments=dict(type='Mixup', alpha=0.8))}


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        ({'model.head.num_classes': 4}, ['model.head.num_classes: is 4']),
        ({'val_evaluator.topk': (1, 10)}, ['val_evaluator.topk: is (1, 10), but there are only 6 classes']),
        ({'val_evaluator.topk': 10}, ['val_evaluator.topk: is 10']),
        ({'model.head.topk': (1, 10), 'model.head.cal_acc': True}, ['model.head.topk']),
        ({**MIXUP, 'model.data_preprocessor.num_classes': 1000}, ['model.data_preprocessor.num_classes: is 1000']),
        (MIXUP, ['model.data_preprocessor.num_classes: is None']),
        ({**MIXUP, 'model.data_preprocessor.num_classes': 6}, []),
        ({'model.data_preprocessor.num_classes': 1000}, []),
        ({'model.head.loss.num_classes': 1000}, ['model.head.loss.num_classes']),
        ({'val_evaluator': dict(type='ConfusionMatrix', num_classes=5)}, ['val_evaluator.num_classes: is 5']),
    ],
)
def test_numbers_of_classes(options, expected, check):
    found = errors(check('mmpretrain', None, options))
    assert len(found) == len(expected)
    for error, start in zip(found, expected, strict=True):
        assert error.startswith(start)
        if 'Mixup' in str(options):
            assert 'model.head.num_classes is 6' in error


@pytest.mark.parametrize(
    ('line', 'expected'),
    [('{image} 6', 'has label 6, but there are 6 classes'), ('{image},3', 'line 1'), ('gone.jpg 1', 'no such image')],
)
def test_lists_of_labels(line, expected, check, tmp_path):
    def write(folder):
        image = next((folder / 'train').rglob('*.JPEG'), None) or next((folder / 'train').rglob('*.*'))
        listed = line.replace('{image}', str(image.relative_to(folder / 'train')))
        (folder / 'train.txt').write_text(f'{listed}\n')

    options = {'train_dataloader.dataset.ann_file': 'train.txt', 'train_dataloader.dataset.data_prefix': 'train'}
    found = errors(check('mmpretrain', write, options, modes=['train']))
    assert len(found) == 1 and expected in found[0], found


def test_imagenet_has_two_classes_of_one_name_twice():
    """That is as it should be: cranes are birds and machines."""
    findings = Findings()
    names = class_names(dict(type='ImageNet'), 'train_dataloader.dataset', 'mmpretrain', findings)
    assert len(names) == 1000 and names.count('crane') == 2 and not findings.found
