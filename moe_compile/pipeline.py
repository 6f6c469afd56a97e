"""Our passes over one graph, in order, and the key that keeps Inductor's caches honest."""

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

from moe_compile.options import Options, name_of
from moe_compile.passes import PASSES
from moe_compile.passes._constants import constants_of
from moe_compile.passes._graph import render
from moe_compile.passes._outcome import EXACTNESS, Outcome
from moe_compile.passes._settings import Settings, set_settings
from moe_compile.report import GraphReport, PassReport, Report

log = logging.getLogger("moe_compile")
HOOK = "post_grad_custom_pre_pass"


class Pipeline:
    """Runs PASSES and the user's own over graphs, and keeps the report."""

    def __init__(self, options: Options, keep_graphs: bool = False) -> None:
        self.options = options
        self.report = Report()
        self._keep_graphs = keep_graphs

    def __call__(self, gm: fx.GraphModule) -> None:
        """Rewrite `gm`, and the bodies of the regions that it calls, in place."""
        for name in sorted({str(node.target) for node in gm.graph.find_nodes(op="get_attr")}):
            if isinstance(body := getattr(gm, name, None), fx.GraphModule):
                self(body)
        options = self.options
        budget = options.constant_budget_mb * 2**20
        set_settings(gm, Settings(options.exactness, budget, options.collectives))
        before = render(gm.graph, renumber=False) if self._keep_graphs else ""
        passes = [self._run(p, gm.graph) for p in PASSES]
        gm.graph.lint()  # once: of ours, tests look after each (testing.run_passes)
        for theirs in options.extra_passes:
            passes.append(self._run(theirs, gm.graph))
            gm.graph.lint()
        gm.recompile()
        after = render(gm.graph, renumber=False) if self._keep_graphs else ""
        sizes = [constant.nbytes for constant in constants_of(gm.graph)]
        self.report.graphs.append(GraphReport(before, after, passes, (len(sizes), sum(sizes))))
        self.report.log(log)
        for name, least in options.require.items():
            found = sum(len(p.outcome.rewrites) for p in passes if p.name == name)
            if found < least:
                raise RuntimeError(
                    f"moe_compile: expected {least} rewrites of {name}, got {found}\n{self.report}"
                )

    def _run(self, pass_: Callable[[fx.Graph], Any], graph: fx.Graph) -> PassReport:
        name = name_of(pass_)
        kind = getattr(pass_, "exactness", "bitwise")  # unsaid: the user's own judgement
        if name in self.options.disable:
            return PassReport(name, Outcome(), skipped="disabled")
        if EXACTNESS.index(kind) > EXACTNESS.index(self.options.exactness):
            return PassReport(
                name, Outcome(), skipped=f"{kind}, but exactness={self.options.exactness}"
            )
        start, before = time.perf_counter(), len(graph.nodes)
        outcome = pass_(graph)
        told = isinstance(outcome, Outcome)
        # Whoever rewrote nothing and made no node left none without users: no need to look.
        if not told or outcome.rewrites or len(graph.nodes) != before:
            graph.eliminate_dead_code()
        return PassReport(name, outcome if told else Outcome(), time.perf_counter() - start)

    @property
    def key(self) -> str | None:
        """Names what the passes do, for cache keys; None where nothing may be cached."""
        theirs = [_uuid_of(p) for p in self.options.extra_passes]
        if self.options.require or None in theirs:
            return None
        o = self.options
        own = (o.exactness, o.disable, o.constant_budget_mb, o.collectives)
        return hashlib.sha256(repr((_own_hash(), own, theirs)).encode()).hexdigest()


class _Key(CustomGraphPass):
    """Puts a key into Inductor's and AOTAutograd's cache keys, in the one hook that both look at.

    Our passes run before Inductor's own key is computed, but an artifact from AOTAutograd's cache
    skips them, and that cache knows no inner compile. What the user set as the hook still runs.
    """

    def __init__(self, key: str | None, theirs: Any) -> None:
        self._key = key
        self._theirs = _as_list(theirs)

    def __call__(self, graph: fx.Graph) -> None:
        for pass_ in self._theirs:
            pass_(graph)

    def uuid(self) -> Any:
        theirs = [_uuid_of(p) for p in self._theirs]
        return None if None in (self._key, *theirs) else (self._key, *theirs)


def cache_key(
    key: str | None, patches: Mapping[str, Any] | None = None, ranks: str = ""
) -> dict[str, Any]:
    """The config patch for Inductor that sets the key; None bypasses both caches.

    ranks: what else the passes look at, of process groups and of placements of inputs.
    """
    key = key if key is None or not ranks else f"{key} {ranks}"
    theirs = (patches or {}).get(HOOK, getattr(inductor_config, HOOK))
    return {HOOK: _Key(key, theirs)}


def source_hash(root: Path) -> str:
    """One hash over all our sources: passes decide the graph, fakes its shapes and strides."""
    digest = hashlib.sha256()
    for folder in (root, root / "ops", root / "passes"):
        for path in sorted([*folder.glob("*.py"), *folder.glob("*.cpp")]):
            digest.update(f"{folder.name}/{path.name}".encode() + path.read_bytes())
    return digest.hexdigest()


@cache
def _own_hash() -> str:
    return source_hash(Path(__file__).parent)


def _uuid_of(pass_: Any) -> Any:
    uuid = getattr(pass_, "uuid", None)
    return uuid() if callable(uuid) else uuid


def _as_list(passes: Any) -> list[Any]:
    if passes is None:
        return []
    return list(passes) if isinstance(passes, (list, tuple)) else [passes]
