"""Read PTX as nvcc writes it, as far as the kernels use it: whatever is not known is an error that names it."""

import ctypes
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

KINDS = ('arithmetic', 'load', 'store', 'atomic', 'branch', 'return', 'barrier', 'warp barrier', 'shuffle', 'sleep')
SPACES = ('param', 'shared', 'global')
WEAK, RELAXED, SYNCHRONIZING = range(3)
SPECIALS = ('%tid.x', '%ntid.x', '%ctaid.x', '%nctaid.x', '%laneid')
MAX_OPERANDS = 6

_ENTRY = re.compile(r'(?:\.visible |\.weak )?\.entry (\w+)\(')
_INSTRUCTION = re.compile(r'\{?\s*(?:@(!?)(%p\d+)\s+)?([a-z][\w.]*)\s*([^;]*);\s*\}?$')
_OPERAND = re.compile(r'\[([^\]]*)\]|\{([^}]*)\}|([^,\s]+)')
_TYPE = re.compile(r'[usbf](8|16|32|64)$')


class Instruction(ctypes.Structure):
    """``ptx::Instruction``."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ('kind', 'function', 'guard', 'negated', 'target', 'joins')),
        *((name, ctypes.c_int32) for name in ('space', 'bytes', 'is_signed', 'count', 'order', 'address')),
        ('offset', ctypes.c_int64),
        ('operands', ctypes.c_int32 * MAX_OPERANDS),
    ]


@dataclass
class Kernel:
    """One entry function."""

    symbol: str
    code: list[Instruction] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)  # of the PTX, for each instruction
    texts: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)  # file and line that it came from
    constants: dict[int, int] = field(default_factory=dict)  # by slot
    slots: dict[str, int] = field(default_factory=dict)

    def describe(self, index: int) -> str:
        """An instruction as people look for it."""
        return f'`{self.texts[index]}` (PTX line {self.lines[index]}, {self.sources[index]})'


class File:
    """The kernels of a file, each of which is read when it is asked for.

    Args:
        text: The PTX.
        functions: Numbers of the arithmetic instructions by name.
        symbols: Addresses of the arguments, ``param``, and of the dynamic shared memory, ``shared``.
    """

    def __init__(self, text: str, functions: Mapping[str, int], symbols: Mapping[str, int]) -> None:
        self._lines = text.splitlines()
        self._functions, self._symbols = functions, symbols
        self._sources = dict(re.findall(r'^\s*\.file\s+(\d+) "([^"]*)"', text, re.M))
        self._shared = re.findall(r'\.extern \.shared [^;]*?(\w+)\[\];', text)
        self._entries = {
            match.group(1): number for number, line in enumerate(self._lines) if (match := _ENTRY.match(line))
        }

    @property
    def kernels(self) -> list[str]:
        """The symbols of its kernels."""
        return list(self._entries)

    def kernel(self, symbol: str) -> Kernel:
        """Read one kernel.

        Raises:
            ValueError: For what is not known, with its line.
        """
        names = dict.fromkeys(self._shared, self._symbols['shared'])
        number = self._entries[symbol] + 1
        while self._lines[number].strip() != '{':
            for name in re.findall(r'(\w+_param_\d+)\[', self._lines[number]):
                if not name.endswith('_param_0'):
                    raise ValueError(f'line {number + 1}: a kernel has one argument, a struct')
                names[name] = self._symbols['param']
            number += 1
        body = self._lines[number + 1 : self._lines.index('}', number)]
        return _Body(symbol, self._functions, names, self._sources).read(body, number + 2)


class _Body:
    def __init__(
        self, symbol: str, functions: Mapping[str, int], names: Mapping[str, int], files: Mapping[str, str]
    ) -> None:
        self.kernel = Kernel(symbol)
        self.functions, self.names, self.files = functions, names, files
        self.labels: dict[str, int] = {}
        self.branches: dict[int, str] = {}

    def read(self, lines: list[str], first: int) -> Kernel:
        source, kernel = '', self.kernel
        for number, raw in enumerate(lines, first):
            line = raw.partition('//')[0].strip()
            if loc := re.match(r'\.loc\s+(\d+) (\d+)', line):
                source = f'{self.files[loc.group(1)].rpartition("/")[2]}:{loc.group(2)}'
            elif label := re.match(r'(\S+):$', line):
                self.labels[label.group(1)] = len(kernel.code)
            elif not line or line.startswith(('.reg', '.pragma')):
                continue
            elif match := _INSTRUCTION.match(line):
                try:
                    instruction = self.instruction(*match.groups())
                except (KeyError, ValueError) as error:
                    raise ValueError(f'line {number} of {kernel.symbol}: {line!r} is not supported: {error}') from error
                kernel.code.append(instruction)
                kernel.lines.append(number)
                kernel.texts.append(re.sub(r'\s+', ' ', line.strip('{} ')))
                kernel.sources.append(source)
            else:
                raise ValueError(f'line {number} of {kernel.symbol} is not understood: {line!r}')
        for index, label in self.branches.items():
            kernel.code[index].target = self.labels[label]
        for index in self.labels.values():
            if index < len(kernel.code):
                kernel.code[index].joins = 1
        return kernel

    def instruction(self, negated: str | None, guard: str | None, name: str, rest: str) -> Instruction:
        made = Instruction(guard=self.slot(guard) if guard else -1, negated=bool(negated))
        parts = name.split('.')
        if parts[0] in ('ld', 'st', 'atom'):
            self.memory(made, parts, rest)
        elif name in ('bra', 'bra.uni'):
            made.kind = KINDS.index('branch')
            self.branches[len(self.kernel.code)] = rest.strip()
        elif name in ('ret', 'exit'):
            made.kind = KINDS.index('return')
        elif name in ('bar.sync', 'barrier.sync.aligned'):
            if rest.strip() != '0':
                raise ValueError('only barrier 0, of the whole block')
            made.kind = KINDS.index('barrier')
        elif name == 'bar.warp.sync':
            made.kind = KINDS.index('warp barrier')
            self.set_operands(made, rest)
        elif name in ('shfl.sync.idx.b32', 'shfl.sync.bfly.b32'):
            made.kind, made.function = KINDS.index('shuffle'), int('bfly' in name)
            self.set_operands(made, re.sub(r'\|%p\d+', '', rest))
        elif name == 'nanosleep.u32':
            made.kind = KINDS.index('sleep')
        else:
            self.arithmetic(made, name, rest)
        return made

    def arithmetic(self, made: Instruction, name: str, rest: str) -> None:
        groups = [group for _, group, _ in _OPERAND.findall(rest) if group]
        if groups:
            if not rest.strip().endswith('}') or len(groups) > 1:
                raise ValueError('a register taken apart')
            name += '.pack'
        if name not in self.functions:
            raise ValueError(f'there is no {name}')
        made.kind, made.function = KINDS.index('arithmetic'), self.functions[name]
        self.set_operands(made, rest)

    def memory(self, made: Instruction, parts: list[str], rest: str) -> None:
        operation, *modifiers = parts
        made.kind = KINDS.index({'ld': 'load', 'st': 'store', 'atom': 'atomic'}[operation])
        made.count, made.order = 1, WEAK
        made.space = -1
        for modifier in modifiers:
            if modifier in SPACES:
                made.space = SPACES.index(modifier)
            elif modifier in ('v2', 'v4'):
                made.count = int(modifier[1])
            elif match := _TYPE.match(modifier):
                made.bytes, made.is_signed = int(match.group(1)) // 8, modifier[0] == 's'
            elif modifier == {'ld': 'acquire', 'st': 'release'}.get(operation):
                made.order = SYNCHRONIZING
            elif modifier == 'relaxed':
                made.order = RELAXED
            # Of a whole GPU, which is what runs; hints to caches change no result.
            elif modifier not in ('gpu', 'cg', 'cs', 'weak', *(('add',) if operation == 'atom' else ())):
                raise ValueError(f'there is no .{modifier}')
        if made.space < 0 or (operation == 'atom' and (modifiers[-1][0] != 'u' or 'add' not in modifiers)):
            raise ValueError('of no space, or no addition')
        address = re.search(r'\[([^\]+]+)(?:\+(-?\d+))?\]', rest)
        if not address:
            raise ValueError('there is no address')
        made.address, made.offset = self.slot(address.group(1).strip()), int(address.group(2) or 0)
        self.set_operands(made, rest.replace(address.group(0), ''))

    def set_operands(self, made: Instruction, rest: str) -> None:
        names = [name for name in re.split(r'[,\s{}]+', rest) if name]
        if len(names) > MAX_OPERANDS:
            raise ValueError('too many operands')
        made.operands[:] = [self.slot(name) for name in names] + [-1] * (MAX_OPERANDS - len(names))

    def slot(self, name: str) -> int:
        """The register's, or that of the register which holds the constant."""
        slots = self.kernel.slots
        if name not in slots:
            value = self.constant(name)
            slots[name] = len(slots)
            if value is not None:
                self.kernel.constants[slots[name]] = value & (2**64 - 1)
        return slots[name]

    def constant(self, name: str) -> int | None:
        if name.startswith('%'):
            if not re.match(r'%[a-z]+\d+$', name) and name not in SPECIALS:
                raise ValueError(f'there is no {name}')
            return None
        if name in self.names:
            return self.names[name]
        if re.match(r'0[fF][0-9a-fA-F]{8}$', name):
            return int(name[2:], 16)
        if re.match(r'-?(0[xX][0-9a-fA-F]+|\d+)U?$', name):
            return int(name.rstrip('U'), 0)
        raise ValueError(f'what {name} is')
