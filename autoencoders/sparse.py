"""Exact sparse arithmetic for codes of which few in a hundred are not 0.

Of the six products of a dense training step (encode, decode, and four gradients) only the first is
computed in full, in blocks that stay in the cache; nobody holds the whole matrix of codes. The
others run over the selected entries: sums of rows of a table (``embedding_bag``) and dot products
of pairs of rows (``sampled_addmm``). Results and gradients are those of dense arithmetic, up to
rounding.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

BLOCK_ENTRIES = 2**22
"""Entries of the matrix of codes that are computed at once on a CPU; 16 MiB of float32."""

# torch says once in a process that sparse matrices are in beta and unchecked. Those made here hold
# the invariants, and their one use is tested against dense arithmetic.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1))


@dataclass(frozen=True)
class Entries:
    """Selected places of a matrix of codes, sorted by bag; a bag is summed to one vector.

    Without groups a bag is a row. With groups of latents, bag ``group * n_rows + row`` holds a
    row's entries of one group.
    """

    bag: Int[Tensor, " active"]
    latent: Int[Tensor, " active"]
    n_rows: int
    n_latents: int
    n_groups: int = 1

    @property
    def row(self) -> Int[Tensor, " active"]:
        """Which vector each entry belongs to."""
        return self.bag if self.n_groups == 1 else self.bag % self.n_rows

    @cached_property
    def bag_ends(self) -> Int[Tensor, " edge"]:
        """Where each bag begins, and the end."""
        return _edges(self.bag, self.n_groups * self.n_rows)

    @cached_property
    def by_latent(self) -> Int[Tensor, " active"]:
        """The order that sorts entries by latent."""
        return self.latent.int().sort(stable=True).indices

    @cached_property
    def latent_ends(self) -> Int[Tensor, " edge"]:
        """Where each latent begins in that order, and the end."""
        return _edges(self.latent[self.by_latent], self.n_latents)

    def sum_by_bag(
        self, values: Float[Tensor, " active"], table: Float[Tensor, "latent dim"]
    ) -> Float[Tensor, "bag dim"]:
        """Add up each bag's rows of a table over latents, weighted."""
        return _sum_rows(self.latent, table, self.bag_ends, values)

    def sum_by_latent(
        self, values: Float[Tensor, " active"], table: Float[Tensor, "bag dim"]
    ) -> Float[Tensor, "latent dim"]:
        """Add up each latent's rows of a table over bags, or over rows, weighted."""
        place = self.bag if len(table) == self.n_groups * self.n_rows else self.row
        order = self.by_latent
        return _sum_rows(place[order], table, self.latent_ends, values[order])

    def dot(
        self, by_bag: Float[Tensor, "bag dim"], by_latent: Float[Tensor, "latent dim"]
    ) -> Float[Tensor, " active"]:
        """Dot product of each entry's two rows."""
        shape = (self.n_groups * self.n_rows, self.n_latents)
        zeros = by_bag.new_zeros(len(self.bag))
        pattern = torch.sparse_csr_tensor(self.bag_ends, self.latent, zeros, shape)
        return torch.sparse.sampled_addmm(pattern, by_bag, by_latent.T, beta=0.0).values()


def encode_entries(
    x: Float[Tensor, "row dim"],
    W_enc: Float[Tensor, "latent dim"],
    b_enc: Float[Tensor, " latent"],
    centre: Float[Tensor, " dim"],
    entries: Entries,
    values: Float[Tensor, " active"],
) -> Float[Tensor, " active"]:
    """Make known entries of ``ReLU(W_enc x + b_enc)`` differentiable.

    Args:
        x: Vectors, ``centre`` already subtracted.
        W_enc: Encoder directions.
        b_enc: Encoder biases.
        centre: Gets the gradient that the subtraction would pass on.
        entries: Which entries.
        values: What they are.
    """
    return _Encode.apply(x, W_enc, b_enc, centre, entries, values)  # pyright: ignore[reportReturnType]


def decode_entries(
    values: Float[Tensor, " active"], W_dec: Float[Tensor, "latent dim"], entries: Entries
) -> Float[Tensor, "bag dim"]:
    """Sum decoder rows of each bag, weighted by its values."""
    return _Decode.apply(values, W_dec, entries)  # pyright: ignore[reportReturnType]


def nested_errors(
    target: Float[Tensor, "row dim"], parts: Float[Tensor, "bag dim"], n_groups: int
) -> tuple[Float[Tensor, " group"], Float[Tensor, "row dim"]]:
    """Subtract one group's parts after the other.

    Returns:
        Sum of squares left after each group, and what is left at the end, without a gradient.
    """
    return _NestedErrors.apply(target, parts, n_groups)  # pyright: ignore[reportReturnType]


class _NestedErrors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, target: Tensor, parts: Tensor, n_groups: int) -> Any:
        by_group = parts.view(n_groups, *target.shape)
        errors = torch.empty_like(by_group)
        for group in range(n_groups):
            before = errors[group - 1] if group else target
            torch.sub(before, by_group[group], out=errors[group])
        ctx.save_for_backward(errors)
        last = errors[-1].clone()
        ctx.mark_non_differentiable(last)
        return torch.linalg.vector_norm(errors, dim=-1).square().sum(-1), last

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (errors,) = ctx.saved_tensors
        to_parts = errors * (-2 * gradients[0])[:, None, None]
        for group in reversed(range(len(errors) - 1)):
            to_parts[group] += to_parts[group + 1]
        return -to_parts[0], to_parts.flatten(0, 1), None


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        centre: Tensor,
        entries: Entries,
        values: Tensor,
    ) -> Tensor:
        values = values.clone()
        ctx.save_for_backward(x, W_enc, values)
        ctx.entries = entries
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        x, W_enc, values = ctx.saved_tensors
        entries: Entries = ctx.entries
        gradient = gradients[0] * (values > 0)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_bags = entries.sum_by_bag(gradient, W_enc)
            to_x = to_bags.view(entries.n_groups, *x.shape).sum(0)
        to_weight = entries.sum_by_latent(gradient, x)
        to_bias = gradient.new_zeros(len(W_enc)).index_add_(0, entries.latent, gradient)
        # One product of a vector replaces the gradient of every row of x.
        return to_x, to_weight, to_bias, -(to_bias @ W_enc), None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, entries: Entries) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.entries = entries
        return entries.sum_by_bag(values, W_dec)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        entries: Entries = ctx.entries
        gradient = gradients[0].contiguous()
        to_values = entries.dot(gradient, W_dec)
        return to_values, entries.sum_by_latent(values, gradient), None


@torch.no_grad()
def entries_above(
    x: Float[Tensor, "row dim"],
    W_enc: Float[Tensor, "latent dim"],
    b_enc: Float[Tensor, " latent"],
    cutoff: float | Float[Tensor, "*latent"],
) -> tuple[Int[Tensor, " active"], Float[Tensor, " active"]]:
    """Find the entries of ``W_enc x + b_enc`` above a bound of at least 0.

    Returns:
        Places in the flattened matrix, ascending, and values.
    """

    def above(block: Tensor) -> tuple[Tensor, Tensor]:
        place = (block > cutoff).view(-1).nonzero()[:, 0]
        return place, block.view(-1)[place]

    return _over_blocks(x, W_enc, b_enc, above)


@torch.no_grad()
def largest_of_rows(
    x: Float[Tensor, "row dim"],
    W_enc: Float[Tensor, "latent dim"],
    b_enc: Float[Tensor, " latent"],
    k: int,
) -> tuple[Int[Tensor, " active"], Float[Tensor, " active"]]:
    """Find the k largest entries of each row of ``ReLU(W_enc x + b_enc)``.

    Returns:
        Places in the flattened matrix, ascending, and values; rows with fewer positive entries
        have zeros.
    """

    def top(block: Tensor) -> tuple[Tensor, Tensor]:
        latent = block.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values
        start = torch.arange(len(block), device=block.device)[:, None] * block.shape[1]
        return (start + latent).view(-1), block.gather(-1, latent).relu().view(-1)

    return _over_blocks(x, W_enc, b_enc, top)


@torch.no_grad()
def largest_of_all(
    x: Float[Tensor, "row dim"],
    W_enc: Float[Tensor, "latent dim"],
    b_enc: Float[Tensor, " latent"],
    n: int,
    cutoff: float,
) -> tuple[Int[Tensor, " active"], Float[Tensor, " active"]]:
    """Find the n largest entries of all of ``ReLU(W_enc x + b_enc)``.

    Args:
        x: Vectors.
        W_enc: Encoder directions.
        b_enc: Encoder biases.
        n: How many; all that are positive when there are fewer.
        cutoff: A guess below the smallest of them. Whatever it is, the result is exact: too high a
            guess costs a second pass, too low a one costs sorting.

    Returns:
        Places in the flattened matrix, ascending, and values.
    """
    if x.is_cuda:
        # The block is the whole matrix, and its largest entries are found without waiting for them.
        pre = F.linear(x, W_enc, b_enc).flatten()
        place = pre.topk(n, sorted=False).indices.sort().values
        return place, pre[place].relu().to(x.dtype)
    place, value = entries_above(x, W_enc, b_enc, cutoff)
    if len(place) < n and cutoff > 0:
        place, value = entries_above(x, W_enc, b_enc, 0.0)
    if len(place) > n:
        chosen = value.topk(n, sorted=False).indices.sort().values
        place, value = place[chosen], value[chosen]
    return place, value


def _over_blocks(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, select: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Select from ``W_enc x + b_enc``, block by block of rows."""
    n_latents = len(W_enc)
    places: list[Tensor] = []
    values: list[Tensor] = []
    for start, block in _blocks(x, W_enc, b_enc):
        place, value = select(block)
        places.append(place + start * n_latents)
        values.append(value)
    return torch.cat(places), torch.cat(values)


def _blocks(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Blocks of ``W_enc x + b_enc``, each gone when the next one comes; on a GPU, one."""
    rows = max(len(x), 1) if x.is_cuda else max(BLOCK_ENTRIES // len(W_enc), 1)
    buffer = x.new_empty(min(rows, len(x)), len(W_enc))
    for start in range(0, max(len(x), 1), rows):
        part = x[start : start + rows]
        yield start, torch.addmm(b_enc, part, W_enc.T, out=buffer[: len(part)])


def _edges(sorted_places: Tensor, n: int) -> Tensor:
    """Where each of n values begins in an ascending list, and the end."""
    return torch.searchsorted(sorted_places, torch.arange(n + 1, device=sorted_places.device))


def _sum_rows(index: Tensor, table: Tensor, ends: Tensor, weights: Tensor) -> Tensor:
    return F.embedding_bag(
        index, table, ends, mode="sum", per_sample_weights=weights, include_last_offset=True
    )
