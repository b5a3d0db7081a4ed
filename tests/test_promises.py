"""docs/promises.md names tests that exist."""

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / 'docs' / 'promises.md'


def test_every_row_is_in_a_table() -> None:
    lines = PAGE.read_text(encoding='utf-8').splitlines()
    for before, line, after in zip(['', *lines], lines, [*lines[1:], ''], strict=False):
        assert not line.startswith('| ') or before.startswith('| ') or after.startswith('| ---'), line


def test_every_promise_names_a_test_that_exists() -> None:
    rows = re.findall(r'^\| (?!promise|---)(.+) \| (.+) \|$', PAGE.read_text(encoding='utf-8'), re.MULTILINE)
    assert len(rows) > 10
    for promise, cell in rows:
        names = re.findall(r'`([\w/]+\.py)::(\w+)`', cell)
        assert names, promise
        for file, name in names:
            assert f'def {name}(' in (TESTS / file).read_text(encoding='utf-8'), f'{file}::{name}'
