"""Names and colours of the generated classes, for configs and for drawing."""

from __future__ import annotations

CLASSES: tuple[str, ...] = ('disc', 'rectangle', 'triangle', 'star', 'ring', 'cross')
"""Shape classes; the position in the tuple is the label (COCO's category id is one more)."""

PALETTE: tuple[tuple[int, int, int], ...] = (
    (230, 60, 60),
    (60, 130, 240),
    (60, 190, 80),
    (245, 190, 40),
    (170, 80, 220),
    (40, 200, 210),
)
"""One RGB colour (0..255) for each of `CLASSES`."""

SEG_CLASSES: tuple[str, ...] = ('background', *CLASSES)
"""Classes of the label maps: class i is stored as i + 1, because 0 means "other" there (ignored)."""

SEG_PALETTE: tuple[tuple[int, int, int], ...] = ((90, 90, 90), *PALETTE)
"""One RGB colour (0..255) for each of `SEG_CLASSES`."""

WNIDS: tuple[str, ...] = tuple(f'n{label + 1:08d}' for label in range(len(CLASSES)))
"""Folder names of the ImageNet-style tree, sorted as `CLASSES` are, so that both give the same labels."""
