"""Exported files in smaller numbers: float16, weights in bfloat16, and 8-bit integers by onnxruntime's quantisation.

The scans compute in float32 in all of them, since what is rounded there grows along the recurrence.
"""

from __future__ import annotations

import ast
import fnmatch
import importlib
import inspect
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_backbones.apis.images import UnreadableImage, find_images
from ssm_backbones.apis.model import preprocessor_config
from ssm_backbones.onnx_export.detector import Detector, pixels
from ssm_backbones.prediction.predictor import Pipeline
from ssm_backbones.utils.errors import CommandError

PRECISIONS = {
    'float32': 1e-4,
    'float16': 2e-2,
    'bfloat16': 5e-2,
    'int8': 0.5,
    'int8-dynamic': 0.5,
}
"""The largest difference from PyTorch's float32 outputs with which a file is written, relative to the largest value.

Those of smaller numbers find files that are of no use; how accurate one is, is for ``tools/test_onnx.py`` to say.
"""

_LAYERS = ('Conv', 'Gemm', 'MatMul')
_CUSTOM_SCANS = ('RouteScan', 'WavefrontScan')


@dataclass(frozen=True)
class Layers:
    """The matrix products and convolutions of a graph, named by their modules.

    Attributes:
        integer: Those in 8-bit integers.
        kept: Those in float.
    """

    integer: tuple[str, ...]
    kept: tuple[str, ...]


def in_float16(module: nn.Module) -> nn.Module:
    """Return a copy of a module that computes in float16, from and to float32; of a detector backbone and neck do."""
    module = deepcopy(module)
    parts = [module]
    if isinstance(module, Detector):
        parts = [part for part in (module.model.backbone, getattr(module.model, 'neck', None)) if part is not None]
    for part in parts:
        part.half()
    parts[0].register_forward_pre_hook(lambda _, given: (given[0].half(), *given[1:]))
    parts[-1].register_forward_hook(
        lambda _, given, found: found.float() if isinstance(found, Tensor) else tuple(each.float() for each in found)
    )
    return module


def store_bfloat16(source: Path, target: Path) -> None:
    """Write a file whose layers' weights are stored in bfloat16 and computed with in float32.

    ONNX has no convolution in bfloat16 in the opset of the exports, and onnxruntime no product on the CPU.
    """
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load(source)
    names = _layers(model.graph)
    layers = {node.input[1] for node in model.graph.node if node.name in names}
    casts = []
    for tensor in model.graph.initializer:
        if tensor.name in layers and tensor.data_type == TensorProto.FLOAT:
            values = torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()).bfloat16()
            name = tensor.name
            raw = values.view(torch.int16).numpy().tobytes()
            tensor.CopyFrom(helper.make_tensor(f'{name}.bfloat16', TensorProto.BFLOAT16, values.shape, raw, raw=True))
            casts.append(helper.make_node('Cast', [tensor.name], [name], name=f'{name}.float32', to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, target)


def require_quantization() -> None:
    """Refuse an onnxruntime that is too old to quantise.

    Raises:
        CommandError: If it is. The message names the version.
    """
    import onnxruntime
    from onnxruntime import quantization

    if 'calibration_cache_path' not in inspect.signature(quantization.quantize_static).parameters:
        raise CommandError(
            f'8-bit integers need a newer onnxruntime than {onnxruntime.__version__}, of which Python 3.10 has none; '
            'pip install --upgrade onnxruntime with Python 3.11 or newer'
        )


def quantize(
    source: Path,
    target: Path,
    images: Iterable[Tensor] | None,
    open_session: Callable[[Path], Any],
    keep: Sequence[str] = (),
) -> Layers:
    """Write a file whose layers multiply 8-bit integers, weights by channel.

    Weights take 7 bits: without VNNI, processors add two products of unsigned and signed bytes in 16 bits, which 8 bits
    overflow, silently. So the file is right on every processor.

    Args:
        source: The file in float32.
        target: The file to write.
        images: Images (B, C, H, W) to take the activations' ranges from; None has them taken at each run.
        open_session: Opens an onnxruntime session of a file.
        keep: Patterns of names of layers that stay in float, beside the first one and those from which scans have
            their inputs.

    Raises:
        CommandError: If a pattern matches no layer, no layer is left to quantise, or onnxruntime is too old or does not
            take an image.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization import calibrate

    require_quantization()
    model = onnx.load(source)
    names = _layers(model.graph)
    # Images have a wider range than maps do, and few channels: their convolution takes little time.
    kept = _inputs_of_scans(model.graph) | set(list(names)[:1])
    if images is None:
        # onnxruntime's convolutions with ranges of each run are slower than those in float.
        kept |= {node.name for node in model.graph.node if node.op_type == 'Conv'}
    for pattern in keep:
        matches = {node for node, name in names.items() if fnmatch.fnmatchcase(name, pattern)}
        if not matches:
            some = ', '.join(list(names.values())[:10])
            raise CommandError(f'keep_float: no layer is named {pattern!r}; the first ones are {some}.')
        kept |= matches
    chosen = [node for node in names if node not in kept]
    if not chosen:
        # To onnxruntime no names are all layers.
        raise CommandError(
            f'none of {len(names)} layers is left for 8-bit integers: the first one, those from which scans have their '
            'inputs, those of keep_float and, without calibration, convolutions stay in float; take another precision.'
        )
    settings: dict[str, Any] = dict(
        op_types_to_quantize=list(_LAYERS),
        nodes_to_quantize=chosen,
        per_channel=True,
        reduce_range=True,
        weight_type=quantization.QuantType.QInt8,
    )
    # onnxruntime transposes weights without their shapes there, and then finds that they do not agree.
    del model.graph.value_info[:]
    # It also advises to fold layers before, which the runtime does by itself.
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory() as folder:
            plain, cache = Path(folder) / 'plain.onnx', Path(folder) / 'ranges.json'
            onnx.save(model, plain)
            # Of what comes out of the scans' own operators onnxruntime infers no type.
            options: dict[str, Any] = {'DefaultTensorType': onnx.TensorProto.FLOAT}
            if images is None:
                quantization.quantize_dynamic(plain, target, extra_options=options, **settings)
            else:
                ranges = _ranges(model, chosen, images, open_session, Path(folder) / 'observed.onnx')
                data = {name: calibrate.TensorData(lowest=low, highest=high) for name, (low, high) in ranges.items()}
                calibrate.save_tensors_data(calibrate.TensorsData(quantization.CalibrationMethod.MinMax, data), cache)
                # Outputs stay in float: the operators between layers are computed so in any case.
                options |= {'OpTypesToExcludeOutputQuantization': ['MatMul', 'Gemm'], 'MatMulConstBOnly': True}
                quantization.quantize_static(
                    plain, target, None, calibration_cache_path=cache, extra_options=options, **settings
                )
    finally:
        logging.getLogger().setLevel(level)
    return Layers(
        tuple(name for node, name in names.items() if node in chosen),
        tuple(name for node, name in names.items() if node not in chosen),
    )


@dataclass(frozen=True)
class Calibration:
    """Images of a config's training data, evenly spread over it, as a file takes them; read anew by each iteration.

    Attributes:
        cfg: The config. Its test pipeline reads the images.
        part: The exported part of the model.
        count: The largest number of images.
        shape: Batch, height and width that the file takes: an image is resized and repeated to fit. None is any.
    """

    cfg: Config
    part: str
    count: int
    shape: Sequence[int] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        """Yield images (B, C, H, W), float32.

        Raises:
            CommandError: If the config has no such data, or an image cannot be read.
        """
        from mmengine.dataset import pseudo_collate
        from mmengine.registry import MODELS, DefaultScope

        found = find_images('train', self.cfg)
        with DefaultScope.overwrite_default_scope(self.cfg.default_scope):
            importlib.import_module(f'{self.cfg.default_scope}.models')
            pipeline = Pipeline(self.cfg)
            preprocessor: Any = MODELS.build(preprocessor_config(self.cfg))
        for place in np.unique(np.linspace(0, len(found) - 1, self.count).round().astype(int)):
            path = found[place].path
            try:
                data: Any = pipeline.prepare(pipeline.load(path))
            except UnreadableImage as error:
                raise CommandError(f'the training image {path} cannot be read: {error}') from error
            if self.part == 'detector':
                image = pixels(data['inputs'])
            else:
                image = preprocessor(pseudo_collate([data]), False)['inputs']
            if self.shape is not None:
                batch, *sides = self.shape
                if list(image.shape[2:]) != sides:
                    image = F.interpolate(image, sides, mode='bilinear')
                image = image.expand(batch, -1, -1, -1)
            yield image


def _ranges(
    model: Any, layers: Sequence[str], images: Iterable[Tensor], open_session: Callable[[Path], Any], path: Path
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the smallest and the largest value of each layer's inputs and outputs over images, by a file to write."""
    import onnx

    wanted = {each for node in model.graph.node if node.name in layers for each in (node.input[0], node.output[0])}
    names = sorted(wanted)
    observed = deepcopy(model)
    present = {each.name for each in observed.graph.output}
    observed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
    onnx.save(observed, path)
    session = open_session(path)
    ranges: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for image in images:
        try:
            found = session.run(names, {'images': image.numpy()})
        except Exception as error:
            # onnxruntime's errors have no other common base class.
            raise CommandError(f'onnxruntime fails for images {tuple(image.shape)}: {str(error).strip()}') from error
        for name, values in zip(names, found, strict=True):
            lowest, highest = ranges.get(name, (values.min(), values.max()))
            ranges[name] = np.minimum(lowest, values.min()), np.maximum(highest, values.max())
    return ranges


def _layers(graph: Any) -> dict[str, str]:
    """Return the names of products with constant matrices and of convolutions, by their nodes' names."""
    from onnx import numpy_helper

    constants = {each.name: each for each in graph.initializer}
    found = {}
    for node in graph.node:
        weight = constants.get(node.input[1]) if node.op_type in _LAYERS else None
        if weight is None or len(weight.dims) != (4 if node.op_type == 'Conv' else 2):
            continue
        values = numpy_helper.to_array(weight)
        # Averages, which pooling is exported as, are no layers.
        if np.unique(values[values != 0]).size > 1:
            found[node.name] = _module_name(node)
    return found


def _module_name(node: Any) -> str:
    """Name a layer by its weight, or by the module that calls it."""
    path, found, _ = node.input[1].rpartition('.weight')
    if found:
        return path
    notes: Mapping[str, str] = {each.key: each.value for each in node.metadata_props}
    scopes = ast.literal_eval(notes.get('pkg.torch.onnx.name_scopes', '[]'))
    return '/'.join([*scopes[-2:-1], node.name])


def _inputs_of_scans(graph: Any) -> set[str]:
    """Name the nodes of the layers from which scans have their inputs, by way of other operators than layers."""
    makers = {output: node for node in graph.node for output in node.output}
    waiting = [name for node in _scans(graph) for name in node.input]
    seen: set[str] = set()
    found = set()
    while waiting:
        name = waiting.pop()
        node = makers.get(name)
        if name in seen or node is None:
            continue
        seen.add(name)
        if node.op_type in _LAYERS:
            found.add(node.name)
        else:
            waiting += node.input
    return found


def _scans(graph: Any) -> list[Any]:
    """Return the nodes of scans: custom operators, or what is from a loop to the sum over its states.

    Without loops a scan begins with softplus, which makes its steps. A sum over one state may have been left out; then
    the next layer or norm ends the scan.
    """
    ends = set(_layers(graph))
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    custom = [node for node in graph.node if node.op_type in _CUSTOM_SCANS]
    loops = [node for node in graph.node if node.op_type == 'Scan']
    waiting = loops or ([] if custom else [node for node in graph.node if node.op_type == 'Softplus'])
    found: dict[str, Any] = {}
    while waiting:
        node = waiting.pop()
        if node.name in found or node.name in ends or node.op_type in ('ReduceSum', 'LayerNormalization'):
            continue
        found[node.name] = node
        waiting += [user for name in node.output for user in users.get(name, ())]
    return [*custom, *found.values()]
