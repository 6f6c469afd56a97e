"""What `quant_fp8` made, for ops that quantise what they read by themselves."""

import operator
from typing import Any, NamedTuple

from torch import fx

from moe_compile.ops import moe
from moe_compile.passes._graph import args, is_call
from moe_compile.passes._outcome import Declined


class Quantised(NamedTuple):
    """x as it was before, and how its groups of 128 were quantised."""

    x: fx.Node
    power_of_two: bool
    amax_floor: float


def arguments_of(call: fx.Node) -> dict[str, Any]:
    """All arguments of a call of an op by name, with the defaults of those not given."""
    schema = call.target._schema.arguments  # type: ignore[union-attr]
    given = {**dict(zip((a.name for a in schema), args(call), strict=False)), **call.kwargs}
    return {a.name: given.get(a.name, a.default_value) for a in schema}


def quantised(q: Any, scale: Any) -> Quantised:
    """What rows and their scales were before one `quant_fp8`; Declined where that is not known."""
    if not (is_call(q, operator.getitem) and is_call(scale, operator.getitem)):
        raise Declined("rows that quant_fp8 did not make here")
    quant = q.args[0]
    if not is_call(quant, moe.quant_fp8.default) or (scale.args[0], q.args[1]) != (quant, 0):
        raise Declined("rows that quant_fp8 did not make here")
    how = arguments_of(quant)
    found = Quantised(how.pop("x"), how.pop("power_of_two"), how.pop("amax_floor"))
    how.pop("column_major")  # where scales lie
    schema = {a.name: a.default_value for a in moe.quant_fp8.default._schema.arguments}
    other = [name for name, value in how.items() if value != schema[name]]
    if other:
        raise Declined(f"rows quantised with {', '.join(other)}")
    return found
