"""Have grad-cam and Torch-Pruning treat the layers of the backbones rightly."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

from .imports import after_import, installed_version


@functools.cache
def check_grad_cam_layers() -> None:
    """Let mmpretrain's ``vis_cam.py`` run beside grad-cam 1.5, and have grad-cam refuse layers that are channel-last.

    ``vis_cam.py`` passes ``use_cuda``, which grad-cam 1.5 has no longer: ``TypeError: unexpected keyword argument
    'use_cuda'``. By default it hooks the last norm. Of a backbone of this package that gives (B, H, W, C), whose axes
    grad-cam would exchange without a word.
    """
    if installed_version('grad-cam') is None:
        return

    def patch(package: ModuleType) -> None:
        base = package.base_cam.BaseCAM
        takes_device = 'use_cuda' in inspect.signature(base).parameters
        for kind in [base, *base.__subclasses__()]:
            if '__init__' in vars(kind):
                kind.__init__ = _checked_cam(kind.__init__, takes_device)

    after_import('pytorch_grad_cam', patch)


def _checked_cam(function: Callable[..., None], takes_device: bool) -> Callable[..., None]:
    @functools.wraps(function)
    def call(self: Any, model: nn.Module, target_layers: Any, *args: Any, **options: Any) -> None:
        if not takes_device:
            options.pop('use_cuda', None)
        if not args and options.get('reshape_transform') is None:
            _check_target_layers(model, target_layers)
        function(self, model, target_layers, *args, **options)

    return call


def _check_target_layers(model: nn.Module, target_layers: Any) -> None:
    """Raise a ValueError for a layer of a backbone whose output is (B, H, W, C)."""
    wanted = set(map(id, target_layers))
    for name, owner in model.named_modules():
        outputs = getattr(owner, 'output_modules', None) if hasattr(type(owner), 'output_modules') else None
        if not outputs:
            continue
        right = {id(owner.get_submodule(each)) for each in outputs.values()}
        for place, layer in owner.named_modules(prefix=name):
            if id(layer) in wanted - right and not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)):
                last = '.'.join(filter(None, [name, list(outputs.values())[-1]]))
                raise ValueError(
                    f'the output of {place} is (batch, height, width, channels), whose axes a class activation map '
                    f'would exchange. Take {last} as the target layer, or give reshape_transform.'
                )


@functools.cache
def within_torch_pruning(
    context: Callable[[ModuleType, Any, nn.Module], contextlib.AbstractContextManager[None]],
) -> None:
    """Have Torch-Pruning build each graph of layers within a context.

    Args:
        context: Called with the package, the graph that is built and the model.
    """
    if installed_version('torch-pruning') is None:
        return

    def patch(package: ModuleType) -> None:
        build = package.DependencyGraph.build_dependency

        @functools.wraps(build)
        def build_within(self: Any, model: nn.Module, *args: Any, **options: Any) -> Any:
            with context(package, self, model):
                return build(self, model, *args, **options)

        package.DependencyGraph.build_dependency = build_within

    after_import('torch_pruning', patch)
