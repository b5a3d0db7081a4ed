"""Stem of V2M's plain layout: patches, position embedding, and class tokens within the grid."""

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssm_backbones.layers.common import PatchEmbed, init_lecun_normal, is_unknown
from ssm_backbones.utils.mm import print_log
from ssm_backbones.utils.tracing import as_one_node

CLS_TOKENS = ('mean', 'corner', 'center')


class TokenGrid(PatchEmbed):
    """Patch embedding with position embedding: an image (B, C_in, H, W) -> a grid (B, h, w, embed_dims).

    Class tokens fill an extra row and an extra column of the grid, all with the same learned vector, so that the grid
    stays rectangular: the first row and column ('corner'), or those in the middle ('center'). The token where the two
    cross is the class output. 'mean' adds no tokens.

    Loading a state dict resizes a position embedding of another grid; see :meth:`resize_saved`.

    Args:
        in_channels: Channels C_in of the images.
        embed_dims: Channels of the grid.
        patch_size: Side of a patch; incomplete patches are padded with zeros at the bottom and right.
        grid_size: Rows and columns of the position embedding. It is resized bicubically to any other grid.
        cls_token: 'mean', 'corner' or 'center'.
    """

    projection: nn.Conv2d

    def __init__(
        self, in_channels: int, embed_dims: int, patch_size: int, grid_size: tuple[int, int], cls_token: str = 'mean'
    ) -> None:
        super().__init__(in_channels, embed_dims, patch_size, norm=False)
        if cls_token not in CLS_TOKENS:
            raise ValueError(f'cls_token is one of {", ".join(map(repr, CLS_TOKENS))}, got {cls_token!r}')
        self.centred = cls_token == 'center'
        init_lecun_normal(self.projection)
        self.pos_embed = nn.Parameter(torch.empty(1, *grid_size, embed_dims))
        self.cls_token = None if cls_token == 'mean' else nn.Parameter(torch.empty(1, 1, 1, embed_dims))
        for parameter in (self.pos_embed, self.cls_token):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        x = x + self.position_embedding(x.shape[1], x.shape[2]).to(x.dtype)
        if self.cls_token is None:
            return x
        batch, height, width, channels = x.shape
        token = self.cls_token.to(x.dtype)
        row, column = self.crossing(height, width)
        tokens = token.expand(batch, 1, width, channels)
        x = torch.cat([x[:, :row], tokens, x[:, row:]], dim=1)
        tokens = token.expand(batch, height + 1, 1, channels)
        return torch.cat([x[:, :, :column], tokens, x[:, :, column:]], dim=2)

    def position_embedding(self, height: int, width: int) -> Tensor:
        """Return the position embedding (1, height, width, embed_dims) of a grid of that size."""
        return resized_positions(self.pos_embed, height, width)

    def resize_saved(self, state_dict: MutableMapping[str, Any], prefix: str = '') -> None:
        """Resize a saved position embedding (1, h, w, embed_dims) to this grid, in place, and log it.

        Anything else under its name is left unchanged, and rejected on loading.

        Args:
            state_dict: Tensors by name.
            prefix: Prefix of this module's names.
        """
        name = f'{prefix}pos_embed'
        saved, shape = state_dict.get(name), self.pos_embed.shape
        if (
            not isinstance(saved, Tensor)
            or not saved.is_floating_point()
            or saved.ndim != 4
            or saved.shape == shape
            or saved.shape[::3] != shape[::3]
            or saved.numel() == 0
        ):
            return
        with torch.no_grad():
            state_dict[name] = _resize(saved.float(), shape[1], shape[2]).to(saved.dtype)
        print_log(
            f'{name} is resized from {saved.shape[1]}x{saved.shape[2]} to {shape[1]}x{shape[2]} patches.',
            logger='current',
        )

    def _load_from_state_dict(self, state_dict: MutableMapping[str, Any], prefix: str, *args: Any) -> None:
        # Called by torch and by mmengine, which has its own way of loading state dicts; both pass a copy.
        self.resize_saved(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def crossing(self, height: int, width: int) -> tuple[int, int]:
        """Return row and column of the class output in a grid of ``height`` x ``width`` patches."""
        return (height // 2, width // 2) if self.centred else (0, 0)

    def class_output(self, x: Tensor) -> Tensor:
        """Return the class output (B, C) of a grid (B, h, w, C): the crossing class token, or the mean for 'mean'."""
        if self.cls_token is None:
            return x.mean((1, 2))
        row, column = self.crossing(x.shape[1] - 1, x.shape[2] - 1)
        return x[:, row, column]

    def patches(self, x: Tensor) -> Tensor:
        """Remove the row and column of class tokens, if any: (B, h, w, C) -> (B, h - 1, w - 1, C)."""
        if self.cls_token is None:
            return x
        row, column = self.crossing(x.shape[1] - 1, x.shape[2] - 1)
        x = torch.cat([x[:, :row], x[:, row + 1 :]], dim=1)
        return torch.cat([x[:, :, :column], x[:, :, column + 1 :]], dim=2)


@as_one_node
def resized_positions(positions: Tensor, height: int, width: int) -> Tensor:
    """Return a position embedding (1, h, w, C) for another grid, or as it is if it has that size."""
    if not is_unknown(height, width) and positions.shape[1:3] == (height, width):
        return positions
    return _resize(positions, height, width)


def _resize(positions: Tensor, height: int, width: int) -> Tensor:
    """Resize a position embedding bicubically, (1, h, w, C) -> (1, height, width, C)."""
    return F.interpolate(positions.permute(0, 3, 1, 2), (height, width), mode='bicubic').permute(0, 2, 3, 1)
