"""Tensor and expert parallel: which rows of which weights a rank holds, and how ranks exchange their results.

Every split is one of OUTPUT rows: a rank computes some rows of a product, with the whole input, and the ranks collect
all rows (`all_gather`). No sum is ever cut in two, so every number is computed as in a single process, in the same
order, and the logits are the same bits for any number of ranks. The released engine instead splits `wo_b` by columns
and adds partial sums of it and of the experts, which sends less and changes the last bits.

    embed, head                  rows of the vocabulary
    attn.wq_b, attn_sink, wo_a   whole o_groups and their heads
    indexer.wq_b                 heads
    attn.wo_b, shared experts    equal parts
    routed experts               whole experts, as many to each; their outputs go to all (`all_reduce_disjoint`)

The rest (norms, gates, low-rank and key projections, compressors, hyper-connections) is small and computed by all, so
that every rank knows which experts are chosen. On CPUs these numbers are the same bits everywhere; GPUs of one run must
be of one kind for that. A single rank exchanges nothing.
"""

import re
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dsv4.convert.checkpoint.names import block_of, expert_of
from dsv4.errors import UsageError, peer_failures

from .config import Config

SPLIT_ROWS = re.compile(
    r"^(embed|head)\.weight$|\.attn\.(wq_b|wo_a|wo_b)\.weight$|\.attn\.attn_sink$|\.indexer\.wq_b\.weight$"
    r"|\.shared_experts\.w[123]\.weight$"
)


@dataclass(frozen=True)
class TensorParallelGroup:
    """This process is rank `index` of `count` that run one model together.

    by_way_of_cpu: gloo and nccl cannot send from this device; tensors are copied to the CPU, exchanged, copied back.
    """

    index: int = 0
    count: int = 1
    by_way_of_cpu: bool = False

    def _reachable(self, x: torch.Tensor) -> torch.Tensor:
        return x.cpu().contiguous() if self.by_way_of_cpu else x.contiguous()

    def bounds(self, length: int) -> tuple[int, int]:
        """[start, stop) of this rank in a dimension of `length`, which the number of ranks divides."""
        step = length // self.count
        return self.index * step, (self.index + 1) * step

    def rows(self, name: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """The rows of a tensor that this rank holds; None for all of them."""
        return self.bounds(shape[0]) if self.count > 1 and SPLIT_ROWS.search(name) else None

    def holds(self, name: str, config: Config) -> bool:
        """Whether this rank needs a tensor: all but the routed experts of other ranks."""
        expert, block = expert_of(name), block_of(name)
        if expert is None or block is None:
            return True
        return expert.number in range(*self.bounds(config.routed_experts(block.stack)))

    def experts(self, config: Config) -> range:
        """The routed experts of this rank."""
        return range(*self.bounds(config.n_routed_experts))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """The ranks' slices [..., n] in one tensor: [..., count * n]."""
        if self.count == 1:
            return x
        mine = self._reachable(x)
        slices = [torch.empty_like(mine) for _ in range(self.count)]
        with peer_failures():
            dist.all_gather([_as_bytes(each) for each in slices], _as_bytes(mine))
        return torch.cat(slices, dim=-1).to(x.device)

    def all_reduce_disjoint(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n], n even, of which at most one rank has bits other than zero in each place: those bits, for all.

        Added as integers: exact, and a negative zero stays one.
        """
        if self.count == 1:
            return x
        mine = self._reachable(x)
        with peer_failures():
            dist.all_reduce(mine.view(torch.int32))
        return mine.to(x.device)


SINGLE = TensorParallelGroup()


def _as_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8)


def check_divisible(config: Config, group: TensorParallelGroup) -> None:
    """Raise UsageError naming the first dimension that the ranks cannot share equally, and numbers that can."""
    lengths = {
        "o_groups": config.o_groups,
        "n_routed_experts": config.n_routed_experts,
        "dspark_n_routed_experts": config.routed_experts("mtp"),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "moe_intermediate_size": config.moe_intermediate_size,
        "index_n_heads": config.index_n_heads,
    }
    possible = [n for n in range(1, config.o_groups + 1) if not any(length % n for length in lengths.values())]
    for name, length in lengths.items():
        if length % group.count:
            raise UsageError(
                f"{group.count} ranks cannot share {name} = {length} equally",
                f"This checkpoint can be run by {', '.join(map(str, possible))} ranks.",
            )
