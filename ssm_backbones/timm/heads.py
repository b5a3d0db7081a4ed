"""Classification heads on maps (B, C, H, W), with the interface of timm's ``ClassifierHead``."""

from __future__ import annotations

from timm.layers import ClassifierHead, SelectAdaptivePool2d
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_backbones.backbones import Mamba2D
from ssm_backbones.backbones.base import SSMBackbone
from ssm_backbones.layers.common import init_linear

HIDDEN_RATIO = 4


class Mamba2DHead(nn.Module):
    """Mamba2D's classifier (arXiv 2412.16146), with the parameters of ``ssm_backbones.heads.Mamba2DClsHead``.

    Pooling, LayerNorm, Linear to four times the channels, GELU, LayerNorm, dropout, Linear. Without pooling these work
    on each pixel; without classes either, the map is returned as it is.

    Args:
        in_features: Channels C of the map.
        num_classes: Number of classes; 0 leaves out the last layer.
        pool_type: timm's name of a pooling that keeps the number of channels ('avg', 'max', 'avgmax'), or '' for none.
        drop_rate: Probability of dropping a hidden unit while training.
    """

    def __init__(self, in_features: int, num_classes: int, pool_type: str = 'avg', drop_rate: float = 0.0) -> None:
        super().__init__()
        self.in_features = in_features
        self.num_features = HIDDEN_RATIO * in_features
        self.norm1 = nn.LayerNorm(in_features)
        self.fc1 = nn.Linear(in_features, self.num_features)
        self.norm2 = nn.LayerNorm(self.num_features)
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type)

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """Replace the last layer by a new one for ``num_classes`` classes, and the pooling unless it is None."""
        if pool_type is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
            if self.global_pool.feat_mult() != 1:
                raise ValueError(f"Mamba2D's head takes global_pool 'avg', 'max', 'avgmax' or '', got {pool_type!r}")
        self.fc2 = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute scores (B, num_classes) of maps (B, C, H, W), or the features (B, 4C) before the last layer."""
        x = self.global_pool(x)
        unpooled = x.ndim == 4
        if unpooled and isinstance(self.fc2, nn.Identity) and not pre_logits:
            return x
        if unpooled:
            x = x.permute(0, 2, 3, 1)
        x = self.drop(self.norm2(F.gelu(self.fc1(self.norm1(x)))))
        if not pre_logits:
            x = self.fc2(x)
        return x.permute(0, 3, 1, 2) if unpooled else x


def build_head(backbone: SSMBackbone, num_classes: int, pool_type: str, drop_rate: float) -> nn.Module:
    """Build the head that the family's authors put on its last map, initialised as theirs."""
    channels = backbone.num_features[-1]
    if isinstance(backbone, Mamba2D):
        return Mamba2DHead(channels, num_classes, pool_type, drop_rate)
    head: nn.Module = ClassifierHead(channels, num_classes, pool_type, drop_rate)
    if num_classes:
        init_linear(head.fc)  # type: ignore[arg-type]
    return head
