"""Parameters and FLOPs of whole models, by mmengine's rules, with the scans counted.

The convention (:data:`CONVENTION`) is that of mmengine's counter, in which the papers and the host libraries report
their figures. A test compares the two counters. This one differs in two ways. It counts dispatched operators instead of
tracing the model with TorchScript, so that it runs on the meta device without arithmetic (unlike a trace, it also
counts operators whose result is unused). And it counts the scans, which :func:`mmengine_handles` adds to mmengine's
own counter.
"""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cuda_ops.route_scan import route_scan_flops
from cuda_ops.wavefront_scan import wavefront_scan_flops
from ssm_backbones.layers.mamba2d_mixer import Neighbour
from ssm_backbones.layers.scans import CrossScan, DotProductAttention, LineScan, WavefrontScan
from ssm_backbones.utils.errors import CommandError

if TYPE_CHECKING:
    from mmengine.config import Config

CONVENTION = (
    'A multiply-add counts once. Counted are convolutions, matrix products and attention; scans, 9*L*E*N for each '
    'route (and each neighbour of the wavefront scan) of L positions, E channels, N states; layer and group norms, 4 '
    'for each element or 5 with weights; batch norms, 1 or 2; average pooling, 1 for each element read; '
    'interpolation, 4 for each element written (1 for nearest). Activations, additions, RMS norms, RoIAlign and NMS '
    'count nothing.'
)

aten = torch.ops.aten
Formula = Callable[[Sequence[Any], Any], int]


@dataclass(frozen=True)
class Complexity:
    """Parameters and FLOPs of a model for one image.

    Attributes:
        params: Number of elements of all parameters.
        flops: FLOPs of one forward pass, see :data:`CONVENTION`.
        params_by_module: Parameters by module name, including submodules; '' is the model.
        flops_by_module: FLOPs by module name, including submodules, of the modules that were called.
        flops_by_operator: FLOPs by operator name.
    """

    params: int
    flops: int
    params_by_module: Mapping[str, int]
    flops_by_module: Mapping[str, int]
    flops_by_operator: Mapping[str, int]

    def as_table(self, depth: int | None = None) -> str:
        """Format a table with a row for each called module with fewer than ``depth`` dots in its name."""
        names = [
            name
            for name in self.params_by_module
            if name in self.flops_by_module and (depth is None or name.count('.') < depth)
        ]
        rows = [('module', 'params', 'FLOPs', 'share')]
        for name in names:
            level = name.count('.') + 1 if name else 0
            label = '  ' * level + (name.rpartition('.')[2] or '(model)')
            flops = self.flops_by_module[name]
            rows.append((label, human(self.params_by_module[name]), human(flops), f'{flops / max(self.flops, 1):.1%}'))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return '\n'.join(
            f'{row[0]:<{widths[0]}}  '
            + '  '.join(f'{text:>{width}}' for text, width in zip(row[1:], widths[1:], strict=True))
            for row in rows
        )


def human(number: int) -> str:
    """Format a count with a unit: 30.25 M, 4.86 G."""
    for size, unit in ((10**12, 'T'), (10**9, 'G'), (10**6, 'M'), (10**3, 'K')):
        if number >= size:
            return f'{number / size:.2f} {unit}'
    return str(number)


def count_complexity(model: nn.Module, call: Callable[[], Any]) -> Complexity:
    """Count the FLOPs of a call of a model, and its parameters.

    Args:
        model: The model, in evaluation mode.
        call: Calls the model or parts of it. On the meta device nothing is computed.
    """
    counter = _Counter()
    with counter.watching(model), torch.no_grad(), _plain_attention(), counter:
        call()
    names = {name: 0 for name, _ in model.named_modules()}
    for name, parameter in model.named_parameters():
        while name:
            name = name.rpartition('.')[0]
            names[name] += parameter.numel()
    return Complexity(names[''], counter.by_module[''], names, dict(counter.by_module), dict(counter.by_operator))


def config_complexity(cfg: Config, height: int, width: int) -> Complexity:
    """Count a whole model from an mmpretrain, mmdet or mmseg config, for one image.

    The model runs with ``mode='tensor'``, as in each library's own counting tool: a classifier up to its logits, a
    segmentor with its decode head (auxiliary heads are not run), a detector with all its heads, on the proposals of its
    first stage for an image of noise (1000 with mmdet's settings).

    Args:
        cfg: A config from :func:`ssm_backbones.apis.config.load_config`.
        height: Height of the model's input, padding included.
        width: Width of the model's input, padding included.

    Raises:
        CommandError: If the image has no pixels, or the model cannot be built or run.
    """
    if min(height, width) < 1:
        raise CommandError(f'shape takes at least 1 pixel each way, got {height} {width}')
    scope = cfg.default_scope
    try:
        return _COUNTERS[scope](_build(cfg), height, width)
    except (KeyError, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise CommandError(
            f'the model of this config cannot be counted on an image of {height}x{width}: '
            f'{type(error).__name__}: {str(error).strip().splitlines()[0]}'
        ) from error


def mmengine_handles() -> dict[str, Callable[[list[Any], list[Any]], int]]:
    """Return handles of the scans for mmengine's ``FlopAnalyzer(model, inputs).set_op_handle(**handles)``."""
    return {
        'cuda_ops::route_scan': _traced(lambda shapes: route_scan_flops(*shapes)),
        'cuda_ops::wavefront_scan': _traced(lambda shapes: wavefront_scan_flops(*shapes)),
        'aten::scaled_dot_product_attention': _traced(lambda shapes: _attention_flops(*shapes[:3])),
    }


def thop_handles() -> dict[type[nn.Module], Callable[..., None]]:
    """Return handles for thop, ``thop.profile(model, inputs, custom_ops=thop_handles())``."""

    def handle(formula: Callable[..., int]) -> Callable[..., None]:
        def count(module: Any, inputs: tuple, output: Any) -> None:
            module.total_ops += torch.DoubleTensor([formula(*inputs)])

        return count

    def neighbour(module: Any, inputs: tuple, output: Any) -> None:
        module.total_ops += torch.DoubleTensor([output[0].numel() * inputs[0].shape[-1]])

    return {kind: handle(formula) for kind, formula in _MODULES.items()} | {Neighbour: neighbour}


def ptflops_handles() -> dict[type[nn.Module], Callable[..., None]]:
    """Return handles for ptflops, ``get_model_complexity_info(..., custom_modules_hooks=ptflops_handles())``.

    They are for its backend 'pytorch', which counts the products inside other modules by itself.
    """

    def handle(formula: Callable[..., int]) -> Callable[..., None]:
        def count(module: Any, inputs: tuple, output: Any) -> None:
            module.__flops__ += formula(*inputs)

        return count

    return {kind: handle(_MODULES[kind]) for kind in (CrossScan, LineScan, WavefrontScan, DotProductAttention)}


def _cross_scan_flops(x: Tensor, dt: Tensor, A: Tensor, *rest: Any) -> int:
    return route_scan_flops(x.shape, dt.shape, A.shape) + 4 * x.numel() * dt.shape[-1]


def _line_scan_flops(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Any,
    C: Any,
    D: Any,
    dt_bias: Any,
    dt_weight: Any,
    reverse: bool = False,
    both_ways: bool = False,
) -> int:
    return route_scan_flops(x.shape, dt.shape, (1 + both_ways, *A.shape)) + x.numel() * dt.shape[-1]


_MODULES: dict[type[nn.Module], Callable[..., int]] = {
    CrossScan: _cross_scan_flops,
    LineScan: _line_scan_flops,
    WavefrontScan: lambda x, top, left, A, *rest: wavefront_scan_flops(x.shape, top.shape, left.shape, A.shape),
    DotProductAttention: lambda query, key, value: _attention_flops(query.shape, key.shape, value.shape),
}


class _Counter(TorchDispatchMode):
    """Dispatch mode that sums the FLOPs of all operators, by running module and by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.by_module: Counter[str] = Counter({'': 0})
        self.by_operator: Counter[str] = Counter()
        self._running: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        formula = _formula(func.overloadpacket)
        flops = formula(args, output) if formula else 0
        if flops:
            self.by_operator[func.overloadpacket.__name__] += flops
            for name in self._around():
                self.by_module[name] += flops
        return output

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Track which of the model's modules are running, also when ``forward`` is called as a method."""
        with ExitStack() as replaced:
            for name, module in model.named_modules():
                if type(module) is nn.Conv1d and module.groups == module.in_channels and module.padding != (0,):
                    # A causal convolution that is watched would be computed in another way, and counted otherwise.
                    continue
                replaced.enter_context(_replaced_forward(module, partial(self._run, name, module.forward)))
            yield

    def _run(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._running.append(name)
        self.by_module[name] += 0
        try:
            return forward(*args, **kwargs)
        finally:
            self._running.pop()

    def _around(self) -> set[str]:
        """Return the running modules and their parents, whose other methods may have called them."""
        around = {''}
        for name in self._running:
            while name:
                around.add(name)
                name = name.rpartition('.')[0]
        return around


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get('forward')
    module.__dict__['forward'] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__['forward']
        else:
            module.__dict__['forward'] = before


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Disable the inference fast path of nn.MultiheadAttention, a single operator without a formula."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _formula(operator: Any) -> Formula | None:
    formula = _FORMULAS.get(operator)
    if formula is None and operator in flop_registry:
        registered = flop_registry[operator]
        # What is registered there counts a multiply-add twice.
        return lambda args, output: registered(*args, out_val=output) // 2
    return formula


def _norm(weight: int) -> Formula:
    return lambda args, output: args[0].numel() * (5 if args[weight] is not None else 4)


def _batch_norm(args: Sequence[Any], output: Any) -> int:
    return args[0].numel() * (2 if args[1] is not None else 1)


def _mean(args: Sequence[Any], output: Any) -> int:
    # Adaptive average pooling to a single pixel is dispatched as mean.
    pooled = len(args) > 2 and args[2] and {dim % args[0].ndim for dim in args[1]} == {2, 3} and args[0].ndim == 4
    return args[0].numel() if pooled else 0


def _attention(args: Sequence[Any], output: Any) -> int:
    return _attention_flops(*(tensor.shape for tensor in args[:3]))


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> int:
    """Both products of an attention of (..., L, C), (..., S, C) and (..., S, C')."""
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


_FORMULAS: dict[Any, Formula] = {
    aten.native_layer_norm: _norm(2),
    aten.native_group_norm: _norm(1),
    aten.native_batch_norm: _batch_norm,
    aten._native_batch_norm_legit_no_training: _batch_norm,
    aten._adaptive_avg_pool2d: lambda args, output: args[0].numel(),
    aten.mean: _mean,
    aten.upsample_bilinear2d: lambda args, output: 4 * output.numel(),
    aten.upsample_nearest2d: lambda args, output: output.numel(),
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
}


def _traced(flops: Callable[[list[Any]], int]) -> Callable[[list[Any], list[Any]], int]:
    """Build a handle for mmengine's counter from a formula of the inputs' shapes (None for non-tensors)."""

    def handle(inputs: list[Any], outputs: list[Any]) -> int:
        return flops([value.type().sizes() if value.isCompleteTensor() else None for value in inputs])

    return handle


def _build(cfg: Config) -> nn.Module:
    """Build the config's model on the meta device, a detector on the CPU."""
    from ssm_backbones.apis.model import build_model

    # Proposals are chosen by their values, so what is behind a detector's backbone has to be computed.
    if cfg.default_scope == 'mmdet':
        return build_model(cfg)
    try:
        return build_model(cfg, device='meta')
    except (RuntimeError, NotImplementedError):
        # Swin and others read their drop-path rates out of a tensor, which has none on the meta device.
        return build_model(cfg).to('meta')


def _channels(model: nn.Module) -> int:
    return getattr(getattr(model, 'backbone', None), 'in_channels', 3)


def _count_classifier(model: nn.Module, height: int, width: int) -> Complexity:
    images = torch.empty(1, _channels(model), height, width, device='meta')
    return count_complexity(model, lambda: model(images, mode='tensor'))


def _count_segmentor(model: nn.Module, height: int, width: int) -> Complexity:
    sample = importlib.import_module('mmseg.structures').SegDataSample(metainfo=_metainfo(height, width))
    images = torch.empty(1, _channels(model), height, width, device='meta')
    return count_complexity(model, lambda: model(images, [sample], mode='tensor'))


def _count_detector(model: nn.Module, height: int, width: int) -> Complexity:
    """Count a detector with the backbone on the meta device and the rest on maps of noise."""
    sample = importlib.import_module('mmdet.structures').DetDataSample(metainfo=_metainfo(height, width))
    images = torch.empty(1, _channels(model), height, width)
    backbone: Any = model.backbone
    forward = backbone.to('meta').forward
    generator = torch.Generator().manual_seed(0)

    def maps(images: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.randn(x.shape, generator=generator) for x in forward(images.to('meta')))

    with _replaced_forward(backbone, maps):
        return count_complexity(model, lambda: model(images, [sample], mode='tensor'))


def _metainfo(height: int, width: int) -> dict[str, Any]:
    size = (height, width)
    return dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size, scale_factor=(1.0, 1.0))


_COUNTERS = {'mmpretrain': _count_classifier, 'mmseg': _count_segmentor, 'mmdet': _count_detector}
