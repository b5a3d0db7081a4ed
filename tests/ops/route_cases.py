"""Inputs of the route scans: awkward sizes, every form of every argument."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import cuda_ops
from cuda_ops import route_scan
from tests.ops import oracle
from tests.ops.helpers import check_against_loop

PARAMETERS = {'A', 'D', 'delta_bias', 'delta_weight'}


def decay_rates(*shape: int) -> Tensor:
    """Negative, from slow to quick."""
    return -torch.exp(torch.empty(shape, dtype=torch.float64).uniform_(-4, 1))


def normal(*shape: int) -> Tensor:
    """Standard normal values in float64."""
    return torch.randn(shape, dtype=torch.float64)


def steps(*shape: int, softplus: bool) -> Tensor:
    """Step sizes; those that meet no softplus are not negative often enough for the recurrence to diverge."""
    return normal(*shape) - 1 if softplus else torch.rand(shape, dtype=torch.float64) * 0.7 - 0.05


@dataclass(frozen=True)
class Sequence:
    """A case of ``selective_scan``. B and C: 0 for a constant, else the number of groups; -1 for no dim of groups."""

    batch: int
    channels: int
    length: int
    states: int
    B: int = -1
    C: int = -1
    D: bool = True
    z: bool = False
    bias: bool = True
    softplus: bool = True

    function: Callable[..., Any] = cuda_ops.selective_scan
    loop: Callable[..., Any] = oracle.selective_scan

    def __str__(self) -> str:
        extras = ''.join(name[0] for name in ('D', 'z', 'bias', 'softplus') if getattr(self, name))
        return f'{self.batch}x{self.channels}x{self.length}-N{self.states}-B{self.B}-C{self.C}-{extras}'

    def parameters(self) -> set[str]:
        return PARAMETERS | {name for name in 'BC' if getattr(self, name) == 0}

    def inputs(self) -> dict[str, Tensor | None]:
        def projection(groups: int) -> Tensor:
            if groups == 0:
                return normal(self.channels, self.states)
            shape = (groups,) if groups > 0 else ()
            return normal(self.batch, *shape, self.states, self.length)

        sequence = (self.batch, self.channels, self.length)
        return {
            'u': normal(*sequence),
            'delta': steps(*sequence, softplus=self.softplus),
            'A': decay_rates(self.channels, self.states),
            'B': projection(self.B),
            'C': projection(self.C),
            'D': normal(self.channels) if self.D else None,
            'z': normal(*sequence) if self.z else None,
            'delta_bias': normal(self.channels) / 10 if self.bias else None,
        }

    def options(self) -> dict[str, Any]:
        return {'delta_softplus': self.softplus, 'return_last_state': True}


@dataclass(frozen=True)
class Cross:
    """A case of ``cross_selective_scan``."""

    batch: int
    height: int
    width: int
    channels: int
    states: int
    D: bool = True
    bias: bool = True
    softplus: bool = True

    function: Callable[..., Any] = cuda_ops.cross_selective_scan
    loop: Callable[..., Any] = oracle.cross_selective_scan

    def __str__(self) -> str:
        extras = ''.join(name[0] for name in ('D', 'bias', 'softplus') if getattr(self, name))
        return f'{self.batch}x{self.height}x{self.width}x{self.channels}-N{self.states}-{extras}'

    def parameters(self) -> set[str]:
        return PARAMETERS

    def inputs(self) -> dict[str, Tensor | None]:
        grid = (self.batch, self.height, self.width)
        return {
            'x': normal(*grid, self.channels),
            'delta': steps(*grid, 4, self.channels, softplus=self.softplus),
            'A': decay_rates(4, self.channels, self.states),
            'B': normal(*grid, 4, self.states),
            'C': normal(*grid, 4, self.states),
            'D': normal(4, self.channels) if self.D else None,
            'delta_bias': normal(4, self.channels) / 10 if self.bias else None,
        }

    def options(self) -> dict[str, Any]:
        return {'delta_softplus': self.softplus}


def factor_weight(rows: tuple[int, ...], case: 'Factors | LineFactors') -> Tensor:
    """Weights (*rows, R) that make step sizes of a case's factors."""
    if case.softplus:
        return normal(*rows, case.rank) / case.rank**0.5
    # Means of the factors, more or less: not negative either.
    return (1 + torch.rand(*rows, case.rank, dtype=torch.float64)) / case.rank


@dataclass(frozen=True)
class Factors(Cross):
    """A case of ``cross_selective_scan`` whose step sizes come as factors."""

    rank: int = 6

    def __str__(self) -> str:
        return f'{super().__str__()}-R{self.rank}'

    def inputs(self) -> dict[str, Tensor | None]:
        delta = steps(self.batch, self.height, self.width, 4, self.rank, softplus=self.softplus)
        return super().inputs() | {'delta': delta, 'delta_weight': factor_weight((4, self.channels), self)}


def scan_of_low_rank_dt(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    delta_weight: Tensor | None = None,
) -> Tensor:
    """The operator with ``delta_weight``, as ``cross_selective_scan`` calls it where that gains."""
    return torch.ops.cuda_ops.route_scan(
        x,
        delta,
        A,
        B.unsqueeze(4),
        C.unsqueeze(4),
        D,
        delta_bias,
        route_scan.CROSS_ROUTES,
        False,
        delta_softplus,
        0,
        delta_weight,
    )[0]


@dataclass(frozen=True)
class OperatorFactors(Factors):
    """The same for the operator itself, which projects on every device and for every rank."""

    function: Callable[..., Any] = scan_of_low_rank_dt


@dataclass(frozen=True)
class Lines:
    """A case of ``line_scan``."""

    batch: int
    height: int
    width: int
    channels: int
    states: int
    axis: str
    reverse: bool = False
    B: bool = True
    C: bool = True
    D: bool = True
    bias: bool = True
    softplus: bool = True
    both_ways: bool = False

    function: Callable[..., Any] = cuda_ops.line_scan
    loop: Callable[..., Any] = oracle.line_scan

    def __str__(self) -> str:
        extras = ''.join(name[0] for name in ('B', 'C', 'D', 'bias', 'softplus') if getattr(self, name))
        route = f'{self.axis}{"-reversed" if self.reverse else "-both-ways" if self.both_ways else ""}'
        return f'{self.batch}x{self.height}x{self.width}x{self.channels}-N{self.states}-{route}-{extras}'

    def parameters(self) -> set[str]:
        return PARAMETERS

    def inputs(self) -> dict[str, Tensor | None]:
        grid = (self.batch, self.height, self.width)
        return {
            'x': normal(*grid, self.channels),
            'delta': steps(*grid, self.channels, softplus=self.softplus),
            'A': decay_rates(self.channels, self.states),
            'B': normal(*grid, self.states) if self.B else None,
            'C': normal(*grid, self.states) if self.C else None,
            'D': normal(self.channels) if self.D else None,
            'delta_bias': normal(self.channels) / 10 if self.bias else None,
        }

    def options(self) -> dict[str, Any]:
        direction = {'both_ways': True} if self.both_ways else {'reverse': self.reverse}
        return {'delta_softplus': self.softplus, 'axis': self.axis, **direction}


@dataclass(frozen=True)
class LineFactors(Lines):
    """A case of ``line_scan`` whose step sizes come as factors."""

    rank: int = 6

    def __str__(self) -> str:
        return f'{super().__str__()}-R{self.rank}'

    def inputs(self) -> dict[str, Tensor | None]:
        delta = steps(self.batch, self.height, self.width, self.rank, softplus=self.softplus)
        return super().inputs() | {'delta': delta, 'delta_weight': factor_weight((self.channels,), self)}


Case = Sequence | Cross | Lines

SEQUENCES = (
    Sequence(1, 1, 1, 1),
    Sequence(3, 3, 2, 2, B=0, bias=False),
    Sequence(1, 15, 63, 3, C=0, z=True, softplus=False),
    Sequence(1, 16, 64, 5, B=4, C=1),
    Sequence(3, 17, 65, 1, D=False, z=True),
    Sequence(1, 63, 64, 16, B=9, C=21),
    Sequence(1, 65, 65, 2, B=13, C=5, D=False, bias=False),
    Sequence(3, 96, 63, 16, B=2, C=2, softplus=False),
    Sequence(1, 100, 65, 1, B=0, C=0),
    Sequence(1, 96, 66, 3, B=0, C=3, D=False),
    Sequence(1, 48, 65, 1, B=3),
    Sequence(1, 64, 129, 4),
    Sequence(1, 16, 500, 16, z=True),
    Sequence(1, 5, 1000, 1, bias=False),
    Sequence(2, 3, 1000, 5, B=3, C=0, softplus=False, bias=False),
    Sequence(0, 16, 64, 2),
    Sequence(0, 4, 3, 3, B=0, C=2, z=True),
)
CROSSES = (
    Cross(1, 1, 1, 1, 1),
    Cross(3, 1, 7, 3, 2, bias=False),
    Cross(1, 7, 1, 15, 3, D=False),
    Cross(3, 2, 3, 16, 1, softplus=False),
    Cross(1, 8, 8, 17, 5),
    Cross(1, 9, 7, 63, 1),
    Cross(1, 5, 13, 65, 2, D=False, bias=False),
    Cross(3, 3, 11, 96, 16),
    Cross(1, 13, 5, 100, 1, softplus=False, bias=False),
    Cross(1, 7, 11, 128, 1),
    Cross(2, 5, 7, 32, 4),
    Cross(1, 25, 20, 16, 1),
    Cross(1, 1, 500, 2, 3),
    Cross(1, 31, 33, 3, 5),
    Cross(1, 40, 25, 3, 1, softplus=False),
    Cross(0, 5, 3, 16, 2),
)
LINES = (
    Lines(1, 1, 1, 1, 1, 'row'),
    Lines(1, 1, 1, 16, 2, 'column', reverse=True, B=False),
    Lines(3, 2, 5, 3, 2, 'row', B=False, bias=False),
    Lines(3, 5, 2, 15, 3, 'column', C=False),
    Lines(1, 7, 65, 16, 1, 'row', reverse=True),
    Lines(1, 65, 7, 17, 1, 'column', reverse=True, softplus=False),
    Lines(1, 3, 64, 63, 5, 'row', C=False, D=False),
    Lines(1, 64, 3, 65, 16, 'column', B=False, D=False),
    Lines(3, 11, 13, 96, 1, 'column', B=False, C=False),
    Lines(1, 13, 11, 100, 3, 'row', reverse=True, B=False, C=False, softplus=False),
    Lines(1, 9, 17, 48, 16, 'column', reverse=True, C=False, bias=False),
    Lines(1, 1, 1000, 2, 5, 'row', reverse=True),
    Lines(1, 500, 2, 3, 2, 'column', D=False),
    Lines(1, 1000, 1, 1, 1, 'row'),
    Lines(0, 3, 5, 16, 2, 'row'),
)
BOTH_WAYS = (
    Lines(1, 1, 1, 1, 1, 'row', both_ways=True),
    Lines(2, 1, 2, 17, 2, 'column', both_ways=True, D=False),
    Lines(3, 2, 5, 3, 2, 'row', both_ways=True, B=False, bias=False),
    Lines(1, 31, 3, 16, 16, 'column', both_ways=True, B=False),
    Lines(2, 3, 32, 48, 5, 'row', both_ways=True, C=False),
    Lines(1, 33, 2, 65, 3, 'column', both_ways=True, softplus=False),
    Lines(1, 2, 64, 100, 1, 'row', both_ways=True, B=False, C=False),
    Lines(1, 65, 7, 15, 4, 'column', both_ways=True, C=False, D=False, bias=False),
    Lines(1, 1, 500, 2, 16, 'row', both_ways=True, C=False),
    Lines(1, 1, 520, 2, 16, 'row', both_ways=True, C=False),  # too long for one pass
    Lines(0, 3, 5, 16, 2, 'row', both_ways=True),
    LineFactors(2, 9, 13, 34, 16, 'column', both_ways=True, B=False, rank=6),
    LineFactors(1, 3, 14, 48, 1, 'row', both_ways=True, C=False, bias=False, rank=12),
    LineFactors(1, 4, 6, 18, 2, 'row', both_ways=True, C=False, rank=33),
    LineFactors(1, 1, 520, 3, 16, 'row', both_ways=True, C=False, rank=3),
)
FACTORS = (
    *(
        kind(*sizes, **options)
        for kind in (Factors, OperatorFactors)
        for *sizes, options in (
            (1, 1, 1, 2, 1, dict(rank=2)),
            (1, 9, 7, 16, 1, dict(rank=1)),
            (2, 13, 9, 34, 1, dict(rank=6, bias=False)),
            (1, 25, 20, 20, 1, dict(rank=16, softplus=False)),
            (1, 7, 6, 18, 1, dict(rank=17, D=False)),
            (1, 5, 6, 15, 1, dict(rank=4)),
            (1, 4, 5, 8, 3, dict(rank=2)),
            (0, 4, 5, 8, 1, dict(rank=2)),
        )
    ),
)
LINE_FACTORS = (
    LineFactors(2, 9, 13, 34, 1, 'column', reverse=True, C=False, rank=6),
    LineFactors(1, 14, 5, 48, 16, 'row', C=False, rank=12),
    LineFactors(1, 5, 14, 17, 16, 'column', B=False, bias=False, rank=12),
    LineFactors(1, 25, 3, 16, 2, 'row', reverse=True, softplus=False, rank=24),
    LineFactors(1, 4, 6, 18, 1, 'column', D=False, rank=33),
)
CASES: tuple[Case, ...] = (*SEQUENCES, *CROSSES, *LINES, *BOTH_WAYS, *FACTORS, *LINE_FACTORS)


def check(case: Case, dtype: torch.dtype, cuda: bool = False) -> None:
    """Hold one case against the float64 loop."""
    check_against_loop(case.function, case.loop, case.inputs(), case.options(), case.parameters(), dtype, cuda)


def case_id(case: Case) -> str:
    """The case's name within a test's."""
    return f'{type(case).__name__.lower()}-{case}'
