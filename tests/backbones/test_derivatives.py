"""Forward mode and the transforms of ``torch.func`` through whole backbones of all families."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import cuda_ops
from ssm_backbones import V2M, Mamba2D, VMamba
from tests.versions import since_torch_2_4

pytestmark = since_torch_2_4

MAKE = {
    'VMamba': lambda **options: VMamba('test', **options),
    'VMamba-v0': lambda **options: VMamba(
        dict(embed_dims=8, depths=[1, 1, 1, 1], d_state=2, ssm_ratio=2.0, version='v0'), **options
    ),
    'V2M': lambda **options: V2M('test', **options),
    'V2M-hier': lambda **options: V2M('test-hier', **options),
    'Mamba2D': lambda **options: Mamba2D('test', **options),
}


@pytest.fixture(params=MAKE)
def backbone(request: pytest.FixtureRequest) -> nn.Module:
    return MAKE[request.param](drop_path_rate=0.0).double().eval()


def image(batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, 32, 40, dtype=torch.float64)


def loss(maps: tuple[Tensor, ...]) -> Tensor:
    # Not the sum of squares, which output norms hold constant.
    return sum((each.sin().mean() for each in maps), torch.zeros((), dtype=torch.float64))


def by_func(call: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    return torch.func.jvp(call, (x,), (v,))[1]


def by_dual_numbers(call: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(x, v))).tangent


def by_differentiating_twice(call: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    return torch.autograd.functional.jvp(call, x, v)[1]


@pytest.mark.parametrize('way', (by_func, by_dual_numbers, by_differentiating_twice), ids=lambda way: way.__name__)
def test_tangents_are_the_numerical_ones(backbone: nn.Module, way: Callable[..., Tensor]) -> None:
    x, v = image(), image()

    def call(x: Tensor) -> Tensor:
        return backbone(x)[-1]

    # PyTorch's fused attention, Mamba2D's, has no forward mode.
    with sdpa_kernel(SDPBackend.MATH):
        tangent = way(call, x, v)
        with torch.no_grad():
            expected = (call(x + 1e-6 * v) - call(x - 1e-6 * v)) / 2e-6
    assert (tangent - expected).norm() < 1e-7 * expected.norm()


@pytest.mark.parametrize('way', (by_func, by_dual_numbers, by_differentiating_twice), ids=lambda way: way.__name__)
def test_fused_attention_refuses_tangents(way: Callable[..., Tensor]) -> None:
    backbone = MAKE['Mamba2D']().double().eval()
    with pytest.raises((NotImplementedError, RuntimeError), match='_scaled_dot_product_flash_attention'):
        way(lambda x: backbone(x)[-1], image(), image())


def test_gradients_by_functions_are_the_ordinary_ones(backbone: nn.Module) -> None:
    parameters, x = dict(backbone.named_parameters()), image(2)

    def call(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss(torch.func.functional_call(backbone, parameters, (x,)))

    got, got_x = torch.func.grad(call, argnums=(0, 1))(parameters, x)
    x.requires_grad_()
    *expected, expected_x = torch.autograd.grad(loss(backbone(x)), [*parameters.values(), x], allow_unused=True)
    torch.testing.assert_close(got_x, expected_x, rtol=1e-9, atol=1e-12)
    for name, value in zip(parameters, expected, strict=True):
        value = torch.zeros_like(parameters[name]) if value is None else value
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12, msg=lambda text, n=name: f'{n}: {text}')


def test_gradients_of_single_samples(backbone: nn.Module) -> None:
    parameters, x = dict(backbone.named_parameters()), image(2)

    def call(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss(torch.func.functional_call(backbone, parameters, (x.unsqueeze(0),)))

    got = torch.vmap(torch.func.grad(call), in_dims=(None, 0))(parameters, x)
    for i in range(2):
        expected = torch.autograd.grad(loss(backbone(x[i : i + 1])), parameters.values(), allow_unused=True)
        for name, value in zip(parameters, expected, strict=True):
            value = torch.zeros_like(parameters[name]) if value is None else value
            torch.testing.assert_close(
                got[name][i], value, rtol=1e-9, atol=1e-12, msg=lambda text, n=name: f'{n}: {text}'
            )


def test_jacobian_by_functions_is_the_ordinary_one(backbone: nn.Module) -> None:
    def call(x: Tensor) -> Tensor:
        return backbone(x)[-1].mean((0, 2, 3))[:3]

    x = image()
    torch.testing.assert_close(
        torch.func.jacrev(call)(x), torch.autograd.functional.jacobian(call, x), rtol=1e-9, atol=1e-12
    )


def test_second_derivatives_need_the_reference(backbone: nn.Module) -> None:
    x, v = image(), image()

    def product() -> Tensor:
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(backbone(leaf)), leaf, create_graph=True)
        return torch.autograd.grad(grad, leaf, v)[0]

    with sdpa_kernel(SDPBackend.MATH):
        with pytest.raises(NotImplementedError, match=r'cuda_ops\.use_reference\(\)'):
            product()

        def gradient(x: Tensor) -> Tensor:
            leaf = x.clone().requires_grad_()
            return torch.autograd.grad(loss(backbone(leaf)), leaf)[0]

        expected = (gradient(x + 1e-5 * v) - gradient(x - 1e-5 * v)) / 2e-5
        with cuda_ops.use_reference():
            got = product()
    assert (got - expected).norm() < 1e-6 * expected.norm()
