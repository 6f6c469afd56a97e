"""What a pass did to one graph, in words that a user of the model understands."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from torch import fx

Exactness = Literal["bitwise", "reassociating", "lossy"]
EXACTNESS: tuple[Exactness, ...] = ("bitwise", "reassociating", "lossy")


@dataclass(frozen=True)
class Event:
    """One rewrite, or one thing that looked like it and was declined."""

    layer: str  # module path, as in "model.layers.3.mlp.experts", or ""
    source: str  # the model's line, as in "modeling_mixtral.py:87: y = self.gate(x)", or ""
    detail: str  # what it became, or the reason why it was left


@dataclass
class Outcome:
    """All events of one run of one pass over one graph."""

    rewrites: list[Event] = field(default_factory=list)
    declined: list[Event] = field(default_factory=list)
    mistakes: list[Event] = field(default_factory=list)  # of the model, found by a lint

    def rewrote(self, node: fx.Node, detail: str) -> None:
        self.rewrites.append(Event(layer_of(node), source_of(node), detail))

    def mistake(self, node: fx.Node, text: str) -> None:
        self.mistakes.append(Event(layer_of(node), trail_of(node) or source_of(node), text))

    def decline(self, node: fx.Node, reason: str) -> None:
        self.declined.append(Event(layer_of(node), source_of(node), reason))


class Declined(Exception):
    """Raised inside a matcher where a thing looked at is not proved to be the thing looked for."""


Pass = Callable[[fx.Graph], Outcome]
P = TypeVar("P", bound=Callable[..., object])


def exactness(kind: Exactness) -> Callable[[P], P]:
    """State how a pass may change results: not at all, by the order of rounding, or more."""

    def mark(pass_: P) -> P:
        pass_.exactness = kind  # type: ignore[attr-defined]
        return pass_

    return mark


def layer_of(node: fx.Node) -> str:
    """The path of the module that made the node, without Dynamo's decoration."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    path = re.sub(r"\[\s*['\"]?(\w+)['\"]?\s*\]", r".\1", str(path))
    path = re.sub(r"\._modules\b", "", path)
    return re.sub(r"^L\.(self|fn|mod)\.?|^L\.", "", path).replace("()", "")


def source_of(node: fx.Node) -> str:
    """The innermost line of the model's own code: "modeling_mixtral.py:87: y = self.gate(x)"."""
    frames = _frames(node)
    mine = [f for f in frames if "/torch/" not in f[0] and "/integrations/moe.py" not in f[0]]
    return _shown((mine or frames)[-1]) if mine or frames else ""


def trail_of(node: fx.Node, most: int = 3) -> str:
    """The innermost lines of the model's own code, callers first: "a.py:3: f(x) > b.py:9: ..."."""
    mine = [f for f in _frames(node) if "/torch/" not in f[0] and _OWN not in f[0]]
    return " > ".join(map(_shown, mine[-most:]))


_OWN = "/moe_compile/parallel.py"


def _frames(node: fx.Node) -> list[tuple[str, str, str]]:
    trace = node.meta.get("stack_trace") or ""
    return re.findall(r'File "([^"]+)", line (\d+), in \S+\n\s*(.*)', trace)


def _shown(frame: tuple[str, str, str]) -> str:
    path, line, code = frame
    return f"{path.rsplit('/', 1)[-1]}:{line}: {code.strip()}"
