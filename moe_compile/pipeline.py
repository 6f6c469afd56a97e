"""The passes as Inductor calls them: one CustomGraphPass, whose uuid keeps the caches honest."""

import hashlib
import logging
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from moe_compile.options import Options, name_of
from moe_compile.passes import PASSES
from moe_compile.passes._graph import clean, render
from moe_compile.passes._outcome import EXACTNESS, Outcome
from moe_compile.report import GraphReport, PassReport, Report

log = logging.getLogger("moe_compile")


class MoePasses(CustomGraphPass):
    """Runs PASSES and the user's own over one graph, and keeps the report."""

    def __init__(
        self, options: Options, before_ours: Any = None, keep_graphs: bool = False
    ) -> None:
        """`before_ours` is what the user had set as Inductor's post_grad_custom_pre_pass."""
        self.options = options
        self.report = Report()
        self._before_ours = _as_list(before_ours)
        self._keep_graphs = keep_graphs

    def __call__(self, graph: fx.Graph) -> None:
        for theirs in self._before_ours:
            theirs(graph)
        before = render(graph, renumber=False) if self._keep_graphs else ""
        passes = [self._run(p, graph) for p in (*PASSES, *self.options.extra_passes)]
        after = render(graph, renumber=False) if self._keep_graphs else ""
        self.report.graphs.append(GraphReport(before, after, passes))
        self.report.log(log)
        for name, least in self.options.require.items():
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
        start = time.perf_counter()
        outcome = pass_(graph)
        clean(graph)
        seconds = time.perf_counter() - start
        return PassReport(name, outcome if isinstance(outcome, Outcome) else Outcome(), seconds)

    def uuid(self) -> Any:
        """Part of Inductor's and AOTAutograd's cache keys; None bypasses both caches."""
        theirs = [_uuid_of(p) for p in (*self._before_ours, *self.options.extra_passes)]
        if self._keep_graphs or self.options.require or None in theirs:
            return None
        own = (self.options.exactness, self.options.disable)
        return hashlib.sha256(repr((_own_hash(), own, theirs)).encode()).hexdigest()


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
