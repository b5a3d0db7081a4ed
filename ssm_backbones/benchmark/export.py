"""Throughput of the feature export relative to the backbone's own."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssm_backbones.benchmark.comparison import Pair, ratios
from ssm_backbones.benchmark.timing import Settings, seconds
from ssm_backbones.benchmark.unavailable import reason
from ssm_backbones.utils.configs import config_file
from ssm_backbones.utils.errors import CommandError

# Of the backbone's time: within 10 %.
TARGET = 1.1


@dataclass(frozen=True)
class ExportComparison:
    """The time of an image in ``tools/export_features.py``, from file to files, against that in the backbone alone.

    The export is what a user starts. Its beginning (building, loading and hashing the model, starting the readers) is
    the same for any number of images, so that its time is taken from the first batch's last file to the last one's.

    Attributes:
        name: For the table and for ``--only``.
        summary: What is done, in a few words.
        config: Path of the config below ``configs``.
        size: Side of the images.
        batch_size: Images computed at once.
        batches: Number of batches per round.
        workers: Processes that read images.
        devices: Types of the devices that it is meant for.
    """

    name: str
    summary: str
    config: str
    size: int = 224
    batch_size: int = 8
    batches: int = 5
    workers: int = 2
    devices: tuple[str, ...] = ('cpu', 'cuda')


EXPORTS = [
    ExportComparison(
        'export/vmamba-tiny', 'feature export at 224x224, batch 8, float32 files', 'vmamba/vmamba-tiny_8xb128_in1k.py'
    ),
]


def measure_export(each: ExportComparison, settings: Settings) -> dict[str, Any]:
    """Measure the export and the backbone in interleaved rounds, every second one in the opposite order.

    Returns:
        As :func:`~ssm_backbones.benchmark.comparison.measure_comparison` does; times are those of one image.
    """
    device = torch.device(settings.device)
    times: dict[str, list[float]] = {'export': [], 'backbone': []}
    try:
        with tempfile.TemporaryDirectory(prefix='ssm-export-') as folder:
            measured = _Export(each, Path(folder), device)
            order = list(times)
            for _ in range(settings.repeats):
                for label in order:
                    times[label].append(measured.export() if label == 'export' else measured.backbone())
                order.reverse()
    except (CommandError, RuntimeError, OSError) as error:
        return dict(
            name=each.name, summary=each.summary, pairs=[], entries={}, skipped={}, failed={'export': reason(error)}
        )
    entries = {
        label: dict(median_s=statistics.median(values), times_s=values, images_per_s=1 / statistics.median(values))
        for label, values in times.items()
    }
    return dict(
        name=each.name,
        summary=each.summary,
        entries=entries,
        skipped={},
        failed={},
        pairs=[ratios(Pair('export', 'backbone', TARGET), entries)],
    )


class _Export:
    """Images and a checkpoint in a folder, and the two ways to their features."""

    def __init__(self, each: ExportComparison, folder: Path, device: torch.device) -> None:
        from ssm_backbones.apis.config import load_config
        from ssm_backbones.apis.model import build_extractor

        self.each, self.folder, self.device = each, folder, device
        self.config = config_file(each.config)
        extractor = build_extractor(load_config(self.config), None)
        self.checkpoint = folder / 'backbone.pth'
        weights = {f'backbone.{name}': value for name, value in extractor.backbone.state_dict().items()}
        torch.save(dict(state_dict=weights), self.checkpoint)
        self.extractor = extractor.to(device)
        self.images = torch.randn(each.batch_size, 3, each.size, each.size, device=device)
        self.count = 0
        draw_images(folder / 'images', each.batch_size * (each.batches + 1), each.size)
        seconds(self._forward, 1, device)

    def _forward(self) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return self.extractor(self.images)

    def backbone(self) -> float:
        """Measure the seconds per image in the backbone."""
        return seconds(self._forward, self.each.batches, self.device) / self.each.batch_size

    def export(self) -> float:
        """Measure the seconds per image in an export."""
        from ssm_backbones.features.export import ExportOptions, export_features

        self.count += 1
        out = self.folder / f'export{self.count}'
        options = ExportOptions(
            self.config,
            str(self.checkpoint),
            str(self.folder / 'images'),
            str(out),
            device=str(self.device),
            batch_size=self.each.batch_size,
            workers=self.each.workers,
        )
        export_features(options)
        return seconds_per_image([path.stat().st_mtime for path in out.rglob('*.safetensors')], self.each.batch_size)


def seconds_per_image(written: Sequence[float], batch_size: int) -> float:
    """Seconds from image to image behind the first batch, from the times when the files were written."""
    written = sorted(written)
    return (written[-1] - written[batch_size - 1]) / (len(written) - batch_size)


def draw_images(folder: Path, count: int, size: int) -> None:
    """Write JPEG files of a soft pattern, about as large as photographs of that size."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        coarse = generator.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(folder / f'{number:04d}.jpg')
