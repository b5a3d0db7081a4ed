"""Prove by sentryward that a kernel computes what the equations say, in real arithmetic.

The references repeat the kernels' constants: in real arithmetic the float nearest to log2(e) is not log2(e).
"""

import ctypes

from tests.ptx import prove

# Of a scan along one row, without D, bias and softplus. LENGTH and SAVED are put in.
SCAN = """
def reference(x, delta, B, C, A):
    import torch

    state, outputs, saved = torch.zeros_like(A[0]), [], []
    for t in range(LENGTH):
        if t in SAVED:
            saved.append(state.T)
        step = delta[0, 0, t, 0][:, None]
        inflow = step * x[0, 0, t][:, None] * B[0, 0, t, 0, 0]
        state = torch.exp2(step * (A[0] * 1.4426950216293335)) * state + inflow
        outputs.append((state * C[0, 0, t, 0, 0]).sum(-1))
    results = torch.stack(outputs)[None, None], state[None, None]
    return (*results, torch.stack(saved)[None, None, None]) if saved else results
"""

GRADIENTS = """
def reference(x, delta, B, C, A, grad_y, grad_last_state):
    import torch

    rates = A[0] * 1.4426950216293335
    states = [torch.zeros_like(rates)]
    for t in range(LENGTH):
        step = delta[0, 0, t, 0][:, None]
        states.append(torch.exp2(step * rates) * states[-1] + step * x[0, 0, t][:, None] * B[0, 0, t, 0, 0])
    carry, grad_A = grad_last_state[0, 0], torch.zeros_like(rates)
    grad_x, grad_delta, grad_B, grad_C = [], [], [], []
    for t in reversed(range(LENGTH)):
        step, here, grad = delta[0, 0, t, 0], x[0, 0, t], grad_y[0, 0, t]
        grad_state = carry + grad[:, None] * C[0, 0, t, 0, 0]
        carry = grad_state * torch.exp2(step[:, None] * rates)
        through_decay = carry * states[t]
        through_inflow = (grad_state * B[0, 0, t, 0, 0]).sum(-1)
        grad_x.insert(0, through_inflow * step)
        grad_delta.insert(0, (through_decay * rates).sum(-1) * 0.6931471824645996 + through_inflow * here)
        grad_A = grad_A + through_decay * step[:, None]
        grad_B.insert(0, (grad_state * (step * here)[:, None]).sum(0))
        grad_C.insert(0, (states[t + 1] * grad[:, None]).sum(0))
    return (
        torch.stack(grad_x)[None, None],
        torch.stack(grad_delta)[None, None, :, None],
        grad_A[None, None, None],
        torch.stack(grad_B)[None, None, None, :, None, None],
        torch.stack(grad_C)[None, None, None, :, None, None],
    )
"""


class GridTensor(ctypes.Structure):
    """``GridTensor`` of the kernels; strides in elements."""

    _fields_ = [
        ('data', ctypes.c_uint64),
        *((name, ctypes.c_int64) for name in ('batch', 'row', 'column', 'route', 'group')),
    ]


class RouteScanParams(ctypes.Structure):
    """``RouteScanParams`` of the kernels."""

    _fields_ = [
        ('dtype', ctypes.c_int32),
        *(
            (name, ctypes.c_int64)
            for name in ('n_batch', 'height', 'width', 'routes', 'groups', 'channels', 'states', 'chunk')
        ),
        ('route', ctypes.c_int32 * 4),
        ('per_line', ctypes.c_bool),
        ('delta_softplus', ctypes.c_bool),
        *((name, GridTensor) for name in ('x', 'delta', 'B', 'C')),
        *((name, ctypes.c_uint64) for name in ('A', 'D', 'delta_bias', 'dt_weight')),
        ('dt_rank', ctypes.c_int64),
        *((name, ctypes.c_uint64) for name in ('last_state', 'saved_states', 'y')),
        ('grad_y', GridTensor),
        *((name, ctypes.c_uint64) for name in ('grad_last_state', 'grad_x')),
        ('grad_delta', GridTensor),
        *((name, ctypes.c_uint64) for name in ('grad_A', 'grad_D', 'grad_delta_bias', 'grad_B', 'grad_C', 'result')),
    ]

    def address(self, name: str) -> int:
        """Of a tensor's first element."""
        value = getattr(self, name)
        return value.data if isinstance(value, GridTensor) else value


def shapes(params: RouteScanParams) -> dict[str, tuple[int, ...]]:
    """Of the tensors of a scan along a single row, as the kernels' parameters give them."""
    channels, states, length = params.channels, params.states, params.width
    saved = (length - 1) // params.chunk if params.chunk else 0
    projection = (1, 1, length, 1, 1, states)
    return dict(
        x=(1, 1, length, channels),
        delta=(1, 1, length, 1, channels),
        B=projection,
        C=projection,
        A=(1, channels, states),
        grad_y=(1, 1, length, channels),
        result=(1, 1, length, channels),
        last_state=(1, 1, channels, states),
        saved_states=(1, 1, 1, saved, states, channels),
        grad_last_state=(1, 1, channels, states),
        grad_delta=(1, 1, length, 1, channels),
        grad_A=(1, 1, 1, channels, states),
        grad_B=(1, *projection),
        grad_C=(1, *projection),
    )


def prove_scan(launch: prove.Launch, arch: str) -> prove.Verdict:
    """Compare a launch of ``scan_forward`` for one row in float32 with its equations."""
    params = RouteScanParams.from_buffer_copy(launch.argument)
    saved = list(range(params.chunk, params.width, params.chunk)) if params.chunk else []
    outputs = ['result', 'last_state', *['saved_states'] * bool(saved)]
    reference = SCAN.replace('LENGTH', str(params.width)).replace('SAVED', str(saved))
    return _prove(launch, arch, reference, ['x', 'delta', 'B', 'C', 'A'], outputs)


def prove_gradients(launch: prove.Launch, arch: str) -> prove.Verdict:
    """The same for a launch of ``scan_backward``."""
    width = RouteScanParams.from_buffer_copy(launch.argument).width
    inputs = ['x', 'delta', 'B', 'C', 'A', 'grad_y', 'grad_last_state']
    outputs = ['result', 'grad_delta', 'grad_A', 'grad_B', 'grad_C']
    return _prove(launch, arch, GRADIENTS.replace('LENGTH', str(width)), inputs, outputs)


def _prove(launch: prove.Launch, arch: str, reference: str, inputs: list[str], outputs: list[str]) -> prove.Verdict:
    params = RouteScanParams.from_buffer_copy(launch.argument)
    sizes = shapes(params)
    ptx, symbol = prove.kernels(arch)[launch.kernel]
    given = prove.configuration(launch, symbol)
    names = {f'tensor_{params.address(name):x}': name for name in inputs + outputs}
    for declaration in given['declarations']:
        declaration['object'] = names.get(declaration['object'], declaration['object'])
    side = dict(
        allocations={_allocation(name): name for name in inputs},
        parameters={},
        layouts={_allocation(name): _layout(sizes[name]) for name in inputs},
    )
    binding = dict(
        schema='spverify.equivalence-mapping.v1',
        left_inputs=side,
        right_inputs=side,
        output_value_semantics='ideal_real',
        outputs=dict(kind='dense_tensors', tensors=[_output(name, sizes[name]) for name in outputs]),
        reference=dict(arguments=[dict(name=n, allocation=_allocation(n), dtype='float32') for n in inputs]),
    )
    return prove.verify(ptx, given, dict(reference=reference, binding=binding))


def _allocation(name: str) -> str:
    return f'6:global{len(name)}:{name}'


def _strides(shape: tuple[int, ...]) -> list[int]:
    strides = [4]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return strides


def _layout(shape: tuple[int, ...]) -> dict[str, object]:
    return dict(
        source_offset=0,
        target_offset=0,
        element_bytes=4,
        shape=list(shape),
        source_strides_bytes=_strides(shape),
        target_strides_bytes=_strides(shape),
    )


def _output(name: str, shape: tuple[int, ...]) -> dict[str, object]:
    return dict(
        left_allocation=_allocation(name),
        right_allocation=_allocation(name),
        left_offset=0,
        right_offset=0,
        element_bytes=4,
        shape=list(shape),
        left_strides_bytes=_strides(shape),
        right_strides_bytes=_strides(shape),
    )
