"""Patches for incompatibilities between the libraries that this package depends on.

``import ssm_backbones`` applies them, since a config's ``custom_imports`` is the earliest moment at which a plugin runs
inside mmdet's, mmseg's or mmpretrain's own tools; the command lines in ``tools/`` therefore import this package before
any host library. Nothing here imports a host library or torchvision. Each patch looks first whether it is needed, is
applied at most once in a process and is reported through the logger ``ssm_backbones.compat``.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ssm_backbones.utils.configs import PACKAGE, config_file
from ssm_backbones.utils.errors import CommandError
from ssm_backbones.utils.mm import INSTALLED, HistoryBuffer
from ssm_backbones.utils.torch_compat import allow_in_checkpoints, torch_load_weights

if TYPE_CHECKING or INSTALLED:
    from mmengine.config import Config
    from mmengine.config.utils import MODULE2PACKAGE

logger = logging.getLogger(__name__)

# Importing torchvision (0.15 to 0.28) looks these operators up; torchvision's own compiled library declares them.
_TORCHVISION_SCHEMAS = (
    'nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
    'qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor',
)

_NUMERIC_DTYPES = '? b B h H i I l L q Q e f d g'.split()


def apply_patches() -> None:
    """Apply every patch that the installed versions need. Cheap and idempotent."""
    _patch_torchvision_import()
    _patch_checkpoint_loading()
    if INSTALLED:
        _read_weights_only()
        _patch_mmseg_bases()
        _patch_mmpretrain_multimodal()
        _patch_grad_cam()
        _patch_bounds_of_mmcv()


@functools.cache
def _patch_mmseg_bases() -> None:
    """Resolve ``mmseg::`` base configs if mmseg is installed from the fork ``onedl-mmsegmentation``.

    mmengine looks for the distribution ``mmsegmentation``, which that fork does not provide. The patch makes it look
    for the module ``mmseg``, as it does for the other libraries.
    """
    if importlib.util.find_spec('mmseg') is None:
        return
    try:
        importlib.metadata.distribution('mmsegmentation')
    except importlib.metadata.PackageNotFoundError:
        MODULE2PACKAGE['mmseg'] = 'mmseg'
        logger.debug('mmsegmentation is installed under another name; its configs are found by the module mmseg.')


@functools.cache
def _patch_mmpretrain_multimodal() -> None:
    """Let mmpretrain be imported where transformers 5 is installed, which peft and others bring.

    mmpretrain 1.2, and its fork onedl-mmpretrain 1.3, import their multimodal models wherever they find pycocotools and
    transformers from 4.28 on. These derive from names that transformers 5 no longer has, so ``import
    mmpretrain.models`` ends in ``TypeError: NoneType takes no arguments``. The patch makes it take its multimodal extra
    for missing, as without transformers.
    """
    transformers, mmpretrain = _version('transformers'), _version('mmpretrain') or _version('onedl-mmpretrain')
    if transformers is None or mmpretrain is None or int(transformers.partition('.')[0]) < 5:
        return

    def leave_out_multimodal(module: ModuleType) -> None:
        if getattr(module, 'WITH_MULTIMODAL', False):
            module.WITH_MULTIMODAL = False  # type: ignore[attr-defined]
            logger.warning(
                "mmpretrain %s's multimodal models (BLIP, CLIP, LLaVA and others) do not import with transformers %s "
                "and are left out; to use them, install 'transformers<5'.",
                mmpretrain,
                transformers,
            )

    _after_import('mmpretrain.utils.dependency', leave_out_multimodal)


@functools.cache
def _patch_grad_cam() -> None:
    """Let mmpretrain's ``vis_cam.py`` run beside grad-cam 1.5, and have grad-cam refuse layers that are channel-last.

    ``vis_cam.py`` passes ``use_cuda``, which grad-cam 1.5 has no longer: ``TypeError: unexpected keyword argument
    'use_cuda'``. By default it hooks the last norm. Of a backbone of this package that gives (B, H, W, C), whose axes
    grad-cam would exchange without a word.
    """
    if _version('grad-cam') is None:
        return

    def patch(package: ModuleType) -> None:
        base = package.base_cam.BaseCAM
        takes_device = 'use_cuda' in inspect.signature(base).parameters
        for kind in [base, *base.__subclasses__()]:
            if '__init__' in vars(kind):
                kind.__init__ = _checked_cam(kind.__init__, takes_device)

    _after_import('pytorch_grad_cam', patch)


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
    if _version('torch-pruning') is None:
        return

    def patch(package: ModuleType) -> None:
        build = package.DependencyGraph.build_dependency

        @functools.wraps(build)
        def build_within(self: Any, model: nn.Module, *args: Any, **options: Any) -> Any:
            with context(package, self, model):
                return build(self, model, *args, **options)

        package.DependencyGraph.build_dependency = build_within

    _after_import('torch_pruning', patch)


@functools.cache
def _patch_bounds_of_mmcv() -> None:
    """Let mmdet 3.3 and mmseg 1.2 be imported beside mmcv 2.2.

    They require a version below 2.2.0 of mmcv, which was released after them, and what they use of it is as in 2.1.
    While their ``__init__`` runs, which does nothing but compare versions, mmcv says that it is 2.1.0.
    """
    version = _version('mmcv')
    if version is None or not version.startswith('2.2.'):
        return

    @contextlib.contextmanager
    def as_mmcv_2_1(library: str) -> Iterator[None]:
        mmcv = importlib.import_module('mmcv')
        mmcv.__version__ = '2.1.0'  # type: ignore[attr-defined]
        try:
            yield
        finally:
            mmcv.__version__ = version  # type: ignore[attr-defined]
        logger.warning(
            '%s asks for mmcv below 2.2.0 and runs with mmcv %s, since ssm_backbones lets it.', library, version
        )

    for library in ('mmdet', 'mmseg'):
        if library not in sys.modules:
            sys.meta_path.insert(0, _ImportObserver(library, functools.partial(as_mmcv_2_1, library)))


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


class _ImportObserver(importlib.abc.MetaPathFinder):
    """Finds one module as the import system does, and has it executed within a context.

    Args:
        name: The module's.
        context: Called before the module is executed.
        function: Called with the module afterwards.
    """

    def __init__(
        self,
        name: str,
        context: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        function: Callable[[ModuleType], None] = lambda module: None,
    ) -> None:
        self.name = name
        self.context = context
        self.function = function
        self.searching = False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        # A library is often looked for without being imported.
        if fullname != self.name or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                sys.meta_path.remove(self)
                with self.context():
                    execute(module)
                self.function(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _after_import(name: str, function: Callable[[ModuleType], None]) -> None:
    """Call a function with a module, now if it has been imported, else as soon as it is."""
    if name in sys.modules:
        function(sys.modules[name])
    else:
        sys.meta_path.insert(0, _ImportObserver(name, function=function))


@functools.cache
def _patch_torchvision_import() -> None:
    """Let ``import torchvision`` succeed if its compiled library does not match the installed torch.

    The usual case is torchvision's CUDA wheel beside a CPU-only torch: the import then ends in
    ``operator torchvision::nms does not exist``. mmpretrain imports torchvision for its Python image transforms alone,
    which work without that library; torchvision's own operators still raise their own, clear error, and
    ``python -m ssm_backbones`` tells of the mismatch.
    """
    library = _find_torchvision_library()
    if library is None:
        return
    try:
        torch.ops.load_library(library)
        return
    except OSError as error:
        reason = str(error.__cause__ or error)
    for schema in _TORCHVISION_SCHEMAS:
        name = schema.partition('(')[0]
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f'torchvision::{name}', schema[len(name) :])
    logger.debug("torchvision's compiled operators do not load with torch %s (%s).", torch.__version__, reason)


def _find_torchvision_library() -> str | None:
    spec = importlib.util.find_spec('torchvision')
    if spec is None or not spec.submodule_search_locations:
        return None
    for folder in spec.submodule_search_locations:
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            path = os.path.join(folder, '_C' + suffix)
            if os.path.isfile(path):
                return path
    return None


@functools.cache
def _patch_checkpoint_loading() -> None:
    """Let ``torch.load`` read the checkpoints of mmengine's runner with ``weights_only=True``, torch 2.6's default.

    Besides tensors, they contain the message hub: NumPy arrays, NumPy scalars and ``HistoryBuffer``, which pickles its
    statistics methods by ``getattr``. Exactly these are allowed. ``getattr`` itself would not be safe: its name is
    bound to a function that returns ``HistoryBuffer``'s public methods and rejects everything else.
    """
    multiarray = importlib.import_module('numpy._core.multiarray' if hasattr(np, '_core') else 'numpy.core.multiarray')
    classes = [HistoryBuffer, np.ndarray, np.dtype, *{type(np.dtype(code)) for code in _NUMERIC_DTYPES}]
    allowed: dict[str, Any] = {f'{kind.__module__}.{kind.__qualname__}': kind for kind in classes}
    # NumPy 1 wrote the module as numpy.core, NumPy 2 writes numpy._core; either may read the other's checkpoints.
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        allowed |= {f'{module}._reconstruct': multiarray._reconstruct, f'{module}.scalar': multiarray.scalar}
    # How NumPy stores bytes in old pickles, which torch allows by itself from 2.5 on.
    allowed |= {'_codecs.encode': codecs.encode, 'builtins.getattr': _history_buffer_method}
    allow_in_checkpoints(allowed)
    logger.debug("mmengine's HistoryBuffer and NumPy numbers may be read from checkpoints (weights_only=True).")


def _history_buffer_method(owner: Any, name: str) -> Callable[..., Any]:
    if owner is HistoryBuffer and isinstance(name, str) and not name.startswith('_') and hasattr(HistoryBuffer, name):
        return getattr(HistoryBuffer, name)
    raise pickle.UnpicklingError(f'a checkpoint may not ask for attribute {name!r} of {owner!r}')


@functools.cache
def _read_weights_only() -> None:
    """Make mmengine's loaders read every checkpoint with ``weights_only=True``.

    Left alone, a checkpoint named by a URL may run code with every version of torch, since ``torch.hub``'s default is
    False; one in a file with torch before 2.6; and with the fork ``onedl-mmengine`` any, since it reads a file that was
    refused once more with ``weights_only=False``.
    """
    _after_import('mmengine.runner.checkpoint', read_weights_only)


def read_weights_only(module: Any) -> None:
    """Make a module's ``torch.load``, ``load_url`` and ``_safe_torch_load`` read with ``weights_only=True``."""
    module.torch = _TorchOfWeights()
    module.load_url = functools.partial(module.load_url, weights_only=True)
    if hasattr(module, '_safe_torch_load'):
        module._safe_torch_load = lambda file, map_location=None, weights_only=True: _TorchOfWeights.load(
            file, map_location=map_location
        )


class _TorchOfWeights:
    """Stands for the module ``torch`` in another module, with a ``load`` that runs no code."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def load(f: Any, map_location: Any = None, pickle_module: Any = None, **options: Any) -> Any:
        return torch_load_weights(f, map_location=map_location, **options)


@functools.cache
def revise_loaded_names(revise: Callable[[nn.Module, Mapping[str, Any]], Mapping[str, Any]]) -> None:
    """Pass each state dict through a function before mmengine loads it into a module.

    mmengine's ``load_state_dict`` hands each part of a model only the entries under that part's own name, so that no
    part sees that they carry a prefix more.

    Args:
        revise: Takes the module and the state dict, and returns the state dict to load.
    """

    def patch(checkpoint: ModuleType) -> None:
        load = checkpoint.load_state_dict

        @functools.wraps(load)
        def load_revised(module: nn.Module, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
            return load(module, revise(module, state_dict), *args, **options)

        checkpoint.load_state_dict = load_revised  # type: ignore[attr-defined]

    _after_import('mmengine.runner.checkpoint', patch)


@functools.cache
def keep_names_in_transformers() -> None:
    """Keep transformers 5 from renaming parameters of the backbones when it loads a model that it saved itself.

    For DETR and RT-DETR it renames every ``out_proj`` in a file to ``o_proj``, as its own attention layers are called
    now, the backbone's too. Those weights of a mixer would then start from random numbers, of which only a report of
    missing names tells (findings/transformers-detr-out-proj.sh). The patch leaves ``mixer.out_proj`` out of it.
    """

    def patch(module: ModuleType) -> None:
        build = getattr(module, '_build_checkpoint_conversion_mapping', None)
        if build is None:
            return
        renaming = module.WeightRenaming

        def narrowed(mappings: dict[str, Any] | None) -> dict[str, Any] | None:
            for transforms in (mappings or {}).values():
                for place, transform in enumerate(transforms):
                    if type(transform) is renaming and transform.source_patterns == ['out_proj']:
                        transforms[place] = renaming(r'(?<!mixer\.)out_proj', 'o_proj')
            return mappings

        module._build_checkpoint_conversion_mapping = lambda: narrowed(build())  # type: ignore[attr-defined]
        narrowed(getattr(module, '_checkpoint_conversion_mapping_cache', None))

    _after_import('transformers.conversion_mapping', patch)


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


@functools.cache
def allow_inheritance() -> None:
    """Let mmengine resolve base configs named ``'ssm_backbones::...'``, as it does for OpenMMLab's own packages.

    mmengine builds the parts of a config from another package in the registries of that package's scope. These configs
    name parts of the host library that they inherit from, so no scope is returned for them.
    """
    MODULE2PACKAGE.setdefault(PACKAGE, PACKAGE)
    find = Config._get_cfg_path

    @functools.cache
    def find_elsewhere(cfg_path: str) -> tuple[str, str | None]:
        # mmengine would first read all of a library's metafiles, which takes tenths of a second and lists no base.
        return _find_base(cfg_path) or find(cfg_path, '')

    def find_here_too(cfg_path: str, filename: str) -> tuple[str, str | None]:
        package, separator, name = cfg_path.partition('::')
        if separator and package == PACKAGE:
            return config_file(name), None
        return find_elsewhere(cfg_path) if separator else find(cfg_path, filename)

    Config._get_cfg_path = staticmethod(find_here_too)


def _find_base(cfg_path: str) -> tuple[str, str] | None:
    """Return the file and scope of e.g. ``'mmdet::_base_/default_runtime.py'``, or None to let mmengine search."""
    package, _, name = cfg_path.partition('::')
    if package not in MODULE2PACKAGE or not name.startswith('_base_/'):
        return None
    spec = importlib.util.find_spec(package)
    files = [Path(folder, '.mim', 'configs', name) for folder in spec.submodule_search_locations or ()] if spec else []
    return next(((str(file), package) for file in files if file.is_file()), None)


@functools.cache
def let_mmcv_take_bfloat16() -> None:
    """Make mmcv's operators, which do not support bfloat16, nor float16 on CPUs, compute such inputs in float32."""
    for name, function in _MMCV_FUNCTIONS:
        function = getattr(importlib.import_module(f'mmcv.ops.{name}'), function)
        function.forward = staticmethod(_in_float32(function.forward))
        # The backward pass gets what the forward pass stored, in float32; autograd casts the gradients that it returns.
        function.backward = staticmethod(_in_float32(function.backward, out_too=False))


_MMCV_FUNCTIONS = (
    ('carafe', 'CARAFEFunction'),
    ('carafe', 'CARAFENaiveFunction'),
    ('deform_conv', 'DeformConv2dFunction'),
    ('focal_loss', 'SigmoidFocalLossFunction'),
    ('focal_loss', 'SoftmaxFocalLossFunction'),
    ('modulated_deform_conv', 'ModulatedDeformConv2dFunction'),
    ('multi_scale_deform_attn', 'MultiScaleDeformableAttnFunction'),
    ('nms', 'NMSop'),
    ('nms', 'SoftNMSop'),
    ('roi_align', 'RoIAlignFunction'),
    ('roi_pool', 'RoIPoolFunction'),
)


def _in_float32(function: Callable[..., Any], out_too: bool = True) -> Callable[..., Any]:
    @functools.wraps(function)
    def computed_in_float32(*args: Any) -> Any:
        dtype = next((arg.dtype for arg in args if _is_unsupported(arg)), None)
        if dtype is None:
            return function(*args)
        out = function(*(arg.float() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args))
        if not out_too:
            return out
        return tuple(_to(part, dtype) for part in out) if isinstance(out, tuple) else _to(out, dtype)

    return computed_in_float32


def let_losses_take_bfloat16(model: nn.Module) -> None:
    """Make a model's heads compute their losses in float32, without autocast, from outputs in bfloat16.

    The losses of some heads, such as mmdet's VFNet's, mix both types and stop.
    """
    for kind in {type(module) for module in model.modules()}:
        owner = next((base for base in kind.__mro__ if 'loss_by_feat' in vars(base)), None)
        if owner is not None:
            _patch_loss(owner)


@functools.cache
def _patch_loss(owner: Any) -> None:
    original = owner.loss_by_feat

    @functools.wraps(original)
    def loss_in_float32(self: Any, *args: Any, **kwargs: Any) -> Any:
        held = [tensor for tensor in _tensors((args, tuple(kwargs.values()))) if tensor.dtype == torch.bfloat16]
        if not held:
            return original(self, *args, **kwargs)
        kwargs = {name: _bfloat16_to_float32(value) for name, value in kwargs.items()}
        with torch.autocast(held[0].device.type, enabled=False):
            return original(self, *_bfloat16_to_float32(args), **kwargs)

    owner.loss_by_feat = loss_in_float32


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _bfloat16_to_float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype == torch.bfloat16 else value
    # Named tuples and other kinds of sequence are left as they are.
    return type(value)(map(_bfloat16_to_float32, value)) if type(value) in (list, tuple) else value


def _is_unsupported(value: Any) -> bool:
    if not isinstance(value, Tensor):
        return False
    return value.dtype == torch.bfloat16 or (value.dtype == torch.float16 and not value.is_cuda)


def _to(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


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
