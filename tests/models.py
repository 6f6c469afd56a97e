"""Experts as different projects write them, each the same function of (x, ids, weights).

Letters: T tokens, K experts per token, R = T * K rows, E experts, H hidden, F expert features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

E, H, FEATURES = 4, 16, 32


class Experts(nn.Module):
    """The weights, the activation, and what the layer means; subclasses say how it is computed.

    up is [E, G, H] and down [E, H, F], or their transposes; G is 2F if gated, with gate and up in
    turn if interleaved.
    """

    def __init__(
        self, dtype=torch.bfloat16, gated=True, interleaved=False, transposed=False, bias=False
    ):
        super().__init__()
        self.gated, self.interleaved, self.transposed = gated, interleaved, transposed
        width = 2 * FEATURES if gated else FEATURES
        up = (E, H, width) if transposed else (E, width, H)
        down = (E, FEATURES, H) if transposed else (E, H, FEATURES)
        shapes = {"up": up, "down": down, "up_bias": (E, width), "down_bias": (E, H)}
        for name, shape in shapes.items():
            has = bias or "bias" not in name
            value = nn.Parameter(torch.randn(shape, dtype=dtype) / 4) if has else None
            self.register_parameter(name, value)
        self.requires_grad_(False)

    def activate(self, h: Tensor) -> Tensor:
        if not self.gated:
            return F.relu(h).square()
        gate, up = (h[..., ::2], h[..., 1::2]) if self.interleaved else h.chunk(2, -1)
        if self.interleaved:
            gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0) + 1
        return F.silu(gate) * up

    def halves(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, up and down as three weights [E, F, H], [E, F, H], [E, H, F]."""
        return *self.up.chunk(2, 1), self.down

    def exact(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """In float64, pair by pair; ids from E on are no expert."""
        named = {name: value.double() for name, value in self.named_parameters()}
        out = torch.zeros_like(x, dtype=torch.float64)
        for t, k in ((t, k) for t in range(ids.shape[0]) for k in range(ids.shape[1])):
            e = int(ids[t, k])
            if e >= E:
                continue
            up, down = (named[n][e] if self.transposed else named[n][e].T for n in ("up", "down"))
            h = x[t].double() @ up + (named["up_bias"][e] if "up_bias" in named else 0)
            y = self.activate(h) @ down + (named["down_bias"][e] if "down_bias" in named else 0)
            out[t] += weights[t, k].double() * y
        return out


class Grouped(Experts):
    """Sorted by expert, as transformers' grouped_mm does; masked where it guards foreign ids."""

    masked = False

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        T, K = ids.shape
        expert, order = torch.sort(ids.reshape(-1))
        counts = torch.histc(expert.float(), bins=E, min=0, max=E - 1)
        offsets = torch.cumsum(counts, 0, dtype=torch.int32)
        unowned = (expert >= E).unsqueeze(-1)
        expert = expert.clamp(max=E - 1)
        h = x[order // K]
        for weight, bias in (self.up, self.up_bias), (self.down, self.down_bias):
            if weight is self.down:
                h = self.activate(h)
            elif self.masked:
                h = h.masked_fill(unowned, 0.0)
            h = torch._grouped_mm(h, weight if self.transposed else weight.mT, offs=offsets)
            h = h if bias is None else h + bias[expert]
            h = h.masked_fill(unowned, 0.0) if self.masked else h
        y = h * weights.reshape(-1)[order].unsqueeze(-1)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0])
        return y[inverse].view(T, K, H).sum(1).to(x.dtype)


class GroupedMasked(Grouped):
    masked = True


class Batched(Experts):
    """Weights gathered for each row, as transformers' batched_mm does; ids clamped if it guards."""

    clamped = False

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        T, K = ids.shape
        expert = ids.reshape(-1)
        expert = expert.clamp(0, E - 1) if self.clamped else expert
        h = x.repeat_interleave(K, dim=0)
        for weight, bias in (self.up, self.up_bias), (self.down, self.down_bias):
            h = h if weight is self.up else self.activate(h)
            if self.transposed:
                h = torch.bmm(h.unsqueeze(1), weight[expert]).squeeze(1)
            else:
                h = torch.bmm(weight[expert], h.unsqueeze(-1)).squeeze(-1)
            h = h if bias is None else h + bias[expert]
        y = h * weights.reshape(-1).unsqueeze(-1)
        return y.view(T, K, H).sum(1).to(x.dtype)


class BatchedClamped(Batched):
    clamped = True


class Decomposed(Batched):
    """The same with each bmm as the multiply and sum that Inductor makes of it when it tunes."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        T, K = ids.shape
        expert = ids.reshape(-1)
        h = x.repeat_interleave(K, dim=0)
        for weight in self.up, self.down:
            h = h if weight is self.up else self.activate(h)
            a, b = weight[expert].float(), h.unsqueeze(-1).float()
            h = (a.unsqueeze(-1) * b.unsqueeze(1)).sum(2).to(x.dtype).squeeze(-1)
        return (h.view(T, K, H) * weights.unsqueeze(-1)).sum(1)


class Titan(Experts):
    """torchtitan's shape: three GEMMs over rows sorted stably, scores in float32, a scatter-add."""

    def forward(
        self, x: Tensor, ids: Tensor, weights: Tensor, base: Tensor | None = None
    ) -> Tensor:
        T, K = ids.shape
        chosen = torch.zeros(T, E, dtype=torch.bool).scatter_(-1, ids, True)
        offsets = chosen.sum(0).cumsum(0, dtype=torch.int32)
        order = torch.argsort(ids.view(-1), stable=True)
        token = order // K
        gate, up, down = self.halves()
        rows = x[token]
        g = F.silu(torch._grouped_mm(rows, gate.transpose(-2, -1), offs=offsets))
        h = g * torch._grouped_mm(rows, up.transpose(-2, -1), offs=offsets)
        y = torch._grouped_mm(h, down.transpose(-2, -1), offs=offsets)
        y = (y.float() * weights.view(-1)[order].reshape(-1, 1)).to(x.dtype)
        base = torch.zeros_like(x) if base is None else base
        return base.scatter_add(0, token.reshape(-1, 1).expand(-1, H), y)


class GptFast(Experts):
    """gpt-fast's shape: weights gathered as [T, K, ., .] and einsums, over slots at the end too."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gate, up, down = (w[ids] for w in self.halves())
        g = F.silu(torch.einsum("th,tkfh->tkf", x, gate))
        h = g * torch.einsum("th,tkfh->tkf", x, up)
        y = torch.einsum("tkf,tkhf->tkh", h, down)
        return torch.einsum("tkh,tk->th", y, weights)


class Megatron(Experts):
    """Megatron-Core's shape: rows picked from a map [E, T] of who goes where, scattered back."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        T, K = ids.shape
        chosen = torch.zeros(T, E, dtype=torch.bool).scatter(1, ids, True)
        probs = torch.zeros(T, E, dtype=weights.dtype).scatter(1, ids, weights)
        picked = chosen.T.reshape(-1).argsort(descending=True, stable=True)[: T * K]
        token = picked % T
        offsets = chosen.sum(0).cumsum(0).to(torch.int32)
        h = torch._grouped_mm(x.index_select(0, token), self.up.mT, offs=offsets)
        y = torch._grouped_mm(self.activate(h), self.down.mT, offs=offsets)
        y = y * probs.T.reshape(-1).index_select(0, picked).unsqueeze(-1)
        return torch.zeros_like(x).scatter_add(0, token.unsqueeze(1).expand(-1, H), y)


class Own(Experts):
    """What one would write: sort, searchsorted offsets, rows put back, weighted by a bmm."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        T, K = ids.shape
        expert, order = ids.flatten().sort(stable=True)
        offsets = torch.searchsorted(expert, torch.arange(E), right=True).int()
        h = torch._grouped_mm(x[order // K], self.up.mT, offs=offsets)
        y = torch._grouped_mm(self.activate(h), self.down.mT, offs=offsets)
        flat = torch.zeros(T * K, H, dtype=y.dtype)
        flat[order] = y
        return torch.bmm(weights.unsqueeze(1), flat.view(T, K, H)).squeeze(1)


class Layer(nn.Module):
    """Experts behind a top-k of scores [T, E]."""

    def __init__(self, experts: Experts, top_k: int = 2):
        super().__init__()
        self.experts, self.top_k = experts, top_k

    def forward(self, x: Tensor, scores: Tensor, *more: Tensor) -> Tensor:
        weights, ids = scores.topk(self.top_k, dim=-1)
        return self.experts(x, ids, weights, *more)
