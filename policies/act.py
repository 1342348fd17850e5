"""Action Chunking with Transformers (Zhao et al. 2023, arXiv:2304.13705), in pure torch.

Three stages with names of their own, so that diagnostics can call each alone:

1. ``encode_observation``: cameras and state to tokens. Everything but the latent.
2. ``encode_posterior``: demonstrated chunk to q(z | state, chunk), the CVAE's encoder.
3. ``decode``: tokens and a latent z to an action chunk, or to single chunk steps ("queries").

Numbers equal LeRobot 0.6.1's ACT for equal weights. What differs is work left out, never the
result: values of the first decoder self-attention are equal for all queries, so its output is
known without it; the posterior's last layer is evaluated for the one token that is read; and
queries nobody asks for are not decoded when there is one decoder layer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from policies.backbones import (
    BackboneName,
    BackboneNorm,
    build_backbone,
    grid_size,
    to_unit_range,
)
from policies.interface import Batch, DataSchema, DataStatistics, Observation
from policies.normalisation import NormalisationMode, Normaliser, camera_key

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


@dataclass(frozen=True)
class Posterior:
    """q(z | state, chunk): a diagonal Gaussian."""

    mean: Float[Tensor, "batch latent"]
    log_variance: Float[Tensor, "batch latent"]

    def sample(self) -> Float[Tensor, "batch latent"]:
        """Draw z by the reparameterisation trick, from torch's global generator."""
        return self.mean + (self.log_variance / 2).exp() * torch.randn_like(self.mean)

    def kl(self) -> Float[Tensor, " batch"]:
        """KL(q || N(0, I)) in nats (Kingma & Welling 2014, appendix B)."""
        terms = 1 + self.log_variance - self.mean.square() - self.log_variance.exp()
        return -0.5 * terms.sum(-1)


@dataclass(frozen=True)
class ObservationTokens:
    """The transformer's inputs, all but the latent token that stands first."""

    tokens: Float[Tensor, "batch token dim"]
    positions: Float[Tensor, "token_and_latent dim"]
    """Positional embeddings of the latent token and of ``tokens``."""


@dataclass(frozen=True)
class ACTLoss:
    """``total = l1 + kl_weight * kl``, in the network's normalised units."""

    total: Float[Tensor, ""]
    l1: Float[Tensor, ""]
    """Mean absolute error over unpadded chunk steps."""
    kl: Float[Tensor, ""]
    """Mean KL divergence of the posterior from the prior, in nats; 0 without a latent."""
    prediction: Float[Tensor, "batch chunk action"]
    """Decoded chunk, in data units, detached."""


class ScaledDotProduct(nn.Module):
    """softmax(q k^T / sqrt(head_dim)) v by the fused kernel, which never stores the weights.

    A module of its own so that whoever wants the weights can hook it (``attention/capture.py``).
    """

    def forward(
        self,
        query: Float[Tensor, "batch head query head_dim"],
        key: Float[Tensor, "batch head token head_dim"],
        value: Float[Tensor, "batch head token head_dim"],
        mask: Bool[Tensor, "batch 1 1 token"] | None,
        dropout: float,
    ) -> Float[Tensor, "batch head query head_dim"]:
        """Mix values; ``mask`` is True where a token may be attended to."""
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)


def attention_weights(
    query: Float[Tensor, "#batch head query head_dim"],
    key: Float[Tensor, "batch head token head_dim"],
    mask: Bool[Tensor, "batch 1 1 token"] | None = None,
) -> Float[Tensor, "batch head query token"]:
    """softmax(q k^T / sqrt(head_dim)) of Vaswani et al. 2017, equation 1.

    Args:
        query: Projected queries.
        key: Projected keys.
        mask: True where a token may be attended to; everywhere when None.
    """
    scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-2, -1))
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1)


class Attention(nn.Module):
    """Multi-head attention with torch's parameter layout, computed by the fused kernel."""

    def __init__(self, dim: int, n_heads: int, dropout: float):
        super().__init__()
        if dim % n_heads:
            raise ValueError(f"dim_model={dim} is not divisible by n_heads={n_heads}")
        self.n_heads = n_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        self.mix = ScaledDotProduct()
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def _split_heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "batch token (head dim) -> batch head token dim", head=self.n_heads)

    def _merge_heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "batch head token dim -> batch token (head dim)")

    def forward(
        self,
        query: Float[Tensor, "batch query dim"],
        key: Float[Tensor, "batch token dim"],
        value: Float[Tensor, "batch token dim"],
        key_is_pad: Bool[Tensor, "batch token"] | None = None,
    ) -> Float[Tensor, "batch query dim"]:
        """Attend from ``query`` to ``key``, return the projected mix of ``value``."""
        dim = query.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if query is key:
            q, k = F.linear(query, weight[: 2 * dim], bias[: 2 * dim]).chunk(2, dim=-1)
        else:
            q = F.linear(query, weight[:dim], bias[:dim])
            k = F.linear(key, weight[dim : 2 * dim], bias[dim : 2 * dim])
        v = F.linear(value, weight[2 * dim :], bias[2 * dim :])
        mask = None if key_is_pad is None else ~key_is_pad[:, None, None, :]
        mixed = self.mix(
            self._split_heads(q),
            self._split_heads(k),
            self._split_heads(v),
            mask,
            self.dropout if self.training else 0.0,
        )
        return self.out_proj(self._merge_heads(mixed))

    def weights(
        self, query: Float[Tensor, "#batch query dim"], key: Float[Tensor, "batch token dim"]
    ) -> Float[Tensor, "batch head query token"]:
        """What ``query`` attends to in ``key``, without mixing any values."""
        dim = key.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        q = F.linear(query, weight[:dim], bias[:dim])
        k = F.linear(key, weight[dim : 2 * dim], bias[dim : 2 * dim])
        return attention_weights(self._split_heads(q), self._split_heads(k))

    def with_constant_value(
        self,
        query_and_key: Float[Tensor, "1 query dim"],
        value: Float[Tensor, " dim"],
        batch: int,
    ) -> Float[Tensor, "batch query dim"]:
        """Self-attention whose values are one and the same vector for every token.

        Weights sum to one, so the output is that vector's projection whatever the weights are.
        Dropout on the weights scales it per sample, head and query, as in the full computation.
        """
        dim = value.shape[-1]
        n_queries = query_and_key.shape[1]
        v = F.linear(value, self.in_proj_weight[2 * dim :], self.in_proj_bias[2 * dim :])
        if not (self.training and self.dropout):
            return repeat(self.out_proj(v), "dim -> batch query dim", batch=batch, query=n_queries)
        q, k = F.linear(
            query_and_key, self.in_proj_weight[: 2 * dim], self.in_proj_bias[: 2 * dim]
        ).chunk(2, dim=-1)
        weights = attention_weights(self._split_heads(q), self._split_heads(k))
        kept = F.dropout(weights.expand(batch, -1, -1, -1), self.dropout).sum(-1)
        heads = rearrange(v, "(head dim) -> head 1 dim", head=self.n_heads)
        return self.out_proj(self._merge_heads(kept[..., None] * heads))


class FeedForward(nn.Module):
    """Two linear layers with an activation and dropout between them."""

    def __init__(self, dim: int, hidden: int, dropout: float, activation: str):
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)
        self.activation = ACTIVATIONS[activation]
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Float[Tensor, "*leading dim"]) -> Float[Tensor, "*leading dim"]:
        """Transform each token by itself."""
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


@dataclass(frozen=True)
class TransformerSize:
    """What encoder and decoder layers have in common."""

    dim: int
    n_heads: int
    dim_feedforward: int
    dropout: float
    activation: str
    pre_norm: bool


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward; positions are added to queries and keys only."""

    def __init__(self, size: TransformerSize):
        super().__init__()
        self.self_attention = Attention(size.dim, size.n_heads, size.dropout)
        self.feed_forward = FeedForward(
            size.dim, size.dim_feedforward, size.dropout, size.activation
        )
        self.norm1 = nn.LayerNorm(size.dim)
        self.norm2 = nn.LayerNorm(size.dim)
        self.dropout = nn.Dropout(size.dropout)
        self.pre_norm = size.pre_norm

    def forward(
        self,
        x: Float[Tensor, "batch token dim"],
        positions: Float[Tensor, "#batch token dim"],
        key_is_pad: Bool[Tensor, "batch token"] | None = None,
        n_outputs: int | None = None,
    ) -> Float[Tensor, "batch output dim"]:
        """Return the transformed tokens, or only the first ``n_outputs`` of them."""
        normed = self.norm1(x) if self.pre_norm else x
        key = normed + positions
        query = key if n_outputs is None else key[:, :n_outputs]
        attended = self.self_attention(query, key, normed, key_is_pad)
        x = (x if n_outputs is None else x[:, :n_outputs]) + self.dropout(attended)
        if self.pre_norm:
            return x + self.dropout(self.feed_forward(self.norm2(x)))
        x = self.norm1(x)
        return self.norm2(x + self.dropout(self.feed_forward(x)))


class Encoder(nn.Module):
    """A stack of encoder layers, with a final norm in the pre-norm variant."""

    def __init__(self, size: TransformerSize, n_layers: int):
        super().__init__()
        self.layers = nn.ModuleList([EncoderLayer(size) for _ in range(n_layers)])
        self.norm = nn.LayerNorm(size.dim) if size.pre_norm else nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "batch token dim"],
        positions: Float[Tensor, "#batch token dim"],
        key_is_pad: Bool[Tensor, "batch token"] | None = None,
        n_outputs: int | None = None,
    ) -> Float[Tensor, "batch output dim"]:
        """Run all layers; the last one only for the first ``n_outputs`` tokens, where given."""
        for layer in self.layers[:-1]:
            x = layer(x, positions, key_is_pad)
        if len(self.layers):
            x = self.layers[-1](x, positions, key_is_pad, n_outputs)
        return self.norm(x)


class DecoderLayer(nn.Module):
    """Self-attention among queries, cross-attention to the encoder's tokens, feed-forward."""

    def __init__(self, size: TransformerSize):
        super().__init__()
        self.self_attention = Attention(size.dim, size.n_heads, size.dropout)
        self.cross_attention = Attention(size.dim, size.n_heads, size.dropout)
        self.feed_forward = FeedForward(
            size.dim, size.dim_feedforward, size.dropout, size.activation
        )
        self.norm1 = nn.LayerNorm(size.dim)
        self.norm2 = nn.LayerNorm(size.dim)
        self.norm3 = nn.LayerNorm(size.dim)
        self.dropout = nn.Dropout(size.dropout)
        self.pre_norm = size.pre_norm

    def attend_to_queries(
        self, x: Float[Tensor, "batch query dim"], positions: Float[Tensor, "query dim"]
    ) -> Float[Tensor, "batch query dim"]:
        """Self-attention block."""
        normed = self.norm1(x) if self.pre_norm else x
        key = normed + positions
        x = x + self.dropout(self.self_attention(key, key, normed))
        return x if self.pre_norm else self.norm1(x)

    def attend_to_zeros(
        self, positions: Float[Tensor, "query dim"], batch: int
    ) -> Float[Tensor, "batch query dim"]:
        """Self-attention block of the first layer, whose input is zero for every query."""
        zero = torch.zeros_like(positions[0])
        normed = self.norm1(zero) if self.pre_norm else zero
        attended = self.self_attention.with_constant_value(
            (normed + positions)[None], normed, batch
        )
        x = self.dropout(attended)
        return x if self.pre_norm else self.norm1(x)

    def memory_weights(
        self,
        positions: Float[Tensor, "query dim"],
        memory: Float[Tensor, "batch token dim"],
        memory_positions: Float[Tensor, "token dim"],
    ) -> Float[Tensor, "batch head query token"]:
        """What the first layer's queries attend to in the memory, and nothing else.

        The queries have seen only zeros by then, so they are the same for the whole batch.
        """
        x = self.attend_to_zeros(positions, batch=1)
        normed = self.norm2(x) if self.pre_norm else x
        return self.cross_attention.weights(normed + positions, memory + memory_positions)

    def attend_to_memory(
        self,
        x: Float[Tensor, "batch query dim"],
        positions: Float[Tensor, "query dim"],
        memory: Float[Tensor, "batch token dim"],
        memory_positions: Float[Tensor, "token dim"],
    ) -> Float[Tensor, "batch query dim"]:
        """Cross-attention block and feed-forward; queries do not see each other here."""
        normed = self.norm2(x) if self.pre_norm else x
        attended = self.cross_attention(normed + positions, memory + memory_positions, memory)
        x = x + self.dropout(attended)
        if self.pre_norm:
            return x + self.dropout(self.feed_forward(self.norm3(x)))
        x = self.norm2(x)
        return self.norm3(x + self.dropout(self.feed_forward(x)))


class Decoder(nn.Module):
    """A stack of decoder layers over learned queries that start from zero."""

    def __init__(self, size: TransformerSize, n_layers: int):
        super().__init__()
        if n_layers < 1:
            raise ValueError(f"n_decoder_layers={n_layers} must be at least 1")
        self.layers = nn.ModuleList([DecoderLayer(size) for _ in range(n_layers)])
        self.norm = nn.LayerNorm(size.dim)

    def forward(
        self,
        positions: Float[Tensor, "chunk dim"],
        memory: Float[Tensor, "batch token dim"],
        memory_positions: Float[Tensor, "token dim"],
        queries: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch query dim"]:
        """Decode all chunk steps, or only ``queries``.

        With one layer the choice comes before the work, because queries do not interact after the
        (constant) first self-attention; with more layers all are computed and then chosen from.
        """
        first, *others = self.layers
        assert isinstance(first, DecoderLayer)
        early = queries is not None and not others and not self.training
        used = positions[list(queries)] if early and queries is not None else positions
        x = first.attend_to_zeros(used, batch=len(memory))
        x = first.attend_to_memory(x, used, memory, memory_positions)
        for layer in others:
            assert isinstance(layer, DecoderLayer)
            x = layer.attend_to_queries(x, positions)
            x = layer.attend_to_memory(x, positions, memory, memory_positions)
        if queries is not None and not early:
            x = x[:, list(queries)]
        return self.norm(x)


class ACT(nn.Module):
    """The network, in normalised units; see the module's docstring for its three stages."""

    def __init__(
        self,
        cameras: Mapping[str, Sequence[int]],
        state_dim: int,
        action_dim: int,
        chunk_size: int,
        size: TransformerSize,
        n_encoder_layers: int,
        n_decoder_layers: int,
        n_posterior_layers: int,
        use_latent: bool,
        latent_dim: int,
        environment_state_dim: int,
        backbone: BackboneName,
        backbone_norm: BackboneNorm,
        backbone_weights: str | None,
        backbone_width: int,
        token_stride: int,
    ):
        super().__init__()
        if not cameras and not environment_state_dim:
            raise ValueError("ACT needs at least one camera or an environment state")
        self.cameras = {name: (int(hw[0]), int(hw[1])) for name, hw in cameras.items()}
        self.chunk_size = chunk_size
        self.latent_dim = latent_dim
        self.token_stride = token_stride
        dim = size.dim

        self.posterior = (
            PosteriorEncoder(
                state_dim, action_dim, chunk_size, latent_dim, size, n_posterior_layers
            )
            if use_latent
            else None
        )
        if cameras:
            self.backbone = build_backbone(
                backbone, backbone_norm, token_stride, backbone_width, backbone_weights
            )
            self.image_projection = nn.Conv2d(self.backbone.out_channels, dim, kernel_size=1)
            for name, (height, width) in self.cameras.items():
                rows, columns = grid_size(height, width, token_stride)
                self.register_buffer(
                    f"position_{camera_key(name)}",
                    sinusoidal_positions_2d(rows, columns, dim),
                    persistent=False,
                )
        else:
            self.backbone = None
        self.encoder = Encoder(size, n_encoder_layers)
        self.decoder = Decoder(size, n_decoder_layers)
        self.latent_projection = nn.Linear(latent_dim, dim)
        self.state_projection = nn.Linear(state_dim, dim) if state_dim else None
        self.environment_state_projection = (
            nn.Linear(environment_state_dim, dim) if environment_state_dim else None
        )
        n_vector_tokens = 1 + bool(state_dim) + bool(environment_state_dim)
        self.vector_positions = nn.Parameter(torch.randn(n_vector_tokens, dim))
        self.query_positions = nn.Parameter(torch.randn(chunk_size, dim))
        self.action_head = nn.Linear(dim, action_dim)

    def encode_observation(
        self,
        images: Mapping[str, Float[Tensor, "batch 3 height width"]],
        state: Float[Tensor, "batch state"] | None,
        environment_state: Float[Tensor, "batch environment"] | None = None,
    ) -> ObservationTokens:
        """Encode a normalised observation: one token per state and per cell of each camera."""
        vectors = []
        if self.state_projection is not None:
            vectors.append(self.state_projection(state))
        if self.environment_state_projection is not None:
            vectors.append(self.environment_state_projection(environment_state))
        tokens = [rearrange(vector, "batch dim -> batch 1 dim") for vector in vectors]
        positions: list[Tensor] = [self.vector_positions]
        if self.backbone is not None:
            for name in self.cameras:
                features = self.image_projection(self.backbone(images[name]))
                tokens.append(rearrange(features, "batch dim row column -> batch (row column) dim"))
                positions.append(self.get_buffer(f"position_{camera_key(name)}").to(features.dtype))
        return ObservationTokens(torch.cat(tokens, dim=1), torch.cat(positions))

    def encode(
        self, observation: ObservationTokens, latent: Float[Tensor, "batch latent"]
    ) -> Float[Tensor, "batch token_and_latent dim"]:
        """Run the transformer encoder over the latent token and the observation's tokens."""
        latent_token = rearrange(self.latent_projection(latent), "batch dim -> batch 1 dim")
        tokens = torch.cat([latent_token, observation.tokens], dim=1)
        return self.encoder(tokens, observation.positions[None])

    def decode(
        self,
        observation: ObservationTokens,
        latent: Float[Tensor, "batch latent"],
        queries: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch query action"]:
        """Decode normalised actions for all chunk steps, or for ``queries`` only."""
        memory = self.encode(observation, latent)
        decoded = self.decoder(self.query_positions, memory, observation.positions, queries)
        return self.action_head(decoded)

    def encode_posterior(
        self,
        state: Float[Tensor, "batch state"] | None,
        actions: Float[Tensor, "batch chunk action"],
        action_is_pad: Bool[Tensor, "batch chunk"],
    ) -> Posterior:
        """Infer q(z | state, chunk) from a normalised chunk.

        Raises:
            ValueError: If the policy was built without a latent.
        """
        if self.posterior is None:
            raise ValueError("this ACT has no posterior: it was built with use_latent=False")
        return self.posterior(state, actions, action_is_pad)

    def prior_mean(self, reference: Tensor) -> Float[Tensor, "batch latent"]:
        """The latent used in execution, z = 0, for as many samples as ``reference`` has."""
        return reference.new_zeros(len(reference), self.latent_dim)


class PosteriorEncoder(nn.Module):
    """The CVAE's encoder: a transformer over [class token, state, action chunk]."""

    positions: Tensor

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        chunk_size: int,
        latent_dim: int,
        size: TransformerSize,
        n_layers: int,
    ):
        super().__init__()
        self.encoder = Encoder(size, n_layers)
        self.class_token = nn.Parameter(torch.randn(1, size.dim))
        self.state_projection = nn.Linear(state_dim, size.dim) if state_dim else None
        self.action_projection = nn.Linear(action_dim, size.dim)
        self.latent_head = nn.Linear(size.dim, 2 * latent_dim)
        n_tokens = 1 + bool(state_dim) + chunk_size
        self.register_buffer(
            "positions", sinusoidal_positions_1d(n_tokens, size.dim), persistent=False
        )

    def forward(
        self,
        state: Float[Tensor, "batch state"] | None,
        actions: Float[Tensor, "batch chunk action"],
        action_is_pad: Bool[Tensor, "batch chunk"],
    ) -> Posterior:
        """Return q(z | state, chunk); padded steps are not attended to."""
        tokens: list[Tensor] = [
            repeat(self.class_token, "1 dim -> batch 1 dim", batch=len(actions))
        ]
        if self.state_projection is not None:
            tokens.append(rearrange(self.state_projection(state), "batch dim -> batch 1 dim"))
        is_pad = F.pad(action_is_pad, (len(tokens), 0), value=False)
        tokens.append(self.action_projection(actions))
        x = torch.cat(tokens, dim=1)
        x = self.encoder(x, self.positions.to(x.dtype)[None], is_pad, n_outputs=1)
        mean, log_variance = self.latent_head(x[:, 0]).chunk(2, dim=-1)
        return Posterior(mean, log_variance)


class ACTPolicy(nn.Module):
    """ACT in data units: normalisation, the network, and the choice of action coordinates.

    Args:
        cameras: Camera name to [height, width] in px, in token order.
        state_dim: Dimensions of the proprioceptive state; 0 for none.
        action_dim: Dimensions of one action.
        environment_state_dim: Dimensions of a privileged environment state; 0 for none.
        chunk_size: Control steps predicted at once.
        n_action_steps: Control steps executed before the next prediction; null for the whole chunk.
        relative_actions: Predict actions relative to the state at the start of the chunk.
        use_latent: Train as a conditional VAE; without it z is always 0.
        latent_dim: Dimensions of the latent z.
        dim_model: Width of the transformer.
        n_heads: Attention heads.
        dim_feedforward: Hidden width of the feed-forward layers.
        n_encoder_layers: Transformer encoder layers.
        n_decoder_layers: Transformer decoder layers.
        n_posterior_layers: Layers of the CVAE's encoder.
        dropout: Dropout rate in the transformers.
        feedforward_activation: Activation of the feed-forward layers.
        pre_norm: Normalise before each block rather than after it.
        backbone: Image encoder.
        backbone_norm: Normalisation in a ResNet: frozen_batch suits pretrained weights, group
            trains from scratch.
        backbone_weights: torchvision weights to start from, e.g. ResNet18_Weights.IMAGENET1K_V1.
        backbone_width: Channels of the small CNN's first stage.
        token_stride: Image px per token; ResNet: 32 for layer 4, 16 for layer 3.
        state_normalisation: How the state is scaled.
        action_normalisation: How actions are scaled.
        image_normalisation: How RGB channels are scaled: data statistics, ImageNet's, or not.
    """

    IMAGENET_MEAN = (0.485, 0.456, 0.406)
    IMAGENET_STD = (0.229, 0.224, 0.225)

    def __init__(
        self,
        cameras: dict[str, list[int]],
        state_dim: int,
        action_dim: int,
        environment_state_dim: int = 0,
        chunk_size: int = 100,
        n_action_steps: int | None = None,
        relative_actions: bool = False,
        use_latent: bool = True,
        latent_dim: int = 32,
        dim_model: int = 512,
        n_heads: int = 8,
        dim_feedforward: int = 3200,
        n_encoder_layers: int = 4,
        n_decoder_layers: int = 1,
        n_posterior_layers: int = 4,
        dropout: float = 0.1,
        feedforward_activation: Literal["relu", "gelu"] = "relu",
        pre_norm: bool = False,
        backbone: BackboneName = "resnet18",
        backbone_norm: BackboneNorm = "frozen_batch",
        backbone_weights: str | None = None,
        backbone_width: int = 32,
        token_stride: int = 32,
        state_normalisation: NormalisationMode = "mean_std",
        action_normalisation: NormalisationMode = "mean_std",
        image_normalisation: Literal["mean_std", "imagenet", "identity"] = "mean_std",
    ):
        super().__init__()
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size} must be at least 1")
        self.n_action_steps = chunk_size if n_action_steps is None else n_action_steps
        if not 1 <= self.n_action_steps <= chunk_size:
            raise ValueError(
                f"n_action_steps={n_action_steps} must lie between 1 and chunk_size={chunk_size}"
            )
        if relative_actions and state_dim != action_dim:
            raise ValueError(
                f"relative_actions needs state_dim={state_dim} to equal action_dim={action_dim}"
            )
        self.hyper_parameters = {
            "cameras": {name: [int(hw[0]), int(hw[1])] for name, hw in cameras.items()},
            "state_dim": state_dim,
            "action_dim": action_dim,
            "environment_state_dim": environment_state_dim,
            "chunk_size": chunk_size,
            "n_action_steps": self.n_action_steps,
            "relative_actions": relative_actions,
            "use_latent": use_latent,
            "latent_dim": latent_dim,
            "dim_model": dim_model,
            "n_heads": n_heads,
            "dim_feedforward": dim_feedforward,
            "n_encoder_layers": n_encoder_layers,
            "n_decoder_layers": n_decoder_layers,
            "n_posterior_layers": n_posterior_layers,
            "dropout": dropout,
            "feedforward_activation": feedforward_activation,
            "pre_norm": pre_norm,
            "backbone": backbone,
            "backbone_norm": backbone_norm,
            "backbone_weights": backbone_weights,
            "backbone_width": backbone_width,
            "token_stride": token_stride,
            "state_normalisation": state_normalisation,
            "action_normalisation": action_normalisation,
            "image_normalisation": image_normalisation,
        }
        """Everything the constructor was given, as plain values."""
        self.chunk_size = chunk_size
        self.n_obs_steps = 1
        self.relative_actions = relative_actions
        self.state_normalisation: NormalisationMode = state_normalisation
        self.action_normalisation: NormalisationMode = action_normalisation
        self.image_normalisation: Literal["mean_std", "imagenet", "identity"] = image_normalisation
        self.data_schema = DataSchema(
            cameras={name: (int(hw[0]), int(hw[1])) for name, hw in cameras.items()},
            state_dim=state_dim,
            action_dim=action_dim,
            environment_state_dim=environment_state_dim,
        )
        self.normaliser = Normaliser(list(cameras), state_dim, action_dim, environment_state_dim)
        self.network = ACT(
            cameras=cameras,
            state_dim=state_dim,
            action_dim=action_dim,
            chunk_size=chunk_size,
            size=TransformerSize(
                dim=dim_model,
                n_heads=n_heads,
                dim_feedforward=dim_feedforward,
                dropout=dropout,
                activation=feedforward_activation,
                pre_norm=pre_norm,
            ),
            n_encoder_layers=n_encoder_layers,
            n_decoder_layers=n_decoder_layers,
            n_posterior_layers=n_posterior_layers,
            use_latent=use_latent,
            latent_dim=latent_dim,
            environment_state_dim=environment_state_dim,
            backbone=backbone,
            backbone_norm=backbone_norm,
            backbone_weights=backbone_weights,
            backbone_width=backbone_width,
            token_stride=token_stride,
        )

    def fit_normaliser(self, statistics: DataStatistics) -> None:
        """Take the scales of all features from the training split's statistics.

        Raises:
            ValueError: If a feature the policy reads has no statistics.
        """
        self.normaliser.fit(
            statistics,
            relative_actions=self.relative_actions,
            image_mode="identity" if self.image_normalisation == "identity" else "mean_std",
            state_mode=self.state_normalisation,
            action_mode=self.action_normalisation,
        )
        if self.image_normalisation == "imagenet":
            for camera in self.data_schema.cameras:
                self.normaliser.image(camera).set(
                    torch.tensor(self.IMAGENET_MEAN), torch.tensor(self.IMAGENET_STD)
                )

    def encode_observation(self, observation: Observation) -> ObservationTokens:
        """Encode an observation in data units.

        Raises:
            ValueError: If a camera or the state is missing, or has another shape than the policy's.
        """
        images = {}
        dtype = self.network.action_head.weight.dtype
        for camera, size in self.data_schema.cameras.items():
            if camera not in observation.images:
                raise ValueError(
                    f"camera {camera!r} is missing; the observation has {list(observation.images)}"
                )
            image = observation.images[camera]
            if tuple(image.shape[-3:]) != (3, *size):
                raise ValueError(
                    f"camera {camera!r} gives {tuple(image.shape[-3:])}, "
                    f"the policy was made for {(3, *size)}"
                )
            feature = self.normaliser.image(camera)
            images[camera] = feature.normalise_image(to_unit_range(image, dtype))
        return self.network.encode_observation(
            images,
            self._normalised_state(observation),
            self._normalised_environment_state(observation),
        )

    def _normalised_state(self, observation: Observation) -> Tensor | None:
        if self.normaliser.state is None:
            return None
        if observation.state is None:
            raise ValueError("the policy reads a state, but the observation has none")
        dtype = self.network.action_head.weight.dtype
        return self.normaliser.state.normalise(observation.state).to(dtype)

    def _normalised_environment_state(self, observation: Observation) -> Tensor | None:
        if self.normaliser.environment_state is None:
            return None
        if observation.environment_state is None:
            raise ValueError("the policy reads an environment state, but the observation has none")
        dtype = self.network.action_head.weight.dtype
        return self.normaliser.environment_state.normalise(observation.environment_state).to(dtype)

    def normalise_actions(
        self, actions: Float[Tensor, "batch query action"], observation: Observation
    ) -> Float[Tensor, "batch query action"]:
        """Map actions from data units to the network's units."""
        if self.relative_actions and observation.state is not None:
            actions = actions - observation.state[:, None]
        return self.normaliser.action.normalise(actions)

    def unnormalise_actions(
        self, actions: Float[Tensor, "batch query action"], observation: Observation
    ) -> Float[Tensor, "batch query action"]:
        """Map actions from the network's units to data units."""
        actions = self.normaliser.action.unnormalise(actions)
        if self.relative_actions and observation.state is not None:
            actions = actions + observation.state[:, None]
        return actions

    def encode_posterior(self, batch: Batch) -> Posterior:
        """Infer q(z | state, demonstrated chunk), independent of train or eval mode."""
        return self.network.encode_posterior(
            self._normalised_state(batch.observation),
            self.normalise_actions(batch.actions, batch.observation),
            batch.action_is_pad,
        )

    def loss(self, batch: Batch, kl_weight: float) -> ACTLoss:
        """Masked L1 plus weighted KL, z drawn from the posterior (ACT, section IV-C).

        Args:
            batch: Samples in data units, on the policy's device.
            kl_weight: Weight of the KL term; the reference card uses 0.1, LeRobot 10.
        """
        target = self.normalise_actions(batch.actions, batch.observation)
        tokens = self.encode_observation(batch.observation)
        if self.network.posterior is None:
            latent = self.network.prior_mean(tokens.tokens)
            kl = target.new_zeros(())
        else:
            posterior = self.network.encode_posterior(
                self._normalised_state(batch.observation), target, batch.action_is_pad
            )
            latent = posterior.sample()
            kl = posterior.kl().mean()
        predicted = self.network.decode(tokens, latent)
        valid = ~batch.action_is_pad[..., None]
        n_valid = valid.sum() * target.shape[-1]
        l1 = ((predicted - target).abs() * valid).sum() / n_valid.clamp_min(1)
        prediction = self.unnormalise_actions(predicted.detach(), batch.observation)
        return ACTLoss(total=l1 + kl_weight * kl, l1=l1, kl=kl, prediction=prediction)

    def predict_chunk(
        self, observation: Observation, queries: Sequence[int] | None = None
    ) -> Float[Tensor, "batch query action"]:
        """Predict actions in data units with z = 0, as in execution.

        Args:
            observation: What the policy sees, on the policy's device.
            queries: Chunk steps to predict; all when None.

        Raises:
            ValueError: If a query lies outside the chunk.
        """
        if queries is not None and not all(0 <= query < self.chunk_size for query in queries):
            raise ValueError(f"queries {list(queries)} must lie in 0..{self.chunk_size - 1}")
        tokens = self.encode_observation(observation)
        latent = self.network.prior_mean(tokens.tokens)
        actions = self.network.decode(tokens, latent, queries)
        return self.unnormalise_actions(actions, observation)

    def sample_chunks(
        self,
        observation: Observation,
        n_samples: int,
        seed: int = 0,
        queries: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch sample query action"]:
        """Decode chunks in data units for one fixed set of latents from the prior.

        Args:
            observation: What the policy sees, on the policy's device.
            n_samples: Latents per observation; the same for every observation.
            seed: Of the latents (:func:`prior_latents`).
            queries: Chunk steps to decode; all when None.

        Raises:
            ValueError: If a query lies outside the chunk, or ``n_samples`` is not positive.
        """
        if n_samples < 1:
            raise ValueError(f"n_samples={n_samples} must be at least 1")
        if self.network.posterior is None:
            # Trained without a latent: every sample is the same chunk.
            chunk = self.predict_chunk(observation, queries)
            return repeat(
                chunk, "batch query action -> batch sample query action", sample=n_samples
            )
        latents = prior_latents(n_samples, self.network.latent_dim, seed)
        return self.decode_latents(observation, latents[None], queries)

    def decode_latents(
        self,
        observation: Observation,
        latents: Float[Tensor, "#batch sample latent"],
        queries: Sequence[int] | None = None,
        max_columns: int | None = None,
    ) -> Float[Tensor, "batch sample query action"]:
        """Decode chunks in data units, given latents; pictures are encoded once.

        z is a token of the transformer encoder, so everything after the backbone runs once per
        latent. Observations and latents share one batch axis, in pieces of bounded memory.

        Args:
            observation: What the policy sees, on the policy's device.
            latents: z for each observation, or one set for all.
            queries: Chunk steps to decode; all when None.
            max_columns: Pairs of observation and latent that are decoded at once; when None 128 on
                a CPU, whose caches then hold the activations, and 4096 elsewhere.

        Raises:
            ValueError: If a query lies outside the chunk.
        """
        if queries is not None and not all(0 <= query < self.chunk_size for query in queries):
            raise ValueError(f"queries {list(queries)} must lie in 0..{self.chunk_size - 1}")
        tokens = self.encode_observation(observation)
        n_batch, n_samples = len(tokens.tokens), latents.shape[1]
        flat = rearrange(
            latents.to(tokens.tokens).expand(n_batch, -1, -1),
            "batch sample latent -> (batch sample) latent",
        )
        if max_columns is None:
            max_columns = 128 if flat.device.type == "cpu" else 4096
        rows = torch.arange(n_batch * n_samples, device=flat.device) // n_samples
        decoded = torch.cat(
            [
                self.network.decode(
                    ObservationTokens(tokens.tokens[row], tokens.positions), latent, queries
                )
                for row, latent in zip(
                    rows.split(max_columns), flat.split(max_columns), strict=True
                )
            ]
        )
        # All samples of an observation as one long chunk, so that relative actions find its state.
        actions = self.unnormalise_actions(
            rearrange(
                decoded,
                "(batch sample) query action -> batch (sample query) action",
                sample=n_samples,
            ),
            observation,
        )
        return rearrange(
            actions, "batch (sample query) action -> batch sample query action", sample=n_samples
        )


def prior_latents(n_samples: int, latent_dim: int, seed: int = 0) -> Float[Tensor, "sample latent"]:
    """Draw z ~ N(0, I) once and for all: scrambled Sobol points through the normal quantile.

    The same set serves all frames and checkpoints (common random numbers), so that videos do not
    flicker and differences between checkpoints are paired.
    """
    uniform = torch.quasirandom.SobolEngine(latent_dim, scramble=True, seed=seed).draw(
        n_samples, dtype=torch.float64
    )
    return torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9))


def sinusoidal_positions_1d(n_positions: int, dim: int) -> Float[Tensor, "position dim"]:
    """Sinusoidal positions of Vaswani et al. 2017, section 3.5, sine and cosine interleaved."""
    position = torch.arange(n_positions, dtype=torch.float64)[:, None]
    index = torch.arange(dim, dtype=torch.float64)
    angle = position / 10000 ** (2 * (index // 2) / dim)
    table = torch.where(index % 2 == 0, angle.sin(), angle.cos())
    return table.float()


def sinusoidal_positions_2d(rows: int, columns: int, dim: int) -> Float[Tensor, "cell dim"]:
    """Two-dimensional sinusoidal positions as in DETR, row-major cells.

    Rows and columns count from 1 and are scaled to (0, 2 pi]; the first half of the dimensions
    encodes the row, the second half the column.
    """
    half = dim // 2
    epsilon = 1e-6
    index = torch.arange(half, dtype=torch.float32)
    frequency = 10000 ** (2 * (index // 2) / half)

    def encode(length: int) -> Float[Tensor, "length half"]:
        place = torch.arange(1, length + 1, dtype=torch.float32)
        angle = (place / (length + epsilon) * 2 * math.pi)[:, None] / frequency
        interleaved = torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=-1)
        return rearrange(interleaved, "length pair two -> length (pair two)")

    row = repeat(encode(rows), "row half -> row column half", column=columns)
    column = repeat(encode(columns), "column half -> row column half", row=rows)
    return rearrange(torch.cat([row, column], dim=-1), "row column dim -> (row column) dim")
