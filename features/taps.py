"""Activations of a policy at a named place: read them, change them, go on from them.

A *tap* is the output of one module while the policy predicts a chunk in eval mode, as vectors of
tokens. Three places of our ACT have names of their own (:data:`SITES`); any other module of any
policy is named by its path, e.g. ``network.encoder.layers.0`` or
``policy.diffusion.unet.mid_modules.1``.

The posterior, which plays no part in predicting, is never tapped. Hooks are gone when a context
ends, also by an exception.
"""

import difflib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from policies.act import ACT, ACTPolicy
from policies.interface import Observation, PolicyView
from policies.normalisation import camera_key
from policies.tokens import TokenLayout

SITES = {
    "encoder": "network.encoder",
    "decoder": "network.decoder",
    "backbone": "network.image_projection",
}
"""Name of a place in our ACT to its module: the transformer encoder's output, one token for the
latent, each state and each cell of each camera; the decoder's output, one token for each chunk
step; the pictures' cells as they enter the encoder, the cameras one behind the other."""

QUERY, TOKEN = "query", "token"
"""Names of tokens: a chunk step, and anything whose meaning is not known."""

Tokens = Float[Tensor, "batch token dim"]

_HEAD = "network.action_head"
_DUMMY_BATCH = 2
# A module whose first axis is not the batch would pass for a good one with a batch of one.


@dataclass(frozen=True)
class TokenPosition:
    """What one token stands for."""

    name: str
    """``latent``, ``state``, ``environment_state``, a camera, ``query``, or ``token``."""
    row: int | None = None
    """Row of a camera's cell, counted downwards; the chunk step of a query."""
    column: int | None = None
    """Column of a camera's cell, counted rightwards."""


@dataclass(frozen=True)
class Tap:
    """What a place in a policy yields for each observation."""

    layer: str
    """A name in :data:`SITES`, or a module's path."""
    positions: tuple[TokenPosition, ...]
    """Of each token, in order."""
    dim: int
    """Length of a token's vector."""


class ActivationCapture:
    """What :func:`capture_activations` has seen so far: the newest forward pass.

    Args:
        n_parts: Parts that the activations of one forward pass are seen in.
    """

    def __init__(self, n_parts: int = 1) -> None:
        self._n_parts = n_parts
        self._parts: deque[Tensor] = deque(maxlen=n_parts)
        self.n_seen = 0
        """Parts seen since the capture began."""

    def keep(self, tokens: Tokens) -> None:
        """Take the tokens of one part, in the place of those of the pass before."""
        # What follows the module may work in place.
        self._parts.append(tokens.detach().clone())
        self.n_seen += 1

    def take(self) -> Tokens | None:
        """Activations of the newest forward pass, once; None if there was none since."""
        if len(self._parts) < self._n_parts:
            return None
        activations = torch.cat(list(self._parts), dim=1)
        self._parts.clear()
        return activations


def find_tap(view: PolicyView, layer: str = "encoder") -> Tap:
    """Describe a place in a policy, by one look at an empty observation.

    Args:
        view: The policy.
        layer: A name in :data:`SITES` (our ACT), or the path of a module that gives a tensor
            (batch, dim), (batch, token, dim) or (batch, dim, row, column), or a tuple that begins
            with one.

    Raises:
        ValueError: If there is no such module (similar names are listed), or predicting a chunk
            does not call it once (ACT's image encoder: once for each camera), or its output is no
            vectors of a batch.
    """
    site = _find_site(view, layer)
    shapes: list[torch.Size] = []

    def look(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        shapes.append(_first_tensor(output, site).shape)

    handle = site.module.register_forward_hook(look)
    try:
        with _evaluating(site.roots), torch.no_grad():
            view.predict_chunk(_empty_observation(view, site.roots))
    finally:
        handle.remove()
    _check_calls(site, len(shapes), site.n_calls)
    for shape in shapes:
        _check_batch(site, shape[0], _DUMMY_BATCH)
    positions = tuple(
        position
        for call, shape in enumerate(shapes)
        for position in _positions(view, site, call, shape)
    )
    return Tap(layer, positions, shapes[0][-1] if len(shapes[0]) == 3 else shapes[0][1])


def read_activations(
    view: PolicyView, observation: Observation, layer: str = "encoder"
) -> Float[Tensor, "batch token dim"]:
    """Activations while the policy predicts a chunk, in eval mode, without gradients.

    Args:
        view: The policy; its modules return to the mode they were in.
        observation: What the policy sees, on its device.
        layer: As for :func:`find_tap`.

    Raises:
        ValueError: As :func:`find_tap`.
    """
    site = _find_site(view, layer)
    capture = ActivationCapture(site.n_parts)
    # What comes before the decoder does not depend on what is decoded.
    is_early = site.network is not None and not site.lies_in("network.decoder", _HEAD)
    with _listening(site, capture.keep), _evaluating(site.roots), torch.no_grad():
        view.predict_chunk(observation, [0] if is_early else None)
    _check_calls(site, capture.n_seen, site.n_parts)
    activations = capture.take()
    assert activations is not None
    _check_batch(site, len(activations), _batch_size(observation))
    return activations


@contextmanager
def capture_activations(view: PolicyView, layer: str = "encoder") -> Iterator[ActivationCapture]:
    """Keep the activations of each forward pass within the context, whoever asks for it.

    Nothing changes in the policy, with one exception: a tap in the decoder lets it decode all chunk
    steps where only some are asked for, so that activations are complete. The others are left out
    afterwards; rounding of those that stay may differ.

    A module without a name in :data:`SITES` is looked at once, with an empty observation, before
    the context begins; contexts around this one see that pass, too.

    Args:
        view: The policy.
        layer: As for :func:`find_tap`.

    Yields:
        Where the activations of the newest forward pass are found.

    Raises:
        ValueError: As :func:`find_tap`.
    """
    site = _find_site(view, layer)
    _check_unfamiliar(view, site)
    capture = ActivationCapture(site.n_parts)
    with _listening(site, capture.keep):
        yield capture


@contextmanager
def edit_activations(
    view: PolicyView, layer: str, edit: Callable[[Tokens], Tokens]
) -> Iterator[None]:
    """Let the policy go on from changed activations within the context.

    An edit that returns what it was given changes nothing, to the last bit. In the decoder, as in
    :func:`capture_activations`, all chunk steps are decoded and edited; what it says of modules
    without a name holds here, too.

    Args:
        view: The policy.
        layer: As for :func:`find_tap`.
        edit: Given the activations, returns others of the same shape. Gradients flow through it.

    Raises:
        ValueError: As :func:`find_tap`; if the module is called once for each of several cameras,
            where an edit would never see all tokens; in the forward pass, if the shape changes.
    """
    site = _find_site(view, layer)
    if site.n_parts > 1:
        raise ValueError(
            f"layer {layer!r}: is called for each of {site.n_calls} cameras, so no edit can see "
            "all tokens at once; edit 'backbone', where the cameras come together"
        )
    _check_unfamiliar(view, site)

    def checked(tokens: Tokens) -> Tokens:
        edited = edit(tokens)
        if edited.shape != tokens.shape:
            raise ValueError(
                f"the edit of layer {layer!r} turned activations of shape {tuple(tokens.shape)} "
                f"into {tuple(edited.shape)}; return the same shape"
            )
        return edited.to(tokens)

    with _listening(site, checked):
        yield


def continue_from(
    view: PolicyView,
    layer: str,
    activations: Float[Tensor, "batch token dim"],
    observation: Observation,
    queries: Sequence[int] | None = None,
) -> Float[Tensor, "batch query action"]:
    """Predict actions in data units from activations, computing only what comes after them.

    Equals ``predict_chunk`` for the activations that were read there. Gradients flow.

    Args:
        view: Our ACT.
        layer: ``encoder`` or ``decoder``.
        activations: Of all tokens of the layer; taken to the network's dtype.
        observation: What the policy saw; only its state is read, where actions are relative to it.
        queries: Chunk steps to predict; all when None.

    Raises:
        ValueError: If the policy or the layer is another, or a query lies outside the chunk.
    """
    if not isinstance(view, ACTPolicy) or layer not in ("encoder", "decoder"):
        raise ValueError(
            f"cannot go on from layer {layer!r} of {type(view).__name__}: only from 'encoder' and "
            "'decoder' of our ACT; use edit_activations elsewhere"
        )
    if queries is not None and not all(0 <= query < view.chunk_size for query in queries):
        raise ValueError(f"queries {list(queries)} must lie in 0..{view.chunk_size - 1}")
    network = view.network
    activations = activations.to(network.action_head.weight.dtype)
    n_tokens = TokenLayout.of(network).n_tokens if layer == "encoder" else view.chunk_size
    if activations.shape[1] != n_tokens:
        raise ValueError(
            f"layer {layer!r} has {n_tokens} tokens, the activations {activations.shape[1]}; give "
            "all of them"
        )
    if layer == "encoder":
        positions = _memory_positions(network, activations.dtype)
        decoded = network.decoder(network.query_positions, activations, positions, queries)
    else:
        decoded = activations if queries is None else activations[:, list(queries)]
    return view.unnormalise_actions(network.action_head(decoded), observation)


def _memory_positions(network: ACT, dtype: torch.dtype) -> Float[Tensor, "token dim"]:
    """Positional embeddings of the encoder's tokens, which no picture is needed for."""
    cameras = [network.get_buffer(f"position_{camera_key(name)}") for name in network.cameras]
    return torch.cat([network.vector_positions, *(grid.to(dtype) for grid in cameras)])


@dataclass(frozen=True)
class _Site:
    """A module to listen to."""

    layer: str
    """As it was asked for."""
    path: str
    module: nn.Module
    roots: tuple[nn.Module, ...]
    """The policy's outermost modules."""
    network: ACT | None
    """Our network, if the policy is one."""
    n_calls: int = 1
    """Calls of the module in one forward pass."""

    @property
    def is_encoder_input(self) -> bool:
        """Whether it is listened to where the cells of all cameras enter the encoder together."""
        return self.network is not None and self.path == SITES["backbone"]

    @property
    def n_parts(self) -> int:
        """Parts that the activations of one forward pass are seen in."""
        return 1 if self.is_encoder_input else self.n_calls

    def lies_in(self, *parts: str) -> bool:
        """Whether the module is one of these parts of our network, or inside of one."""
        return self.network is not None and any(
            self.path == part or self.path.startswith(f"{part}.") for part in parts
        )


def _find_site(view: PolicyView, layer: str) -> _Site:
    network = view.network if isinstance(view, ACTPolicy) else None
    roots: dict[str, nn.Module] = (
        {"": view}
        if isinstance(view, nn.Module)
        else {
            name: value
            for name, value in getattr(view, "__dict__", {}).items()
            if isinstance(value, nn.Module)
        }
    )
    modules = {
        ".".join(part for part in (prefix, name) if part): module
        for prefix, root in roots.items()
        for name, module in root.named_modules()
    }
    modules.pop("", None)
    path = SITES.get(layer, layer) if network is not None else layer
    if path not in modules:
        names = [*SITES, *modules] if network is not None else list(modules)
        near = difflib.get_close_matches(layer, names, n=5, cutoff=0.4)
        parent = layer.rpartition(".")[0]
        siblings = [name for name in names if name.rpartition(".")[0] == parent]
        near += [name for name in siblings if name not in near][:12]
        raise ValueError(
            f"layer {layer!r}: {type(view).__name__} has no such module; "
            + (f"similar are {near}" if near else "it has no modules to look into")
        )
    site = _Site(layer, path, modules[path], tuple(roots.values()), network)
    if network is not None and site.lies_in("network.backbone", SITES["backbone"]):
        return replace(site, n_calls=len(network.cameras))
    return site


def _check_calls(site: _Site, found: int, expected: int) -> None:
    if found != expected:
        times = "once" if expected == 1 else f"{expected} times, once for each camera"
        inside = [name for name, _ in site.module.named_children()][:12]
        raise ValueError(
            f"layer {site.layer!r}: predicting a chunk calls it {found} times; activations of one "
            f"forward pass need a module that is called {times}"
            + (f" (inside it are {inside})" if inside else "")
        )


def _check_batch(site: _Site, found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(
            f"layer {site.layer!r}: the first axis of its output counts {found} for a batch of "
            f"{expected}; name a module whose first axis is the batch"
        )


def _check_unfamiliar(view: PolicyView, site: _Site) -> None:
    """Look once at a module that is not known to be called as it should be."""
    if site.network is None or site.path not in (*SITES.values(), "network.backbone"):
        find_tap(view, site.layer)


@contextmanager
def _listening(site: _Site, see: Callable[[Tokens], Tokens | None]) -> Iterator[None]:
    """Show the activations to ``see`` in each forward pass; what it returns takes their place."""
    handles = []
    try:
        if site.network is not None and site.is_encoder_input:
            n_vectors = len(TokenLayout.of(site.network).vectors)
            handles.append(site.network.encoder.register_forward_pre_hook(_cells(see, n_vectors)))
        else:
            handles.append(site.module.register_forward_hook(_output(site, see)))
        if site.network is not None and site.lies_in("network.decoder"):
            handles += _decode_everything(site.network)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _output(site: _Site, see: Callable[[Tokens], Tokens | None]) -> Callable[..., Any]:
    """Hook a module's output."""

    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        tensor = _first_tensor(output, site)
        tokens = _as_tokens(tensor)
        seen = see(tokens)
        if seen is None:
            return None
        if tensor.ndim == 2:
            changed = rearrange(seen, "batch 1 dim -> batch dim")
        elif tensor.ndim == 3:
            changed = seen
        else:
            # In the memory format it had: convolutions round differently in another.
            cells = rearrange(
                seen, "batch (row column) dim -> batch dim row column", row=tensor.shape[2]
            )
            changed = torch.empty_like(tensor).copy_(cells)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook


def _cells(see: Callable[[Tokens], Tokens | None], n_vectors: int) -> Callable[..., Any]:
    """Hook the pictures' cells among the tokens that enter the encoder."""

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> Any:
        tokens, *others = inputs
        cells = tokens[:, n_vectors:]
        seen = see(cells)
        if seen is None:
            return None
        return (torch.cat([tokens[:, :n_vectors], seen], dim=1), *others)

    return hook


def _decode_everything(network: ACT) -> list[Any]:
    """Decode all chunk steps; those that were asked for are chosen before the action head."""
    asked: list[Sequence[int] | None] = [None]

    def widen(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        positions, memory, memory_positions, asked[0] = inputs
        return positions, memory, memory_positions, None

    def choose(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor] | None:
        queries, asked[0] = asked[0], None
        return None if queries is None else (inputs[0][:, list(queries)],)

    return [
        network.decoder.register_forward_pre_hook(widen),
        network.action_head.register_forward_pre_hook(choose),
    ]


def _first_tensor(output: Any, site: _Site) -> Tensor:
    """The output, or the first part of one of several parts.

    Raises:
        ValueError: If it is no vectors.
    """
    tensor = output[0] if isinstance(output, tuple) and output else output
    # Inside of our transformer a fourth axis counts heads.
    is_map = site.network is None or site.lies_in("network.backbone", SITES["backbone"])
    if not isinstance(tensor, Tensor) or tensor.ndim not in ((2, 3, 4) if is_map else (2, 3)):
        found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(
            f"layer {site.layer!r}: gives {found}, not vectors (batch, dim), (batch, token, dim) "
            "or a feature map (batch, dim, row, column); name a module that does"
        )
    return tensor


def _as_tokens(tensor: Tensor) -> Tokens:
    if tensor.ndim == 2:
        return rearrange(tensor, "batch dim -> batch 1 dim")
    if tensor.ndim == 4:
        return rearrange(tensor, "batch dim row column -> batch (row column) dim")
    return tensor


def _positions(
    view: PolicyView, site: _Site, call: int, shape: torch.Size
) -> Iterator[TokenPosition]:
    """What the tokens of one call stand for."""
    if site.network is not None:
        layout = TokenLayout.of(site.network)
        if site.lies_in("network.encoder") and shape[1:-1] == (layout.n_tokens,):
            for name in layout.vectors:
                yield TokenPosition(name)
            for name, (rows, columns) in layout.grids.items():
                yield from _grid(name, rows, columns)
            return
        if site.lies_in("network.decoder") and shape[1:-1] == (view.chunk_size,):
            yield from (TokenPosition(QUERY, step) for step in range(view.chunk_size))
            return
        if site.lies_in("network.backbone", SITES["backbone"]) and len(shape) == 4:
            yield from _grid(list(layout.grids)[call], shape[2], shape[3])
            return
    if len(shape) == 4:
        yield from _grid(TOKEN, shape[2], shape[3])
    else:
        yield from (TokenPosition(TOKEN) for _ in range(shape[1] if len(shape) == 3 else 1))


def _grid(name: str, rows: int, columns: int) -> Iterator[TokenPosition]:
    for row in range(rows):
        for column in range(columns):
            yield TokenPosition(name, row, column)


def _batch_size(observation: Observation) -> int:
    parts = (*observation.images.values(), observation.state, observation.environment_state)
    return next(len(part) for part in parts if part is not None)


def _empty_observation(view: PolicyView, roots: Sequence[nn.Module]) -> Observation:
    """Black pictures and zero states of the shapes that the policy was made for."""
    parameters = (parameter for root in roots for parameter in root.parameters())
    device = next((parameter.device for parameter in parameters), torch.device("cpu"))
    leading = (_DUMMY_BATCH,) if view.n_obs_steps == 1 else (_DUMMY_BATCH, view.n_obs_steps)
    schema = view.data_schema

    def vector(dim: int) -> Tensor | None:
        return torch.zeros(*leading, dim, device=device) if dim else None

    return Observation(
        images={
            name: torch.zeros(*leading, 3, *size, dtype=torch.uint8, device=device)
            for name, size in schema.cameras.items()
        },
        state=vector(schema.state_dim),
        environment_state=vector(schema.environment_state_dim),
    )


@contextmanager
def _evaluating(roots: Sequence[nn.Module]) -> Iterator[None]:
    """Switch to eval mode, then back, module by module."""
    training = [module for root in roots for module in root.modules() if module.training]
    for root in roots:
        root.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
