"""Live constants at run time: computed from parameters, and again when these change.

A change is seen by a parameter's identity, its version counter and its address, looked at before
every forward. What none of them shows (`p.data.copy_(x)`, writes by numpy or DLPack) needs a call
of `moe_compile.refresh()`. A value keeps its address for as long as its shape, so that CUDA graphs
that read it go on reading the newest.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from moe_compile.passes._constants import Constant

_version, _pointer = attrgetter("_version"), Tensor.data_ptr
# CUDA builds of torch have this for CUDA-graph trees.
_addresses_equal = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)


class LiveConstant:
    """One value, shared by all compiled graphs that make it from the same parameters."""

    def __init__(self, recipe: fx.GraphModule, sources: Sequence[Tensor]) -> None:
        self._recipe = recipe
        self._sources = [weakref.ref(s) for s in sources]
        self._seen: tuple[Any, ...] = ()
        self._lock = threading.Lock()
        self.value: Tensor | None = None
        self.readers: weakref.WeakSet[_Bound] = weakref.WeakSet()

    def drop(self) -> None:
        """Free the value; who reads it asks for a new one."""
        self.value = None
        for bound in self.readers:
            bound.values, bound.versions = [], None

    def update(self, sources: Sequence[Tensor], force: bool = False) -> None:
        """Compute the value if a source changed since it was, in place where the shape allows."""
        with self._lock:
            now = (_versions(sources), tuple(map(_pointer, sources)))
            if not force and self.value is not None and now[0] is not None and now == self._seen:
                return
            new, old = self.compute(sources), self.value
            with torch.no_grad(), torch.inference_mode(False):
                if old is not None and _like(old, new):
                    old.copy_(new)
                else:
                    self.value = new
            # Another stream may read it next, and no event tells that stream to wait.
            if new.is_cuda and now[0] is not None:
                torch.cuda.current_stream(new.device).synchronize()
            self._seen = now

    def compute(self, sources: Sequence[Tensor]) -> Tensor:
        """A new tensor."""
        with torch.no_grad(), torch.inference_mode(False):
            new: Tensor = self._recipe(*[s.detach() for s in sources])
            mine = new.untyped_storage().data_ptr()
            return (
                new.clone() if any(s.untyped_storage().data_ptr() == mine for s in sources) else new
            )

    def sources(self) -> list[Tensor] | None:
        """The parameters, or None once one of them is gone."""
        found = [ref() for ref in self._sources]
        return None if any(s is None for s in found) else found  # type: ignore[return-value]


class _Bound:
    """The values of one graph for one set of parameters, and what was last seen of these."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.versions: tuple[int, ...] | None = None
        self.pointers: list[int] = []


class LiveGraph:
    """A compiled graph that takes its constants as its last inputs, and hands them to it."""

    _boxed_call = True

    def __init__(self, compiled: Callable[[list[Any]], Any], constants: Sequence[Constant]) -> None:
        used = sorted({i for c in constants for i in c.sources})
        self._compiled = compiled
        self._recipes = [(c.recipe, [used.index(i) for i in c.sources]) for c in constants]
        self._all = list(range(len(used)))
        self._pick = _picker(used)
        self._bound: dict[tuple[int, ...], _Bound] = {}
        self._on_cuda = any(c.val.device.type == "cuda" for c in constants)

    def __call__(self, inputs: list[Any]) -> Any:
        sources = self._pick(inputs)
        bound = self._bound.get(tuple(map(id, sources)))
        if (
            bound is None
            or bound.versions is None
            or not self._at_same_addresses(sources, bound)
            or tuple(map(_version, sources)) != bound.versions
        ):
            inputs.extend(self._renewed(sources, bound))
        else:
            inputs.extend(bound.values)
        return self._compiled(inputs)

    def _at_same_addresses(self, sources: tuple[Tensor, ...], bound: _Bound) -> bool:
        if _addresses_equal is not None:  # 5 us less for 58 parameters
            return bool(_addresses_equal(list(sources), bound.pointers, self._all))
        return list(map(_pointer, sources)) == bound.pointers

    def _renewed(self, sources: tuple[Tensor, ...], bound: _Bound | None) -> list[Tensor]:
        """The values after a change, or in the first call."""
        bound = bound or self._bind(sources)
        parts = [[sources[i] for i in where] for _, where in self._recipes]
        recipes = [recipe for recipe, _ in self._recipes]
        constants = [shared_constant(r, part) for r, part in zip(recipes, parts, strict=True)]
        pairs = list(zip(constants, parts, strict=True))
        if self._on_cuda and torch.cuda.is_current_stream_capturing():
            # Recorded with the rest, the computation runs in every replay; here nothing ran yet.
            return [constant.compute(part) for constant, part in pairs]
        seen = _versions(sources), list(map(_pointer, sources))
        for constant, part in pairs:
            constant.readers.add(bound)
            constant.update(part)
        bound.values = [constant.value for constant in constants]  # type: ignore[misc]
        bound.versions, bound.pointers = seen
        return bound.values

    def _bind(self, sources: tuple[Tensor, ...]) -> _Bound:
        key, bound = tuple(map(id, sources)), _Bound()
        self._bound[key] = bound
        for source in sources:
            weakref.finalize(source, _forget, weakref.ref(self), key).atexit = False
        return bound


def _forget(graph: "weakref.ref[LiveGraph]", key: tuple[int, ...]) -> None:
    """Drop what was bound to a parameter that is gone; its id may soon be another's."""
    if (mine := graph()) is not None:
        mine._bound.pop(key, None)


# They live as long as the parameters, not as the compiled code: the next compile takes them over,
# and a CUDA graph that the user captured goes on reading them.
_SHARED: dict[tuple[Any, ...], LiveConstant] = {}
_SHARED_LOCK = threading.Lock()


def shared_constant(recipe: fx.GraphModule, sources: Sequence[Tensor]) -> LiveConstant:
    """The live constant of this recipe and these parameters, which other graphs may have, too."""
    dtypes = tuple(s.dtype for s in sources)
    ids = tuple(map(id, sources))
    key = (recipe.code, ids, dtypes)
    with _SHARED_LOCK:
        for other in list(_SHARED):  # those of parameters that have since become of another dtype
            if other[1] == ids and other[2] != dtypes:
                _SHARED.pop(other).drop()
        if key not in _SHARED:
            _SHARED[key] = LiveConstant(recipe, sources)
            for source in sources:
                weakref.finalize(source, _SHARED.pop, key, None).atexit = False
        return _SHARED[key]


def refresh(model: nn.Module | None = None) -> int:
    """Compute live constants again, and return how many: after changes that nothing shows.

    Such are `p.data.copy_(x)`, `p.data.mul_(x)`, writes through numpy or DLPack, and, for a CUDA
    graph that you captured yourself, every change: its replay runs no Python. The values keep
    their addresses. All models if none is given.
    """
    mine = None
    if model is not None:
        mine = {id(t) for t in (*model.parameters(), *model.buffers())}
    count = 0
    for constant in list(_SHARED.values()):
        sources = constant.sources()
        if sources is None or constant.value is None:
            continue
        if mine is None or any(id(s) in mine for s in sources):
            constant.update(sources, force=True)
            count += 1
    return count


def constant_bytes() -> int:
    """Bytes that all live constants take now."""
    values = [constant.value for constant in list(_SHARED.values())]
    return sum(v.untyped_storage().nbytes() for v in values if v is not None)


def _versions(sources: Sequence[Tensor]) -> tuple[int, ...] | None:
    """The version counters, or None: tensors made under inference_mode have none."""
    return None if any(s.is_inference() for s in sources) else tuple(map(_version, sources))


def _like(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


def _picker(indices: Sequence[int]) -> Callable[[list[Any]], tuple[Any, ...]]:
    if len(indices) == 1:
        only = indices[0]
        return lambda inputs: (inputs[only],)
    return itemgetter(*indices)
