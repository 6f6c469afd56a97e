"""Compile, tune and record before the first request."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from moe_compile.huggingface import NAME
from moe_compile.ops import _tune
from moe_compile.ops._tuned import recording

log = logging.getLogger("moe_compile")

# One token from prefill; then decode steps: CUDA-graph trees run the first, record the second and
# replay the third. One more, since where a replay goes wrong it had better be here.
NEW_TOKENS = 5
NEW_TOKENS_BEFORE_RECORDING = 2

T = TypeVar("T")


def warmup(
    model: Any,
    batch_sizes: Iterable[int],
    *,
    prompt_length: int = 16,
    max_length: int | None = None,
    caches: Mapping[int, Any] | None = None,
    tune: bool = False,
    progress: bool = True,
) -> dict[int, float]:
    """Run a short `generate` for each batch size, and return the seconds that each took.

        moe_compile.prepare(model)
        moe_compile.warmup(model, batch_sizes=(1, 4, 16), max_length=4096)

    What comes after compiles nothing, as long as it has one of these batch sizes and is no longer
    than max_length. Where `generate` makes the cache, its memory may lie elsewhere the next time,
    and then mode="reduce-overhead" records anew what it compiled here; a cache in `caches` stays.

    model: one that `prepare` has made ready.
    prompt_length: tokens of the prompts, which are random. Prefill runs uncompiled, with kernels
        that depend on the number of tokens: best the length of typical prompts.
    max_length: tokens of the longest request, prompt and answer, which is how long the static cache
        is; as short as the run allows if not given, and then each longer request compiles again.
    caches: by batch size, the static caches that requests will be given as `past_key_values`. They
        are reset afterwards.
    tune: before anything is recorded, measure which blocks are the fastest for each launch of our
        kernels that no warmup measured before on such a GPU. Slow the first time; kept on disk
        beside Inductor's caches (docs/cuda_graphs.md). All ranks of a job say the same. On a CPU
        there is nothing to measure.
    progress: show bars, where tqdm is installed.
    Logs the seconds of each batch size (`TORCH_LOGS=moe_compile`).
    Errors: ValueError for a model that is not prepared, for batch sizes or lengths below what a run
        takes, and for caches that lack a batch size.
    """
    sizes, shortest = list(dict.fromkeys(batch_sizes)), prompt_length + NEW_TOKENS
    longest = shortest if max_length is None else max_length
    _check_prepared(model)
    _require(sizes and min(sizes) >= 1, "batch_sizes of 1 or more", sizes)
    _require(prompt_length >= 1, "a prompt_length of 1 or more", prompt_length)
    _require(longest >= shortest, f"max_length of {shortest} or more", max_length)
    lacking = [] if caches is None else [size for size in sizes if size not in caches]
    _require(not lacking, "caches for all batch sizes", f"none for {lacking}")
    seconds = dict.fromkeys(sizes, 0.0)

    def run(desc: str, new_tokens: int) -> None:
        for size in _bar(sizes, desc, "batch size", progress):
            cache = None if caches is None else caches[size]
            start = time.perf_counter()
            _generate(model, size, prompt_length, longest, new_tokens, cache)
            took = time.perf_counter() - start
            seconds[size] += took
            log.info("%s: batch size %d: %.1f s", desc, size, took)

    if tune:
        _measure(lambda: run("compile", NEW_TOKENS_BEFORE_RECORDING), model.device, progress)
    run("warmup", NEW_TOKENS)
    return seconds


def _measure(run: Callable[[], None], device: torch.device, progress: bool) -> None:
    """Find the fastest blocks for what `run` launches."""
    _tune.share(device)
    with recording() as asked:
        run()
    jobs = _bar(_tune.jobs(asked, device), "tune", "launch", progress)
    _tune.keep([job.measured(device) for job in jobs], device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what was measured on


def _generate(
    model: Any, size: int, prompt_length: int, longest: int, new_tokens: int, cache: Any
) -> None:
    """A few tokens, with a cache as long as for many."""
    tokens = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)  # the user's random numbers stay theirs
    prompt = torch.randint(tokens, (size, prompt_length), generator=generator).to(model.device)

    def is_done(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        enough = ids.shape[1] >= prompt_length + new_tokens
        return torch.full(ids.shape[:1], enough, device=ids.device)

    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=longest - prompt_length,
        min_new_tokens=new_tokens,  # no end before that
        stopping_criteria=[is_done],
        do_sample=False,
        **({} if cache is None else {"past_key_values": cache}),
    )
    if cache is not None:
        cache.reset()
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)


def _check_prepared(model: Any) -> None:
    config = getattr(getattr(model, "generation_config", None), "compile_config", None)
    is_prepared = getattr(config, "backend", None) == NAME
    _require(is_prepared, "a model that moe_compile.prepare made ready", type(model).__name__)


def _bar(items: Sequence[T], desc: str, unit: str, progress: bool) -> Iterable[T]:
    """The items, with a bar on a terminal."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return items
    return tqdm(items, desc=desc, unit=unit, disable=None if progress else True)  # type: ignore[no-any-return]


def _require(holds: Any, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"warmup: expected {expected}, got {got}")
