"""Compile one MoE layer by the backend's name alone, as a user of the wheel would.

Run by .ci/run with the fresh venv's Python, isolated (-I), from an empty folder.
"""

import sys

import torch
from torch import Tensor
from torch.nn import functional as F


def layer(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Top-2 of 8 experts with SwiGLU, each token gathering its experts' weights."""
    weights, ids = (x @ gate.T).softmax(-1).topk(2)
    flat = ids.reshape(-1)
    rows = x.repeat_interleave(2, 0).unsqueeze(-1)
    a, b = torch.bmm(up[flat], rows).squeeze(-1).chunk(2, -1)
    y = torch.bmm(down[flat], (F.silu(a) * b).unsqueeze(-1)).squeeze(-1)
    return (y * weights.reshape(-1, 1)).view(-1, 2, x.shape[1]).sum(1)


def main() -> None:
    torch.manual_seed(0)
    T, E, H, features = 5, 8, 32, 48
    shapes = (T, H), (E, H), (E, 2 * features, H), (E, H, features)
    inputs = [torch.randn(shape) / shape[-1] ** 0.5 for shape in shapes]
    assert "moe_compile" not in sys.modules
    options = {"require": {"find_experts": 1, "find_routing": 1}}
    compiled = torch.compile(layer, backend="moe_compile", fullgraph=True, options=options)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), layer(*inputs))
    where = sys.modules["moe_compile"].__file__ or ""
    assert where.startswith(sys.prefix), f"{where} is not in {sys.prefix}"
    print(f"one MoE layer rewritten, values equal, moe_compile from {where}")


if __name__ == "__main__":
    main()
