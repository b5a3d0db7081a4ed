"""Optimizers and their wrappers: groups of parameters, layer-wise learning rates, and bfloat16 mixed precision."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from mmengine.runner import autocast
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ssm_backbones.backbones.base import SSMBackbone
from ssm_backbones.compat import let_losses_take_bfloat16, let_mmcv_take_bfloat16
from ssm_backbones.utils.torch_compat import AnyRMSNorm

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, AnyRMSNorm)
_RATES_AND_GAINS = ('A_log', 'D', 'dt_bias', 'scale')
_EMBEDDINGS = ('pos_embed', 'cls_token')
_OPTIONS = (
    'layer_decay_rate',
    'norm_decay_mult',
    'bias_decay_mult',
    'flat_decay_mult',
    'scan_decay_mult',
    'embedding_decay_mult',
    'custom_keys',
)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class GroupedOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor, with one group for all parameters of equal options in place of one for each parameter.

    An optimizer updates its groups one after the other. mmengine's own gives VMamba-T's Mask R-CNN 322 of them, which
    AdamW updates by 2432 calls on a GPU (``foreach``), and the two that are left by 15. What each parameter learns at,
    and whether it decays, stays the same. Takes ``DefaultOptimWrapperConstructor``'s arguments and options.

    Raises:
        ValueError: If a parameter is in the model twice and ``paramwise_cfg`` has no ``bypass_duplicate=True``.
    """

    def add_params(
        self, params: list[dict], module: nn.Module, prefix: str = '', is_dcn_module: int | float | None = None
    ) -> None:
        """Append one group to ``params`` for each set of options in the model, in the order of first parameters.

        A group's ``param_names`` tell a later resumption which parameters it had.
        """
        if prefix:  # mmengine descends into the children by this method
            super().add_params(params, module, prefix, is_dcn_module)
            return
        single: list[dict] = []
        super().add_params(single, module, prefix, is_dcn_module)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        groups: list[tuple[dict, dict]] = []
        for group in single:
            options = {'lr': self.base_lr, 'weight_decay': self.base_wd, **group}
            options = {key: value for key, value in options.items() if key not in ('params', 'lr_mult', 'decay_mult')}
            (parameter,) = group['params']
            name = names.pop(id(parameter), None)
            if name is None:
                # Joined, it would be updated twice in a step, of which PyTorch only warns.
                raise ValueError(
                    f'a parameter of shape {tuple(parameter.shape)} is in the {type(module).__name__} twice; '
                    'bypass_duplicate=True in paramwise_cfg takes it once'
                )
            known = next((known for known, others in groups if others == options), None)
            if known is None:
                known = dict(params=[], param_names=[])
                known.update((key, value) for key, value in options.items() if value is not None)
                groups.append((known, options))
            known['params'].append(parameter)
            known['param_names'].append(name)
        params.extend(group for group, _ in groups)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Optimizer constructor whose learning rate decays from the heads to the stem by a constant factor per layer.

    ::

        optim_wrapper = dict(
            constructor='LayerDecayOptimWrapperConstructor',
            paramwise_cfg=dict(layer_decay_rate=0.9))

    The learning rate of layer i of n is ``lr * layer_decay_rate ** (n - 1 - i)``, where the backbone's
    ``get_layer_depth`` returns i and n: the stem is layer 0, each block is one layer, and output norms, necks and heads
    are the last. It works in models of all host libraries with any backbone that has this method.

    No weight decay is applied to norms, biases, other parameters of a single dimension, the scans' parameters
    (``A_log``, ``D``, ``dt_bias`` and learned scales), position embeddings and class tokens.

    ``paramwise_cfg`` takes:

    - ``layer_decay_rate``: the factor, above 0 and at most 1. Required.
    - ``norm_decay_mult``, ``bias_decay_mult``, ``flat_decay_mult`` (other parameters of one dimension),
      ``scan_decay_mult`` (the scans' parameters), ``embedding_decay_mult``: factors of the weight decay; 0 by default.
    - ``custom_keys``: as in mmengine, maps parts of parameter names to ``lr_mult`` and ``decay_mult``; the longest
      matching key applies. ``lr_mult`` is multiplied with the layer's factor, ``decay_mult`` replaces the rules above.
      Both are optional.

    Args:
        optim_wrapper_cfg: The config of the wrapper, with its ``optimizer``, which sets ``lr``.
        paramwise_cfg: The options above.

    Raises:
        ValueError: If an option is unknown or invalid, or the model does not have exactly one backbone with
            ``get_layer_depth``.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        options: dict[str, Any] = self.paramwise_cfg
        unknown = [key for key in options if key not in _OPTIONS]
        if unknown:
            raise ValueError(
                f'paramwise_cfg of {type(self).__name__} has no {", ".join(unknown)}; it takes {", ".join(_OPTIONS)}'
            )
        rate = options.get('layer_decay_rate')
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 1:
            raise ValueError(f'paramwise_cfg needs layer_decay_rate, above 0 and at most 1, got {rate!r}')
        if self.base_lr is None:
            raise ValueError(f'{type(self).__name__} multiplies the learning rate: set lr in the optimizer')
        for key, custom in options.get('custom_keys', {}).items():
            if set(custom) - {'lr_mult', 'decay_mult'}:
                raise ValueError(f'custom_keys take lr_mult and decay_mult, got {key!r}: {dict(custom)}')

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer wrapper of a model, which may be wrapped for several devices."""
        return super().__call__(model.module if is_model_wrapper(model) else model)

    def add_params(
        self, params: list[dict], module: nn.Module, prefix: str = '', is_dcn_module: int | float | None = None
    ) -> None:
        """Append one group to ``params`` for each pair of learning rate and weight decay in the model.

        Frozen parameters are left out; shared parameters are added once.
        """
        prefix, backbone = _find_backbone(module)
        groups: dict[tuple[float, float | None], dict[str, Any]] = {}
        seen: set[int] = set()
        for owner_name, owner in module.named_modules():
            for leaf, parameter in owner.named_parameters(recurse=False):
                if id(parameter) in seen or not parameter.requires_grad:
                    continue
                seen.add(id(parameter))
                name = f'{owner_name}.{leaf}' if owner_name else leaf
                custom = self._custom(name)
                layer, layers = backbone.get_layer_depth(name, prefix)
                scale = self.paramwise_cfg['layer_decay_rate'] ** (layers - 1 - layer) * custom.get('lr_mult', 1.0)
                group: dict[str, Any] = dict(params=[], lr=self.base_lr * scale, lr_scale=scale, param_names=[])
                if self.base_wd is not None:
                    group['weight_decay'] = self.base_wd * custom.get('decay_mult', self._decay(owner, leaf, parameter))
                group = groups.setdefault((group['lr'], group.get('weight_decay')), group)
                group['params'].append(parameter)
                group['param_names'].append(name)
        params.extend(groups.values())
        lines = [
            f'lr {group["lr"]:.3g}, weight decay {group.get("weight_decay")}: {len(group["params"])} tensors, '
            f'{group["param_names"][0]} and so on'
            for group in groups.values()
        ]
        print_log('\n  '.join(['Layer-wise learning rates:', *lines]), logger='current')

    def _custom(self, name: str) -> dict[str, float]:
        keys = self.paramwise_cfg.get('custom_keys', {})
        fitting = sorted((key for key in keys if key in name), key=lambda key: (-len(key), key))
        return keys[fitting[0]] if fitting else {}

    def _decay(self, owner: nn.Module, leaf: str, parameter: torch.Tensor) -> float:
        """Return the factor of a parameter's weight decay."""
        if isinstance(owner, _NORMS):
            kind = 'norm'
        elif leaf in _RATES_AND_GAINS:
            kind = 'scan'
        elif leaf in _EMBEDDINGS:
            kind = 'embedding'
        elif leaf == 'bias':
            kind = 'bias'
        elif parameter.ndim <= 1:
            kind = 'flat'
        else:
            return 1.0
        return self.paramwise_cfg.get(f'{kind}_decay_mult', 0.0)


def _find_backbone(model: nn.Module) -> tuple[str, Any]:
    """Return the backbone, after the prefix of its parameters' names."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, 'get_layer_depth')
        and (isinstance(module, SSMBackbone) or name.rpartition('.')[2] == 'backbone')
    ]
    if len(found) != 1:
        names = ', '.join(name for name, _ in found) or 'none'
        raise ValueError(
            f'a {type(model).__name__} with layer-wise learning rates needs exactly one backbone that has '
            f'get_layer_depth, as those of this package have; found: {names}'
        )
    name, backbone = found[0]
    return f'{name}.' if name else '', backbone


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Optimizer wrapper that runs the model in bfloat16 autocast, on any device.

    mmengine's ``AmpOptimWrapper`` does not support CPUs. bfloat16 has float32's range, so gradients are neither scaled
    nor checked for overflow; parameters, gradients and the optimizer stay in float32. mmcv's operators, which do not
    support bfloat16, and the heads' losses are patched to compute in float32. Takes ``OptimWrapper``'s arguments.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepared = False
        if 'mmcv.ops' in sys.modules:
            let_mmcv_take_bfloat16()

    @contextmanager
    def optim_context(self, model: torch.nn.Module) -> Iterator[None]:
        """Enter bfloat16 autocast and the gradient accumulation context of ``OptimWrapper``."""
        if not self._prepared:
            let_losses_take_bfloat16(model)
            self._prepared = True
        with super().optim_context(model), autocast(dtype=torch.bfloat16):
            yield
