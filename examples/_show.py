"""What the demo prints."""

import os
import platform
import sys
import threading
import time
from dataclasses import dataclass, field

import torch
import transformers
import triton
from tqdm import tqdm


@dataclass
class Result:
    """One row of the table at the end."""

    name: str
    baseline: str
    kernels: tuple[str, str]
    step_ms: tuple[float, float]
    fastest_ms: tuple[float, float]
    token_ms: tuple[float, float]
    failures: list[str] = field(default_factory=list)


class Progress:
    """A bar over the steps of one model with a running clock; plain lines off a terminal."""

    def __init__(self, name: str, total: int) -> None:
        self._start, self._name, self._step, self._total = time.perf_counter(), name, 0, total
        self._live = sys.stderr.isatty()
        bar_format = "{desc} |{bar:20}| {n_fmt}/{total_fmt} {elapsed} {postfix}"
        self._bar = tqdm(total=total, desc=name, bar_format=bar_format, disable=not self._live)
        self._done = threading.Event()
        threading.Thread(target=self._tick, daemon=True).start()

    def _tick(self) -> None:
        while not self._done.wait(1.0):
            self._bar.refresh()

    def step(self, what: str) -> None:
        """Say what begins now."""
        self._step += 1
        self._bar.set_postfix_str(what, refresh=False)
        self._bar.update()
        if not self._live:
            seconds = time.perf_counter() - self._start
            place = f"{self._name} {self._step}/{self._total} {seconds:4.0f} s"
            print(f"{place} {what}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._done.set()
        self._bar.close()


def tell(line: str) -> None:
    """Print without breaking the bar."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def tell_conditions(
    device: str, dtype: torch.dtype, batch: int, prompt: int, num_tokens: int
) -> None:
    """Machine, sizes, versions."""
    if device == "cuda":
        machine = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, CUDA graphs"
    else:
        load = f"load {os.getloadavg()[0]:.1f} before the start"
        machine = f"CPU {platform.machine()}, {torch.get_num_threads()} threads, {load}"
    tell(f"{machine}; {dtype}, batch {batch}, prompt {prompt}, {num_tokens} new tokens")
    versions = [f"{m.__name__} {m.__version__}" for m in (torch, triton, transformers)]
    tell(", ".join([f"Python {platform.python_version()}", *versions]))
    if dtype == torch.float32:
        tell("why float32: in 16 bits a near tie of two logits may fall either way, rightly")


def tell_table(results: list[Result]) -> None:
    """Times in ms and kernels, Inductor's first."""
    tell(
        "\nms, Inductor -> moe_compile; step: the compiled forward; token: with generate around it"
    )
    heads = "decode step, median", "decode step, fastest", "token, median"
    tell(f"{'model':11} {'Inductor on':11}" + "".join(f"{head:>27}" for head in heads))
    for r in results:
        cells = (
            f"{plain:.2f} -> {ours:.2f} {plain / ours:6.2f}x"
            for plain, ours in (r.step_ms, r.fastest_ms, r.token_ms)
        )
        tell(f"{r.name:11} {r.baseline:11}" + "".join(f"{cell:>27}" for cell in cells))
    tell("\nkernels of one MoE layer")
    for r in results:
        tell(f"{r.name:11} {r.kernels[0]} -> {r.kernels[1]}")
