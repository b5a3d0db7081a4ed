#!/bin/sh
# torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11, x86-64
#
# An operator made by torch.library.custom_op with register_autograd has a derivative for backward passes alone. Forward
# mode says nothing of it: torch.func.jvp takes the operator's tangent for zero, so that the derivative of a sum holds
# the other terms alone, a plausible wrong number; with dual numbers the tangent is None. A torch.autograd.Function
# without jvp raises in both cases. Backward transforms (torch.func.grad, jacrev) do raise, and name as the remedy a
# staticmethod that an author who passed setup_context to register_autograd has no way to override.
#
# Seen, for d/dx (x * x + x) at x = 3, where x * x is the operator:
#   backward 7.0, torch.func.jvp 1.0, tangent of the operator with dual numbers None
#   torch.func.grad: RuntimeError: In order to use an autograd.Function with functorch transforms (vmap, grad, jvp, ...
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile numpy==2.4.6 torch==2.13.0
"$dir/venv/bin/python" - <<'EOF'
import sys

import torch
from torch import Tensor
from torch.autograd import forward_ad


@torch.library.custom_op('findings::square', mutates_args=())
def square(x: Tensor) -> Tensor:
    return x * x


def keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


square.register_autograd(lambda ctx, grad: 2 * ctx.saved_tensors[0] * grad, setup_context=keep)


def function(x):
    return square(x) + x


x = torch.tensor(3.0, requires_grad=True)
function(x).backward()
tangent = torch.func.jvp(function, (x.detach(),), (torch.tensor(1.0),))[1]
with forward_ad.dual_level():
    dual = forward_ad.unpack_dual(square(forward_ad.make_dual(x.detach(), torch.tensor(1.0)))).tangent
print(f'backward {x.grad}, torch.func.jvp {tangent}, tangent of the operator with dual numbers {dual}')
try:
    torch.func.grad(function)(x.detach())
    sys.exit('torch.func.grad works now')
except RuntimeError as error:
    print(f'torch.func.grad: RuntimeError: {str(error)[:91]} ...')
sys.exit(tangent != 1 or dual is not None)
EOF
