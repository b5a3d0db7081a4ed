"""Batch images of one size, so that nothing is padded and no result depends on the others of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

# Limit on the images that wait for others of their size, in batches; beyond it, smaller batches are computed.
WAITING_BATCHES = 4


class _Prepared(Protocol):
    @property
    def data(self) -> Mapping[str, Any] | None: ...


T = TypeVar('T', bound=_Prepared)


def batches(samples: Iterable[T], batch_size: int) -> Iterator[list[T]]:
    """Yield batches of samples of one size, with at most ``batch_size`` each, and a bounded number waiting.

    Args:
        samples: Objects with a mapping ``data`` whose ``inputs`` is a tensor (C, H, W).
        batch_size: Maximum batch size, at least 1.
    """
    waiting: dict[tuple[int, ...], list[T]] = {}
    for sample in samples:
        assert sample.data is not None, 'only what could be read is batched'
        shape = tuple(sample.data['inputs'].shape)
        waiting.setdefault(shape, []).append(sample)
        if len(waiting[shape]) == batch_size:
            yield waiting.pop(shape)
        elif sum(map(len, waiting.values())) >= WAITING_BATCHES * batch_size:
            yield waiting.pop(max(waiting, key=lambda key: len(waiting[key])))
    yield from waiting.values()
