"""Building blocks of the backbones, on channel-last maps."""
