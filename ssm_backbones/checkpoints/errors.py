"""The error of everything that reads, converts or loads checkpoints."""

from ssm_backbones.utils.errors import CommandError


class CheckpointError(CommandError):
    """A checkpoint that cannot be read or identified, or does not match; the message names cause and remedy."""
