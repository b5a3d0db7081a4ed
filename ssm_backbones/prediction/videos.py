"""Videos as sequences of images, and back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ssm_backbones.apis.images import InputImage
from ssm_backbones.utils.errors import CommandError
from ssm_backbones.utils.files import writing

SUFFIXES = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v')


def is_video(path: str) -> bool:
    """Return whether a path has a video's suffix."""
    return path.lower().endswith(SUFFIXES)


class Video:
    """The frames of a video, which are read one after the other.

    Args:
        path: The file.

    Attributes:
        name: The file's name without suffix, which the frames' ids begin with: ``name/000000.jpg`` is the first.
        frames: Number of frames by the file's header.

    Raises:
        CommandError: If the file does not exist or is no video.
    """

    def __init__(self, path: str) -> None:
        import mmcv

        if not os.path.isfile(path):
            raise CommandError(f'video {path} does not exist.')
        self.path, self.name = path, Path(path).stem
        self._reader = mmcv.VideoReader(path, cache_capacity=1)
        self.frames = self._reader.frame_cnt
        if not self._reader.opened or self.frames < 1:
            raise CommandError(f'video {path} cannot be read: OpenCV finds no frames in it.')

    def images(self) -> list[InputImage]:
        """Return what stands for each frame."""
        return [InputImage(f'{self.name}/{place:06d}.jpg', self.path) for place in range(self.frames)]

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the frames, uint8 BGR (H, W, 3)."""
        for _ in range(self.frames):
            frame = self._reader.read()
            if frame is None:
                return
            yield frame

    def write(self, folder: Path, target: Path) -> None:
        """Put the drawn frames of a folder together into an MP4 file of the same speed.

        Raises:
            CommandError: If the file cannot be written.
        """
        import mmcv

        with writing(target):
            mmcv.frames2video(
                str(folder),
                str(target),
                fps=self._reader.fps or 25,
                fourcc='mp4v',
                filename_tmpl='{:06d}.jpg',
                show_progress=False,
            )
