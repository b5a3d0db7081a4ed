"""A small export that no model has computed."""

from pathlib import Path

import torch

from ssm_backbones.features.store import FeatureStore

LEVELS = [dict(name='level0', index=0, stride=4, channels=2), dict(name='level1', index=1, stride=8, channels=3)]


def write_export(folder: Path) -> Path:
    """Write an export of two images in one file, and return the folder."""
    store = FeatureStore(folder, dict(fingerprint='0' * 16, dtype='fp32', neck=False, levels=LEVELS), shard_size=2)
    store.open()
    for id in 'ab':
        maps = {level['name']: torch.arange(level['channels'] * 4.0).view(-1, 2, 2) + ord(id) for level in LEVELS}
        store.add(
            dict(
                id=id,
                path=f'/images/{id}.png',
                original_size=[8, 8],
                input_size=[8, 8],
                padded_size=[8, 8],
                scale_x=1.0,
                scale_y=1.0,
                offset_x=0.0,
                offset_y=0.0,
                image_box=[0, 0, 8, 8],
                dtype='fp32',
                levels=[
                    dict(name=level['name'], stride=level['stride'], shape=list(maps[level['name']].shape))
                    for level in LEVELS
                ],
                fingerprint='0' * 16,
            ),
            maps,
        )
    store.flush()
    store.write_index(['a', 'b'])
    return folder
