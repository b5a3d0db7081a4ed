"""Write a config for one's own data."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ssm_backbones.apis.config import load_config
from ssm_backbones.data_check import Finding, check_data
from ssm_backbones.project.bands import find_bands
from ssm_backbones.project.classification import find_classification
from ssm_backbones.project.detection import find_detection
from ssm_backbones.project.recipe import build_empty, choose_batch, choose_epochs, find_base
from ssm_backbones.project.segmentation import find_segmentation
from ssm_backbones.project.settings import Plan, config_text
from ssm_backbones.project.sources import Found
from ssm_backbones.utils.errors import CommandError
from ssm_backbones.utils.files import write_atomic, writing

TASKS = ('det', 'seg', 'cls')


@dataclass(frozen=True)
class NewProjectOptions:
    """Options of ``tools/new_project.py``.

    Attributes:
        task: ``'det'`` (boxes, and masks where all objects have one), ``'seg'`` or ``'cls'``.
        data: The folder of the data, or for ``'cls'`` a table (.csv).
        out: The config file to write. What is converted or divided goes into a folder of its name beside it.
        backbone: Family and arch, see :func:`~ssm_backbones.list_backbones`.
        weights: Checkpoint that the backbone starts from, official or of this package: a path or a URL. By default the
            authors' ImageNet weights, which are downloaded; ``'none'`` trains from scratch.
        classes: Class list of a segmentation, a name (and colour) a line.
        batch_size: By default as much as should fit into memory.
        epochs: By default by the number of images.
        seed: Of the division into training and validation, where the data has none.
    """

    task: str
    data: str
    out: str
    backbone: str = 'vmamba-tiny'
    weights: str | None = None
    classes: str | None = None
    batch_size: int | None = None
    epochs: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class NewProject:
    """A project that was made.

    Attributes:
        config: The config file.
        base: The config that it inherits from, below the folder of configs.
        found: The data.
        batch_size: Images of a step on one device.
        epochs: Number of epochs.
        iterations: Number of steps on one device.
        findings: What the check of the data found.
    """

    config: Path
    base: str
    found: Found
    batch_size: int
    epochs: int
    iterations: int
    findings: list[Finding]


def new_project(options: NewProjectOptions) -> NewProject:
    """Find the data in a folder, write a config that trains on it, and check the data with it.

    Raises:
        CommandError: If the data is not understood, or the config exists or cannot be written. No config is written
            then.
    """
    data, out = Path(options.data), Path(options.out)
    _check_options(options, data, out)
    converted = out.resolve().with_name(f'{out.stem}_data')
    if options.task == 'det':
        found = find_detection(data, converted, options.seed)
    elif options.task == 'seg':
        classes = None if options.classes is None else Path(options.classes)
        found = find_segmentation(data, converted, options.seed, classes)
    else:
        found = find_classification(data, converted, options.seed)
    bands = find_bands(found.examples)
    base = find_base(options.task, options.backbone, found.masks)
    batch = options.batch_size or choose_batch(options.task, options.backbone, found.images)
    epochs = options.epochs or choose_epochs(options.task, found.images)
    weights = base.weights if options.weights is None else options.weights
    if weights is None:
        found.notes.append(f'no weights of {options.backbone} are published: it is trained from scratch')
    plan = Plan(options.task, found, base, bands, None if weights == 'none' else weights, batch, epochs)
    text = config_text(plan)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, text)
    findings = check_data(load_config(out))
    return NewProject(out, base.name, found, batch, epochs, plan.iterations, findings)


def _check_options(options: NewProjectOptions, data: Path, out: Path) -> None:
    if options.task not in TASKS:
        raise CommandError(f'task is one of {", ".join(TASKS)}, got {options.task!r}.')
    build_empty(options.backbone)
    if not data.is_dir() and not (options.task == 'cls' and data.is_file()):
        raise CommandError(f'data {data} is no folder.')
    if options.classes is not None and options.task != 'seg':
        raise CommandError('classes goes with task seg: the other formats name their classes.')
    if out.suffix != '.py' or not out.stem.isidentifier():
        raise CommandError(f'out {out} must be a Python file whose name is an identifier, such as my_config.py.')
    if out.exists():
        raise CommandError(f'out {out} exists. Name another file, or remove it.')
    for name in ('batch_size', 'epochs'):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise CommandError(f'{name} must be at least 1, got {value}.')
    weights = options.weights
    if weights not in (None, 'none') and '://' not in str(weights) and not os.path.isfile(str(weights)):
        raise CommandError(f'weights {weights} does not exist.')
