"""Feature pyramid for backbones of a single resolution."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from ssm_backbones.layers.common import FeatureMap
from ssm_backbones.utils.torch_compat import keep_gradient_contiguous

STRIDES = (4, 8, 16, 32)


class SimplePyramid(nn.Module):
    """Maps of strides 4, 8, 16 and 32 from maps of stride 16, by deconvolutions, identity and max pooling.

    The widths are C/4, C/2, C and C; each map ends in a LayerNorm. Source: ViTDet's simple feature pyramid
    (arXiv 2203.16527, section 3), without the convolutions to the head's width, which belong to the head.

    Args:
        channels: Width C, a multiple of 4.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels % 4:
            raise ValueError(
                f'the finest map of the pyramid has a quarter of the width, which must divide by 4, got {channels}'
            )
        half, quarter = channels // 2, channels // 4
        self.out_channels = (quarter, half, channels, channels)
        self.levels = nn.ModuleList(
            [
                nn.Sequential(Deconv(channels, half), nn.LayerNorm(half), nn.GELU(), Deconv(half, quarter)),
                Deconv(channels, half),
                nn.Identity(),
                HalvingMaxPool(),
            ]
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in self.out_channels)
        self.maps = nn.ModuleList(FeatureMap() for _ in self.out_channels)

    def forward(self, maps: Sequence[Tensor], height: int, width: int) -> tuple[Tensor, ...]:
        """Compute maps (B, C_i, ceil(H/s), ceil(W/s)) from four maps (B, ceil(H/16), ceil(W/16), C).

        The deconvolutions' outputs beyond the image's bottom and right are cropped, so that the sizes are those of a
        hierarchical backbone.
        """
        outputs = []
        for x, stride, level, norm, to_map in zip(maps, STRIDES, self.levels, self.norms, self.maps, strict=True):
            # Not -(-height // stride), which PyTorch's ONNX exporter rounds towards zero.
            x = level(x)[:, : (height + stride - 1) // stride, : (width + stride - 1) // stride]
            outputs.append(to_map(norm(x)))
        return tuple(outputs)


class Deconv(nn.Module):
    """Double a map, each pixel giving a 2x2 square: (B, H, W, C_in) -> (B, 2H, 2W, C_out)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        keep_gradient_contiguous(x)
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()


class HalvingMaxPool(nn.Module):
    """The largest value of each 2x2 square, (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), C)."""

    def forward(self, x: Tensor) -> Tensor:
        # The stride is spelled out: TVM 0.27.0 takes none by default.
        return F.max_pool2d(x.permute(0, 3, 1, 2), 2, 2, ceil_mode=True).permute(0, 2, 3, 1)
