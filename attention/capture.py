"""Attention weights of ACT, taken while it works: a pure observer.

Nothing is added to the forward pass but the weights themselves, no action changes by a bit, and
nothing stays behind in the network.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from policies.act import Attention, attention_weights

ENCODER, DECODER = "encoder", "decoder"


@dataclass(frozen=True)
class AttentionWeights:
    """Weights of one forward pass, per layer, head and query; each row sums to 1."""

    by_layer: Mapping[str, Float[Tensor, "batch head query token"]]
    """``encoder.0``, ... to self-attention, where every token is a query; ``decoder.0``, ... to
    cross-attention, whose queries are the chunk steps that were decoded."""

    def layer(self, name: str) -> Float[Tensor, "batch head query token"]:
        """Weights of one layer.

        Raises:
            ValueError: If the network has no such layer, or it was not captured.
        """
        if name not in self.by_layer:
            raise ValueError(f"layer {name!r}: captured were {list(self.by_layer)}")
        return self.by_layer[name]

    def encoder(self) -> list[Float[Tensor, "batch head token token"]]:
        """Self-attention of the captured encoder layers, from the first on."""
        return [weights for name, weights in self.by_layer.items() if name.startswith(ENCODER)]

    def cross(self) -> list[Float[Tensor, "batch head query token"]]:
        """Cross-attention of the captured decoder layers, from the first on."""
        return [weights for name, weights in self.by_layer.items() if name.startswith(DECODER)]


class AttentionCapture:
    """What :func:`capture_attention` has seen so far: the newest forward pass."""

    def __init__(self, layers: Collection[str]) -> None:
        self._order = tuple(layers)
        self._seen: dict[str, Tensor] = {}

    def keep(self, layer: str, weights: Float[Tensor, "batch head query token"]) -> None:
        """Take the weights of one layer in the place of older ones."""
        self._seen[layer] = weights

    @property
    def weights(self) -> AttentionWeights:
        """Weights of the newest forward pass.

        Raises:
            RuntimeError: If the network has not run since the capture began, or since ``take()``.
        """
        if len(self._seen) < len(self._order):
            raise RuntimeError(
                "the network has not run within this capture: an action from a queue needs no "
                "forward pass. Predict a chunk, or ask a wrapper with force_model_run=True"
            )
        return AttentionWeights({name: self._seen[name] for name in self._order})

    def take(self) -> AttentionWeights | None:
        """Weights of the newest forward pass, once; None if there was none since."""
        if len(self._seen) < len(self._order):
            return None
        weights = self.weights
        self._seen.clear()
        return weights


def attention_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Name every layer whose attention says something: self in the encoder, cross in the decoder.

    The decoder's first self-attention mixes values that are all equal: its weights say nothing.

    Args:
        network: Our ACT, or LeRobot's ``ACTPolicy.model``.

    Raises:
        TypeError: If the network is neither.
    """
    layers: dict[str, nn.Module] = {}
    for part, ours, theirs in (
        (ENCODER, "self_attention", "self_attn"),
        (DECODER, "cross_attention", "multihead_attn"),
    ):
        for number, layer in enumerate(getattr(getattr(network, part, None), "layers", ())):
            attention = getattr(layer, ours, None) or getattr(layer, theirs, None)
            if isinstance(attention, Attention | nn.MultiheadAttention):
                layers[f"{part}.{number}"] = attention
    if not any(name.startswith(DECODER) for name in layers):
        raise TypeError(
            f"{type(network).__name__}: there is no attention to capture; give the ACT network "
            "itself (ACTPolicy.network of ours, ACTPolicy.model of LeRobot's)"
        )
    return layers


@contextmanager
def capture_attention(
    network: nn.Module, layers: Collection[str] | None = None, differentiable: bool = False
) -> Iterator[AttentionCapture]:
    """Keep the attention weights of each forward pass of ``network`` within the context.

    Args:
        network: Our ACT, or LeRobot's ``ACTPolicy.model``.
        layers: Names such as ``encoder.0`` and ``decoder.0``; all when None.
        differentiable: Let the output depend on the kept weights, so that gradients with respect to
            them exist. Attention is then computed in the open, and differs in rounding.

    Yields:
        Where the weights of the newest forward pass are found.

    Raises:
        TypeError: If the network is no ACT.
        ValueError: If it has no layer of a given name.
    """
    there = attention_layers(network)
    if unknown := set(layers or ()) - set(there):
        raise ValueError(f"layers {sorted(unknown)}: the network has {list(there)}")
    chosen = {name: there[name] for name in there if layers is None or name in layers}
    capture = AttentionCapture(chosen)
    handles = []
    try:
        for name, attention in chosen.items():
            handles += _observe(attention, name, capture, differentiable)
        yield capture
    finally:
        for handle in handles:
            handle.remove()


def _observe(
    attention: nn.Module, name: str, capture: AttentionCapture, differentiable: bool
) -> list[Any]:
    """Hook one layer so that its weights are kept; return what removes the hooks."""
    if isinstance(attention, Attention):

        def watch(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            query, key, value, mask, _ = inputs
            if differentiable:
                weights = attention_weights(query, key, mask)
                capture.keep(name, weights)
                return weights @ value
            with torch.no_grad():
                capture.keep(name, attention_weights(query, key, mask))
            return None

        return [attention.mix.register_forward_hook(watch)]
    assert isinstance(attention, nn.MultiheadAttention)
    if differentiable:
        return [attention.register_forward_hook(_in_the_open(name, capture), with_kwargs=True)]

    def ask(_: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]):
        # torch computes the weights in any case and averages over heads by default.
        return inputs, {**options, "need_weights": True, "average_attn_weights": False}

    def keep(_: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        capture.keep(name, output[1].detach())

    return [
        attention.register_forward_pre_hook(ask, with_kwargs=True),
        attention.register_forward_hook(keep),
    ]


def _in_the_open(name: str, capture: AttentionCapture) -> Callable[..., tuple[Tensor, None]]:
    """Replace torch's attention, whose returned weights are a view off the path of gradients."""

    def replace(
        attention: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], _: Any
    ) -> tuple[Tensor, None]:
        named = dict(zip(("query", "key", "value"), inputs, strict=False)) | options
        assert isinstance(attention, nn.MultiheadAttention)
        output, weights = open_attention(
            attention, named["query"], named["key"], named["value"], named.get("key_padding_mask")
        )
        capture.keep(name, weights)
        return output, None

    return replace


def open_attention(
    attention: nn.MultiheadAttention,
    query: Float[Tensor, "query batch dim"],
    key: Float[Tensor, "token batch dim"],
    value: Float[Tensor, "token batch dim"],
    key_is_pad: Tensor | None = None,
) -> tuple[Float[Tensor, "query batch dim"], Float[Tensor, "batch head query token"]]:
    """Multi-head attention of torch, written out so that its output depends on its weights.

    Args:
        attention: With equal dimensions of queries, keys and values, and the batch second, as
            LeRobot builds it.
        query: Before projection.
        key: Before projection.
        value: Before projection.
        key_is_pad: (batch, token), True where a token must not be attended to.

    Returns:
        The output, and the weights that it was made from.
    """
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    assert weight is not None
    assert not attention.batch_first
    weights = weight.chunk(3)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    q, k, v = (
        rearrange(
            F.linear(x, w, b),
            "token batch (head dim) -> batch head token dim",
            head=attention.num_heads,
        )
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    mask = None if key_is_pad is None else ~key_is_pad[:, None, None, :]
    mixing = attention_weights(q, k, mask)
    mixed = rearrange(mixing @ v, "batch head token dim -> token batch (head dim)")
    return attention.out_proj(mixed), mixing
