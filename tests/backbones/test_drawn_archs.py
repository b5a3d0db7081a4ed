"""Archs and arguments that hypothesis draws: each builds a backbone that runs, or is rejected by our own error."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ssm_backbones
from ssm_backbones.backbones import V2M, Mamba2D, VMamba

PACKAGE = str(Path(ssm_backbones.__file__).parent)
ARCHS = [(VMamba, 'test'), (V2M, 'test'), (V2M, 'test-hier'), (Mamba2D, 'test')]
ARGUMENTS = ('in_channels', 'out_indices', 'drop_path_rate', 'frozen_stages', 'with_cp', 'norm_eval')
V2M_ARGUMENTS = (*ARGUMENTS, 'img_size', 'cls_token', 'out_type', 'pyramid')
# Small, so that what is built is so too.
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 6),
    st.sampled_from([0.5, 2.0, float('nan'), float('inf'), 1 + 2j, '', 'scan', 'v0', 'v2', 'single', 'mean', b'1']),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.sampled_from(['a', 'depths', 1]), inner, max_size=2),
        st.lists(st.integers(1, 2), min_size=1, max_size=4),
    ),
    max_leaves=4,
)


def check(data: st.DataObject) -> None:
    family, name = data.draw(st.sampled_from(ARCHS), label='arch')
    arch: Any = dict(family.ARCHS[name])
    changed = data.draw(st.sampled_from([*arch, *(V2M_ARGUMENTS if name == 'test' and family is V2M else ARGUMENTS)]))
    value = data.draw(values, label=changed)
    options = {}
    if changed not in arch:
        options[changed] = value
    elif data.draw(st.integers(0, 9), label='0 leaves the key out') == 0:
        del arch[changed]
    else:
        arch[changed] = value
    try:
        backbone = family(arch=arch, **options)
    except (ValueError, TypeError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        assert last.filename.startswith(PACKAGE), f'{changed}={value!r}: {error!r}, raised in {last.filename}'
        assert changed in str(error), f'{changed}={value!r}: {error}'
        return
    with torch.no_grad():
        maps = backbone.eval()(torch.rand(1, backbone.in_channels, 33, 17))
    assert all(each.isfinite().all() for each in maps)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_drawn_archs_run_or_are_rejected(data: st.DataObject) -> None:
    check(data)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, print_blob=True)
@given(st.data())
def test_more_drawn_archs_run_or_are_rejected(data: st.DataObject) -> None:
    check(data)
