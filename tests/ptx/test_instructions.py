"""The interpreter's instructions compute what Python says they should."""

import ctypes
import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.cuda_emulation.emulate import compiler
from tests.ptx.interpret import FaultFound, Program, functions, read_ptx, watched_tensors

pytestmark = pytest.mark.skipif(compiler() is None, reason='the interpreter is compiled by g++, which is not there')

KERNEL = """
.extern .shared .align 16 .b8 memory[];
.entry kernel(
	.param .align 8 .b8 kernel_param_0[16]
)
{{
	.reg .b64 	%rd<99>;
	ld.param.u64 	%rd1, [kernel_param_0];
	ld.param.u64 	%rd2, [kernel_param_0+8];
	mov.u32 	%r1, %tid.x;
	mul.wide.u32 	%rd3, %r1, 32;
	add.s64 	%rd4, %rd1, %rd3;
	mul.wide.u32 	%rd5, %r1, 8;
	add.s64 	%rd6, %rd2, %rd5;
	ld.global.u64 	%rd10, [%rd4];
	ld.global.u64 	%rd11, [%rd4+8];
	ld.global.u64 	%rd12, [%rd4+16];
	ld.global.u64 	%rd13, [%rd4+24];
{code}
	st.global.u64 	[%rd6], %rd20;
	ret;

}}
"""


class Arguments(ctypes.Structure):
    _fields_ = [('source', ctypes.c_uint64), ('target', ctypes.c_uint64)]


def execute(code: str, values: np.ndarray, shared: int = 0) -> np.ndarray:
    """Run code on four 64-bit values of each of 32 threads, %rd10 to %rd13; the threads' %rd20."""
    with watched_tensors():
        source = torch.empty(32 * 4, dtype=torch.int64)
        target = torch.zeros(32, dtype=torch.int64)
    source.numpy().view(np.uint64)[:] = values.reshape(-1)
    program = Program(read_ptx(KERNEL.format(code=code)).kernel('kernel'))
    program.launch(Arguments(source.data_ptr(), target.data_ptr()), 1, 32, shared)
    return target.numpy().view(np.uint64)


def bits(value: Any, form: str) -> int:
    """A value's bits in a register; forms are those of ``struct``."""
    return int.from_bytes(struct.pack(form, value), 'little')


def wrapped(value: int, form: str) -> int:
    """An integer modulo the type's range."""
    width = 8 * struct.calcsize(form)
    value &= 2**width - 1
    return value - 2**width if form in 'hiq' and value >> (width - 1) else value


def single(value: float) -> float:
    """Rounded to float32."""
    with np.errstate(over='ignore'):
        return float(np.float32(value))


def half(value: float) -> float:
    """Rounded to float16."""
    with np.errstate(over='ignore'):
        return float(np.float16(np.float32(value)))


INTEGERS = {
    form: [
        0,
        1,
        2,
        5,
        31,
        63,
        100,
        2 ** (width - 1) - 1,
        *((-1, -7, -(2 ** (width - 1))) if form in 'hiq' else (2**width - 1, 2**width - 6)),
    ]
    for form, width in (('H', 16), ('h', 16), ('I', 32), ('i', 32), ('Q', 64), ('q', 64))
}
FLOATS = [single(x) for x in (0.0, -0.0, 1.0, -1.5, 0.1, 3e38, -1e-39, 7.25, -1000.3, math.inf, -math.inf, math.nan)]
TYPES = {'u16': 'H', 's16': 'h', 'b16': 'H', 'u32': 'I', 's32': 'i', 'b32': 'I', 'u64': 'Q', 's64': 'q', 'b64': 'Q'}
Operation = Callable[..., Any]
SUFFIX = {'f32': 'f', 'pred': '?'} | TYPES


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def integer_cases() -> list[tuple[str, str, str, Operation]]:
    """Name, form of the result, forms of the operands, the operation on integers without bounds."""
    cases: list[tuple[str, str, str, Operation]] = []
    for suffix, form in TYPES.items():
        width, signed = int(suffix[1:]), suffix[0] == 's'
        cases.append((f'mov.{suffix}', form, form, lambda a: a))
        cases.append((f'selp.{suffix}', form, form + form + '?', lambda a, b, p: a if p else b))
        cases.append((f'setp.eq.{suffix}', '?', form * 2, lambda a, b: a == b))
        cases.append((f'setp.ne.{suffix}', '?', form * 2, lambda a, b: a != b))
        if suffix[0] == 'b':
            cases += [
                (f'and.{suffix}', form, form * 2, lambda a, b: a & b),
                (f'or.{suffix}', form, form * 2, lambda a, b: a | b),
                (f'xor.{suffix}', form, form * 2, lambda a, b: a ^ b),
                (f'not.{suffix}', form, form, lambda a: ~a),
                (f'shl.{suffix}', form, form + 'I', lambda a, n, width=width: a << n if n < width else 0),
            ]
            continue
        cases += [
            (f'add.{suffix}', form, form * 2, lambda a, b: a + b),
            (f'sub.{suffix}', form, form * 2, lambda a, b: a - b),
            (f'mul.lo.{suffix}', form, form * 2, lambda a, b: a * b),
            (f'mad.lo.{suffix}', form, form * 3, lambda a, b, c: a * b + c),
            (f'min.{suffix}', form, form * 2, min),
            (f'max.{suffix}', form, form * 2, max),
            (f'div.{suffix}', form, form * 2, lambda a, b: quotient(a, b) if b else None),
            (f'rem.{suffix}', form, form * 2, lambda a, b: a - b * quotient(a, b) if b else None),
            (f'setp.lt.{suffix}', '?', form * 2, lambda a, b: a < b),
            (f'setp.le.{suffix}', '?', form * 2, lambda a, b: a <= b),
            (f'setp.gt.{suffix}', '?', form * 2, lambda a, b: a > b),
            (f'setp.ge.{suffix}', '?', form * 2, lambda a, b: a >= b),
            (f'shr.{suffix}', form, form + 'I', lambda a, n: a >> n),
        ]
        if signed:
            cases += [(f'neg.{suffix}', form, form, lambda a: -a), (f'abs.{suffix}', form, form, abs)]
        if width < 64:
            wide = {'H': 'I', 'h': 'i', 'I': 'Q', 'i': 'q'}[form]
            cases += [
                (f'mul.wide.{suffix}', wide, form * 2, lambda a, b: a * b),
                (f'mad.wide.{suffix}', wide, form * 2 + wide, lambda a, b, c: a * b + c),
                (f'mul.hi.{suffix}', form, form * 2, lambda a, b, width=width: a * b >> width),
            ]
        for other, to in TYPES.items():
            if other != suffix and other[0] != 'b':
                cases.append((f'cvt.{other}.{suffix}', to, form, lambda a: a))
    return cases


def float_cases() -> list[tuple[str, str, str, Operation]]:
    def comparison(holds: Operation, unordered: bool) -> Operation:
        return lambda a, b: unordered if math.isnan(a) or math.isnan(b) else holds(a, b)

    def fma(a: float, b: float, c: float) -> float | None:
        from fractions import Fraction

        if not all(map(math.isfinite, (a, b, c))):
            return single(a * b + c)
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        nearest = np.float32(float(exact))
        if not np.isfinite(nearest) or exact == 0:
            return None
        # The conversion above rounds twice: of the neighbours, take the one that is nearest to the exact sum.
        around = [nearest, np.nextafter(nearest, np.float32(np.inf)), np.nextafter(nearest, np.float32(-np.inf))]
        around = [value for value in around if np.isfinite(value)]
        best = min(abs(Fraction(float(value)) - exact) for value in around)
        ties = [value for value in around if abs(Fraction(float(value)) - exact) == best]
        return float(next(value for value in ties if len(ties) == 1 or value.view(np.uint32) % 2 == 0))

    def smaller(a: float, b: float) -> float | None:
        return b if math.isnan(a) else a if math.isnan(b) else None if a == b else min(a, b)

    ordered: dict[str, Operation] = {
        'eq': lambda a, b: a == b,
        'ne': lambda a, b: a != b,
        'lt': lambda a, b: a < b,
        'le': lambda a, b: a <= b,
        'gt': lambda a, b: a > b,
        'ge': lambda a, b: a >= b,
    }
    cases: list[tuple[str, str, str, Operation]] = [
        ('mov.f32', 'f', 'f', lambda a: a),
        ('selp.f32', 'f', 'ff?', lambda a, b, p: a if p else b),
        ('add.f32', 'f', 'ff', lambda a, b: single(a + b)),
        ('sub.f32', 'f', 'ff', lambda a, b: single(a - b)),
        ('mul.f32', 'f', 'ff', lambda a, b: single(a * b)),
        ('add.rn.f32', 'f', 'ff', lambda a, b: single(a + b)),
        ('sub.rn.f32', 'f', 'ff', lambda a, b: single(a - b)),
        ('mul.rn.f32', 'f', 'ff', lambda a, b: single(a * b)),
        ('fma.rn.f32', 'f', 'fff', fma),
        ('neg.f32', 'f', 'f', lambda a: -a),
        ('abs.f32', 'f', 'f', abs),
        ('min.f32', 'f', 'ff', smaller),
        ('max.f32', 'f', 'ff', lambda a, b: None if smaller(-a, -b) is None else -smaller(-a, -b)),
        ('setp.nan.f32', '?', 'ff', lambda a, b: math.isnan(a) or math.isnan(b)),
        ('setp.num.f32', '?', 'ff', lambda a, b: not math.isnan(a) and not math.isnan(b)),
        ('cvt.f32.f16', 'f', 'e', lambda a: a),
        ('cvt.rn.f16.f32', 'e', 'f', half),
        ('cvt.f32.bf16', 'f', 'H', lambda a: struct.unpack('f', struct.pack('I', a << 16))[0]),
        (
            'cvt.rn.bf16.f32',
            'H',
            'f',
            lambda a: None if math.isnan(a) else torch.tensor(a).bfloat16().view(torch.int16).item() & 0xFFFF,
        ),
    ]
    for name, holds in ordered.items():
        cases.append((f'setp.{name}.f32', '?', 'ff', comparison(holds, False)))
        cases.append((f'setp.{name}u.f32', '?', 'ff', comparison(holds, True)))
    return cases


def predicate_cases() -> list[tuple[str, str, str, Operation]]:
    return [
        ('mov.pred', '?', '?', lambda a: a),
        ('not.pred', '?', '?', lambda a: not a),
        ('and.pred', '?', '??', lambda a, b: a and b),
        ('or.pred', '?', '??', lambda a, b: a or b),
        ('xor.pred', '?', '??', lambda a, b: a != b),
        ('mov.b32.pack', 'I', 'HH', lambda a, b: b << 16 | a),
        ('mov.b64.pack', 'Q', 'II', lambda a, b: b << 32 | a),
        ('cvta.to.global.u64', 'Q', 'Q', lambda a: a),
        ('bfi.b32', 'I', 'IIII', insert),
    ]


def insert(a: int, b: int, position: int, length: int) -> int:
    ones = ((1 << (length & 255)) - 1 << (position & 255)) & 0xFFFFFFFF
    return b & ~ones | (a << (position & 255)) & ones


CASES = [*integer_cases(), *float_cases(), *predicate_cases()]


@pytest.mark.parametrize('start', range(8))
def test_arithmetic(start: int) -> None:
    """Every instruction on edge cases and on values of any size."""
    random = np.random.default_rng(start)
    for name, result, operands, operation in CASES[start::8]:
        rows = [[any_value(random, form) for form in operands] for _ in range(32)]
        values = np.zeros((32, 4), np.uint64)
        for lane, row in enumerate(rows):
            for i, (value, form) in enumerate(zip(row, operands, strict=True)):
                values[lane, i] = bits(value, form)
        registers = [f'%rd{10 + i}' for i in range(len(operands))]
        listed = ', '.join(registers)
        if name.endswith('.pack'):
            name, listed = name.removesuffix('.pack'), f'{{{listed}}}'
        got = execute(f'\t{name} \t%rd20, {listed};', values)
        for lane, row in enumerate(rows):
            expected = operation(*row)
            if expected is None:  # neither the manual nor anyone else says
                continue
            if result in 'HhIiQq':
                expected = wrapped(expected, result)
            size = struct.calcsize(result)
            value = struct.unpack(result, int(got[lane]).to_bytes(8, 'little')[:size])[0]
            same = (
                math.isnan(value)
                if isinstance(expected, float) and math.isnan(expected)
                else bits(value, result) == bits(expected, result)
            )
            assert same, f'{name} of {row}: {value} instead of {expected}'


POOLS: dict[str, list[Any]] = INTEGERS | {
    'f': FLOATS,
    '?': [False, True],
    'e': [float(x) for x in np.array([0, 1, -2.5, 6e-8, -1e-5, 65504, np.inf, np.nan], np.float16)],
}


def any_value(random: np.random.Generator, form: str) -> Any:
    """An edge case, or any bits."""
    if random.random() < 0.7:
        return POOLS[form][random.integers(len(POOLS[form]))]
    raw = random.bytes(struct.calcsize(form))
    return bool(raw[0] & 1) if form == '?' else struct.unpack(form, raw)[0]


def test_every_instruction_is_tested() -> None:
    tested = {name for name, *_ in CASES} | {'ex2.approx.ftz.f32', 'rcp.approx.ftz.f32'}
    narrow = {name for name in functions() if name.startswith('cvt') and name.endswith('8')}
    shifts = {name for name in functions() if name.startswith('shr.b')}
    assert set(functions()) - narrow - shifts == tested


@pytest.mark.parametrize(
    ('name', 'exact', 'bound', 'low', 'high'),
    (('ex2', np.exp2, 2.0**-22, -120, 100), ('rcp', lambda x: 1 / x, 2.0**-23, 1, 2)),
)
def test_special_functions_are_wrong_by_as_much_as_they_may(
    name: str, exact: Operation, bound: float, low: float, high: float
) -> None:
    arguments = np.random.default_rng(0).uniform(low, high, (32, 4)).astype(np.float32)
    got = execute(f'\t{name}.approx.ftz.f32 \t%rd20, %rd10;', arguments.view(np.uint32).astype(np.uint64))
    results = got.astype(np.uint32).view(np.float32).astype(np.float64)
    true = exact(arguments[:, 0].astype(np.float64))
    errors = np.abs(results / true - 1)
    # Rounding of the exact result adds half a unit in the last place.
    assert errors.max() < bound + 2**-23 and errors.max() > bound / 2


def test_special_functions_flush_subnormal_numbers() -> None:
    arguments = np.zeros((32, 4), np.uint64)
    for lane, value in enumerate((-130.0, -126.5, 1e-40, -math.inf, math.inf, 0.0)):
        arguments[lane, 0] = bits(value, 'f')
    results = execute('\tex2.approx.ftz.f32 \t%rd20, %rd10;', arguments).astype(np.uint32).view(np.float32)
    assert results[:2].tolist() == [0, 0] and results[3:5].tolist() == [0, math.inf]
    results = execute('\trcp.approx.ftz.f32 \t%rd20, %rd10;', arguments).astype(np.uint32).view(np.float32)
    assert results[2:6].tolist() == [math.inf, 0, 0, math.inf]


def test_shuffles_predicates_and_branches() -> None:
    values = np.arange(128, dtype=np.uint64).reshape(32, 4)
    lanes = np.arange(32, dtype=np.uint64)
    got = execute('\tshfl.sync.bfly.b32 \t%rd20|%p1, %rd10, 5, 31, -1;', values)
    assert np.array_equal(got, (lanes ^ np.uint64(5)) * np.uint64(4))
    got = execute('\tshfl.sync.idx.b32 \t%rd20|%p1, %rd10, %rd11, 31, -1;', values)
    assert np.array_equal(got, (values[:, 1] & np.uint64(31)) * np.uint64(4))
    # Each lane counts to its number: the lanes of a warp part, and meet again at the shuffle.
    loop = """
	mov.u64 	%rd20, 0;
	bra.uni 	$L__BB0_2;
$L__BB0_1:
	add.s64 	%rd20, %rd20, 1;
$L__BB0_2:
	setp.lt.u64 	%p1, %rd20, %rd10;
	@%p1 bra 	$L__BB0_1;
	@!%p1 add.s64 	%rd20, %rd20, 3;
	@%p1 add.s64 	%rd20, %rd20, 1000;
	shfl.sync.bfly.b32 	%rd20, %rd20, 1, 31, -1;
"""
    assert np.array_equal(execute(loop, values), (lanes ^ np.uint64(1)) * np.uint64(4) + np.uint64(3))


def test_loads_and_stores() -> None:
    values = np.random.default_rng(0).integers(0, 2**64, (32, 4), np.uint64)
    code = """
	mov.u32 	%r2, memory;
	shl.b32 	%r3, %r1, 4;
	add.s32 	%r4, %r2, %r3;
	st.shared.v4.u32 	[%r4], {%rd10, %rd11, %rd12, %rd13};
	bar.warp.sync 	-1;
	xor.b32 	%r5, %r3, 16;
	add.s32 	%r6, %r2, %r5;
	ld.shared.v2.u32 	{%r7, %r8}, [%r6+8];
	mov.b64 	%rd20, {%r7, %r8};
"""
    got = execute(code, values, shared=512)
    neighbours = values[np.arange(32) ^ 1] & np.uint64(0xFFFFFFFF)
    assert np.array_equal(got, neighbours[:, 3] << np.uint64(32) | neighbours[:, 2])
    got = execute('\tld.global.s16 \t%rd20, [%rd4+2];', values)
    assert np.array_equal(got.view(np.int64), values.view(np.int16)[:, 1])
    got = execute('\tld.global.u16 \t%rd20, [%rd4+2];', values)
    assert np.array_equal(got, values.view(np.uint16)[:, 1])


@pytest.mark.parametrize(
    ('code', 'message'),
    (
        ('\tsin.approx.f32 \t%f1, %f2;', 'sin.approx.f32'),
        ('\tld.global.nc.f32 \t%f1, [%rd4];', 'nc'),
        ('\tatom.global.add.f32 \t%f1, [%rd4], %f2;', 'atom.global.add.f32'),
        ('\tred.global.add.u64 \t[%rd4], %rd10;', 'red.global.add.u64'),
        ('\tmov.u32 \t%r9, %clock;', '%clock'),
        ('\tmov.b32 \t{%rs1, %rs2}, %r1;', 'taken apart'),
        ('\tbar.sync \t1, 32;', 'barrier 0'),
        ('\tshfl.sync.up.b32 \t%r9, %r1, 1, 0, -1;', 'shfl.sync.up.b32'),
    ),
)
def test_what_is_not_known_is_an_error_that_names_it(code: str, message: str) -> None:
    with pytest.raises(ValueError, match='is not supported') as caught:
        execute(code, np.zeros((32, 4), np.uint64))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ('code', 'message'),
    (
        ('\tld.global.u64 \t%rd20, [%rd4+1024];', 'outside of the tensors'),
        ('\tld.global.u64 \t%rd20, [%rd4+-8];', 'outside of the tensors'),
        ('\tld.global.u64 \t%rd20, [%rd4+4];', 'multiple of 8'),
        ('\tld.param.u64 \t%rd20, [kernel_param_0+16];', "beyond the kernel's arguments"),
        ('\tst.shared.u32 \t[memory+512], %r1;', "beyond the block's 512 bytes"),
        ('\tld.shared.u32 \t%rd20, [%r1];', "beyond the block's 512 bytes"),
        ('\tst.shared.u16 \t[memory], %r1;', '4 bytes of shared memory'),
        ('\tst.shared.u32 \t[memory], %r1;', 'race in shared memory'),
        ('\tst.global.u32 \t[%rd2], %r1;', 'race in global memory'),
        ('\tsetp.eq.s32 \t%p1, %r1, 3;\n\t@%p1 ret;\n\tbar.warp.sync \t-1;', 'lanes have ended'),
        (
            '\tsetp.eq.s32 \t%p1, %r1, 3;\n\t@%p1 bra \t$L1;\n\tbar.warp.sync \t-1;\n$L1:\n\tbar.sync \t0;',
            'wait for each other',
        ),
        (
            '\tsetp.eq.s32 \t%p1, %r1, 3;\n\t@%p1 bra \t$L1;\n\tbar.sync \t0;\n\tret;\n$L1:\n\tbar.sync \t0;',
            'different barriers',
        ),
    ),
)
def test_faults_are_reported_with_their_instruction(code: str, message: str) -> None:
    with pytest.raises(FaultFound) as caught:
        execute(code, np.zeros((32, 4), np.uint64), shared=512)
    assert message in str(caught.value) and '(PTX line ' in str(caught.value), caught.value
