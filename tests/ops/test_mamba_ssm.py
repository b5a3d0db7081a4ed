"""The drop-in for mamba-ssm: its modules' functions against plain loops, and what imports find."""

import importlib
import sys
from importlib.util import find_spec

import pytest
import torch
from torch.nn import functional as F

import cuda_ops
from tests.ops import oracle
from tests.ops.helpers import DTYPES, check_against_loop, dtype_name

BATCH, CHANNELS, STATES, LENGTH = 2, 4, 3, 13


@pytest.fixture(scope='module', autouse=True)
def drop_in():
    """Served within this module alone."""
    package = importlib.import_module('cuda_ops.mamba_ssm')
    package.install()
    yield package
    package.uninstall()
    assert find_spec('selective_scan_cuda') is None


@pytest.fixture
def interface():
    return importlib.import_module('mamba_ssm.ops.selective_scan_interface')


def inputs(B='variable', C='variable', channels=CHANNELS) -> dict[str, torch.Tensor]:
    """A scan's tensors in float64, B and C constant, variable or of two groups."""
    shapes = dict(constant=(channels, STATES), variable=(BATCH, STATES, LENGTH), grouped=(BATCH, 2, STATES, LENGTH))
    torch.manual_seed(0)
    double = dict(dtype=torch.float64)
    return dict(
        u=torch.randn(BATCH, channels, LENGTH, **double),
        delta=torch.randn(BATCH, channels, LENGTH, **double),
        A=-torch.rand(channels, STATES, **double),
        B=torch.randn(shapes[B], **double),
        C=torch.randn(shapes[C], **double),
        D=torch.randn(channels, **double),
        z=torch.randn(BATCH, channels, LENGTH, **double),
        delta_bias=torch.randn(channels, **double),
    )


@pytest.mark.parametrize('dtype', DTYPES, ids=dtype_name)
@pytest.mark.parametrize('name', ['selective_scan_fn', 'selective_scan_ref'])
@pytest.mark.parametrize(
    'B, C', [('variable', 'variable'), ('grouped', 'grouped'), ('constant', 'variable'), ('variable', 'constant')]
)
def test_selective_scan(B, C, name, dtype, interface) -> None:
    # What is constant is a parameter, and stays in float32.
    constant = {key for key, kind in (('B', B), ('C', C)) if kind == 'constant'}
    check_against_loop(
        getattr(interface, name),
        oracle.selective_scan,
        inputs(B, C),
        dict(delta_softplus=True, return_last_state=True),
        {'A', 'D', 'delta_bias'} | constant,
        dtype,
    )


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=dtype_name)
def test_the_gate_is_applied_before_rounding(dtype, interface) -> None:
    maps = {name: value.to(dtype) for name, value in inputs().items() if name in ('u', 'delta', 'B', 'C', 'z')}
    A, D = inputs()['A'].float(), inputs()['D'].float()
    wide = {name: value.float() for name, value in maps.items()}
    expected = cuda_ops.selective_scan(A=A, D=D, **wide).to(dtype)
    torch.testing.assert_close(interface.selective_scan_fn(A=A, D=D, **maps), expected, rtol=0, atol=0)
    # Rounding before it gives others.
    assert not torch.equal(cuda_ops.selective_scan(A=A, D=D, **maps), expected)


def test_autocast_changes_no_dtype(interface) -> None:
    tensors = {name: value.float() for name, value in inputs().items()}
    with torch.autocast('cpu', torch.bfloat16):
        found = interface.selective_scan_fn(**tensors)
    torch.testing.assert_close(found, interface.selective_scan_fn(**tensors), rtol=0, atol=0)
    assert found.is_contiguous()


class Compiled(torch.autograd.Function):
    """An autograd function around one of the compiled modules, as the programs that call them have it."""

    @staticmethod
    def forward(ctx, name, options, u, delta, A, B, C, D, z, delta_bias):
        ctx.name, ctx.options = name, options
        module = importlib.import_module(name)
        if name == 'selective_scan_cuda':
            out, x, *gated = module.fwd(u, delta, A, B, C, D, z, delta_bias, True)
            assert len(gated) == (z is not None)
        else:
            out, x = module.fwd(u, delta, A, B, C, D, delta_bias, True, 1, *options)
            gated = []
        assert x.shape == (*u.shape[:2], 1, 2 * A.shape[1]) and x.dtype == torch.float32
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, x, out)
        return (gated or [out])[0], x[:, :, -1, 1::2]

    @staticmethod
    def backward(ctx, grad, _):
        u, delta, A, B, C, D, z, delta_bias, x, out = ctx.saved_tensors
        module = importlib.import_module(ctx.name)
        if ctx.name != 'selective_scan_cuda':
            *grads, grad_bias = module.bwd(u, delta, A, B, C, D, delta_bias, grad, x, True, 1)
            return None, None, *grads, None, grad_bias
        dz = torch.full_like(u, float('nan')) if z is not None else None
        found = module.bwd(u, delta, A, B, C, D, z, delta_bias, grad, x, out, dz, True, z is not None)
        *grads, grad_bias = found[:7]
        if z is not None:
            assert found[7] is dz and len(found) == 9
            torch.testing.assert_close(found[8], module.fwd(u, delta, A, B, C, D, z, delta_bias, True)[2])
        return None, None, *grads, dz, grad_bias


MODULES = [
    ('selective_scan_cuda', (), True),
    ('selective_scan_cuda', (), False),
    ('selective_scan_cuda_core', (), False),
    ('selective_scan_cuda_oflex', (False,), False),
    ('selective_scan_cuda_oflex', (True,), False),
]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=dtype_name)
@pytest.mark.parametrize('name, options, gated', MODULES, ids=lambda value: str(value))
def test_compiled_modules(name, options, gated, dtype) -> None:
    tensors = inputs('grouped', 'grouped')
    z = tensors.pop('z')

    def function(u, delta, A, B, C, D, delta_bias, z=None):
        # The kernels have no gradient of the last state.
        return Compiled.apply(name, options, u, delta, A, B, C, D, z, delta_bias)[0]

    def loop(**tensors):
        return oracle.selective_scan(delta_softplus=True, **tensors)

    given = {**tensors, **({'z': z} if gated else {})}
    check_against_loop(function, loop, given, {}, {'A', 'D', 'delta_bias'}, dtype)
    maps = {key: value.to(dtype) for key, value in tensors.items() if key not in ('A', 'D', 'delta_bias')}
    parameters = {key: value.float() for key, value in tensors.items() if key not in maps}
    expected = torch.float32 if options == (True,) else dtype
    assert function(**maps, **parameters).dtype == expected
    last = Compiled.apply(name, options, *({**maps, **parameters, 'z': None}[key] for key in (
        'u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias')))[1]  # fmt: skip
    exact = {key: value.double() for key, value in {**maps, **parameters}.items()}
    torch.testing.assert_close(
        last.double(),
        oracle.selective_scan(delta_softplus=True, return_last_state=True, **exact)[1],
        rtol=1e-4,
        atol=1e-5,
    )


def test_channels_that_share_their_delta() -> None:
    """VMamba's kernels take fewer channels of delta: each serves successive ones."""
    module = importlib.import_module('selective_scan_cuda_oflex')
    tensors = {name: value.float() for name, value in inputs('grouped', 'grouped').items()}
    del tensors['z']
    tensors['delta'], tensors['delta_bias'] = tensors['delta'][:, :2], tensors['delta_bias'][:2]
    leaves = {name: value.requires_grad_() for name, value in tensors.items()}
    wide = {**leaves, **{key: leaves[key].repeat_interleave(2, dim=-(leaves[key].dim() // 2) - 1) for key in (
        'delta', 'delta_bias')}}  # fmt: skip
    expected = oracle.selective_scan(delta_softplus=True, **wide)
    grad = torch.randn_like(expected)
    order = [leaves[key].detach() for key in ('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias')]
    out, x = module.fwd(*order, True, 1, True)
    torch.testing.assert_close(out, expected.detach())
    grads = torch.autograd.grad(
        expected, [leaves[key] for key in ('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias')], grad
    )
    torch.testing.assert_close(module.bwd(*order, grad, x, True, 1), list(grads), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match='3 channels, which do not divide the 4'):
        module.fwd(order[0], torch.zeros(BATCH, 3, LENGTH), *order[2:], True, 1, True)


def inner_loop(xz, conv, conv_bias, x_proj, dt_proj, out_proj, out_bias, A, D, delta_bias, B=None, C=None, norms=None):
    """Mamba's mixer from its equations."""
    x, z = xz[:, : xz.shape[1] // 2], xz[:, xz.shape[1] // 2 :]
    width = conv.shape[2]
    padded = torch.cat([x.new_zeros(*x.shape[:2], width - 1), x], dim=2)
    x = sum(conv[:, 0, k, None] * padded[..., k : k + x.shape[2]] for k in range(width)) + conv_bias[:, None]
    x = x * torch.sigmoid(x)
    projected = torch.einsum('rd,bdl->brl', x_proj, x)
    rank, states = dt_proj.shape[1], A.shape[1]
    delta = torch.einsum('dr,brl->bdl', dt_proj, projected[:, :rank])
    variable = [projected[:, rank : rank + states], projected[:, -states:]]
    if norms is not None:
        weights = norms
        normed = [
            value / (value.square().mean(1, keepdim=True) + 1e-6).sqrt() * weight[:, None]
            for value, weight in zip([*variable, delta], weights, strict=True)
        ]
        variable, delta = normed[:2], normed[2]
    B, C = (value if value is not None else other for value, other in zip((B, C), variable, strict=True))
    y = oracle.selective_scan(x, delta, A, B, C, D, z, delta_bias, True)
    return torch.einsum('fd,bdl->blf', out_proj, y) + out_bias


@pytest.mark.parametrize('case', ['variable', 'constant', 'normed'])
@pytest.mark.parametrize('name', ['mamba_inner_fn', 'mamba_inner_ref'])
def test_mamba_inner(name, case, interface) -> None:
    if name == 'mamba_inner_ref' and case == 'normed':
        pytest.skip('mamba_inner_ref takes no norms')
    torch.manual_seed(0)
    rank, outputs = 2, 5
    columns = rank + (0 if case == 'constant' else 2 * STATES)
    shapes = dict(
        xz=(BATCH, 2 * CHANNELS, LENGTH), conv=(CHANNELS, 1, 4), conv_bias=(CHANNELS,), x_proj=(columns, CHANNELS),
        dt_proj=(CHANNELS, rank), out_proj=(outputs, CHANNELS), out_bias=(outputs,), A=(CHANNELS, STATES),
        D=(CHANNELS,), delta_bias=(CHANNELS,),
    )  # fmt: skip
    if case == 'constant':
        shapes |= dict(B=(CHANNELS, STATES), C=(CHANNELS, STATES))
    if case == 'normed':
        shapes |= dict(b_rms_weight=(STATES,), c_rms_weight=(STATES,), dt_rms_weight=(CHANNELS,))
    leaves = {key: torch.randn(shape, dtype=torch.float64) for key, shape in shapes.items()}
    leaves['A'] = -leaves['A'].abs()
    leaves = {key: value.requires_grad_() for key, value in leaves.items()}
    names = ('xz', 'conv', 'conv_bias', 'x_proj', 'dt_proj', 'out_proj', 'out_bias', 'A')
    keywords = {key: value for key, value in leaves.items() if key not in names}
    found = getattr(interface, name)(*(leaves[key] for key in names), **keywords)
    norms = [leaves[key] for key in leaves if key.endswith('rms_weight')] or None
    plain = {key: value for key, value in keywords.items() if not key.endswith('rms_weight')}
    expected = inner_loop(*(leaves[key] for key in names), **plain, norms=norms)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, list(leaves.values()), grad),
        torch.autograd.grad(expected, list(leaves.values()), grad),
    )


def test_mamba_inner_under_autocast(interface) -> None:
    torch.manual_seed(0)
    arguments = [
        torch.randn(shape) / 3
        for shape in ((1, 8, 6), (4, 1, 4), (4,), (2 + 2 * STATES, 4), (4, 2), (5, 4), (5,), (4, STATES))
    ]
    arguments[-1] = -arguments[-1].abs()
    expected = interface.mamba_inner_fn(*arguments)
    with torch.autocast('cpu', torch.bfloat16):
        found = interface.mamba_inner_fn(*arguments)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
    with pytest.raises(ValueError, match='checkpoint_lvl must be 0 or 1, got 2'):
        interface.mamba_inner_fn(*arguments, checkpoint_lvl=2)


def convolution(x, weight, bias=None, before=None, numbers=None):
    """The causal convolution by loops over positions and taps."""
    batch, channels, length = x.shape
    width = weight.shape[1]
    y = torch.zeros(batch, channels, length, dtype=x.dtype)
    for b in range(batch):
        for position in range(length):
            value = torch.zeros(channels, dtype=x.dtype) if bias is None else bias.clone()
            number = None if numbers is None else numbers[b][position]
            for tap in range(width):
                source = position - width + 1 + tap
                if source >= 0:
                    same, found = numbers is None or numbers[b][source] == number, x[b, :, source]
                else:
                    same = before is not None and (numbers is None or numbers[b][0] == number)
                    found = before[b, :, source] if before is not None else torch.zeros(channels, dtype=x.dtype)
                value = value + (weight[:, tap] * found if same else 0)
            y[b, :, position] = 0 if number is not None and number < 0 else value
    return y


@pytest.mark.parametrize('length', [1, 2, 7])
@pytest.mark.parametrize('with_before', [False, True])
@pytest.mark.parametrize('numbers', [None, [[0, 0, 1, 1, 1, -1, 2], [-1, 0, 0, 0, 3, 3, 3]]])
def test_causal_convolution(length, with_before, numbers) -> None:
    from causal_conv1d import causal_conv1d_fn

    torch.manual_seed(0)
    double = dict(dtype=torch.float64, requires_grad=True)
    leaves = [torch.randn(shape, **double) for shape in ((2, 3, length), (3, 4), (3,), (2, 3, 3))]
    x, weight, bias, before = leaves if with_before else (*leaves[:3], None)
    leaves = leaves[: 3 + with_before]
    seq_idx = None if numbers is None else torch.tensor(numbers)[:, :length]
    expected = convolution(x, weight, bias, before, None if seq_idx is None else seq_idx.tolist())
    found = causal_conv1d_fn(x, weight, bias, seq_idx, before)
    torch.testing.assert_close(found, expected)
    silu = causal_conv1d_fn(x, weight, bias, seq_idx, before, activation='silu')
    torch.testing.assert_close(silu, F.silu(expected))
    grad = torch.randn_like(found)
    pairs = zip(*(torch.autograd.grad(y, leaves, grad, allow_unused=True) for y in (found, expected)), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)
    if numbers is None:
        y, final = causal_conv1d_fn(x, weight, bias, None, before, return_final_states=True)
        # Continued from the final state, it is as if it had not stopped.
        more = torch.randn(2, 3, 5, dtype=torch.float64)
        whole = causal_conv1d_fn(torch.cat([x, more], dim=2), weight, bias, None, before)
        torch.testing.assert_close(torch.cat([y, causal_conv1d_fn(more, weight, bias, None, final)], dim=2), whole)


@pytest.mark.parametrize('positions', [3, 4, 6])
def test_updates_continue_a_convolution(positions) -> None:
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update

    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(3, 4), torch.randn(3)
    state = torch.zeros(2, 3, positions)
    steps = [causal_conv1d_update(x[..., k], state, weight, bias, 'silu').unsqueeze(2) for k in range(3)]
    steps.append(causal_conv1d_update(x[..., 3:], state, weight, bias, 'silu'))
    torch.testing.assert_close(torch.cat(steps, dim=2), causal_conv1d_fn(x, weight, bias, activation='silu'))
    torch.testing.assert_close(state, x[..., -positions:])


def test_convolution_in_half_precision_rounds_once() -> None:
    from causal_conv1d import causal_conv1d_fn

    x, weight = torch.randn(2, 3, 9).bfloat16(), torch.randn(3, 4)
    with torch.autocast('cpu', torch.bfloat16):
        found = causal_conv1d_fn(x, weight, activation='swish')
    expected = F.silu(convolution(x.double(), weight.double()))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected.bfloat16(), rtol=2**-8, atol=1e-6)


def test_what_is_not_served_is_said(interface) -> None:
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update

    tensors = {name: value.float() for name, value in inputs().items()}
    with pytest.raises(NotImplementedError, match='A is torch.complex64'):
        interface.selective_scan_fn(**{**tensors, 'A': tensors['A'] + 0j})
    with pytest.raises(TypeError, match='delta must have the dtype of u'):
        interface.selective_scan_fn(**{**tensors, 'delta': tensors['delta'].half()})
    with pytest.raises(ModuleNotFoundError, match='mamba_ssm.modules is not served .*MAMBA_SKIP_CUDA_BUILD'):
        importlib.import_module('mamba_ssm.modules.mamba_simple')
    with pytest.raises(ModuleNotFoundError, match='causal_conv1d_cuda is not served .* causal_conv1d_fn'):
        importlib.import_module('causal_conv1d_cuda')
    with pytest.raises(ImportError, match='mamba_ssm.Mamba is not served'):
        from mamba_ssm import Mamba  # noqa: F401
    with pytest.raises(ImportError, match='bimamba_inner_fn is not served'):
        from mamba_ssm.ops.selective_scan_interface import bimamba_inner_fn  # noqa: F401
    assert not hasattr(interface, 'something')
    x, weight = torch.randn(1, 3, 5), torch.randn(3, 4)
    for arguments, kind, message in (
        (dict(activation='gelu'), NotImplementedError, "activation must be None, 'silu' or 'swish', got 'gelu'"),
        (dict(bias=torch.zeros(2)), ValueError, r'bias must have shape \(3,\)'),
        (dict(initial_states=torch.zeros(1, 3, 4)), ValueError, 'initial_states must have shape'),
        (dict(seq_idx=torch.zeros(1, 4)), ValueError, 'seq_idx must have shape'),
        (dict(seq_idx=torch.zeros(1, 5), return_final_states=True), ValueError, 'return_final_states must be False'),
    ):
        with pytest.raises(kind, match=message):
            causal_conv1d_fn(x, weight, **arguments)
    with pytest.raises(NotImplementedError, match='cache_seqlens must be None'):
        causal_conv1d_update(x, torch.zeros(1, 3, 4), weight, cache_seqlens=torch.zeros(1))
    with pytest.raises(ValueError, match='positions at least 3'):
        causal_conv1d_update(x, torch.zeros(1, 3, 2), weight)


def test_what_was_imported_before_is_refused(drop_in, monkeypatch) -> None:
    drop_in.uninstall()
    try:
        monkeypatch.setitem(sys.modules, 'selective_scan_cuda', type(sys)('selective_scan_cuda'))
        with pytest.raises(ImportError, match='selective_scan_cuda was imported before cuda_ops.mamba_ssm'):
            drop_in.install()
        monkeypatch.delitem(sys.modules, 'selective_scan_cuda')
    finally:
        drop_in.install()


def test_an_installed_package_keeps_its_other_modules(drop_in, tmp_path, monkeypatch) -> None:
    modules = tmp_path / 'mamba_ssm' / 'modules'
    modules.mkdir(parents=True)
    # Its top imports compiled code.
    (tmp_path / 'mamba_ssm' / '__init__.py').write_text('raise ImportError')
    (modules / '__init__.py').write_text('')
    (modules / 'mamba_simple.py').write_text(
        'from mamba_ssm.ops.selective_scan_interface import selective_scan_fn\nclass Mamba: scan = selective_scan_fn\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    drop_in.uninstall()
    drop_in.install()
    try:
        from mamba_ssm import Mamba

        assert Mamba.scan.__module__ == 'cuda_ops.mamba_ssm._interface'
    finally:
        for name in [name for name in sys.modules if name.startswith('mamba_ssm')]:
            del sys.modules[name]


def test_scripts_and_modules_run_with_it(tmp_path, monkeypatch, capsys) -> None:
    from cuda_ops.mamba_ssm.__main__ import main

    script = tmp_path / 'script_of_mamba.py'
    script.write_text(
        'import sys\nfrom selective_scan_cuda import fwd\nfrom value_of_mamba import VALUE\n'
        'print(sys.argv[1:], VALUE)\nassert __name__ == "__main__"\n'
    )
    (tmp_path / 'value_of_mamba.py').write_text('VALUE = 3')
    monkeypatch.setattr(sys, 'argv', list(sys.argv))
    monkeypatch.setattr(sys, 'path', list(sys.path))
    assert main([str(script), '--option']) == main(['-m', 'script_of_mamba', '--option']) == 0
    assert capsys.readouterr().out == "['--option'] 3\n" * 2
    assert main(['nowhere.py']) == main(['-m']) == main([]) == 2
    assert 'nowhere.py does not exist' in capsys.readouterr().err
