"""Classes in the config: names of the data sets, numbers of the heads and of what mixes and evaluates labels."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS

from ssm_backbones.apis.config import registered
from ssm_backbones.apis.model import preprocessor_config
from ssm_backbones.data_check.finding import ERROR, WARNING, Findings
from ssm_backbones.utils.errors import did_you_mean

# Parts of a model whose number of classes is not the data set's: a backbone's own classifier, foreground against
# background, stuff, and the words of a language model.
_OTHER_CLASSES = ('backbone', 'rpn_head', 'semantic_head', 'language_model', 'data_preprocessor', 'teacher')


def dataset_class(dataset: Mapping[str, Any], scope: str) -> Any:
    """Return the class of a data set's config, None if its ``type`` is not registered."""
    kind = dataset.get('type')
    return registered(DATASETS, kind, scope) if isinstance(kind, str) else kind


def class_names(dataset: Mapping[str, Any], key: str, scope: str, findings: Findings) -> tuple[str, ...] | None:
    """Return the class names of a data set's config, None if neither it nor the data set's class has any."""
    metainfo = dict(dataset.get('metainfo') or {})
    if scope == 'mmpretrain' and dataset.get('classes') is not None and 'classes' not in metainfo:
        metainfo['classes'] = dataset['classes']
    for name in metainfo:
        if name != 'classes' and name.lower() == 'classes':
            findings.add(
                ERROR, f'{key}.metainfo', f'has {name!r}, which no library reads', "Write 'classes', in small letters."
            )
    classes = metainfo.get('classes')
    if classes is None:
        # Of ImageNet's names two classes each are called crane and maillot.
        own = getattr(dataset_class(dataset, scope), 'METAINFO', {}).get('classes')
        return None if own is None else tuple(own)
    if isinstance(classes, str):
        if os.path.isfile(classes):
            with open(classes, encoding='utf-8') as file:
                return tuple(file.read().splitlines())
        findings.add(
            ERROR,
            f'{key}.metainfo.classes',
            f'is the string {classes!r}, not a list of names, and would be taken letter by letter',
            f'Write classes=({classes!r}, ), with the comma, or the path of a file with a name in each line.',
        )
        return (classes,)
    doubled = sorted({name for name in classes if list(classes).count(name) > 1})
    if doubled:
        findings.add(
            ERROR, f'{key}.metainfo.classes', f'lists {doubled[0]!r} more than once', 'Give each class a name.'
        )
    return tuple(classes)


def check_same_classes(named: Mapping[str, Sequence[str] | None], findings: Findings) -> None:
    """Check that the data sets of a config agree in their classes."""
    known = {key: list(classes) for key, classes in named.items() if classes is not None}
    first = next(iter(known), None)
    for key, classes in known.items():
        if classes != known[first or '']:
            findings.add(
                ERROR,
                f'{key}.metainfo.classes',
                f'is {_listed(classes)}, but {first} has {_listed(known[first or ""])}',
                'Set the same classes, in the same order, for training, validation and testing.',
            )


def check_numbers(cfg: Config, classes: Sequence[str] | None, modes: Sequence[str], findings: Findings) -> None:
    """Check that every head, Mixup and every evaluator has the data set's number of classes."""
    if classes is None:
        return
    number = len(classes)
    remedy = f'Set it to {number}.'
    for key, value, default in _numbers(cfg.model, 'model', cfg.default_scope):
        if value != number:
            findings.add(
                ERROR,
                key,
                f'is {value}{" by default" if default else ""}, but the data have {_counted(classes)}',
                remedy,
            )
    for key, weights in _class_weights(cfg.model, 'model'):
        # DETR-like heads and those with a background class weigh one class more.
        if len(weights) not in (number, number + 1):
            findings.add(
                ERROR, key, f'has {len(weights)} weights, but the data have {_counted(classes)}', 'Give each class one.'
            )
    if cfg.default_scope == 'mmpretrain':
        _check_mixing(cfg, classes, findings)
    for mode in modes:
        for key, evaluator in evaluators(cfg, mode):
            own = evaluator.get('num_classes')
            if own is not None and own != number:
                findings.add(ERROR, f'{key}.num_classes', f'is {own}, but the data have {_counted(classes)}', remedy)
    _check_topk(cfg, classes, modes, findings)
    _check_detections(cfg.model, number, findings)


def evaluators(cfg: Config, mode: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the key and config of each evaluator of a mode."""
    configured = cfg.get(f'{mode}_evaluator') or []
    if not isinstance(configured, (list, tuple)):
        return [(f'{mode}_evaluator', configured)]
    return [(f'{mode}_evaluator[{index}]', evaluator) for index, evaluator in enumerate(configured)]


def check_names_in_file(
    path: Any,
    in_file: Sequence[str],
    classes: Sequence[str],
    key: str,
    counts: Mapping[str, int],
    findings: Findings,
) -> None:
    """Compare a COCO file's categories with the config's classes, in the file's order.

    mmdet numbers the file's categories that are among the classes, in the file's order: a class that the file lacks
    moves up those behind it, and classes in another order exchange their names.

    Args:
        path: The file.
        in_file: Names of its categories, in its order.
        classes: The config's.
        key: The config key of the classes.
        counts: Number of objects by category.
        findings: Collects what is found.
    """
    lacking = [name for name in classes if name not in in_file]
    left_out = [name for name in in_file if name not in classes]
    has = f'the file has {_listed(in_file)}'
    if lacking:
        loosely = {_loose(name): name for name in left_out}
        alike = loosely.get(_loose(lacking[0]))
        hint = (
            f' (the file writes {alike!r})'
            if alike
            else did_you_mean(str(lacking[0]), [str(name) for name in left_out])
        )
        findings.add(
            ERROR,
            path,
            f'no category is named {lacking[0]!r}{hint}, a class of {key}; {has}',
            'Spell the classes as the file does, in its order: mmdet would number the others as if there were no such '
            'class.',
            count=len(lacking),
        )
        return
    used = [name for name in in_file if name in classes]
    if used != list(classes):
        findings.add(
            ERROR,
            path,
            f'has its categories in the order {_listed(used)}, and {key} in the order {_listed(classes)}',
            "List the classes in the file's order: mmdet numbers labels by the file, and names them by the config.",
        )
    if left_out:
        objects = sum(counts.get(name, 0) for name in left_out)
        findings.add(
            WARNING if objects else 'note',
            path,
            f'{objects} objects of {_listed(left_out)}, which {key} does not list, are not trained on or evaluated',
            'Add the classes if they are wanted.',
            count=len(left_out),
        )


def _numbers(model: Mapping[str, Any], key: str, scope: str) -> Iterator[tuple[str, int, bool]]:
    """Yield the key and number of classes of every part of a model that has one, and whether it is the default."""
    if 'num_things_classes' in model:
        yield f'{key}.num_things_classes', model['num_things_classes'] + model.get('num_stuff_classes', 0), False
    elif isinstance(model.get('num_classes'), int):
        yield f'{key}.num_classes', model['num_classes'], False
    elif key.endswith('head') and isinstance(model.get('type'), str):
        default = _default_number(model['type'], scope)
        if default is not None:
            yield f'{key}.num_classes', default, True
    if 'language_model' in model:
        return
    for name, value in model.items():
        if name in _OTHER_CLASSES:
            continue
        if isinstance(value, Mapping):
            yield from _numbers(value, f'{key}.{name}', scope)
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                if isinstance(item, Mapping):
                    yield from _numbers(item, f'{key}.{name}[{index}]', scope)


def _default_number(kind: str, scope: str) -> int | None:
    cls: Any = registered(MODELS, kind, scope)
    if not inspect.isclass(cls):
        return None
    for base in inspect.getmro(cls):
        constructor = vars(base).get('__init__')
        parameter = inspect.signature(constructor).parameters.get('num_classes') if constructor else None
        if parameter is not None:
            return parameter.default if isinstance(parameter.default, int) else None
    return None


def _class_weights(model: Mapping[str, Any], key: str) -> Iterator[tuple[str, Sequence[float]]]:
    for name, value in model.items():
        inner = f'{key}.{name}'
        if name == 'class_weight' and isinstance(value, (list, tuple)):
            yield inner, value
        elif name in _OTHER_CLASSES:
            continue
        elif isinstance(value, Mapping):
            yield from _class_weights(value, inner)
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                if isinstance(item, Mapping):
                    yield from _class_weights(item, f'{inner}[{index}]')


def _check_mixing(cfg: Config, classes: Sequence[str], findings: Findings) -> None:
    """Check the number of classes of one-hot labels, which Mixup and CutMix mix."""
    preprocessor = preprocessor_config(cfg)
    mixes = bool((cfg.model.get('train_cfg') or {}).get('augments')) or preprocessor.get('to_onehot', False)
    value = preprocessor.get('num_classes')
    if not mixes or value == len(classes):
        return
    key = 'model.data_preprocessor' if cfg.model.get('data_preprocessor') else 'data_preprocessor'
    head = (cfg.model.get('head') or {}).get('num_classes')
    findings.add(
        ERROR,
        f'{key}.num_classes',
        f'is {value}, but the data have {_counted(classes)} and model.head.num_classes is {head}; Mixup, CutMix and '
        'one-hot labels take their number from here',
        f'Set {key}.num_classes and model.head.num_classes to {len(classes)}.',
    )


def _check_topk(cfg: Config, classes: Sequence[str], modes: Sequence[str], findings: Findings) -> None:
    places = [(key, evaluator) for mode in modes for key, evaluator in evaluators(cfg, mode)]
    head = cfg.model.get('head') or {}
    if head.get('cal_acc'):
        places.append(('model.head', head))
    for key, owner in places:
        topk = owner.get('topk')
        if topk is None and owner.get('type') in ('Accuracy', 'mmpretrain.Accuracy'):
            continue
        largest = max(topk) if isinstance(topk, (list, tuple)) and topk else topk
        if isinstance(largest, int) and largest > len(classes):
            findings.add(
                ERROR,
                f'{key}.topk',
                f'is {topk}, but there are only {_counted(classes)}',
                f'Set {key}.topk=(1, ), also where else it is set.',
            )


def _check_detections(model: Mapping[str, Any], number: int, findings: Findings) -> None:
    """Check that a detector with a fixed number of queries is not asked for more objects than it can give."""
    test_cfg = _part(model, 'test_cfg')
    # A softmax gives one class for each query, sigmoids all of them.
    by_softmax = not _part(_part(model, 'bbox_head'), 'loss_cls').get('use_sigmoid', True)
    # max_per_image is that of instances alone.
    masks = _part(model, 'panoptic_head') if test_cfg.get('instance_on') else {}
    for key, owner, limit, settings in (
        ('model.num_queries', model, 'max_per_img', test_cfg),
        ('model.rpn_head.num_proposals', _part(model, 'rpn_head'), 'max_per_img', _part(test_cfg, 'rcnn')),
        ('model.panoptic_head.num_queries', masks, 'max_per_image', test_cfg),
    ):
        queries, most = owner.get(key.rpartition('.')[2]), settings.get(limit)
        if not isinstance(queries, int) or not isinstance(most, int):
            continue
        available = queries if by_softmax else queries * number
        if most > available:
            place = 'model.test_cfg.rcnn' if 'rpn_head' in key else 'model.test_cfg'
            findings.add(
                ERROR,
                f'{place}.{limit}',
                f'is {most}, but {key}={queries} and {number} classes give {available} objects',
                f'Set it to at most {available}.',
            )


def _part(settings: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a part of a model's settings; none where it is a list, as of Co-DETR's several heads."""
    value = settings.get(key)
    return value if isinstance(value, Mapping) else {}


def _loose(name: Any) -> str:
    return ''.join(character for character in str(name).casefold() if character.isalnum())


def _counted(classes: Sequence[str]) -> str:
    return f'{len(classes)} classes {_listed(classes)}'


def _listed(names: Sequence[Any]) -> str:
    shown = ', '.join(map(repr, names[:8]))
    return f'({shown}{f", ... {len(names)} names" if len(names) > 8 else ""})'
