"""Mistakes in a model's collectives that run without an error and give wrong numbers."""

import warnings

from torch import fx

from moe_compile.passes._collectives import ALL_REDUCE, REDUCE_SCATTER, collectives
from moe_compile.passes._outcome import Outcome, exactness, layer_of, trail_of
from moe_compile.passes._settings import settings_of
from moe_compile.passes.placements import Placements


class CollectivesWarning(UserWarning):
    """The model reduces a value twice, not at all, or over the wrong ranks."""


@exactness("bitwise")
def lint_collectives(graph: fx.Graph) -> Outcome:
    """Report what the placements of values prove to be wrong, and change nothing.

    - double reduce: an all-reduce or reduce-scatter of a value that all ranks hold already;
    - missing reduce: a partial sum that reaches a nonlinear op, or is returned;
    - replicated term: a value that all ranks hold, added to a partial sum (a bias, a shared expert,
      the residual), and so counted once for each rank;
    - wrong group: a sum over more ranks than the value is partial over.

    Unknown is no mistake: reductions of values that nothing is known of are counted, not blamed.
    A value divided by the number of ranks before or after is an average, and right. Code that only
    one rank runs (`if rank == 0: y = y + shared`) looks like a replicated term in that rank's
    graph; `moe_compile.parallel.mark_partial(shared)` says that it is meant.
    """
    outcome = Outcome()
    wanted = settings_of(graph).collectives
    if wanted == "ignore":
        return outcome
    placements = Placements(graph)
    seen = set()
    for finding in placements.findings:
        text = f"{finding.kind}: {finding.text}"
        where = trail_of(finding.node)
        if (where, text) in seen:
            continue
        seen.add((where, text))
        outcome.mistake(finding.node, text)
        if wanted == "warn":
            place = " | ".join(x for x in (layer_of(finding.node), where) if x)
            warnings.warn(
                f"{text} [{place or finding.node.name}]", CollectivesWarning, stacklevel=2
            )
    if wanted == "error" and outcome.mistakes:
        lines = [f"  {e.source or e.layer}: {e.detail}" for e in outcome.mistakes]
        raise RuntimeError("\n".join(["lint_collectives: expected none, got", *lines]))
    _tell_unknown(graph, placements, outcome)
    return outcome


def _tell_unknown(graph: fx.Graph, placements: Placements, outcome: Outcome) -> None:
    """How many reductions could not be judged, and what was missing for the first."""
    reductions = [c for c in collectives(graph) if c.target in (ALL_REDUCE, REDUCE_SCATTER)]
    unknown = [c for c in reductions if placements.of(c.source, c.group).is_unknown]
    if unknown:
        why = placements.of(unknown[0].source, unknown[0].group).why
        text = f"{len(unknown)} of {len(reductions)} reductions not judged; the first: {why}"
        outcome.decline(unknown[0].value, text)
