"""Several ranks for tests: one process that knows four of them, or processes that talk."""

import os
import socket
from collections import Counter

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_compile.passes._collectives import COLLECTIVES, c10d
from moe_compile.testing import capture, run_passes, run_ranks

RANKS = 4
PAIRS = {"rows": [[0, 1], [2, 3]], "columns": [[0, 2], [1, 3]]}  # of a mesh of 2 x 2


class Mesh:
    """The groups that rank `rank` of four is in: all ranks, its row and its column."""

    def __init__(self, rank=0):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=RANKS)
        self.all = dist.group.WORLD
        made = {name: [dist.new_group(ranks) for ranks in PAIRS[name]] for name in PAIRS}
        mine = {
            n: next(g for g in gs if g != dist.GroupMember.NON_GROUP_MEMBER)
            for n, gs in made.items()
        }
        self.row, self.column = mine["rows"], mine["columns"]
        self.parts = {self.row.group_name: PAIRS["rows"], self.column.group_name: PAIRS["columns"]}

    def close(self):
        dist.destroy_process_group()


def all_reduce(x, group=None, op="sum"):
    return _waited(c10d.all_reduce(x, op, (group or dist.group.WORLD).group_name))


def reduce_scatter(x, group=None, op="sum"):
    group = group or dist.group.WORLD
    return _waited(c10d.reduce_scatter_tensor(x, op, group.size(), group.group_name))


def all_gather(x, group=None):
    group = group or dist.group.WORLD
    return _waited(c10d.all_gather_into_tensor(x, group.size(), group.group_name))


def _waited(x):
    return c10d.wait_tensor(x)


def count_collectives(gm):
    """How often each collective stands in a graph, by its name."""
    found = [n.target for n in gm.graph.nodes if n.target in COLLECTIVES]
    return Counter(str(t).split(".")[1] for t in found)


def trace(fn, *inputs):
    """The graph of `fn`, without a compile: a hundred times as fast as `capture`."""
    with torch.no_grad():
        gm = make_fx(fn, tracing_mode="fake")(*inputs)
    (returned,) = gm.graph.output_node().args
    if not isinstance(returned, (list, tuple)):
        gm.graph.output_node().args = ([returned],)
        gm.recompile()
    return gm


@torch.no_grad()
def before_and_after(fn, parts, *passes, shape=(8, 4), compiled=False, dynamic=None):
    """Trace or capture `fn`, run passes; the graph, their outcomes, and collectives of both.

    What the ranks return before and after has to agree.
    """
    torch.manual_seed(0)
    given = [[torch.randn(shape, dtype=torch.float64)] for _ in range(RANKS)]
    gm = capture(fn, *given[0], dynamic=dynamic) if compiled else trace(fn, *given[0])
    symbols = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    sizes = [s.node.hint for s in symbols if not isinstance(s, torch.Tensor)]
    given = [[*sizes, *xs] for xs in given]
    want = run_ranks(gm, [[_copy(x) for x in xs] for xs in given], parts)
    before = count_collectives(gm)
    outcomes = run_passes(gm, *passes)
    got = run_ranks(gm, [[_copy(x) for x in xs] for xs in given], parts)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    return gm, outcomes, before, count_collectives(gm)


def _copy(x):
    return x.clone() if isinstance(x, torch.Tensor) else x


def spawn(worker, n, *args, backend=None):
    """Run `worker(rank, n, *args)` in n processes; errors of any are raised.

    They talk by NCCL where there is a GPU for each, by gloo otherwise; see `own_device`.
    """
    backend = backend or ("nccl" if torch.cuda.device_count() >= n else "gloo")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_start, (worker, n, port, backend, *args), nprocs=n)


def own_device():
    """Where the tensors of a process that `spawn` started have to be."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def _start(rank, worker, n, port, backend, *args):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n))
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, rank=rank, world_size=n)
    worker(rank, n, *args)
    dist.barrier()  # nobody leaves while another still talks
    # Python's shutdown races with gloo's threads, which then call std::terminate.
    os._exit(0)
