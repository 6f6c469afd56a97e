"""Passes over FX graphs, in the order in which they run."""

if __name__ != "moe_compile.passes":
    raise ImportError(f"{__name__!r} is moe_compile.passes: import it by that name")
