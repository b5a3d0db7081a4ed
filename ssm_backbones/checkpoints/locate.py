"""Locate weights in a checkpoint: models, wrappers' prefixes, and moving averages."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ssm_backbones.checkpoints.differences import shorten
from ssm_backbones.checkpoints.families import Family
from ssm_backbones.checkpoints.files import CheckpointError
from ssm_backbones.utils.mm import print_log

_MAIN_PATHS = [('state_dict',), ('model',), ()]
_AVERAGE = re.compile(r'(?:^|[^A-Za-z])ema(?:[^a-z]|$)|EMA|ema[A-Z]|[Aa]verag')
_DEPTH = 4
# Inserted anywhere in names by torch.compile and by the wrappers of sharded and recomputed modules.
_WRAPPER = re.compile(r'(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.')
# Shorter names, such as norm.weight, occur in many models.
_DISTINCTIVE = 4


@dataclass(frozen=True)
class WeightSet:
    """The weights of one model in a checkpoint, by official names without a wrapper's prefix."""

    family: Family
    path: tuple[str, ...]
    """The keys that lead to the dictionary of the tensors."""
    wrapper: str
    """Prefix of a wrapper, such as 'module.'."""
    prefix: str
    """Prefix of the backbone's names after the wrapper's: '' or 'backbone.'."""
    is_average: bool
    """Whether these are moving averages (EMA) of the weights."""
    tensors: dict[str, Tensor]
    outside: tuple[str, ...]
    """Entries of the same dictionary outside the wrapper that belong to no other set."""
    inserted: tuple[str, ...] = ()
    """What ``torch.compile`` and other wrappers of modules had inserted into the names."""
    others: tuple[WeightSet, ...] = ()
    """The other sets in the file."""

    @property
    def label(self) -> str:
        """Name of the set, by which it can be chosen."""
        path = '/'.join(self.path) or 'top'
        return f'{path}:{self.wrapper}' if self.wrapper else path


def choose_weights(checkpoint: Mapping[str, Any], wanted: str, families: Sequence[Family], source: str) -> WeightSet:
    """Find the weights to convert.

    Args:
        checkpoint: The contents of the file.
        wanted: 'auto' (the main weights), 'raw', 'ema' (their moving averages) or the label of a set.
        families: The families to look for.
        source: The file's name, for messages.

    Raises:
        CheckpointError: If no weights, or not exactly one set of the wanted kind, are found.
    """
    sets = list(find_official(checkpoint, families))
    if not sets:
        raise CheckpointError(_explain_unknown(checkpoint, families, source))
    if wanted == 'auto':
        ranks = [_rank(found) for found in sets]
        chosen = [found for found, rank in zip(sets, ranks, strict=True) if rank == min(ranks)]
    elif wanted in ('raw', 'ema'):
        chosen = [found for found in sets if found.is_average == (wanted == 'ema')]
    else:
        chosen = [found for found in sets if found.label == wanted]
    if len(chosen) != 1:
        held = ', '.join(f'{found.label}{" (averages)" if found.is_average else ""}' for found in sets)
        many = 'more than one set of' if chosen else 'no'
        raise CheckpointError(
            f'{source} holds {many} weights for {wanted!r}; it holds {held}. Choose one of these '
            "names, 'auto', 'raw' or 'ema'."
        )
    (found,) = chosen
    taken_off = [found.wrapper] * bool(found.wrapper) + list(found.inserted)
    _log_taken_off(source, taken_off, len(found.tensors), found.outside)
    return replace(found, others=tuple(other for other in sets if other is not found))


def holds_official(checkpoint: Mapping[str, Any], families: Sequence[Family]) -> bool:
    """Return whether a checkpoint contains weights with official names."""
    return next(find_official(checkpoint, families), None) is not None


def own_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors by name in a runner's or trainer's checkpoint or in a state dict."""
    for key in ('state_dict', 'model'):
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    return {name: value for name, value in checkpoint.items() if isinstance(value, Tensor)}


def without_wrappers(tensors: Mapping[str, Tensor], expected: Collection[str], source: str) -> dict[str, Tensor]:
    """Remove prefixes from the tensors' names so that they match a module's.

    Removed are any common prefix, such as ``backbone.`` in a whole model's file, ``model.`` or ``module.``, and what
    ``torch.compile`` inserts into names. The log lists removed prefixes and tensors without the prefix, which are left
    out.

    Args:
        tensors: Tensors by their names in the file.
        expected: The module's names.
        source: The file's name, for messages.

    Raises:
        CheckpointError: If several prefixes match equally well.
    """
    inside, taken_off, outside = _unwrapped(tensors, expected, source)
    _log_taken_off(source, taken_off, len(inside), outside)
    return inside


def without_wrappers_if_better(
    tensors: Mapping[str, Tensor], expected: Collection[str], source: str
) -> dict[str, Tensor] | None:
    """Do as :func:`without_wrappers` if more names match then than before; otherwise return None."""
    inside, taken_off, outside = _unwrapped(tensors, expected, source)
    if sum(name in expected for name in inside) <= sum(name in expected for name in tensors):
        return None
    _log_taken_off(source, taken_off, len(inside), outside)
    return inside


def _unwrapped(
    tensors: Mapping[str, Tensor], expected: Collection[str], source: str
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Return the tensors under the module's names, what was taken off, and the names outside of the prefix."""
    wrapped = any(_WRAPPER.search(name) for name in expected)
    cleaned = dict(tensors) if wrapped else without_inserted(tensors)
    prefix = common_prefix(cleaned, expected, source)
    inside = {name.removeprefix(prefix): value for name, value in cleaned.items() if name.startswith(prefix)}
    taken_off = [prefix] * bool(prefix) + ([] if wrapped else _inserted(tensors))
    return inside, taken_off, [name for name in cleaned if not name.startswith(prefix)]


def without_wrapper_of_blocks(tensors: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Remove a wrapper's prefix from the names of a model of ours, of which only the blocks' names are known.

    The backbone's own prefix, ``backbone.``, is kept, as are other entries of the model; those outside the wrapper are
    left out. The log lists what is removed.

    Args:
        tensors: Entries by their names in the file.
        source: The file's name, for messages.

    Raises:
        CheckpointError: If several prefixes occur.
    """
    cleaned = without_inserted(tensors)
    blocks = (re.fullmatch(r'((?:.*?\.)??)(?:backbone\.)?stages\.0\.blocks\.0\.mixer\..*', name) for name in cleaned)
    wrappers = sorted({match[1] for match in blocks if match})
    if len(wrappers) > 1:
        raise CheckpointError(
            f'{source} holds the weights several times, under the prefixes '
            f'{", ".join(map(repr, wrappers))}; save those to convert in a file of their own.'
        )
    wrapper = wrappers[0] if wrappers else ''
    inside = {name.removeprefix(wrapper): value for name, value in cleaned.items() if name.startswith(wrapper)}
    outside = [name for name in cleaned if not name.startswith(wrapper)]
    _log_taken_off(source, [wrapper] * bool(wrapper) + _inserted(tensors), len(inside), outside)
    return inside


def without_inserted(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries without what ``torch.compile`` and wrappers of modules insert anywhere in names."""
    cleaned = {_WRAPPER.sub('', name): value for name, value in named.items()}
    # Otherwise both a wrapped and a bare copy are in the file.
    return cleaned if len(cleaned) == len(named) else dict(named)


def _inserted(names: Collection[str]) -> list[str]:
    return sorted({match[0] for name in names for match in _WRAPPER.finditer(name)})


def _log_taken_off(source: str, taken_off: Sequence[str], number: int, outside: Sequence[str] = ()) -> None:
    """Log what was taken off the names of a number of tensors, if anything was, and the names outside."""
    # That a whole model has its backbone under this name is nothing to report.
    if taken_off and taken_off != ['backbone.']:
        print_log(
            f'{source}: {" and ".join(map(repr, taken_off))} is taken off the names of {number} tensors'
            + (f'; {len(outside)} others are left out: {shorten(outside, ", ")}.' if outside else '.'),
            logger='current',
        )


def common_prefix(names: Collection[str], expected: Collection[str], source: str = 'the checkpoint') -> str:
    """Return the prefix under which a checkpoint has most of a module's names; '' without one.

    Raises:
        CheckpointError: If several prefixes match equally well.
    """
    known = {name for name in expected if name.count('.') + 1 >= _DISTINCTIVE}
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split('.')
        for i in range(len(parts) - _DISTINCTIVE + 1):
            if '.'.join(parts[i:]) in known:
                counts[''.join(f'{part}.' for part in parts[:i])] += 1
    best = [prefix for prefix, count in counts.items() if count == max(counts.values())]
    for usual in ('', 'backbone.'):
        if usual in best:
            return usual
    best = [prefix for prefix in best if not _AVERAGE.search(prefix)] or best
    if len(best) > 1:
        raise CheckpointError(
            f'{source} holds the weights several times, under the prefixes '
            f'{", ".join(map(repr, best))}; save those to load in a file of their own.'
        )
    return best[0] if best else ''


def find_official(checkpoint: Mapping[str, Any], families: Sequence[Family]) -> Iterator[WeightSet]:
    """Yield every set of weights with official names in a checkpoint."""
    for path, held in _mappings(checkpoint, ()):
        mapping = without_inserted(held)
        found: dict[tuple[str, str], Family] = {}
        for family in families:
            # The wrapper is matched as short as possible, so that 'backbone.' is never taken for one.
            mark = re.compile(rf'((?:.*?\.)??)((?:backbone\.)*){family.official_mark.pattern}')
            for name in mapping:
                match = mark.fullmatch(name)
                if match:
                    found[match[1], match[2]] = family
        owned, outside = _share_out(mapping, {wrapper for wrapper, _ in found})
        for (wrapper, prefix), family in found.items():
            yield WeightSet(
                family,
                path,
                wrapper,
                prefix,
                _is_average(checkpoint, path, wrapper),
                owned[wrapper],
                outside,
                tuple(_inserted(held)),
            )


def _mappings(value: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yield every dictionary in a checkpoint that contains tensors by name, with the keys that lead to it."""
    named = {name: item for name, item in value.items() if isinstance(name, str)}
    if any(isinstance(item, Tensor) for item in named.values()):
        yield path, named
    if len(path) < _DEPTH:
        for name, item in named.items():
            if isinstance(item, Mapping):
                yield from _mappings(item, (*path, name))


def _share_out(mapping: Mapping[str, Any], wrappers: set[str]) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """Return the entries of each wrapper, without its prefix, and the names outside all wrappers.

    The empty wrapper gets the remaining entries, except those that share the root of another wrapper, such as the
    counter ``ema.n_averaged`` next to ``ema.module.*``.
    """
    prefixed = sorted(wrappers - {''}, key=len, reverse=True)
    roots = tuple(wrapper.partition('.')[0] + '.' for wrapper in prefixed)
    owned: dict[str, dict[str, Any]] = {wrapper: {} for wrapper in wrappers}
    outside = []
    for name, value in mapping.items():
        wrapper = next((wrapper for wrapper in prefixed if name.startswith(wrapper)), None)
        if wrapper is not None:
            owned[wrapper][name.removeprefix(wrapper)] = value
        elif '' in wrappers and not name.startswith(roots):
            owned[''][name] = value
        else:
            outside.append(name)
    return owned, tuple(outside)


def _is_average(checkpoint: Mapping[str, Any], path: tuple[str, ...], wrapper: str) -> bool:
    # Lightning's WeightAveraging and mmengine's EMAHook save the averages as the weights, and the weights elsewhere.
    for aside, sign in (('current_model_state', 'state_dict'), ('ema_state_dict', 'message_hub')):
        if aside in checkpoint and sign in checkpoint and path in (('state_dict',), (aside,)):
            return path == ('state_dict',)
    return _AVERAGE.search('/'.join((*path, wrapper))) is not None


def _rank(found: WeightSet) -> tuple[int, bool]:
    main = _MAIN_PATHS.index(found.path) if found.path in _MAIN_PATHS else len(_MAIN_PATHS)
    return main, _AVERAGE.search(found.wrapper) is not None


def _explain_unknown(checkpoint: Mapping[str, Any], families: Sequence[Family], source: str) -> str:
    wanted = ' or '.join(family.name for family in families)
    held = list(_mappings(checkpoint, ()))
    if not held:
        keys = ', '.join(repr(key) for key in list(checkpoint)[:5]) or 'nothing'
        return f'{source} holds no tensors by name, but {keys}; it is no official checkpoint of {wanted}.'
    own = next((name for _, mapping in held for name in mapping if '.mixer.' in name), None)
    if own is not None:
        front = own[: max(own.find('stages.'), 0)]
        prefix = f', prefix={front!r}' if front else ''
        return (
            f"{source} has this package's own names already: load it with init_cfg=dict(type='Pretrained', "
            f'checkpoint=...{prefix}) or load_from, or convert it back with --to-official.'
        )
    path, mapping = max(held, key=lambda item: len(item[1]))
    names = ', '.join(list(mapping)[:3])
    return (
        f'{source} is no official checkpoint of {wanted}: no tensor has the name of one of their blocks. Its '
        f'{len(mapping)} tensors in {"/".join(path) or "the top"} begin with {names}.'
    )
