"""Options of the generated data sets."""

from __future__ import annotations

from dataclasses import dataclass

_SIDE_LIMITS = (64, 4096)
_COUNT_LIMIT = 1_000_000
_SEED_LIMIT = 2**32


@dataclass(frozen=True)
class ShapesOptions:
    """Options that fully determine a generated data set.

    Attributes:
        seed: 0 <= seed < 2**32; another seed gives other images.
        train, val: Images in each split, 1 to 1,000,000. More of them leave the first ones as they are.
        size: (height, width) in pixels, each 64 to 4096.
        max_size: (height, width), at least `size`; the sides of each image are drawn from `size` to `max_size`.
            None means that all are of one size.

    Raises:
        TypeError, ValueError: Naming the field and its value.
    """

    seed: int = 0
    train: int = 600
    val: int = 100
    size: tuple[int, int] = (128, 160)
    max_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        _check_integer('seed', self.seed, 0, _SEED_LIMIT - 1)
        _check_integer('train', self.train, 1, _COUNT_LIMIT)
        _check_integer('val', self.val, 1, _COUNT_LIMIT)
        _check_size('size', self.size)
        if self.max_size is not None:
            _check_size('max_size', self.max_size)
            if any(high < low for low, high in zip(self.size, self.max_size, strict=True)):
                raise ValueError(f'max_size {tuple(self.max_size)} has to be at least size {tuple(self.size)}')

    @property
    def largest(self) -> tuple[int, int]:
        """Greatest (height, width) that an image may have."""
        return self.size if self.max_size is None else self.max_size

    def count(self, split: str) -> int:
        """Images in the split 'train' or 'val'."""
        return {'train': self.train, 'val': self.val}[split]

    def as_json(self) -> dict[str, int | list[int]]:
        """Return the options as JSON-serialisable values."""
        return {
            'seed': self.seed,
            'train': self.train,
            'val': self.val,
            'size': list(self.size),
            'max_size': list(self.largest),
        }


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f'{name} has to be an integer, not {value!r}')
    if not low <= value <= high:
        raise ValueError(f'{name} has to be from {low} to {high}, not {value}')


def _check_size(name: str, value: object) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f'{name} has to be (height, width), not {value!r}')
    for side, length in zip(('height', 'width'), value, strict=True):
        _check_integer(f'{name}: {side}', length, *_SIDE_LIMITS)
