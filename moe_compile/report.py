"""What every pass did, in order, with before and after."""

import difflib
import logging
from collections import Counter
from dataclasses import dataclass, field

from moe_compile.passes._outcome import Event, Outcome


@dataclass(frozen=True)
class PassReport:
    """One pass over one graph."""

    name: str
    outcome: Outcome
    seconds: float = 0.0
    skipped: str = ""  # why the pass did not run


@dataclass(frozen=True)
class GraphReport:
    """All passes over one graph; `before` and `after` are its text where graphs are kept.

    constants: how many live constants the graph has, and the bytes that they take.
    """

    before: str
    after: str
    passes: list[PassReport]
    constants: tuple[int, int] = (0, 0)

    @property
    def diff(self) -> str:
        """What the passes changed, as a unified diff."""
        lines = difflib.unified_diff(
            self.before.splitlines(), self.after.splitlines(), "before", "after", lineterm="", n=1
        )
        return "\n".join(lines)


@dataclass
class Report:
    """What the passes did to the graphs of one model. `print(report)` shows it."""

    graphs: list[GraphReport] = field(default_factory=list)
    breaks: dict[str, int] = field(default_factory=dict)  # why Dynamo left the graph, and how often

    @property
    def counts(self) -> dict[str, int]:
        """Rewrites by pass, over all graphs."""
        counts: Counter[str] = Counter()
        for graph in self.graphs:
            for p in graph.passes:
                counts[p.name] += len(p.outcome.rewrites)
        return dict(counts)

    def __str__(self) -> str:
        total = ", ".join(f"{name} {count}" for name, count in self.counts.items())
        lines = [f"moe_compile: {len(self.graphs)} graph(s); rewrites: {total or 'none'}"]
        if not self.graphs:
            lines.append("  No graph reached the passes: Dynamo captured nothing.")
        lines += [f"  graph break ({n}x): {reason}" for reason, n in self.breaks.items()]
        for i, graph in enumerate(self.graphs):
            lines.append(f"graph {i}")
            for p in graph.passes:
                lines += _pass_lines(p)
            if graph.constants[0]:
                count, size = graph.constants
                lines.append(f"  live constants: {count}, {size / 2**20:.1f} MiB")
            if graph.before != graph.after:
                lines += [
                    "  changed (all of it in .graphs[i].before and .after):",
                    *_head(graph.diff),
                ]
        return "\n".join(lines)

    __repr__ = __str__

    def log(self, logger: logging.Logger) -> None:
        """A few lines for the newest graph; a pass that only declined is a warning."""
        for p in self.graphs[-1].passes:
            rewrites, declined = p.outcome.rewrites, p.outcome.declined
            if rewrites:
                logger.info("%s: %d rewrites", p.name, len(rewrites))
            quiet = rewrites or p.name in _PICKY
            level = logging.INFO if quiet else logging.WARNING
            for reason, count in Counter(e.detail for e in declined).items():
                text = "%s declined %dx: %s (moe_compile.explain tells where)"
                logger.log(level, text, p.name, count, reason)


# These leave most of what they look at, and rightly so.
_PICKY = (
    "fuse_activation_quant",
    "fuse_all_reduce",
    "lint_collectives",
    "elide_all_reduces",
    "hoist_constants",
    "choose_kernels",
    "choose_linear",
    "fuse_residual",
    "fuse_norm",
    "choose_attention",
    "rotate_together",
    "read_cache",
    "store_together",
)


def _pass_lines(p: PassReport) -> list[str]:
    if p.skipped:
        return [f"  {p.name}: not run ({p.skipped})"]
    rewrites, declined = p.outcome.rewrites, p.outcome.declined
    lines = [
        f"  {p.name}: {len(rewrites)} rewritten, {len(declined)} declined, {p.seconds * 1e3:.1f} ms"
    ]
    lines += [f"    ! {_place(e)}: {e.detail}" for e in p.outcome.mistakes]
    lines += [f"    + {_place(e)}: {e.detail}" for e in rewrites]
    lines += [f"    - {_place(e)}: declined, {e.detail}" for e in declined]
    return lines


def _place(event: Event) -> str:
    return " | ".join(part for part in (event.layer, event.source) if part) or "(no source)"


def _head(diff: str, most: int = 80) -> list[str]:
    lines = [f"    {line}" for line in diff.splitlines()[2:]]
    return (
        lines if len(lines) <= most else [*lines[:most], f"    ... {len(lines) - most} more lines"]
    )
