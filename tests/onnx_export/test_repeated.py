"""Which blocks are translated once for all; test_export.py exports a backbone that repeats one."""

import torch

from ssm_backbones import Mamba2D
from ssm_backbones.onnx_export.export import compare, open_session, write_onnx
from ssm_backbones.onnx_export.repeated import as_operators, repeated_blocks

IMAGES = torch.randn(1, 3, 32, 48)


def model(drop_path_rate: float = 0.0) -> Mamba2D:
    arch = dict(embed_dims=[16, 32], depths=[5, 2], d_state=2, mixers=['scan', 'attention'])
    return Mamba2D(arch, out_indices=(0, 1), drop_path_rate=drop_path_rate).eval()


def test_blocks_that_differ_in_values_alone_are_of_a_kind() -> None:
    backbone = model(drop_path_rate=0.3)
    scans, attentions = (stage.blocks for stage in backbone.stages)
    kinds = [each.blocks for each in repeated_blocks(backbone, IMAGES)]
    # Blocks with an odd index scan from the other corner.
    assert kinds == [tuple(scans[0::2]), tuple(scans[1::2]), tuple(attentions)]


def test_what_was_changed_is_translated_by_itself() -> None:
    backbone = model()
    scans, attentions = (stage.blocks for stage in backbone.stages)
    scans[2].norm1.eps = 1e-3
    scans[1].mixer.register_forward_hook(lambda *args: None)
    attentions[0].mlp.other = torch.nn.Linear(1, 1)
    assert [each.blocks for each in repeated_blocks(backbone, IMAGES)] == [(scans[0], scans[4])]


def test_the_model_is_as_before() -> None:
    backbone = model()
    expected = backbone(IMAGES)
    with as_operators(repeated_blocks(backbone, IMAGES)):
        assert all('forward' in vars(block) for stage in backbone.stages for block in stage.blocks)
    assert not any('forward' in vars(module) for module in backbone.modules())
    assert not any(module._forward_hooks for module in backbone.modules())
    torch.testing.assert_close(backbone(IMAGES), expected)


def test_a_forward_of_a_block_s_own_is_kept() -> None:
    backbone = model()
    attentions = backbone.stages[1].blocks
    own = lambda x: x  # noqa: E731
    for block in attentions:
        block.forward = own
    kinds = repeated_blocks(backbone, IMAGES)
    assert not set(attentions) & {block for kind in kinds for block in kind.blocks}


class FirstMap(torch.nn.Module):
    def __init__(self, backbone: torch.nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.backbone(images)[0]


def test_blocks_whose_output_is_not_used_are_left_out(tmp_path) -> None:
    """As of a segmentor whose head takes the maps of the first stages alone."""
    arch = dict(embed_dims=[32, 32], depths=[1, 2], d_state=2, mixers=['attention', 'attention'])
    module = FirstMap(Mamba2D(arch, out_indices=(0, 1))).eval()
    write_onnx(module, IMAGES, tmp_path / 'model.onnx')
    differences = compare(open_session(tmp_path / 'model.onnx'), module, IMAGES.shape)
    assert list(differences) == ['output'] and differences['output'] < 1e-5
