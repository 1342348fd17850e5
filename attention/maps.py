"""Maps that are made of attention weights alone: cross-attention, self-attention, rollout.

They cost next to nothing and say where information is read from, not what it is used for.
"""

from collections.abc import Sequence

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from attention.attribution import Attribution
from attention.capture import (
    DECODER,
    ENCODER,
    AttentionWeights,
    attention_layers,
    capture_attention,
)
from attention.method import ACTMethod, Target
from policies.act import ACTPolicy, DecoderLayer
from policies.interface import Observation, PolicyView
from policies.tokens import TokenLayout


def token_attribution(
    method: str,
    layout: TokenLayout,
    relevance: Float[Tensor, "batch token"],
    queries: Sequence[int],
) -> Attribution:
    """Give the tokens' relevances their places.

    Raises:
        ValueError: If there are more or fewer than the layout has tokens.
    """
    vectors, maps = layout.split(relevance)
    return Attribution(
        method=method,
        queries=tuple(queries),
        maps=maps,
        cells_px={name: float(layout.token_stride) for name in maps},
        image_sizes=dict(layout.image_sizes),
        vectors=vectors,
        dimensions={},
    )


def query_attention(
    weights: AttentionWeights,
    queries: Sequence[int],
    layer: int = -1,
    head: int | None = None,
) -> Float[Tensor, "batch token"]:
    """Cross-attention of some chunk steps: c_k, their mean.

    Args:
        weights: Of a forward pass that decoded these queries, or the whole chunk.
        queries: Chunk steps.
        layer: Decoder layer, from the last where negative.
        head: One head; the mean of all when None.

    Raises:
        ValueError: If there is no such layer, head or query.
    """
    cross = weights.cross()
    if not -len(cross) <= layer < len(cross):
        raise ValueError(f"layer {layer}: {len(cross)} decoder layers were captured")
    chosen = _of_head(cross[layer], head)
    if chosen.shape[1] != len(queries):
        if max(queries) >= chosen.shape[1]:
            raise ValueError(f"queries {list(queries)}: {chosen.shape[1]} chunk steps were decoded")
        chosen = chosen[:, list(queries)]
    return reduce(chosen, "batch query token -> batch token", "mean")


def self_attention(
    weights: AttentionWeights, token: int, layer: int = -1, head: int | None = None
) -> Float[Tensor, "batch token"]:
    """What one token of the encoder attends to.

    Args:
        weights: Of a forward pass.
        token: Place in the sequence (:meth:`TokenLayout.index`).
        layer: Encoder layer, from the last where negative.
        head: One head; the mean of all when None.

    Raises:
        ValueError: If there is no such layer or head.
    """
    encoder = weights.encoder()
    if not -len(encoder) <= layer < len(encoder):
        raise ValueError(f"layer {layer}: {len(encoder)} encoder layers were captured")
    return _of_head(encoder[layer], head)[:, token]


def roll_out(
    weights: AttentionWeights, start: Float[Tensor, "batch token"]
) -> Float[Tensor, "batch token"]:
    """Attention rollout of Abnar & Zuidema 2020 (arXiv:2005.00928), section 3.

    ``start R`` with ``R = prod_l (A_l / 2 + I / 2)`` over all encoder layers, A_l averaged over
    heads: half of what a token holds is taken to have passed it by, on the residual path.

    Args:
        weights: Of a forward pass, with all encoder layers.
        start: Attention to the encoder's outputs, e.g. :func:`query_attention`.
    """
    rolled = start
    for layer in reversed(weights.encoder()):
        mean = reduce(layer, "batch head query token -> batch query token", "mean")
        rolled = (rolled + torch.einsum("bq,bqt->bt", rolled, mean)) / 2
    return rolled


def _of_head(
    weights: Float[Tensor, "batch head query token"], head: int | None
) -> Float[Tensor, "batch query token"]:
    if head is None:
        return reduce(weights, "batch head query token -> batch query token", "mean")
    if not 0 <= head < weights.shape[1]:
        raise ValueError(f"head {head}: there are heads 0 to {weights.shape[1] - 1}")
    return weights[:, head]


def captured_weights(
    policy: ACTPolicy,
    observation: Observation,
    queries: Sequence[int],
    with_encoder: bool = True,
) -> AttentionWeights:
    """Encode the frames once, without a graph, and return what is attended to there.

    With one decoder layer nothing behind the weights is computed: at LeRobot's defaults the rest of
    the decoder is two fifths of a batched forward pass.

    Args:
        policy: In eval mode.
        observation: Frames.
        queries: Chunk steps whose cross-attention is wanted.
        with_encoder: Whether the encoder's self-attention is wanted, too.
    """
    network = policy.network
    names = list(attention_layers(network))
    encoder = [name for name in names if name.startswith(ENCODER)] if with_encoder else []
    decoder = [name for name in names if name.startswith(DECODER)]
    if len(decoder) > 1:
        with torch.no_grad(), capture_attention(network, [*encoder, *decoder]) as capture:
            policy.predict_chunk(observation, queries)
        return capture.weights
    with torch.no_grad(), capture_attention(network, encoder) as capture:
        tokens = policy.encode_observation(observation)
        memory = network.encode(tokens, network.prior_mean(tokens.tokens))
        first = network.decoder.layers[0]
        assert isinstance(first, DecoderLayer)
        positions = network.query_positions[list(queries)]
        cross = first.memory_weights(positions, memory, tokens.positions)
    return AttentionWeights({**capture.weights.by_layer, decoder[0]: cross})


class CrossAttention(ACTMethod):
    """What the decoder attends to among the encoder's outputs.

    The encoder has mixed the tokens by then: where it has many layers, a cell is no longer its own
    place in the picture.

    Args:
        layer: Decoder layer, from the last where negative.
        head: One head; the mean of all when None.
    """

    name = "cross_attention"

    def __init__(self, layer: int = -1, head: int | None = None):
        self.layer = layer
        self.head = head

    def check(self, view: PolicyView) -> None:
        """ACT that has this layer and head."""
        _check_choice(self.policy(view), DECODER, self.layer, self.head)

    def attribute(self, view: PolicyView, observation: Observation, target: Target) -> Attribution:
        """One forward pass."""
        policy = self.policy(view)
        target.check(policy)
        weights = captured_weights(policy, observation, target.queries, with_encoder=False)
        relevance = query_attention(weights, target.queries, self.layer, self.head)
        layout = TokenLayout.of(policy.network)
        return token_attribution(self.name, layout, relevance, target.queries)


class EncoderAttention(ACTMethod):
    """What one token attends to within the encoder.

    Args:
        token: ``latent``, ``state``, ``environment_state``, or a cell as ``camera:row,column``; the
            first token when None.
        layer: Encoder layer, from the last where negative.
        head: One head; the mean of all when None.
    """

    name = "encoder_attention"

    def __init__(self, token: str | None = None, layer: int = -1, head: int | None = None):
        self.token = token
        self.layer = layer
        self.head = head

    def check(self, view: PolicyView) -> None:
        """ACT that has this layer, head and token."""
        policy = self.policy(view)
        _check_choice(policy, ENCODER, self.layer, self.head)
        _token_place(TokenLayout.of(policy.network), self.token)

    def attribute(self, view: PolicyView, observation: Observation, target: Target) -> Attribution:
        """One forward pass; the target says nothing here but its queries' names."""
        policy = self.policy(view)
        target.check(policy)
        layout = TokenLayout.of(policy.network)
        weights = captured_weights(policy, observation, target.queries)
        place = _token_place(layout, self.token)
        relevance = self_attention(weights, place, self.layer, self.head)
        return token_attribution(self.name, layout, relevance, target.queries)


class Rollout(ACTMethod):
    """Cross-attention followed back through the encoder's layers (:func:`roll_out`).

    Args:
        token: Follow what one encoder output holds, named as in :class:`EncoderAttention`; what the
            decoder attends to when None.
    """

    name = "rollout"

    def __init__(self, token: str | None = None):
        self.token = token

    def check(self, view: PolicyView) -> None:
        """ACT that has this token."""
        policy = self.policy(view)
        if self.token is not None:
            _token_place(TokenLayout.of(policy.network), self.token)

    def attribute(self, view: PolicyView, observation: Observation, target: Target) -> Attribution:
        """One forward pass."""
        policy = self.policy(view)
        target.check(policy)
        layout = TokenLayout.of(policy.network)
        weights = captured_weights(policy, observation, target.queries)
        start = query_attention(weights, target.queries)
        if self.token is not None:
            start = torch.zeros_like(start)
            start[:, _token_place(layout, self.token)] = 1
        return token_attribution(self.name, layout, roll_out(weights, start), target.queries)


def _token_place(layout: TokenLayout, token: str | None) -> int:
    """Read ``state`` or ``camera:row,column``.

    Raises:
        ValueError: If there is no such token.
    """
    if token is None or token in layout.vectors:
        return layout.index(token or layout.vectors[0])
    camera, _, cell = token.rpartition(":")
    try:
        row, column = (int(number) for number in cell.split(","))
    except ValueError as error:
        raise ValueError(
            f"token {token!r}: give one of {list(layout.vectors)}, or a cell as camera:row,column "
            f"of {layout.grids}"
        ) from error
    return layout.index(camera, (row, column))


def _check_choice(policy: ACTPolicy, part: str, layer: int, head: int | None) -> None:
    """Refuse a layer or head that the network does not have.

    Raises:
        ValueError: Naming those that it has.
    """
    layers = [name for name in attention_layers(policy.network) if name.startswith(part)]
    if not -len(layers) <= layer < len(layers):
        raise ValueError(f"layer {layer}: the policy has {part} layers 0 to {len(layers) - 1}")
    n_heads = policy.hyper_parameters["n_heads"]
    if head is not None and not 0 <= head < n_heads:
        raise ValueError(f"head {head}: the policy has heads 0 to {n_heads - 1}")
