"""Heads that mmpretrain does not have, registered in its ``MODELS``.

``custom_imports = dict(imports=['ssm_backbones', 'ssm_backbones.heads'])`` in a config makes them available. This
module alone needs mmpretrain; ``import ssm_backbones`` does not import it.
"""

from typing import Any

from mmpretrain.models.heads import ClsHead
from mmpretrain.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_backbones.checkpoints import CheckpointError

HIDDEN_RATIO = 4


@MODELS.register_module()
class Mamba2DClsHead(ClsHead):
    """Mamba2D's classifier (arXiv 2412.16146).

    Mean over the map, LayerNorm, Linear to four times the channels, GELU, LayerNorm, dropout, Linear. It pools the
    backbone's last map (B, C, H, W) itself, so the classifier needs no neck.

    Args:
        num_classes: Number of classes.
        in_channels: Channels C of the last map.
        dropout: Probability of dropping a hidden unit while training; the paper's are 0, 0.15 and 0.4 for nano, tiny
            and small.
        init_cfg: mmengine's initialisation config. None keeps PyTorch's default of each layer, as the authors do.
        options: ``loss``, ``topk`` and ``cal_acc`` of mmpretrain's ``ClsHead``.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        dropout: float = 0.0,
        init_cfg: dict | list[dict] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(init_cfg=init_cfg, **options)
        if num_classes < 1 or in_channels < 1:
            raise ValueError(f'num_classes and in_channels must be at least 1, got {num_classes} and {in_channels}')
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f'dropout must lie in [0, 1), got {dropout!r}')
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.norm1 = nn.LayerNorm(in_channels)
        self.fc1 = nn.Linear(in_channels, HIDDEN_RATIO * in_channels)
        self.norm2 = nn.LayerNorm(HIDDEN_RATIO * in_channels)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(HIDDEN_RATIO * in_channels, num_classes)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f'{prefix}norm.weight' in state_dict:
            # In official checkpoints this norm is outside the head; without the check only linear layers would load.
            raise CheckpointError(
                "Mamba2DClsHead is given the authors' classifier, by their names; convert the file "
                'with tools/convert_checkpoint.py.'
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def pre_logits(self, feats: tuple[Tensor, ...]) -> Tensor:
        """Compute the features (B, 4C) before the last linear layer from the backbone's maps."""
        x = feats[-1]
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f'Mamba2DClsHead takes maps (B, {self.in_channels}, H, W) and pools them itself, got '
                f"{tuple(x.shape)}; leave out the neck, and set in_channels to the last map's"
            )
        x = self.norm1(x.mean((2, 3)))
        return self.dropout(self.norm2(F.gelu(self.fc1(x))))

    def forward(self, feats: tuple[Tensor, ...]) -> Tensor:
        """Compute scores (B, num_classes) from the backbone's maps."""
        return self.fc2(self.pre_logits(feats))
