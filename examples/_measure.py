"""What the demo measures: generation and its steps, distance from float64, kernels of one block."""

import copy
import re
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel, StaticCache


def sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Generator:
    """`model.generate`, greedily, with one static cache for all calls, so that it compiles once."""

    def __init__(self, model: PreTrainedModel, prompt: Tensor, num_tokens: int) -> None:
        self.model, self.prompt, self.num_tokens = model, prompt, num_tokens
        self.cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + num_tokens)
        self.inputs: dict[str, Any] = {}  # of the newest decode step
        self.step_ms: list[float] = []  # the compiled forward alone
        self.token_ms: list[
            float
        ] = []  # from one step to the next: what generate does around it, too
        self._last: float | None = None  # when the step before began
        self._compiled = model.get_compiled_call
        model.get_compiled_call = self._timed  # type: ignore[method-assign]
        # A cache given by hand and a cache_implementation exclude each other.
        model.generation_config.cache_implementation = None

    def _timed(self, config: Any) -> Callable[..., Any]:
        forward = self._compiled(config)

        def step(**inputs: Any) -> Any:
            self.inputs = inputs
            sync()
            start = time.perf_counter()
            if self._last is not None:
                self.token_ms.append((start - self._last) * 1e3)
            self._last = start
            outputs = forward(**inputs)
            sync()
            self.step_ms.append((time.perf_counter() - start) * 1e3)
            return outputs

        return step

    def __call__(self) -> tuple[Tensor, Tensor]:
        """The new tokens [B, N] and their logits [B, N, V]."""
        self.cache.reset()
        self._last = None
        result = self.model.generate(
            self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            past_key_values=self.cache,
            max_new_tokens=self.num_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return result.sequences[:, self.prompt.shape[1] :], torch.stack(result.logits, 1)

    def forget_times(self) -> None:
        """Those of the first calls, which compile."""
        self.step_ms, self.token_ms = [], []


class _InFloat64(TorchFunctionMode):
    """Gives float64 where a model's code asks for float32 by name (norms, routers, rotary)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        widen = lambda a: torch.float64 if a is torch.float32 else a  # noqa: E731
        args = tuple(map(widen, args))
        kwargs = {key: widen(value) for key, value in (kwargs or {}).items()}
        return func(*args, **kwargs).double() if func is Tensor.float else func(*args, **kwargs)


def float64_logits(model: PreTrainedModel, prompt: Tensor, tokens: Tensor) -> Tensor:
    """The logits [B, N, V] that the same weights give in float64 for the same tokens."""
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")
    with torch.no_grad(), _InFloat64():
        logits = exact(torch.cat([prompt, tokens], 1), use_cache=False).logits
    assert logits.dtype == torch.float64
    return logits[:, prompt.shape[1] - 1 : -1]


def errors(logits: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest and root-mean-square distance."""
    distance = (logits.double() - exact).abs()
    return distance.max().item(), distance.square().mean().sqrt().item()


def compile_block(block: nn.Module, x: Tensor, backend: str) -> tuple[Callable[..., Any], str]:
    """The compiled block, and how many kernels it launches, in words."""
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    _, code = run_and_get_code(compiled, x)
    if x.is_cuda:
        return compiled, f"{_profiled_kernels(lambda: compiled(x)) or 'unknown number of'} kernels"
    fused, calls = _generated_calls("\n".join(code))
    return compiled, f"{fused + calls} ({fused} fused, {calls} library calls)"


def interleaved_ms(fns: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median time of each, taken in turns, so that a disturbance meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in fns}
    for _ in range(rounds):
        for name, fn in fns.items():
            sync()
            start = time.perf_counter()
            fn()
            sync()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: median(ms) for name, ms in times.items()}


def _generated_calls(code: str) -> tuple[int, int]:
    """Calls of Inductor's own kernels, and of others, in the wrapper it wrote for the CPU."""
    wrapper = code.partition("def call(")[2].partition("\ndef ")[0]
    fused = re.findall(r"^ +cpp_fused\w*\(", wrapper, re.MULTILINE)
    calls = re.findall(r"^ +(?:\w+ = )?(?:torch\.ops|aten|extern_kernels)\.", wrapper, re.MULTILINE)
    return len(fused), len(calls)


def _profiled_kernels(fn: Callable[[], Any]) -> int:
    """GPU kernels, copies and fills that `fn` launches."""
    fn()
    sync()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        fn()
        sync()
    on_gpu = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not getattr(e, "is_user_annotation", False) for e in on_gpu)
