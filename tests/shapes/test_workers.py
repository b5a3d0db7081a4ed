"""Drawing by several processes."""

import os
import signal

import pytest

from ssm_backbones.shapes.workers import for_each_image


@pytest.mark.parametrize('processes', [1, 2, 3])
def test_results_are_in_order_and_from_as_many_processes(processes: int) -> None:
    results = for_each_image(lambda index: (index, os.getpid()), 8, processes)
    assert [index for index, _ in results] == list(range(8))
    assert len({process for _, process in results}) == processes


def test_few_images_start_no_process() -> None:
    assert for_each_image(lambda index: os.getpid(), 49) == [os.getpid()] * 49
    assert for_each_image(os.getpid, 0) == []


@pytest.mark.parametrize('index', [0, 1], ids=['here', 'in a child'])
def test_an_error_is_raised_here(index: int) -> None:
    def draw(number: int) -> None:
        if number == index:
            raise OSError(f'no space for image {number}')

    with pytest.raises(OSError, match=f'no space for image {index}'):
        for_each_image(draw, 4, 2)


def test_a_child_that_is_killed_is_an_error() -> None:
    parent = os.getpid()

    def draw(number: int) -> None:
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match='ended early'):
        for_each_image(draw, 4, 2)
