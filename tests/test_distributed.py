"""Under ``torch.distributed``: each scenario runs on two processes, wrapped and unwrapped, and all that can be seen has
to be the same on each.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed._functional_collectives as functional
from ranks import Ranks
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

from lazy_einsum import FallbackWarning, OptimizedModule, UntraceableError

einsum = torch.einsum

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


class Block(nn.Module):
    """Has something to optimize."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(6, 6, dtype=torch.float64) / 3)
        self.b = nn.Parameter(torch.randn(6, 6, dtype=torch.float64) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + einsum("bi,ij,jk->bk", x, self.a, self.b)


class Net(nn.Module):
    """Two blocks and a head.

    Attributes:
        extra: whether there is a parameter that takes no part.
    """

    def __init__(self, extra: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(6, 3, dtype=torch.float64)
        if extra:
            self.extra = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return einsum("bi,ci,c->b", self.blocks(x), self.head.weight, self.head.bias)


class Checkpointed(Net):
    """Runs its blocks under a checkpoint."""

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.blocks, x, use_reentrant=False)
        return einsum("bi,ci,c->b", y, self.head.weight, self.head.bias)


class Communicating(nn.Module):
    """Calls ``between(x)`` between two calls of a block."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = Block()
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.between(self.block(x)))


def whole(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def state(module: nn.Module) -> dict[str, Any]:
    """Parameters, buffers and gradients."""
    found: dict[str, Any] = {}
    for name, parameter in module.named_parameters():
        found[name.removeprefix("module.")] = parameter.detach()
        found[f"gradient of {name.removeprefix('module.')}"] = parameter.grad
    found.update(module.named_buffers())
    return found


def compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        mine = found[name]
        assert type(mine) is type(value), name
        if isinstance(value, DTensor):
            assert (mine.placements, mine.device_mesh) == (value.placements, value.device_mesh), name
            mine, value = mine.to_local(), value.to_local()
        torch.testing.assert_close(mine, value, rtol=1e-9, atol=1e-9, msg=partial("{}: {}".format, name))


def batch(rank: int, step: int) -> Tensor:
    """Of another size on each rank and at each step."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(2 + rank + step % 4, 6, dtype=torch.float64, generator=generator)


def train(
    wrapped: nn.Module,
    plain: nn.Module,
    rank: int,
    steps: int = 6,
    micro: int = 1,
    inputs: Callable[[int, int], Tensor] = batch,
) -> None:
    """Train both alike and compare after each step; ``micro`` batches make a step."""
    optimizers = [torch.optim.Adam(module.parameters(), lr=1e-2) for module in (wrapped, plain)]
    for step in range(steps):
        losses = []
        for module in (wrapped, plain):
            module.zero_grad()
            for number in range(micro):
                last = number == micro - 1
                with contextlib.nullcontext() if last else module.no_sync():
                    loss = module(inputs(rank, step * micro + number)).square().mean()
                    loss.backward()
            losses.append(loss.detach())
        compare({"loss": losses[0], **state(wrapped)}, {"loss": losses[1], **state(plain)})
        for optimizer in optimizers:
            optimizer.step()


@contextlib.contextmanager
def falls_back(reason: str) -> Iterator[None]:
    """There is one warning, which says ``reason``."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", FallbackWarning)
        yield
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 1 and reason in messages[0], messages


def is_specialized(wrapped: Any) -> None:
    info = wrapped.cache_info()
    assert info.fallbacks == 0 and info.hits > 0 and info.currsize > 0, info


# -- DistributedDataParallel ------------------------------------------------------------------------------------------


def ddp_around(rank: int, **options: Any) -> None:
    wrapped = DDP(OptimizedModule(Net(extra="find_unused_parameters" in options)), **options)
    train(wrapped, DDP(Net(extra="find_unused_parameters" in options), **options), rank)
    is_specialized(wrapped.module)


def ddp_inside(rank: int, **options: Any) -> None:
    wrapped = OptimizedModule(DDP(Net(extra="find_unused_parameters" in options), **options))
    train(wrapped, DDP(Net(extra="find_unused_parameters" in options), **options), rank)
    is_specialized(wrapped)
    assert {signature.module for signature in wrapped.specializations} == {"module"}


def ddp_accumulation(rank: int) -> None:
    for make in (lambda: DDP(OptimizedModule(Net())), lambda: OptimizedModule(DDP(Net()))):
        train(make(), DDP(Net()), rank, steps=3, micro=3)


def ddp_checkpoint(rank: int) -> None:
    """A checkpoint inside the module, and one around the wrapper."""
    with falls_back("checkpointing"):
        train(DDP(OptimizedModule(Checkpointed())), DDP(Checkpointed()), rank)

    class Around(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    wrapped = OptimizedModule(Net())
    train(DDP(Around(wrapped)), DDP(Around(Net())), rank)
    is_specialized(wrapped)


def ddp_refused(rank: int) -> None:
    """What it wraps can't be traced as a whole: its parts are specialized, with one warning on it."""
    with falls_back("module (Checkpointed) runs as it is, not optimized: forward uses checkpointing"):
        train(OptimizedModule(DDP(Checkpointed())), DDP(Checkpointed()), rank)
    strict = OptimizedModule(DDP(Checkpointed()), on_untraceable="raise")
    with pytest.raises(UntraceableError, match="checkpointing"):
        strict(batch(rank, 0))


def ddp_prepare(rank: int) -> None:
    wrapped = OptimizedModule(DDP(Net()))
    entry = wrapped.prepare(batch(rank, 0))
    wrapped(batch(rank, 0))
    assert (entry.hits, wrapped.cache_info().misses) == (1, 1)


def ddp_state_dict(rank: int) -> None:
    plain, child = DDP(Net()), Net()
    with torch.no_grad():
        plain.module.head.weight.add_(1)
    wrapped = OptimizedModule(child)
    wrapped.load_state_dict(plain.state_dict())  # with the prefix module.
    compare(wrapped.state_dict(), plain.module.state_dict())
    outside, inside = DDP(wrapped), OptimizedModule(DDP(Net()))
    inside.load_state_dict(plain.state_dict())
    for target in (outside, inside):
        assert list(target.state_dict()) == list(plain.state_dict())
        compare(dict(target.state_dict()), dict(plain.state_dict()))
        torch.testing.assert_close(target(batch(rank, 0)), plain(batch(rank, 0)))
    # The wrapper's attribute ``module`` is its child, here DDP itself and not what that wraps.
    for target in (outside, inside.module):
        compare(get_model_state_dict(target), get_model_state_dict(plain))


# -- fully_shard ------------------------------------------------------------------------------------------------------


def blocks_and_root(net: nn.Module, **options: Any) -> nn.Module:
    for block in net.blocks:
        fully_shard(block, **options)
    return fully_shard(net, **options)


def grouped(net: nn.Module) -> nn.Module:
    fully_shard([net.blocks[0], net.blocks[1]])
    return fully_shard(net)


def blocks_only(net: nn.Module) -> nn.Module:
    for block in net.blocks:
        fully_shard(block)
    return net


def nested(net: nn.Module) -> nn.Module:
    blocks_only(net)
    fully_shard(net.blocks)
    return nn.Sequential(fully_shard(net))


def prefetching(net: nn.Module) -> nn.Module:
    blocks_and_root(net)
    first, second = net.blocks
    first.set_modules_to_forward_prefetch([second])
    second.set_modules_to_backward_prefetch([first])
    return net


def partly_frozen(net: nn.Module) -> nn.Module:
    net.blocks[0].a.requires_grad_(False)
    return blocks_and_root(net)


def mixed_precision(net: nn.Module, **options: Any) -> nn.Module:
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float64, **options)
    for block in net.blocks:
        fully_shard(block, mp_policy=policy)
    return fully_shard(net) if policy.output_dtype else fully_shard(net, mp_policy=policy)


SHARDINGS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "blocks and root": blocks_and_root,
    "root": fully_shard,
    "blocks": blocks_only,
    "not resharded": partial(blocks_and_root, reshard_after_forward=False),
    "several as one": grouped,
    "nested": nested,
    "prefetching": prefetching,
    "partly frozen": partly_frozen,
}


def fsdp(rank: int, sharding: str) -> None:
    shard = SHARDINGS[sharding]
    child = shard(Net())
    wrapped, plain = OptimizedModule(child), shard(Net())
    events: list[list[str]] = [[], []]
    for module, fired in zip((child, plain), events, strict=True):
        watch(module, fired)
    train(wrapped, plain, rank)
    assert events[0] == events[1]
    is_specialized(wrapped)
    names = {name for name, part in child.named_modules() if isinstance(part, (FSDPModule, Block)) and name}
    parts = wrapped.cache_info().parts
    if sharding != "root":
        assert {parts[name] for name in names if name.endswith(("0", "1"))} == {"specialized"}, parts
    for target in (wrapped, plain):
        target.eval()
    with torch.no_grad():
        torch.testing.assert_close(wrapped(batch(rank, 0)), plain(batch(rank, 0)))
    compare(get_model_state_dict(wrapped), get_model_state_dict(plain))
    assert list(wrapped.state_dict()) == list(plain.state_dict())
    reached = {name: tensor + 1 for name, tensor in get_model_state_dict(plain).items()}
    for target in (wrapped, plain):
        set_model_state_dict(target, reached)
    torch.testing.assert_close(wrapped(batch(rank, 1)), plain(batch(rank, 1)))


def watch(module: nn.Module, fired: list[str]) -> None:
    """Note when parameters are gathered and let go."""
    for name, part in module.named_modules():
        if isinstance(part, FSDPModule):
            for method in ("unshard", "reshard"):
                groups = part._get_fsdp_state()._fsdp_param_groups
                for group in groups:
                    _watch_one(group, method, f"{method} {name}", fired)


def _watch_one(group: Any, method: str, event: str, fired: list[str]) -> None:
    original = getattr(group, method)

    def noting(*args: Any, **kwargs: Any) -> Any:
        fired.append(event)
        return original(*args, **kwargs)

    setattr(group, method, noting)


@torch.no_grad()
def fsdp_frozen(rank: int) -> None:
    """What is sharded comes and goes, so nothing is kept of it, and of all else."""
    for name, shard in SHARDINGS.items():
        wrapped, plain = OptimizedModule(shard(Net()), frozen=True), shard(Net())
        for step in (0, 0, 1, 2, 3):
            torch.testing.assert_close(wrapped(batch(rank, step)), plain(batch(rank, step)))
        folds = {fold.fold.names for entry in wrapped.specializations.values() for fold in entry.folds}
        assert folds == ({("head.weight", "head.bias")} if name == "blocks" else set()), name
        for parameter in plain.parameters():
            parameter.mul_(2)
        set_model_state_dict(wrapped, get_model_state_dict(plain))
        torch.testing.assert_close(wrapped(batch(rank, 0)), plain(batch(rank, 0)))


@torch.no_grad()
def ddp_frozen(rank: int) -> None:
    inside = OptimizedModule(DDP(Net()), frozen=("module.blocks.0.a", "module.blocks.0.b"))
    around = OptimizedModule(Net(), frozen=("blocks.0.a", "blocks.0.b"))
    outer, plain = DDP(around), Net()
    for step in (0, 0, 1, 2, 3):
        for module in (inside, outer):
            torch.testing.assert_close(module(batch(rank, step)), plain(batch(rank, step)))
    for module in (inside, around):
        assert module.cache_info().fold_bytes == 6 * 6 * 8


def fsdp_mixed_precision(rank: int) -> None:
    for options in ({}, {"output_dtype": torch.float64}, {"cast_forward_inputs": False}):

        def inputs(rank: int, step: int, options: Any = options) -> Tensor:
            return batch(rank, step) if options.get("cast_forward_inputs", True) else batch(rank, step).float()

        wrapped, plain = (mixed_precision(Net(), **options) for _ in range(2))
        wrapped = OptimizedModule(wrapped)
        for step in range(4):
            found, expected = (module(inputs(rank, step)) for module in (wrapped, plain))
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            for module, result in ((wrapped, found), (plain, expected)):
                module.zero_grad()
                result.square().mean().backward()
            for mine, other in zip(wrapped.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(whole(mine.grad), whole(other.grad), rtol=1e-5, atol=1e-5)
        is_specialized(wrapped)


def fsdp_checkpoint(rank: int) -> None:
    def make() -> nn.Module:
        net = Net()
        net.blocks = nn.Sequential(*map(checkpoint_wrapper, net.blocks))
        return blocks_and_root(net)

    wrapped = OptimizedModule(make())
    with falls_back("blocks.0 (FSDPCheckpointWrapper) runs as it is, not optimized: forward uses checkpointing"):
        train(wrapped, make(), rank)
    assert wrapped.cache_info().currsize > 0  # the rest


def fsdp_sharded_weight(rank: int) -> None:
    """A parameter that is used outside of the module that gathers it: an error in eager mode."""

    def make() -> nn.Module:
        net = Net()
        fully_shard(net.head)
        return net

    wrapped = OptimizedModule(make(), on_untraceable="ignore")
    for module in (wrapped, make()):
        with pytest.raises(RuntimeError, match=r"mixed .* and DTensor"):
            module(batch(rank, 0))


# -- DTensor ----------------------------------------------------------------------------------------------------------


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = Block()
        self.up = nn.Linear(6, 8, dtype=torch.float64)
        self.down = nn.Linear(8, 6, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.block(x)).relu())


def same(rank: int, step: int) -> Tensor:
    return batch(0, step)


def tensor_parallel(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))

    def make() -> nn.Module:
        return parallelize_module(Perceptron(), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})

    wrapped = OptimizedModule(make())
    with falls_back("up.weight is a DTensor, a subclass of torch.Tensor; specialized on their own: block"):
        train(wrapped, make(), rank, inputs=same)


def tensor_and_data_parallel(rank: int) -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))

    def make() -> nn.Module:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        net = nn.Sequential(parallelize_module(Perceptron(), mesh["tensor"], plan), Block())
        for part in (*net, net):
            fully_shard(part, mesh=mesh["data"])
        return net

    wrapped = OptimizedModule(make())
    with falls_back("0.up.weight is a DTensor, a subclass of torch.Tensor; specialized on their own: 0.block"):
        train(wrapped, make(), rank, inputs=same)


def distributed_arguments(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    wrapped = OptimizedModule(lambda *operands: einsum("ij,jk,kl->il", *operands))
    torch.manual_seed(0)
    with falls_back("argument 0 is a DTensor, a subclass of torch.Tensor"):
        for _ in range(3):
            operands = [torch.randn(4, 4, dtype=torch.float64) for _ in range(3)]
            placed = [
                distribute_tensor(operand, mesh, [placement])
                for operand, placement in zip(operands, (Shard(0), Replicate(), Replicate()), strict=True)
            ]
            torch.testing.assert_close(wrapped(*placed).full_tensor(), torch.linalg.multi_dot(operands))
    torch.testing.assert_close(wrapped(*operands), torch.linalg.multi_dot(operands))  # plain ones are specialized
    assert wrapped.cache_info().currsize == 1


# -- one rank traces while the other does not -------------------------------------------------------------------------


def all_reduce(x: Tensor) -> Tensor:
    with torch.no_grad():
        mean = x.mean(0)
        dist.all_reduce(mean)
    return x - mean


def all_reduce_async(x: Tensor) -> Tensor:
    mean = x.detach().mean(0)
    dist.all_reduce(mean, async_op=True).wait()
    return x - mean


def all_gather(x: Tensor) -> Tensor:
    found = [torch.empty(6, dtype=x.dtype) for _ in range(2)]
    dist.all_gather(found, x.detach().sum(0))
    return x + found[0] - found[1]


def all_gather_object(x: Tensor) -> Tensor:
    found: list[Any] = [None, None]
    dist.all_gather_object(found, dist.get_rank())
    return x * (1 + sum(found))


def barrier(x: Tensor) -> Tensor:
    dist.barrier()
    return x


def send_and_receive(x: Tensor) -> Tensor:
    mine, theirs = x.detach().sum(0), torch.empty(6, dtype=x.dtype)
    peer = 1 - dist.get_rank()
    sent = [dist.P2POp(dist.isend, mine, peer), dist.P2POp(dist.irecv, theirs, peer)]
    for work in dist.batch_isend_irecv(sent):
        work.wait()
    return x + theirs


class Synchronized(torch.autograd.Function):
    """What ``SyncBatchNorm`` does, which runs on no CPU: communication in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        mean = x.mean(0)
        dist.all_reduce(mean)
        return x - mean

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        mean = gradient.mean(0)
        dist.all_reduce(mean)
        return gradient - mean


def functional_all_reduce(x: Tensor) -> Tensor:
    return x - functional.all_reduce(x.mean(0), "sum", dist.group.WORLD)


def functional_all_gather(x: Tensor) -> Tensor:
    return x + functional.all_gather_tensor_autograd(x.mean(0, keepdim=True), 0, dist.group.WORLD).sum(0)


REFUSED: Sequence[Callable[[Tensor], Tensor]] = (
    all_reduce,
    all_reduce_async,
    all_gather,
    all_gather_object,
    barrier,
    send_and_receive,
    Synchronized.apply,
)
RECORDED: Sequence[Callable[[Tensor], Tensor]] = (functional_all_reduce, functional_all_gather)


def communication(rank: int) -> None:
    """No trace communicates: with one on one rank only, all goes on as it should."""
    for between in (*REFUSED, *RECORDED):
        plain, wrapped = Communicating(between), OptimizedModule(Communicating(between), on_untraceable="ignore")
        for step in range(3):
            if rank == 0:
                wrapped.cache_clear()
            if rank == step % 2:
                with contextlib.suppress(UntraceableError):
                    wrapped.prepare(batch(rank, step))
            train(wrapped, plain, rank, steps=1, inputs=lambda rank, _, step=step: batch(rank, step))
        assert (wrapped.cache_info().fallbacks == 0) == (between in RECORDED), between


def communication_is_named(rank: int) -> None:
    for between in (all_reduce, all_gather):
        with falls_back(f"forward communicates with other processes ({between.__name__})"):
            OptimizedModule(Communicating(between))(batch(rank, 0))


def synchronized_batch_norm(rank: int) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(6).double()
        return nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(Block(), norm, Block()))

    wrapped, plain = OptimizedModule(make(), on_untraceable="ignore"), make()
    for module in (wrapped, plain):
        with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on"):
            module(batch(rank, 0))
        module.eval()
    train(wrapped, plain, rank, steps=3)
    assert wrapped.cache_info().currsize > 0


# -- the same code everywhere -----------------------------------------------------------------------------------------


class Many(nn.Module):
    """Networks with many orders that cost the same."""

    def forward(self, *x: Tensor) -> Tensor:
        ring = einsum("ab,bc,cd,de,ef,fg,gh,ha->", *x[:8])
        star = einsum("ab,ac,ad,ae,af,ag,ah->bcdefgh", *x[:7]).sum()
        return ring + star + einsum("ab,bc,dc,ed,ae->e", *x[3:8]).sum()


def same_code(rank: int) -> None:
    """Ranks have other hash seeds, and have seen other calls before."""
    torch.manual_seed(0)
    operands = [torch.randn(3, 3, dtype=torch.float64) for _ in range(8)]
    if rank == 0:
        OptimizedModule(Many())(*[torch.randn(4, 4) for _ in range(8)])
    random_greedy: list[Any] = ["auto", "random-greedy", "branch-2"]
    found = []
    for optimize in random_greedy:
        wrapped = OptimizedModule(Many(), optimize=optimize)
        torch.testing.assert_close(wrapped(*operands), Many()(*operands))
        found.append(wrapped.code)
    net = OptimizedModule(blocks_and_root(Net()))
    for step in range(4):
        net(batch(0, step))
    found += [entry.code for entry in net.specializations.values()]
    found += [str(plan) for entry in net.specializations.values() for plan in entry.plans]
    gathered: list[Any] = [None, None]
    dist.all_gather_object(gathered, (hash("a"), found))
    assert gathered[0][0] != gathered[1][0], "the hash seeds are the same"
    assert gathered[0][1] == gathered[1][1]


# -- the tests --------------------------------------------------------------------------------------------------------

SCENARIOS: dict[str, Callable[[int], None]] = {
    "DDP around": ddp_around,
    "DDP inside": ddp_inside,
    "DDP around, unused parameters": partial(ddp_around, find_unused_parameters=True),
    "DDP inside, unused parameters": partial(ddp_inside, find_unused_parameters=True),
    "DDP around, static graph": partial(ddp_around, static_graph=True),
    "DDP inside, static graph": partial(ddp_inside, static_graph=True),
    "DDP, accumulation": ddp_accumulation,
    "DDP, checkpoint": ddp_checkpoint,
    "DDP inside, untraceable": ddp_refused,
    "DDP inside, prepare": ddp_prepare,
    "DDP, state_dict": ddp_state_dict,
    **{f"FSDP, {name}": partial(fsdp, sharding=name) for name in SHARDINGS},
    "FSDP, frozen": fsdp_frozen,
    "DDP, frozen": ddp_frozen,
    "FSDP, mixed precision": fsdp_mixed_precision,
    "FSDP, checkpoint": fsdp_checkpoint,
    "FSDP, sharded weight": fsdp_sharded_weight,
    "tensor-parallel": tensor_parallel,
    "tensor- and data-parallel": tensor_and_data_parallel,
    "DTensor arguments": distributed_arguments,
    "communication": communication,
    "communication is named": communication_is_named,
    "SyncBatchNorm": synchronized_batch_norm,
    "same code": same_code,
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    found = Ranks(tmp_path_factory.mktemp("ranks"))
    yield found
    found.stop()


@pytest.mark.parametrize("name", SCENARIOS)
def test_distributed(ranks: Ranks, name: str) -> None:
    ranks.run(SCENARIOS[name])


def _fails(rank: int) -> None:
    assert rank == 0, "this rank fails"
    dist.barrier()


def test_a_failure_on_one_rank_is_one_of_the_test(ranks: Ranks) -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1: Traceback.*this rank fails"):
        ranks.run(_fails)
    assert not ranks.is_running
