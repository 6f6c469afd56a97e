"""Decode with CUDA graphs of your own: one for each of a few batch sizes, the others padded."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from moe_compile._graph_inputs import Addresses, Inputs, Pad, require, show

Outputs = Tensor | tuple[Tensor, ...]


class cuda_graphs:
    """Record `fn` once for each batch size; a call replays the smallest graph that the batch fits.

        step = moe_compile.cuda_graphs(model, (tokens, positions), fixed={"cache": cache})
        logits = step(tokens, positions)  # any batch from 1 to 16

    fn(*inputs, **fixed) gets tensors with the batch as their first dim, and returns such a tensor
    or a tuple of such. It runs without gradients, in the inference mode of this call. torch.compile
    is welcome, in any mode but those that make CUDA graphs themselves.

    example: the inputs, of any batch size, on a GPU: they tell dtypes and shapes, and their rows
        are what `fn` runs on here, `warmups` times for each batch size. Those runs are real: a
        cache that `fn` writes to is written to.
    batch_sizes: one graph each; they share memory. A call may have any batch up to the largest: the
        rows up to the next of these sizes are padding, and their results are cut off.
    fixed: arguments by name that are the same in all calls. Their tensors are read where they lie.
    pad: what padding rows hold, for all inputs or one for each. For ids of experts take -1: to our
        ops that is no expert, so that padding reads no weights. Padding runs through `fn` like any
        row: where `fn` writes to a cache, it must lead to a place that nobody reads.
    modules: what else `fn` reads. `fn` itself, or the module whose method it is, counts by itself.
    copy: return tensors of the caller's own. Else they are the graph's, right until the next call.
    check: before each replay, compare the addresses of all parameters, buffers and fixed tensors
        with those recorded, in less than 0.1 us apiece. (Of tensors like torchao's, which hold
        theirs inside, nothing is seen.)
    warmups: runs before each recording, so that nothing is compiled, tuned or loaded within it.

    Calls belong on one stream and one thread. docs/cuda_graphs.md says when to take this, and what
    makes a graph wrong.
    Errors: ValueError for inputs other than the example's in dtype, device or shape of a row, for
        more rows than the largest batch size, or none, and for an example that is not on a GPU;
        RuntimeError where a tensor has moved, and while another graph is being recorded.
    """

    def __init__(
        self,
        fn: Callable[..., Outputs],
        example: Tensor | Sequence[Tensor],
        *,
        batch_sizes: Iterable[int] = (1, 2, 4, 8, 16),
        fixed: Mapping[str, Any] | None = None,
        pad: Pad | Sequence[Pad] = 0,
        modules: nn.Module | Iterable[nn.Module] = (),
        copy: bool = False,
        check: bool = True,
        warmups: int = 3,
    ) -> None:
        require(warmups >= 1, "1 or more warmups, since recording compiles nothing", warmups)
        examples = [example] if isinstance(example, Tensor) else list(example)
        self._inputs = Inputs(examples, batch_sizes, pad)
        self._fn = partial(fn, **(fixed or {}))  # kept: graphs do not own the memory they read
        self._copy = copy
        self.batch_sizes = self._inputs.batch_sizes
        modules = _owner(fn) + ([modules] if isinstance(modules, nn.Module) else list(modules))
        device = _cuda_device(examples)
        _refuse_recording()
        # The largest first: the others find room in its memory.
        calls = {n: partial(self._fn, *self._inputs.rows(n)) for n in reversed(self.batch_sizes)}
        self._graphs = _record_all(calls, warmups, device)
        tensors = [t for t in tree_leaves(self._fn.keywords) if isinstance(t, Tensor)]
        self._addresses = Addresses(modules, tensors) if check else None

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Outputs:
        """The outputs of `fn` for a batch."""
        _refuse_recording()
        if self._addresses is not None:
            self._addresses.check()
        batch = self._inputs.load(inputs)
        graph, outputs = self._graphs[self.batch_sizes[bisect_left(self.batch_sizes, batch)]]
        graph.replay()
        cut = [out[:batch].clone() if self._copy else out[:batch] for out in _as_tuple(outputs)]
        return cut[0] if isinstance(outputs, Tensor) else tuple(cut)


def _record_all(
    calls: Mapping[int, Callable[[], Outputs]], warmups: int, device: torch.device
) -> dict[int, tuple[Any, Outputs]]:
    """For each batch size a graph, and the tensors that its replays write."""
    with torch.cuda.device(device), torch.no_grad():
        pool, streams = torch.cuda.graph_pool_handle(), [torch.cuda.Stream(), torch.cuda.Stream()]
        return {n: _record(call, n, warmups, pool, streams) for n, call in calls.items()}


def _record(
    call: Callable[[], Outputs], size: int, warmups: int, pool: Any, streams: Sequence[Any]
) -> tuple[Any, Outputs]:
    current, (aside, recording) = torch.cuda.current_stream(), streams
    aside.wait_stream(current)
    with torch.cuda.stream(aside):
        for _ in range(warmups):
            _check_outputs(call(), size)
    current.wait_stream(aside)
    # cuBLAS keeps a workspace for each stream until somebody clears them, as CUDA-graph trees do.
    # So the graph gets one in its own pool, and nobody else knows of it.
    torch._C._cuda_clearCublasWorkspaces()
    graph = torch.cuda.CUDAGraph()
    mode = "thread_local"  # what other threads do meanwhile is no error
    with torch.cuda.graph(graph, pool=pool, stream=recording, capture_error_mode=mode):
        outputs = call()
    torch._C._cuda_clearCublasWorkspaces()
    return graph, outputs


def _owner(fn: Any) -> list[nn.Module]:
    """The module that `fn` is, or whose method it is, compiled or not."""
    if not isinstance(fn, nn.Module):
        fn = getattr(getattr(fn, "_torchdynamo_orig_callable", fn), "__self__", None)
    return [fn] if isinstance(fn, nn.Module) else []


def _check_outputs(outputs: Any, size: int) -> None:
    outs = _as_tuple(outputs)
    are_batches = all(isinstance(x, Tensor) and x.ndim and len(x) == size for x in outs)
    require(outs and are_batches, f"fn to return tensors [{size}, ...]", show(outs))


def _cuda_device(examples: list[Tensor]) -> torch.device:
    devices = {x.device for x in examples}
    on_one_gpu = len(devices) == 1 and examples[0].is_cuda
    require(on_one_gpu, "an example on one CUDA device", ", ".join(sorted(map(str, devices))))
    return examples[0].device


def _refuse_recording() -> None:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "cuda_graphs: expected a stream that records no graph, got one that does"
        )


def _as_tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)
