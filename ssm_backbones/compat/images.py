"""Read and draw images: files that cannot be read, large ones, and drawing in several processes."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from ssm_backbones.utils.errors import CommandError


@contextlib.contextmanager
def name_unreadable_files() -> Iterator[None]:
    """Raise a :class:`CommandError` that names the file if an image or label map cannot be read within the context.

    The host libraries' loading transforms raise the decoder's error without the file's name, or none at all for a file
    that decodes to nothing. DataLoader workers forked within the context inherit the patch.
    """
    loading = importlib.import_module('mmcv.transforms.loading')
    originals = {cls: cls.transform for cls in (loading.LoadImageFromFile, loading.LoadAnnotations)}
    try:
        loading.LoadImageFromFile.transform = _naming(originals[loading.LoadImageFromFile], 'img_path', 'image')
        loading.LoadAnnotations.transform = _naming(originals[loading.LoadAnnotations], 'seg_map_path', 'label map')
        yield
    finally:
        for cls, transform in originals.items():
            cls.transform = transform


def _naming(transform: Callable[..., Any], key: str, kind: str) -> Callable[..., Any]:
    def named(self: Any, results: dict[str, Any]) -> Any:
        try:
            return transform(self, results)
        except CommandError:
            raise
        except Exception as error:
            if results.get(key) is None:
                raise
            raise CommandError(
                f'{kind} {results[key]} cannot be read ({type(error).__name__}: {str(error).strip()}). '
                'Replace the file, or take it out of the annotations.'
            ) from error

    return named


@contextlib.contextmanager
def without_pil_limit() -> Iterator[None]:
    """Lift PIL's own limit on pixels, so that only the caller's limit applies."""
    from PIL import Image

    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def draw_in_every_process(visualizer: Any) -> None:
    """Let one of mmengine's visualizers draw in all processes of a group; by itself it does in the first one alone."""
    from mmengine.dist import master_only

    wrapper = master_only(print).__code__

    def unwrapped(value: Any) -> Any:
        return value.__wrapped__ if getattr(value, '__code__', None) is wrapper else value

    kind: Any = type(visualizer)
    methods: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        for name, value in vars(base).items():
            if isinstance(value, property):
                methods[name] = property(unwrapped(value.fget), unwrapped(value.fset))
            elif callable(value) and not name.startswith('__'):
                methods[name] = unwrapped(value)
    visualizer.__class__ = type(kind)(kind.__name__, (kind,), methods)
