"""FSDP2 through mmengine: each of several processes holds a share of the parameters and of what trains them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import mmengine
import torch
from mmengine._strategy import DDPStrategy
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.registry import STRATEGIES
from mmengine.runner.checkpoint import save_checkpoint
from torch import Tensor, nn

from ssm_backbones.backbones.base import Stage
from ssm_backbones.engine.checkpoint_saving import BACKEND
from ssm_backbones.engine.cpu_distributed import share_batch_norms
from ssm_backbones.utils.errors import CommandError
from ssm_backbones.utils.torch_compat import release

_DTYPES = {None: None, 'bfloat16': torch.bfloat16}


@STRATEGIES.register_module()
class FSDP2Strategy(DDPStrategy):
    """Strategy of mmengine's ``FlexibleRunner`` that divides a model among the processes by ``fully_shard``.

    ::

        runner_type = 'FlexibleRunner'
        strategy = dict(type='FSDP2Strategy', param_dtype='bfloat16')

    Each block of this package's backbones is a unit, gathered for its forward and its backward pass; the rest of the
    model is one more. In float32, losses and updates are those of ``DistributedDataParallel`` to rounding.

    Checkpoints are those of any training: the first process writes whole tensors by their usual names. Every tool reads
    them, and a training in any number of processes, sharded or not, goes on from them.

    Args:
        param_dtype: ``'bfloat16'`` gathers the blocks' parameters and computes the blocks in bfloat16; gradients are
            reduced and parameters updated in float32, and a block's output is float32. None: all in float32.
        activation_checkpointing: Recompute each block in the backward pass, as the backbones' ``with_cp`` does.
        reshard_after_forward: Release a block's whole parameters after its forward pass. False takes more memory and
            gathers them once a step.
        kwargs: Arguments of mmengine's ``DDPStrategy``, such as ``sync_bn``.

    Raises:
        ValueError: If ``param_dtype`` is another one.
    """

    def __init__(
        self,
        *,
        param_dtype: str | None = None,
        activation_checkpointing: bool = False,
        reshard_after_forward: bool = True,
        **kwargs: Any,
    ) -> None:
        if param_dtype not in _DTYPES:
            raise ValueError(f"param_dtype must be None or 'bfloat16', got {param_dtype!r}")
        self.param_dtype = _DTYPES[param_dtype]
        self.activation_checkpointing = activation_checkpointing
        self.reshard_after_forward = reshard_after_forward
        super().__init__(**kwargs)

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        device = get_device()
        model = self.convert_model(model.to(device))
        if device == 'cpu':
            model = share_batch_norms(model)
        options: Any = dict(
            mesh=init_device_mesh(device, (self.world_size,)), reshard_after_forward=self.reshard_after_forward
        )
        policy = MixedPrecisionPolicy()
        if self.param_dtype is not None:
            policy = MixedPrecisionPolicy(self.param_dtype, torch.float32, torch.float32)
        for stage in _stages(model):
            stage.with_cp |= self.activation_checkpointing
            for block in stage.blocks:
                fully_shard(block, mp_policy=policy, **options)
        fully_shard(model, **options)
        return model

    def build_optim_wrapper(self, optim_wrapper: Any, model: nn.Module | None = None) -> Any:
        """Build the optimizer wrapper, which logs the norm of all processes' gradients."""
        built: Any = super().build_optim_wrapper(optim_wrapper, model)
        if getattr(built, 'clip_func', None) is nn.utils.clip_grad_norm_:
            built.clip_func = _clip_grad_norm
        return built

    def model_state_dict(self) -> dict[str, Any]:
        """Gather the model's state; all processes have to call this, and the first one has the tensors afterwards."""
        state = self.model.state_dict()
        whole = _gather(state)
        whole._metadata = getattr(state, '_metadata', None)
        return whole

    def optim_state_dict(self) -> dict[str, Any]:
        """Gather the optimizer's state, as above."""
        return _gather(self.optim_wrapper.state_dict())

    def load_model_state_dict(self, state_dict: Mapping[str, Any], **kwargs: Any) -> None:
        """Load whole tensors, of which each process takes its share; arguments are mmengine's."""
        own = self.model.state_dict()
        placed = type(own)((name, _divide(value, own.get(name))) for name, value in state_dict.items())
        super().load_model_state_dict(placed, **kwargs)

    def load_optim_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load an optimizer's whole state, of which each process takes its share."""
        groups = self.optim_wrapper.optimizer.param_groups
        parameters = [parameter for group in groups for parameter in group['params']]
        states = {
            number: {name: _divide(value, parameters[number]) for name, value in state.items()}
            for number, state in state_dict['state'].items()
        }
        super().load_optim_state_dict({**state_dict, 'state': states})

    def resume(self, filename: str, **kwargs: Any) -> dict[str, Any]:
        """Resume from a checkpoint, which is read into the CPU's memory; arguments are mmengine's."""
        return super().resume(filename, **{**kwargs, 'map_location': 'cpu'})

    def save_checkpoint(
        self,
        filename: str,
        *,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        extra_ckpt: dict[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """Write a checkpoint by the first process; all have to call this. Arguments are mmengine's."""
        checkpoint: dict[str, Any] = dict(state_dict=self.model_state_dict())
        if save_optimizer and hasattr(self, 'optim_wrapper'):
            checkpoint['optimizer'] = self.optim_state_dict()
        if not is_main_process():
            return
        if save_param_scheduler and hasattr(self, 'param_schedulers'):
            checkpoint['param_schedulers'] = self.scheduler_state_dict()
        checkpoint.update(extra_ckpt or {})
        checkpoint['meta'] = dict(
            checkpoint.get('meta') or {},
            seed=self.seed,
            time=time.strftime('%Y%m%d_%H%M%S'),
            mmengine_version=mmengine.__version__,
        )
        if callback is not None:
            callback(checkpoint)
        save_checkpoint(checkpoint, filename, backend_args=None if '://' in filename else dict(backend=BACKEND))


def check_fsdp2(cfg: Config, launcher: str, detect_anomaly: bool = False) -> None:
    """Check that a training's config has nothing that does not work with :class:`FSDP2Strategy`, where it names that.

    Args:
        cfg: The config.
        launcher: As in :class:`~ssm_backbones.engine.runner.TrainOptions`.
        detect_anomaly: As there.

    Raises:
        CommandError: If it has. The message names the key and the remedy.
    """
    if not uses_fsdp2(cfg):
        return
    if release() < (2, 6):
        raise CommandError(f'strategy: FSDP2Strategy needs torch 2.6 or newer, this is {torch.__version__}.')
    if detect_anomaly:
        raise CommandError(
            'detect_anomaly cannot look at divided gradients; train without strategy to find the module.'
        )
    for fault, reason in _faults(cfg, launcher):
        if fault:
            raise CommandError(f'strategy: FSDP2Strategy {reason}')


def uses_fsdp2(cfg: Config) -> bool:
    """Return whether a config trains by :class:`FSDP2Strategy`."""
    kind = (cfg.get('strategy') or {}).get('type')
    return kind is FSDP2Strategy or str(kind).rpartition('.')[2] == FSDP2Strategy.__name__


def _faults(cfg: Config, launcher: str) -> Iterator[tuple[bool, str]]:
    yield (
        cfg.get('runner_type') != 'FlexibleRunner',
        "is for mmengine's FlexibleRunner; set runner_type='FlexibleRunner'.",
    )
    yield launcher == 'none', 'is for several processes; start the training with tools/dist_train.sh.'
    hooks: Iterable[Any] = [*(cfg.get('custom_hooks') or ()), *(cfg.get('default_hooks') or {}).values()]
    names = {str(hook.get('type')).rpartition('.')[2] for hook in hooks if isinstance(hook, Mapping)}
    yield (
        any('EMAHook' in name for name in names),
        'has no averaged weights, since PyTorch cannot copy a sharded model; remove EMAHook from custom_hooks.',
    )
    wrapper = cfg.get('optim_wrapper') or {}
    yield (
        'AmpOptimWrapper' in str(wrapper.get('type')),
        "does not scale losses; set param_dtype='bfloat16' in the strategy, or optim_wrapper.type='OptimWrapper' or "
        "'BFloat16OptimWrapper'.",
    )
    yield 'optimizer' not in wrapper, 'trains by one optimizer; set optim_wrapper.optimizer.'
    yield bool(cfg.get('compile')), 'does not compile; remove compile.'
    yield (
        bool((cfg.get('val_cfg') or {}).get('fp16')),
        "validates in the blocks' own param_dtype; remove val_cfg.fp16.",
    )
    test_cfg = cfg.model.get('test_cfg') or {}
    yield (
        cfg.get('val_cfg') is not None and test_cfg.get('mode') == 'slide',
        'cannot validate by sliding windows: images of other sizes have other numbers of them, and each is computed by '
        "all processes together. Set model.test_cfg.mode='whole', or val_cfg, val_dataloader and val_evaluator to None "
        'and test the checkpoints with tools/test.py.',
    )


def _stages(model: nn.Module) -> list[Stage]:
    stages = [module for module in model.modules() if isinstance(module, Stage)]
    if not stages:
        raise CommandError('strategy: FSDP2Strategy divides a backbone of this package, and the model has none.')
    return stages


def _clip_grad_norm(parameters: Iterable[Tensor], *args: Any, **kwargs: Any) -> Tensor:
    # The norm is a DTensor, whose parts float() adds up in torch 2.13, but not in every older version.
    norm: Any = nn.utils.clip_grad_norm_(parameters, *args, **kwargs)
    return norm.full_tensor() if hasattr(norm, 'full_tensor') else norm


def _gather(state: Any) -> Any:
    """Make whole CPU tensors of all tensors in a state, in the first process; the others have None for them."""
    if isinstance(state, dict):
        return type(state)((key, _gather(value)) for key, value in state.items())
    if isinstance(state, list | tuple):
        return type(state)(_gather(value) for value in state)
    if not isinstance(state, Tensor):
        return state
    whole: Tensor = state.full_tensor() if hasattr(state, 'full_tensor') else state
    return whole.detach().cpu() if is_main_process() else None


def _divide(value: Any, like: Any) -> Any:
    """Return this process's share of a whole tensor, if its counterpart is divided and of the same shape."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(value, Tensor) and isinstance(like, DTensor) and value.shape == like.shape:
        return distribute_tensor(value, like.device_mesh, like.placements)
    return value
