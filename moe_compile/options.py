"""What a user may choose: `torch.compile(model, backend="moe_compile", options={...})`."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch._inductor import config as inductor_config

from moe_compile.passes import PASSES
from moe_compile.passes._outcome import EXACTNESS, Exactness, Pass


@dataclass(frozen=True)
class Options:
    """Our own options; every other key of `options` is one of Inductor's.

    mode: as torch.compile's `mode`, for use with other options (torch allows one of the two).
    exactness: the most a pass may change results: "bitwise", "reassociating" (the same maths,
        rounded in another order; the default) or "lossy".
    require: least number of rewrites by pass name, for each graph; fewer fail the compile with the
        report. Such compiles bypass the compile cache, since a cached graph runs no pass.
    disable: names of passes that shall not run.
    constant_budget_mb: most memory, in MiB, that the live constants of one graph may take beside
        the parameters they are made from (see passes/hoist_constants.py).
    collectives: what a mistake in the model's collectives is (a value reduced twice, a partial sum
        not reduced, over the wrong ranks): "warn", "error" or "ignore".
    extra_passes: passes of your own, run after ours in the order given, whatever `exactness` says
        unless they state theirs. One with a `uuid` attribute (a string that changes whenever the
        pass does) may be cached; others bypass the cache.
    """

    mode: str | None = None
    exactness: Exactness = "reassociating"
    require: Mapping[str, int] = field(default_factory=dict)
    disable: tuple[str, ...] = ()
    constant_budget_mb: int = 1024
    collectives: str = "warn"
    extra_passes: tuple[Pass, ...] = ()

    def __post_init__(self) -> None:
        names = {name_of(p) for p in (*PASSES, *self.extra_passes)}
        if self.exactness not in EXACTNESS:
            _refuse(f"exactness among {', '.join(EXACTNESS)}", self.exactness)
        for key in (*self.require, *self.disable):
            if key not in names:
                _refuse(f"pass names among {', '.join(sorted(names))}", key)
        budget = self.constant_budget_mb
        if isinstance(budget, bool) or not isinstance(budget, int) or budget < 0:
            _refuse("constant_budget_mb of 0 or more MiB", repr(budget))
        if self.collectives not in ("warn", "error", "ignore"):
            _refuse("collectives among warn, error, ignore", repr(self.collectives))
        for extra in self.extra_passes:
            if not callable(extra):
                _refuse("extra_passes of functions from fx.Graph to an outcome", extra)


def parse_options(
    mode: str | None, options: Mapping[str, Any] | None
) -> tuple[Options, dict[str, Any]]:
    """Our options, and the config patches for Inductor that follow from mode and the other keys.

    Errors: ValueError for a key that neither we nor Inductor know, with those that exist.
    """
    given = dict(options or {})
    own_keys = {f.name for f in fields(Options)}
    own = {key: given.pop(key) for key in list(given) if key in own_keys}
    for key in ("disable", "extra_passes"):
        if key in own:
            own[key] = tuple(own[key])
    ours = Options(**own)
    known = inductor_config.get_config_copy()
    for key in given:
        if key.replace("-", "_") not in known:
            near = difflib.get_close_matches(key, [*own_keys, *known], n=3)
            hint = f" (close to {', '.join(near)})" if near else ""
            _refuse(
                f"options among {', '.join(sorted(own_keys))} or Inductor's own", f"{key!r}{hint}"
            )
    mode = mode or ours.mode
    if mode in (None, "default"):
        patches: dict[str, Any] = {}
    else:
        modes = torch._inductor.list_mode_options()
        if mode not in modes:
            _refuse(
                f"mode among default, {', '.join(m for m in modes if m != 'default')}", repr(mode)
            )
        patches = dict(modes[mode])
    return ours, {**patches, **{key.replace("-", "_"): value for key, value in given.items()}}


def name_of(pass_: Any) -> str:
    """The name under which a pass is reported and required."""
    return str(getattr(pass_, "__name__", type(pass_).__name__))


def _refuse(expected: str, got: object) -> None:
    raise ValueError(f"moe_compile: expected {expected}, got {got}")
