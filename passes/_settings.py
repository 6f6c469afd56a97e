"""What the user chose that a pass has to know, carried by the graph's module."""

from dataclasses import dataclass

from torch import fx

from moe_compile.passes._outcome import Exactness

_KEY = "moe_compile"


@dataclass(frozen=True)
class Settings:
    """`constant_budget`: bytes that the live constants of one graph may take.

    `collectives`: what a mistake in the model's collectives is, "warn", "error" or "ignore".
    """

    exactness: Exactness = "reassociating"
    constant_budget: int = 2**30
    collectives: str = "warn"


def set_settings(gm: fx.GraphModule, settings: Settings) -> None:
    gm.meta[_KEY] = settings


def settings_of(graph: fx.Graph) -> Settings:
    """Those set for the graph's module, or the defaults."""
    settings = getattr(graph.owning_module, "meta", {}).get(_KEY, Settings())
    assert isinstance(settings, Settings)
    return settings
