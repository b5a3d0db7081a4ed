"""Training and testing of mmpretrain, mmdet and mmseg configs, for ``tools/train.py`` and ``tools/test.py``.

One pair of functions covers the three libraries. A config names its library by ``default_scope``. Whatever that
library's own command lines add to mmengine's runner (drawing, dumping of predictions, ``--tta``, dataloader defaults)
is done here.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from ssm_backbones.apis.checks import check_checkpoint, check_init_cfg, check_paths
from ssm_backbones.apis.config import load_config
from ssm_backbones.apis.top_k import explain_top_k
from ssm_backbones.checkpoints.files import read_checkpoint
from ssm_backbones.compat import let_mmcv_take_bfloat16, name_unreadable_files
from ssm_backbones.data_check import as_table, check_data, error_message
from ssm_backbones.engine.anomaly import DetectAnomalyHook
from ssm_backbones.engine.checkpoint_hook import LoadCheckpointHook
from ssm_backbones.engine.checkpoint_saving import remove_partial_files, save_atomically
from ssm_backbones.engine.cpu_distributed import CPUDistributedDataParallel
from ssm_backbones.engine.fsdp2 import check_fsdp2, uses_fsdp2
from ssm_backbones.engine.half_precision import return_float32
from ssm_backbones.engine.randomness import ResumableRandomnessHook
from ssm_backbones.engine.resuming import CheckResumedHook
from ssm_backbones.utils.errors import CommandError
from ssm_backbones.utils.files import locked
from ssm_backbones.utils.processor import bfloat16_instructions, cpuinfo

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainOptions:
    """Options of ``tools/train.py``.

    Attributes:
        config: The config file.
        work_dir: Folder for logs and checkpoints; default: the config's ``work_dir``, else ``work_dirs/<config name>``.
        resume: The checkpoint to resume from, or ``'auto'`` for the latest one in ``work_dir`` or, if there is none,
            to start from the config's ``load_from``. ``None`` starts a new training.
        amp: Mixed precision: float16 with dynamic loss scaling on a GPU, bfloat16 on a CPU.
        auto_scale_lr: Scale the learning rate by the actual over the config's ``auto_scale_lr.base_batch_size``.
        cfg_options: Values that replace the config's, by dotted key.
        launcher: ``'none'``, ``'pytorch'``, ``'slurm'`` or ``'mpi'``.
        check: Check the data first, as :func:`ssm_backbones.data_check.check_data` does.
        detect_anomaly: Stop at the first NaN or infinity, as :class:`~ssm_backbones.engine.anomaly.DetectAnomalyHook`
            does.
    """

    config: str
    work_dir: str | None = None
    resume: str | None = None
    amp: bool = False
    auto_scale_lr: bool = False
    cfg_options: Mapping[str, Any] = field(default_factory=dict)
    launcher: str = 'none'
    check: bool = True
    detect_anomaly: bool = False


@dataclass(frozen=True)
class TestOptions:
    """Options of ``tools/test.py``.

    Attributes:
        config: The config file.
        checkpoint: The checkpoint to test, a path or a URL.
        work_dir: As in :class:`TrainOptions`.
        out: Destination of the predictions: a ``.pkl`` file for mmdet and mmpretrain, a folder of label maps for mmseg.
        show: Show every prediction in a window.
        show_dir: Folder for images with the predictions drawn on them, by each library's own rule for its place.
        wait_time: Seconds that each window stays.
        tta: Test-time augmentation.
        cfg_options: Values that replace the config's, by dotted key.
        launcher: As in :class:`TrainOptions`.
        check: As in :class:`TrainOptions`.
    """

    __test__ = False  # pytest would take the class for a test by its name

    config: str
    checkpoint: str
    work_dir: str | None = None
    out: str | None = None
    show: bool = False
    show_dir: str | None = None
    wait_time: float = 2.0
    tta: bool = False
    cfg_options: Mapping[str, Any] = field(default_factory=dict)
    launcher: str = 'none'
    check: bool = True


def train(options: TrainOptions) -> Runner:
    """Train and return the runner.

    Raises:
        CommandError: If the config, its data, a checkpoint or the machine does not allow it. The message gives the
            remedy. Nothing has been written by then, unless a file turned out to be unreadable during training.
    """
    cfg = load_config(options.config, options.cfg_options)
    _set_work_dir(cfg, options.config, options.work_dir)
    with contextlib.ExitStack() as stack:
        # Before its checkpoints are looked at, which another training may be replacing. A new folder is made only once
        # nothing is wrong.
        new = not os.path.isdir(cfg.work_dir)
        if not new:
            stack.enter_context(_alone_in(cfg.work_dir, options.launcher))
        message = _prepare_training(cfg, options)
        if new:
            stack.enter_context(_alone_in(cfg.work_dir, options.launcher))
        return _train(cfg, message, options.detect_anomaly)


def _prepare_training(cfg: Config, options: TrainOptions) -> str:
    """Apply the options, check everything that can be checked before, and return a line for the log."""
    if options.amp:
        _enable_amp(cfg)
    if not torch.cuda.is_available():
        _replace_what_needs_a_gpu(cfg)
    if options.auto_scale_lr:
        _enable_auto_scale_lr(cfg)
    message = _choose_start(cfg, options.resume)
    if cfg.default_scope == 'mmpretrain':
        _set_mmpretrain_dataloaders(cfg, ('train_dataloader', 'val_dataloader', 'test_dataloader'))
    _let_loaders_do_without_workers(cfg)
    check_fsdp2(cfg, options.launcher, options.detect_anomaly)
    check_paths(cfg, ('train', 'val'))
    check_init_cfg(cfg.model)
    start = cfg.get('load_from')
    checkpoint = _check_start(
        start, 'load_from' if options.resume is None else '--resume' if cfg.resume else 'load_from'
    )
    if cfg.get('resume'):
        _take_seed(cfg, checkpoint)
    if options.check:
        _check_data(cfg, ('train', 'val'), options.launcher)
    _prepare_launch(cfg, options.launcher)
    return message


def _train(cfg: Config, message: str, detect_anomaly: bool) -> Runner:
    start = cfg.get('load_from')
    if detect_anomaly and cfg.get('compile'):
        logger.warning('detect_anomaly: the model is not compiled, so that every module can be checked.')
        cfg.compile = False
    with name_unreadable_files():
        runner = _build_runner(cfg)
        save_atomically(runner)
        runner.register_hook(ResumableRandomnessHook())
        if detect_anomaly:
            runner.register_hook(DetectAnomalyHook())
        if message:
            runner.logger.info(message)
        if start is not None:
            resumed = bool(cfg.get('resume'))
            runner.register_hook(LoadCheckpointHook(start, whole=resumed, convert=not resumed))
            if resumed:
                runner.register_hook(CheckResumedHook(start))
        with explain_top_k(runner.model):
            runner.train()
    _leave_launch()
    return runner


def test(options: TestOptions) -> dict[str, float]:
    """Test and return the metrics.

    Raises:
        CommandError: If the config, its data, the checkpoint or the machine does not allow it.
    """
    cfg = load_config(options.config, options.cfg_options)
    _set_work_dir(cfg, options.config, options.work_dir)
    cfg.load_from = options.checkpoint
    cfg.resume = False
    if uses_fsdp2(cfg):
        # Its checkpoints are whole, and each process tests with the whole model.
        for key in ('runner_type', 'strategy'):
            cfg.pop(key, None)
    scope = cfg.default_scope
    if options.show or options.show_dir:
        _enable_drawing(cfg, options)
    if options.tta:
        _enable_tta(cfg)
    if scope == 'mmpretrain':
        _set_mmpretrain_dataloaders(cfg, ('test_dataloader',))
    _let_loaders_do_without_workers(cfg)
    check_paths(cfg, ('test',))
    _check_out(options.out, scope)
    _check_start(options.checkpoint, 'checkpoint')
    if options.check:
        _check_data(cfg, ('test',), options.launcher)
    _prepare_launch(cfg, options.launcher)
    if options.out is not None and scope == 'mmseg':
        cfg.test_evaluator.output_dir = options.out
        cfg.test_evaluator.keep_results = True
    with name_unreadable_files():
        runner = _build_runner(cfg)
        unused = _parts_without_a_test(scope, options.tta)
        runner.register_hook(LoadCheckpointHook(options.checkpoint, whole=True, unused=unused))
        if options.out is not None and scope != 'mmseg':
            runner.test_evaluator.metrics.append(_dump_metric(scope, options.out))
        with explain_top_k(runner.model):
            metrics = runner.test()
    _leave_launch()
    return metrics


test.__test__ = False  # type: ignore[attr-defined]


def _is_first_process(launcher: str) -> bool:
    rank = {'none': '0', 'pytorch': 'RANK', 'slurm': 'SLURM_PROCID', 'mpi': 'OMPI_COMM_WORLD_RANK'}[launcher]
    return os.environ.get(rank, '0') == '0'


@contextlib.contextmanager
def _alone_in(work_dir: str, launcher: str) -> Iterator[None]:
    """Keep other trainings out of a work dir, and remove what a killed one left half-written."""
    if not _is_first_process(launcher):
        yield
        return
    with locked(work_dir, 'training', 'work_dir'):
        remove_partial_files(work_dir)
        yield


def _check_data(cfg: Config, modes: tuple[str, ...], launcher: str) -> None:
    """Check the data in the first process of a run, and log what is no error."""
    if not _is_first_process(launcher):
        return
    findings = check_data(cfg, modes)
    message = error_message(findings)
    if message:
        raise CommandError(f'{message}\ntools/check_data.py tells more; --no-check goes on without this check.')
    if findings:
        logger.warning('the check of the data found:\n%s', as_table(findings))


def _set_work_dir(cfg: Config, config: str, work_dir: str | None) -> None:
    if work_dir is not None:
        cfg.work_dir = work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', Path(config).stem)


def _enable_amp(cfg: Config) -> None:
    kind = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if kind in ('AmpOptimWrapper', 'BFloat16OptimWrapper'):
        logger.warning('--amp: the config has mixed precision already (optim_wrapper.type=%r).', kind)
    elif kind != 'OptimWrapper':
        raise CommandError(f"--amp replaces optim_wrapper.type='OptimWrapper' only; this config has {kind!r}.")
    elif torch.cuda.is_available():
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    else:
        cfg.optim_wrapper.type = 'BFloat16OptimWrapper'


def _replace_what_needs_a_gpu(cfg: Config) -> None:
    if cfg.optim_wrapper.get('type') == 'AmpOptimWrapper':
        logger.warning('AmpOptimWrapper needs a GPU; on this CPU BFloat16OptimWrapper takes its place.')
        cfg.optim_wrapper.type = 'BFloat16OptimWrapper'
        for name in ('loss_scale', 'dtype', 'use_fsdp'):
            cfg.optim_wrapper.pop(name, None)
    if cfg.optim_wrapper.get('type') == 'BFloat16OptimWrapper' and cpuinfo() and not bfloat16_instructions():
        logger.warning(
            'bfloat16: this processor has no instructions for it; a step may take 2 to 16 times the time of float32. '
            'Leave out --amp, or set optim_wrapper.type to OptimWrapper.'
        )


def _enable_auto_scale_lr(cfg: Config) -> None:
    if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
        raise CommandError(
            '--auto-scale-lr: the config does not say for which batch its learning rate was chosen. '
            'Add auto_scale_lr=dict(base_batch_size=...) to it.'
        )
    cfg.auto_scale_lr.enable = True


def _set_mmpretrain_dataloaders(cfg: Config, names: tuple[str, ...]) -> None:
    """Set the dataloader defaults that mmpretrain's command lines, not its configs, provide."""
    for name in names:
        loader = cfg.get(name)
        if loader is None:
            continue
        loader.setdefault('collate_fn', dict(type='default_collate'))
        loader.setdefault('pin_memory', torch.cuda.is_available())
        if name != 'test_dataloader':
            loader.setdefault('persistent_workers', loader.get('num_workers', 0) > 0)


def _let_loaders_do_without_workers(cfg: Config) -> None:
    """Take away what PyTorch refuses in a loader with ``num_workers=0``, which most base configs set."""
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        loader = cfg.get(name)
        if loader is not None and not loader.get('num_workers', 0):
            loader['persistent_workers'] = False
            loader.pop('prefetch_factor', None)


def _choose_start(cfg: Config, resume: str | None) -> str:
    """Set the config's ``resume`` and ``load_from``, and return a line for the log.

    If there is nothing to resume yet, mmdet's own command line drops ``load_from``, and mmseg's resumes from it, with
    the epoch and optimizer of another training.
    """
    if resume is not None and resume != 'auto':
        cfg.resume, cfg.load_from = True, resume
        return ''
    # A config's own `resume` goes on from its `load_from` where it has one, as mmengine documents.
    if resume is None and (not cfg.get('resume') or cfg.get('load_from') is not None):
        return ''
    record = Path(cfg.work_dir, 'last_checkpoint')
    named = record.read_text(encoding='utf-8').strip() if record.is_file() else ''
    if not named:
        latest = _latest_checkpoint(record.parent)
        cfg.resume = latest is not None
        if latest is not None:
            # A training that was killed between the two wrote the checkpoint and not the record. Starting anew would
            # overwrite it.
            cfg.load_from = str(latest)
            return f'{record} names no checkpoint; the latest one there, {latest}, is resumed from.'
        source = cfg.get('load_from')
        first = 'starts as the config says' if source is None else f'starts from load_from={source!r}'
        return f'There is no {record} to resume from: the training {first}.'
    cfg.resume = True
    cfg.load_from = _recorded_checkpoint(record, named)
    if os.path.realpath(cfg.load_from) == os.path.realpath(named):
        return ''
    return f'{record} names {named}; the file of that name beside it, {cfg.load_from}, is resumed from.'


def _latest_checkpoint(work_dir: Path) -> Path | None:
    """Return the checkpoint written last, of those that the runner writes while it trains."""
    found = [path for kind in ('epoch', 'iter') for path in work_dir.glob(f'{kind}_*.pth')]
    return max(found, key=os.path.getmtime, default=None)


def _recorded_checkpoint(record: Path, named: str) -> str:
    """Return the latest checkpoint according to mmengine's record, also if the work dir was moved or copied.

    Raises:
        CommandError: If the checkpoint does not exist.
    """
    beside = record.parent / Path(named).name
    if beside.is_file():
        return str(beside)
    if '://' in named or os.path.isfile(named):
        return named
    others = sorted(record.parent.glob('*.pth'), key=os.path.getmtime)
    hint = f', the latest one there is {others[-1]}' if others else ''
    raise CommandError(
        f'{record} names {named}, which does not exist. Go on from another checkpoint '
        f'with --resume PATH{hint}; or remove {record} to start from the latest one or anew.'
    )


def _check_start(checkpoint: str | None, key: str) -> Mapping[str, Any]:
    """Read a local checkpoint, so that an unreadable one is rejected before anything is built."""
    check_checkpoint(checkpoint, key)
    if checkpoint is not None and '://' not in checkpoint:
        return read_checkpoint(checkpoint)
    return {}


def _take_seed(cfg: Config, checkpoint: Mapping[str, Any]) -> None:
    """Take the seed that a training without one drew, which mmengine does only after the data's order is drawn."""
    seed = (checkpoint.get('meta') or {}).get('seed')
    if seed is not None and (cfg.get('randomness') or {}).get('seed') is None:
        cfg.randomness = dict(cfg.get('randomness') or {}, seed=seed)


def _parts_without_a_test(scope: str, tta: bool) -> tuple[str, ...]:
    """Return prefixes of the parameters that are not used in testing."""
    if scope == 'mmseg':
        return ('auxiliary_head.',)
    # See _predict_boxes_alone.
    return ('roi_head.mask_head.',) if scope == 'mmdet' and tta else ()


def _enable_drawing(cfg: Config, options: TestOptions) -> None:
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise CommandError(
            "--show and --show-dir need the library's visualization hook in the config's default_hooks; "
            f"inherit {cfg.default_scope}'s default_runtime.py."
        )
    if cfg.default_scope == 'mmpretrain':
        if options.tta:
            raise CommandError('mmpretrain cannot draw augmented images; give --show or --show-dir without --tta.')
        hook.update(enable=True, show=options.show, wait_time=options.wait_time, out_dir=options.show_dir, interval=1)
        return
    hook.draw = True
    if options.show:
        hook.update(show=True, wait_time=options.wait_time)
    if options.show_dir and cfg.default_scope == 'mmdet':
        hook.test_out_dir = options.show_dir
    elif options.show_dir:
        cfg.visualizer.save_dir = options.show_dir


def _enable_tta(cfg: Config) -> None:
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    if cfg.default_scope == 'mmseg':
        missing = [key for key in ('tta_model', 'tta_pipeline') if cfg.get(key) is None]
        if missing:
            raise CommandError(
                f"--tta: the config has no {' and no '.join(missing)}; mmseg's _base_/default_runtime.py gives the "
                'first, its _base_/datasets/ files give the second.'
            )
    elif cfg.default_scope == 'mmdet':
        cfg.setdefault('tta_model', _mmdet_tta_model())
        cfg.setdefault('tta_pipeline', _flip_pipeline(dataset.pipeline, _MMDET_TTA_PACK))
        _predict_boxes_alone(cfg)
    else:
        cfg.setdefault('tta_model', dict(type='mmpretrain.AverageClsScoreTTA'))
        cfg.setdefault('tta_pipeline', _flip_pipeline(dataset.pipeline, dataset.pipeline[-1]))
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset.pipeline = cfg.tta_pipeline


_MMDET_TTA_PACK = dict(
    type='PackDetInputs',
    meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction'),
)


def _mmdet_tta_model() -> dict[str, Any]:
    return dict(type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100))


def _flip_pipeline(pipeline: list[Any], pack: Mapping[str, Any]) -> list[Any]:
    flips = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
    return [*deepcopy(pipeline[:-1]), dict(type='TestTimeAug', transforms=[flips, [deepcopy(pack)]])]


def _predict_boxes_alone(cfg: Config) -> None:
    """Remove the mask head for test-time augmentation, because mmdet merges augmented boxes but not masks."""
    roi_head = cfg.model.get('roi_head')
    if roi_head is None or roi_head.get('mask_head') is None:
        return
    logger.warning('--tta: mmdet merges boxes only; masks are neither predicted nor evaluated.')
    roi_head.mask_head = None
    roi_head.mask_roi_extractor = None
    evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
    for evaluator in evaluators:
        if isinstance(evaluator.get('metric'), list):
            evaluator.metric = [name for name in evaluator.metric if name != 'segm']


def _check_out(out: str | None, scope: str) -> None:
    if out is None:
        return
    if scope == 'mmseg':
        if os.path.isfile(out):
            raise CommandError(f'--out {out} is a file; mmseg writes a folder of label maps.')
    elif not out.endswith(('.pkl', '.pickle')):
        raise CommandError(f'--out {out}: {scope} writes a pickle, so the name must end in .pkl or .pickle.')


def _dump_metric(scope: str, out: str) -> Any:
    if scope == 'mmdet':
        return importlib.import_module('mmdet.evaluation').DumpDetResults(out_file_path=out)
    return importlib.import_module('mmengine.evaluator').DumpResults(out_file_path=out)


def _prepare_launch(cfg: Config, launcher: str) -> None:
    cfg.launcher = launcher
    if launcher == 'none' or torch.cuda.is_available():
        return
    if launcher != 'pytorch':
        raise CommandError(f'--launcher {launcher} needs a GPU for every process and none is visible here.')
    # mmengine's init_dist selects a GPU first; on CPUs the process group is initialised with gloo before that.
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group('gloo')
    wrapper = cfg.setdefault('model_wrapper_cfg', ConfigDict())
    if wrapper.get('type', 'MMDistributedDataParallel') == 'MMDistributedDataParallel':
        wrapper['type'] = CPUDistributedDataParallel.__name__
    wrapper.setdefault('broadcast_buffers', False)
    wrapper.setdefault('find_unused_parameters', cfg.get('find_unused_parameters', False))
    wrapper['device_ids'] = None


def _leave_launch() -> None:
    """Destroy the process group in all processes at once: one that exits earlier can abort in the group's threads."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _build_runner(cfg: Config) -> Runner:
    if cfg.default_scope != 'mmpretrain':
        # `fp16` of the loops for validation and testing means bfloat16 on a CPU.
        let_mmcv_take_bfloat16()
    if cfg.default_scope == 'mmdet':
        importlib.import_module('mmdet.utils').setup_cache_size_limit_of_dynamo()
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    if any((cfg.get(f'{mode}_cfg') or {}).get('fp16') for mode in ('val', 'test')):
        return_float32(runner.model)
    return runner
