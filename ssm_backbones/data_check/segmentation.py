"""Checks of label maps, for mmseg's data sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssm_backbones.data_check.finding import ERROR, NOTE, WARNING, Findings
from ssm_backbones.data_check.images import missing_files, read_header, spread, suffixes, turns_images

IGNORED = 255


def check_label_maps(
    dataset: Any, key: str, pipeline: Sequence[Mapping[str, Any]], every: bool, findings: Findings
) -> dict[int, int]:
    """Check the files of an mmseg data set and the values of its label maps.

    Args:
        dataset: The data set, built without a pipeline.
        key: Its config key.
        pipeline: The config's pipeline.
        every: Whether to open all files, not a sample.
        findings: Collects what is found.

    Returns:
        The number of pixels by label as trained on, in the files that were opened.
    """
    infos = dataset.load_data_list()
    folder = dataset.data_prefix.get('img_path') or ''
    if not infos:
        findings.add(
            ERROR,
            f'{key}.img_suffix',
            f'is {dataset.img_suffix!r}, which no file in {folder} ends in; there are {suffixes(folder)}',
            "Set img_suffix to the images' suffix.",
        )
        return {}
    for name, suffix in (('img_path', 'img_suffix'), ('seg_map_path', 'seg_map_suffix')):
        paths = [info[name] for info in infos if info.get(name)]
        missing = missing_files(paths)
        place = dataset.data_prefix.get(name) or ''
        findings.add_all(
            ERROR,
            f'{key}.{suffix}',
            missing,
            lambda path, place=place, suffix=suffix: (  # type: ignore[misc]
                path,
                f'there is no such file; {suffix} is {getattr(dataset, suffix)!r}, and in {place} there are '
                f'{suffixes(place)}',
            ),
            f'Set {suffix} to the end of the names, or take away what has no partner.',
        )
        if missing:
            return {}
    loader = next((step for step in pipeline if str(step.get('type')).endswith('LoadAnnotations')), None)
    pairs = [(info['img_path'], info['seg_map_path']) for info in infos if info.get('seg_map_path')]
    if loader is None or not pairs:
        return {}
    return _check_values(dataset, key, loader, spread(pairs, every), turns_images(pipeline), len(pairs), findings)


def _check_values(
    dataset: Any,
    key: str,
    loader: Mapping[str, Any],
    pairs: Sequence[tuple[str, str]],
    turns: bool,
    total: int,
    findings: Findings,
) -> dict[int, int]:
    classes = dataset.metainfo.get('classes') or ()
    number = len(classes)
    raw: Counter[int] = Counter()
    labels: Counter[int] = Counter()
    colours, other_sizes, wide, beyond = [], [], [], []
    for image, path in pairs:
        array = _read(path, palette=loader.get('imdecode_backend', 'pillow') == 'pillow')
        if array is None:
            # Not PIL's: the trial of the pipeline says more.
            continue
        if array.ndim != 2:
            colours.append((path, array))
            continue
        header = read_header(image)
        if header is not None and header.loaded_size(turns) != array.shape[::-1]:
            other_sizes.append((path, f'{array.shape[1]}x{array.shape[0]}', image, header))
        values, counts = np.unique(array, return_counts=True)
        if values[0] < 0 or values[-1] > 255 or array.dtype.kind not in 'bui':
            wide.append((path, array.dtype, values))
            continue
        raw.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        trained = dict(zip(_as_trained(values, dataset), counts.tolist(), strict=True))
        for label, count in zip(_as_trained(values, dataset), counts.tolist(), strict=True):
            labels[label] += count
        strange = sorted(label for label in trained if label != IGNORED and label >= number)
        if strange and number:
            pixel = np.argwhere(np.isin(array, values[[label in strange for label in _as_trained(values, dataset)]]))[0]
            beyond.append((path, strange, values, pixel[::-1].tolist()))
    looked_at = '' if len(pairs) == total else f'; {len(pairs)} of {total} label maps were looked at'
    has = f'{number} classes'
    shift = ', after reduce_zero_label' if dataset.reduce_zero_label else ''
    findings.add_all(
        ERROR,
        key,
        colours,
        lambda found: (
            found[0],
            f'has shape {found[1].shape}, as an image in colours; a label map has one channel of class indices '
            f'from 0 to {number - 1}{looked_at}',
        ),
        'Write the index of the class into each pixel, as PNG in mode L or P.',
    )
    findings.add_all(
        ERROR,
        key,
        wide,
        lambda found: (
            found[0],
            f'has values of {found[1]} from {found[2][0]} to {found[2][-1]}; mmseg keeps 8 bits, so that 256 is '
            f'taken for 0{looked_at}',
        ),
        f'Write indices of the {has} as 8 bits, and 255 for what is to be ignored.',
    )
    findings.add_all(
        ERROR,
        key,
        other_sizes,
        lambda found: (
            found[0],
            f'is {found[1]} (width x height), but {found[2]} is loaded as {found[3].loaded_size(turns)[0]}x'
            f'{found[3].loaded_size(turns)[1]}'
            + (f' (EXIF orientation {found[3].orientation})' if found[3].orientation != 1 else '')
            + looked_at,
        ),
        'A label map has the size of its image.',
    )
    findings.add_all(
        ERROR,
        key,
        beyond,
        lambda found: (
            f'{found[0]}, x, y {found[3]}',
            f'has labels {found[1]}{shift}, but there are {has}, 0 to {number - 1} (and {IGNORED}, ignored); values '
            f'in the file: {_listed(found[2])}{looked_at}',
        ),
        'List all classes, or write 255 for what is to be ignored.',
    )
    if not findings.has_errors() and number and raw:
        _check_spread(dataset, key, raw, labels, looked_at, findings)
    return dict(labels)


def _check_spread(
    dataset: Any, key: str, raw: Mapping[int, int], labels: Mapping[int, int], looked_at: str, findings: Findings
) -> None:
    """Check which labels occur at all."""
    classes = dataset.metainfo['classes']
    seen = sorted(label for label in labels if label != IGNORED)
    values = _listed(sorted(raw))
    black_and_white = set(raw) <= {0, IGNORED} and IGNORED in raw
    if len(classes) > 1 and (not seen or (black_and_white and len(seen) < 2)):
        ignored = 'all pixels are' if not seen else f'all pixels but those of {classes[seen[0]]!r} are'
        findings.add(
            ERROR,
            key,
            f'{ignored} ignored: the label maps hold {values} only, and 255 means "ignored"{looked_at}',
            'Write class indices, such as 0 and 1 in place of 0 and 255'
            + ('; with reduce_zero_label=True, 0 is ignored, too.' if dataset.reduce_zero_label else '.'),
        )
        return
    if dataset.reduce_zero_label and 0 in raw and max(value for value in raw if value != IGNORED) == len(classes) - 1:
        findings.add(
            WARNING,
            key,
            f'reduce_zero_label=True ignores label 0 and makes 1 the first class, but the label maps hold {values}, as '
            f'many as there are classes: {classes[-1]!r} never occurs{looked_at}',
            'Set reduce_zero_label=False, in the data set and in LoadAnnotations, if 0 is the first class.',
        )
    unseen = [name for label, name in enumerate(classes) if label not in seen]
    if unseen:
        findings.add(
            NOTE if looked_at else WARNING,
            key,
            f'no pixel is labelled {", ".join(map(repr, unseen[:8]))}{looked_at}',
            'Check the values of the label maps if the class should be there.',
            count=len(unseen),
        )


def check_losses(cfg: Any, ignored: bool, findings: Findings) -> None:
    """Check that no loss meets ignored pixels with which it does not go together (mmseg 1.2.2).

    Args:
        cfg: The config.
        ignored: Whether any pixel is ignored.
        findings: Collects what is found.
    """
    if not ignored:
        return
    for name in ('decode_head', 'auxiliary_head'):
        heads = cfg.model.get(name) or []
        for head in heads if isinstance(heads, (list, tuple)) else [heads]:
            losses = head.get('loss_decode') or []
            for loss in losses if isinstance(losses, (list, tuple)) else [losses]:
                if loss.get('type') == 'CrossEntropyLoss' and loss.get('class_weight') and not loss.get('use_sigmoid'):
                    findings.add(
                        ERROR,
                        f'model.{name}.loss_decode.class_weight',
                        'is set, and label maps have ignored pixels (255): the loss finds no weight for them and stops',
                        'Take class_weight out; OHEMPixelSampler serves rare classes, too.',
                    )
                elif loss.get('type') == 'DiceLoss':
                    findings.add(
                        WARNING,
                        f'model.{name}.loss_decode',
                        'is a DiceLoss, and label maps have ignored pixels (255): it counts them as wrong',
                        'Take TverskyLoss with alpha and beta of 0.5: the Dice loss of each class, which ignores them.',
                    )


def _as_trained(values: np.ndarray, dataset: Any) -> list[int]:
    """Return the labels that mmseg's LoadAnnotations makes of a file's values."""
    labels = values.astype(np.int64).tolist()
    if dataset.reduce_zero_label:
        labels = [IGNORED if value in (0, IGNORED) else value - 1 for value in labels]
    mapping = dataset.label_map or {}
    return [mapping.get(label, label) for label in labels]


def _read(path: str, palette: bool) -> np.ndarray | None:
    """Read a label map; other decoders than PIL's make colours of a palette's indices."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode == 'P' and not palette:
                return np.asarray(image.convert('RGB'))
            return np.asarray(image).squeeze()
    except (OSError, SyntaxError, ValueError):
        return None


def _listed(values: Sequence[Any] | np.ndarray) -> str:
    shown = ', '.join(str(value) for value in list(values)[:10])
    return f'{shown}{", ..." if len(values) > 10 else ""}'
