"""Share the drawing of images among processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TypeVar

T = TypeVar('T')

# Images that a further process has to draw to be worth its start.
_IMAGES_PER_PROCESS = 50


def for_each_image(draw: Callable[[int], T], count: int, processes: int | None = None) -> list[T]:
    """Return ``[draw(0), ..., draw(count - 1)]``, drawn by several processes.

    Args:
        draw: Called with the number of an image, maybe in a forked process; the result is pickled.
        count: Number of images.
        processes: How many draw; if None, one for each core that this process may use, fewer for few images.

    Raises:
        RuntimeError: If one of the processes ends early.
        Exception: What `draw` raises.
    """
    if processes is None:
        processes = max(1, min(_usable_cores(), count // _IMAGES_PER_PROCESS))
    parts = [range(first, count, processes) for first in range(processes)]
    # Forked, so that nobody imports anything once more. The children run no parallel code of a library.
    context = multiprocessing.get_context('fork')
    children = []
    try:
        for part in parts[1:]:
            receiver, sender = context.Pipe(duplex=False)
            arguments = (draw, part, os.getpid(), receiver, sender)
            child = context.Process(target=_draw_and_send, args=arguments, daemon=True)
            child.start()
            sender.close()
            children.append((child, receiver))
        drawn = [[draw(index) for index in parts[0]], *(_receive(receiver) for _, receiver in children)]
    finally:
        for child, receiver in children:
            receiver.close()
            child.terminate()
            child.join()
    return [drawn[index % processes][index // processes] for index in range(count)]


def _draw_and_send(
    draw: Callable[[int], T], part: range, parent: int, receiver: Connection, sender: Connection
) -> None:
    # The parent alone has this end then, and sending to a dead parent fails instead of waiting.
    receiver.close()
    # An interrupt of the terminal reaches all processes; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    drawn: list[T] = []
    try:
        for index in part:
            if os.getppid() != parent:
                return
            drawn.append(draw(index))
    except Exception as error:
        sender.send(error)  # raised again in the parent
    else:
        sender.send(drawn)


def _receive(receiver: Connection) -> list[T]:
    try:
        drawn: list[T] | Exception = receiver.recv()
    except EOFError:
        raise RuntimeError('a process that draws images ended early; is there enough memory?') from None
    if isinstance(drawn, Exception):
        raise drawn
    return drawn


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
