"""Kernels that synchronize rightly pass, and each fault planted in what nvcc made of them is found."""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.cuda_emulation.emulate import compiler
from tests.ptx.interpret import FaultFound, Program, compile_ptx, read_ptx, toolkit, watched_tensors

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason='the interpreter is compiled by g++, which is not there'),
    pytest.mark.skipif(toolkit() is None, reason='the kernels are compiled by nvcc, which is not there'),
]
COUNT, BLOCKS = 96, 4
Edit = Callable[[str], str]


class Arguments(ctypes.Structure):
    _fields_ = [
        ('source', ctypes.c_uint64),
        ('target', ctypes.c_uint64),
        ('flags', ctypes.c_uint64),
        ('count', ctypes.c_int32),
    ]


def run(kernel: str, edit: Edit = lambda text: text, **settings: int) -> bool:
    """Run a kernel of kernels.cu with its PTX edited; whether the result is right."""
    whole = compile_ptx(Path(__file__).with_name('kernels.cu'))
    start = whole.index(f'.entry {kernel}(')
    end = whole.index('\n}', start)
    edited = edit(whole[start:end])
    program = Program(read_ptx(whole[:start] + edited + whole[end:]).kernel(kernel))
    with watched_tensors():
        source = torch.arange(COUNT, dtype=torch.float32)
        target = torch.full((BLOCKS, COUNT), torch.nan)
        flags = torch.zeros(BLOCKS + 1, dtype=torch.int64)
    arguments = Arguments(source.data_ptr(), target.data_ptr(), flags.data_ptr(), COUNT)
    program.launch(arguments, BLOCKS if kernel == 'chain' else 1, COUNT, COUNT * 4, **settings)
    lanes = torch.arange(COUNT)
    expected = {
        'reverse': [source + 2],
        'pass_in_warp': [source[lanes ^ 1] + source[lanes ^ 3]],
        'chain': [source, source.flip(0) + 1, source + 2, source.flip(0) + 3],
    }[kernel]
    return torch.equal(target[: len(expected)], torch.stack(expected))


def without(pattern: str, number: int = 0) -> Edit:
    """Leaves out the instruction of that number among those that a pattern finds."""
    return replaced(pattern, '', number)


def replaced(pattern: str, replacement: str, number: int = 0) -> Edit:
    """Replaces one of an instruction's parts."""

    def edit(text: str) -> str:
        found = list(re.finditer(pattern, text))
        assert len(found) > number, f'{pattern} is not there'
        at = found[number]
        return text[: at.start()] + at.expand(replacement) + text[at.end() :]

    return edit


@pytest.mark.parametrize('kernel', ('reverse', 'pass_in_warp', 'chain'))
def test_a_kernel_without_fault_is_right(kernel: str) -> None:
    assert all(run(kernel, seed=seed, residents=1 + seed % 3) for seed in range(12))


RACES = (
    ('reverse', without(r'bar\.sync.*;', 0)),
    ('reverse', without(r'bar\.sync.*;', 1)),
    ('reverse', without(r'bar\.sync.*;', 2)),
    ('pass_in_warp', without(r'bar\.warp\.sync.*;')),
    ('chain', without(r'bar\.sync.*;', 0)),
    ('chain', without(r'bar\.sync.*;', 1)),
    ('chain', without(r'bar\.sync.*;', 2)),
    ('chain', replaced(r'st\.release\.gpu', 'st')),
    ('chain', replaced(r'st\.release\.gpu', 'st.relaxed.gpu')),
    ('chain', replaced(r'ld\.acquire\.gpu', 'ld')),
    ('chain', replaced(r'ld\.acquire\.gpu', 'ld.relaxed.gpu')),
)


@pytest.mark.parametrize(('kernel', 'edit'), RACES)
def test_missing_synchronization_is_a_race_in_any_order(kernel: str, edit: Edit) -> None:
    for seed in range(4):
        with pytest.raises(FaultFound, match='^race in .* memory .*kernels.cu:') as caught:
            run(kernel, edit, seed=seed)
        assert len(re.findall(r'PTX line \d+', str(caught.value))) == 2


def is_right(kernel: str, edit: Edit, **settings: int) -> bool:
    """Were races not looked for: whether the result is right, and not for example a ticket that is not there."""
    try:
        return run(kernel, edit, checks_races=False, **settings)
    except FaultFound:
        return False


@pytest.mark.parametrize(('kernel', 'edit'), RACES)
def test_missing_synchronization_gives_wrong_results(kernel: str, edit: Edit) -> None:
    """Many orders show it, others happen to be right."""
    assert sum(not is_right(kernel, edit, seed=seed) for seed in range(24)) >= 2


@pytest.mark.parametrize(
    ('kernel', 'edit'),
    (
        ('pass_in_warp', replaced(r'shfl\.sync\.bfly', 'shfl.sync.idx')),
        ('reverse', replaced('0f3F800000', '0f40000000')),
        ('chain', replaced(r'setp\.gt\.s64', 'setp.le.s64')),
        ('chain', replaced(r'@(%p\d+ bra)', r'@!\1')),
    ),
)
def test_wrong_operands_and_predicates_give_wrong_results(kernel: str, edit: Edit) -> None:
    assert not is_right(kernel, edit)


def test_a_write_beyond_a_tensor_is_found() -> None:
    with pytest.raises(FaultFound, match=r'outside of the tensors.*st\.global\.f32'):
        run('chain', replaced(r'(st\.global\.f32\s+\[%rd\d+)\]', r'\1+1536]'))


def test_blocks_that_wait_for_ever_are_reported() -> None:
    """Tickets go by the order in which blocks start. Without them, a block may wait for one that cannot start."""
    by_index = replaced(r'atom\.global\.add\.u64\s+(%rd\d+), \[[^]]*\], 1;', r'cvt.u64.u32 \1, %ctaid.x;')
    assert run('chain', by_index, residents=BLOCKS)
    found = 0
    for seed in range(6):
        try:
            assert run('chain', by_index, seed=seed, residents=1)
        except FaultFound as fault:
            assert re.match(r'deadlock, with [1-3] blocks that have not started: .*ld\.acquire|.*nanosleep', str(fault))
            found += 1
    assert found >= 3
