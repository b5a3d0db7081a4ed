"""The benchmark of the feature export: what it computes, and a run on a tiny model."""

from pathlib import Path

import pytest

from ssm_backbones.benchmark import Settings, export
from ssm_backbones.benchmark.export import ExportComparison, measure_export, seconds_per_image


def test_the_first_batch_does_not_count() -> None:
    # Four images of the first batch after a long start, then one each half a second.
    assert seconds_per_image([12.0, 10.0, 10.1, 9.9, 10.0, 10.5, 11.0, 11.5], batch_size=4) == (12.0 - 10.1) / 4


def test_export_against_the_backbone(write_config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, 'config_file', lambda name: str(write_config(name)))
    exported: list[int] = []
    timed = export.seconds_per_image
    monkeypatch.setattr(
        export, 'seconds_per_image', lambda written, batch: exported.append(len(written)) or timed(written, batch)
    )
    small = ExportComparison('export/small', 'a small one', 'mmpretrain', size=32, batch_size=2, batches=2, workers=0)
    result = measure_export(small, Settings(repeats=2))
    assert not result['failed'] and exported == [6, 6]
    ours, theirs = result['entries']['export'], result['entries']['backbone']
    assert len(ours['times_s']) == len(theirs['times_s']) == 2
    assert ours['images_per_s'] == pytest.approx(1 / ours['median_s'])
    pair = result['pairs'][0]
    assert pair['target'] == 1.1 and pair['met'] == (pair['ratio'] <= 1.1)
    round_ratios = [a / b for a, b in zip(ours['times_s'], theirs['times_s'], strict=True)]
    assert pair['ratio'] == pytest.approx(sum(round_ratios) / 2)


def test_an_export_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(export, 'config_file', lambda name: str(tmp_path / name))
    result = measure_export(ExportComparison('export/none', '', 'none.py'), Settings(repeats=1))
    assert result['failed']['export'].startswith('CommandError: config file') and not result['entries']
