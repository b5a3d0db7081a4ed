"""Checks of labelled images, for mmpretrain's data sets."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ssm_backbones.data_check.finding import ERROR, WARNING, Findings
from ssm_backbones.data_check.images import missing_files


def explain_failure(dataset: Mapping[str, Any], key: str, error: Exception, findings: Findings) -> None:
    """Add a finding about a data set that mmpretrain refuses to build."""
    reason = f'{type(error).__name__}: {str(error).strip()}'
    root = dataset.get('data_root') or ''
    ann_file = dataset.get('ann_file')
    if ann_file:
        path = os.path.join(root, ann_file)
        bad = _bad_line(path) if os.path.isfile(path) else None
        if bad is not None:
            findings.add(
                ERROR, path, f'reads {bad[1]!r}', "Each line is an image's path, a blank, and a class number.", bad[0]
            )
            return
    prefix = dataset.get('data_prefix') or dataset.get('split') or ''
    folder = os.path.join(root, prefix if isinstance(prefix, str) else prefix.get('img_path', ''))
    folders = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) if os.path.isdir(folder) else []
    there = f'{folder} has {len(folders)} folders ({", ".join(folders[:8])}{", ..." if len(folders) > 8 else ""})'
    findings.add(
        ERROR,
        key,
        f'{reason} {there}',
        "Each class is a folder of images; set metainfo=dict(classes=...) to one name for each folder, in the folders' "
        'alphabetical order.',
    )


def check_labels(dataset: Any, key: str, findings: Findings) -> tuple[dict[str, int], tuple[str, ...] | None]:
    """Check an mmpretrain data set's files and labels.

    Returns:
        The number of images by class, and the names of the classes; for a tree of folders, the folders' names.
    """
    infos = dataset.data_list
    folders = getattr(dataset, 'folder_to_idx', None)
    names = tuple(dataset.metainfo.get('classes') or ()) or None
    paths = [info['img_path'] for info in infos if 'img_path' in info]
    findings.add_all(
        ERROR,
        key,
        missing_files(paths) if folders is None else [],
        lambda path: (path, 'there is no such image'),
        'Name the folder of the images (data_prefix), or take what is missing out of the annotations.',
    )
    labels = [info.get('gt_label') for info in infos]
    if names is None or not all(isinstance(label, int) for label in labels):
        return {}, names
    number = len(names)
    findings.add_all(
        ERROR,
        key,
        [info for info in infos if not 0 <= info['gt_label'] < number],
        lambda info: (info['img_path'], f'has label {info["gt_label"]}, but there are {number} classes, from 0'),
        'Number classes from 0, and list all of them.',
    )
    counts = Counter(labels)
    empty = [name for label, name in enumerate(names) if not counts[label]]
    findings.add_all(
        WARNING, key, empty, lambda name: (f'class {name!r}', 'has no image'), 'Take the class out, or add images.'
    )
    if folders is not None and sorted(map(str, names)) == sorted(folders) and list(names) != list(folders):
        findings.add(
            ERROR,
            f'{key}.metainfo.classes',
            f'is {names[:8]}, but mmpretrain numbers the folders by their alphabet: {tuple(folders)[:8]}',
            "List the classes in the folders' alphabetical order.",
        )
    return {str(name): counts[label] for label, name in enumerate(names)}, names


def check_same_folders(trees: Mapping[str, tuple[str, ...]], findings: Findings) -> None:
    """Check that the trees of folders for training and evaluation have the same classes, since labels count folders."""
    first = next(iter(trees), None)
    for key, folders in trees.items():
        if first is None or folders == trees[first]:
            continue
        lacking = [name for name in trees[first] if name not in folders]
        extra = [name for name in folders if name not in trees[first]]
        findings.add(
            ERROR,
            key,
            f'has {len(folders)} folders of classes and {first} has {len(trees[first])}'
            + (f'; it lacks {", ".join(lacking[:8])}' if lacking else '')
            + (f'; it alone has {", ".join(extra[:8])}' if extra else ''),
            'Labels count folders by their alphabet: make the same folders in both, some of them empty if need be.',
        )


def _bad_line(path: str) -> tuple[str, str] | None:
    with open(path, encoding='utf-8', errors='replace') as file:
        for number, line in enumerate(file, 1):
            label = line.strip().rpartition(' ')[2]
            if not label.lstrip('-').isdigit():
                return f'line {number}', line.rstrip('\n')
    return None
