"""A policy that shows where it looks while it acts: ACT, LeRobot's or ours, behind one wrapper.

Importing this needs torch, NumPy and OpenCV; neither W&B nor a library of data sets.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from attention.attribution import Attribution
from attention.capture import AttentionWeights, capture_attention
from attention.maps import query_attention, roll_out, token_attribution
from attention.method import Target
from policies.act import ACTPolicy
from policies.ensembling import ActionQueue, TemporalEnsembler
from policies.interface import Observation
from policies.lerobot_format import camera_name, image_key
from policies.tokens import TokenLayout
from rendering.attention import AttentionStyle, Scale, draw_camera, scale_range
from rendering.attention_scenes import attention_scenes

STATE_KEY = "observation.state"
ENVIRONMENT_STATE_KEY = "observation.environment_state"


class ACTPolicyWithAttention:
    """Acts exactly as the policy that it wraps, and says what each decision looked at.

    Everything else, from ``reset`` to ``config``, is the wrapped policy's own. Copies and pickles
    hold a copy of the policy.

    Args:
        policy: LeRobot's ``ACTPolicy``, or ours.
        preprocessor: LeRobot's processor of observations, applied before its policy sees them; none
            for a batch that has been through it. Ours scales by itself.
        queries: Chunk steps whose attention is shown, on average; the action to execute now alone
            when not given.
        method: ``cross_attention`` of the decoder's last layer, or its ``rollout`` through the
            encoder.
        head: One head of the cross-attention; the mean of all when None.
        temporal_ensemble_coeff: For our policy, which holds no queue of its own: predict at every
            step and average overlapping chunks; when None, execute the first ``n_action_steps`` of
            each chunk. LeRobot's policy does what its config says.

    Raises:
        TypeError: If the policy is no ACT.
        ValueError: If an argument has no meaning for the policy.
    """

    def __init__(
        self,
        policy: Any,
        preprocessor: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
        queries: Sequence[int] = (0,),
        method: Literal["cross_attention", "rollout"] = "cross_attention",
        head: int | None = None,
        temporal_ensemble_coeff: float | None = None,
    ):
        if method not in ("cross_attention", "rollout"):
            raise ValueError(f"method {method!r}: give cross_attention or rollout")
        is_ours = isinstance(policy, ACTPolicy)
        if is_ours and preprocessor is not None:
            raise ValueError("preprocessor: our ACTPolicy scales observations itself; give none")
        if not is_ours and temporal_ensemble_coeff is not None:
            raise ValueError(
                f"temporal_ensemble_coeff={temporal_ensemble_coeff}: LeRobot's policy ensembles if "
                "its config says so; set config.temporal_ensemble_coeff before it is built"
            )
        network = getattr(policy, "network", None) or getattr(policy, "model", None)
        if not isinstance(network, nn.Module):
            raise TypeError(f"{type(policy).__name__}: give an ACTPolicy, LeRobot's or ours")
        TokenLayout.of(network)
        self._policy = policy
        self._network = network
        self._preprocessor = preprocessor
        self._queries = Target(tuple(queries)).queries
        self._method = method
        self._head = head
        self._controller: ActionQueue | TemporalEnsembler | None = None
        if is_ours:
            self._controller = (
                ActionQueue(policy.n_action_steps)
                if temporal_ensemble_coeff is None
                else TemporalEnsembler(temporal_ensemble_coeff, policy.chunk_size)
            )

    def __getattr__(self, name: str) -> Any:
        # Copying and unpickling ask before there is a policy.
        if name.startswith("__") or "_policy" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._policy, name)

    def reset(self) -> None:
        """Begin a new episode."""
        if self._controller is not None:
            self._controller.reset()
        else:
            self._policy.reset()

    @torch.no_grad()
    def select_action(
        self, observation: Observation | Mapping[str, Any], force_model_run: bool = True
    ) -> tuple[Float[Tensor, "batch action"], Attribution | None]:
        """Return the action to execute now, and what the network looked at.

        Args:
            observation: As the wrapped policy takes it: a dict of LeRobot's keys, with or without a
                batch axis, or (ours) an :class:`~policies.interface.Observation`.
            force_model_run: Where the action comes from the queue, run the network once more on
                this observation and throw the actions away, so that there are maps at every step.

        Returns:
            The same action, to the bit, as without the wrapper; and maps, or None where the network
            did not run and ``force_model_run`` is False.

        Raises:
            ValueError: If a camera or the state is missing, or pictures have another size.
        """
        if self._controller is not None:
            seen = self._our_observation(observation)
            return self._select_ours(seen, force_model_run)
        return self._select_lerobots(observation, force_model_run)

    def _select_ours(
        self, observation: Observation, force_model_run: bool
    ) -> tuple[Tensor, Attribution | None]:
        controller = cast("ActionQueue | TemporalEnsembler", self._controller)
        with capture_attention(self._network) as capture:
            chunk = None
            if controller.wants_prediction():
                steps = controller.steps_used()
                # As many as a rollout asks for, and those that are shown.
                needed = None if steps is None else range(max(steps, self._queries[-1] + 1))
                chunk = self._policy.predict_chunk(observation, needed)
            action = controller.step(chunk)
            if chunk is None and force_model_run:
                self._policy.predict_chunk(observation, list(self._queries))
        return action, self._maps(capture.take(), TokenLayout.of(self._network))

    def _select_lerobots(
        self, observation: Observation | Mapping[str, Any], force_model_run: bool
    ) -> tuple[Tensor, Attribution | None]:
        if isinstance(observation, Observation):
            observation = _to_lerobot(observation)
        batch: Mapping[str, Any] = dict(observation)
        if self._preprocessor is not None:
            batch = self._preprocessor(dict(batch))
        keys = list(self._policy.config.image_features)
        if missing := [key for key in keys if key not in batch]:
            raise ValueError(f"{missing}: missing; the observation has {list(observation)}")
        like = next(self._policy.parameters())
        batch = {
            key: _placed(value, like, 4 if key in keys else 2)
            if key.startswith("observation.") and isinstance(value, Tensor)
            else value
            for key, value in batch.items()
        }
        layout = TokenLayout.of(
            self._network,
            {camera_name(key): (batch[key].shape[-2], batch[key].shape[-1]) for key in keys},
        )
        # LeRobot's ACT makes its latent in float32 whatever the precision of its weights.
        is_half = like.dtype != torch.float32
        precision = torch.autocast(like.device.type, like.dtype, enabled=is_half)
        with precision, capture_attention(self._network) as capture:
            action = self._policy.select_action(dict(batch))
            weights = capture.take()
            if weights is None and force_model_run:
                # Neither reads nor writes the queue.
                self._policy.predict_action_chunk(dict(batch))
                weights = capture.take()
        return action, self._maps(weights, layout)

    def _maps(self, weights: AttentionWeights | None, layout: TokenLayout) -> Attribution | None:
        if weights is None:
            return None
        relevance = query_attention(weights, self._queries, head=self._head)
        if self._method == "rollout":
            relevance = roll_out(weights, relevance)
        return token_attribution(self._method, layout, relevance, self._queries)

    def _our_observation(self, observation: Observation | Mapping[str, Any]) -> Observation:
        policy = cast("ACTPolicy", self._policy)
        device = next(policy.parameters()).device
        if isinstance(observation, Observation):
            return observation.to(device)
        images = {}
        for camera in policy.data_schema.cameras:
            key = image_key(camera)
            if key not in observation:
                raise ValueError(f"{key}: missing; the observation has {list(observation)}")
            images[camera] = _batched(observation[key], 4)
        state, environment_state = (
            _batched(observation[key], 2) if key in observation else None
            for key in (STATE_KEY, ENVIRONMENT_STATE_KEY)
        )
        return Observation(images, state, environment_state).to(device)

    def visualize_attention(
        self,
        images: Sequence[Any] | Mapping[str, Any] | None = None,
        attention_maps: Attribution | None = None,
        observation: Observation | Mapping[str, Any] | None = None,
        use_rgb: bool = True,
        overlay_alpha: float = 0.5,
        show_proprio_border: bool = True,
        proprio_border_width: int = 15,
        colormap: str = "jet",
        scale: Scale = "global",
        target_height: int | None = None,
    ) -> list[UInt8[np.ndarray, "height width 3"]]:
        """Draw maps over the pictures that they belong to.

        Args:
            images: Pictures as tensors (3, height, width) or arrays (height, width, 3), in the
                order of the policy's cameras or by name; those of ``observation`` when None.
            attention_maps: From :meth:`select_action`.
            observation: As it was before normalisation.
            use_rgb: Whether to return RGB; BGR, as OpenCV shows it, otherwise.
            overlay_alpha: Weight of the colours, 0..1.
            show_proprio_border: Put a magenta frame around each picture, the brighter the more
                attention the state gets.
            proprio_border_width: Of that frame, in px of the result.
            colormap: Any of matplotlib's.
            scale: Range of the colours; ``global`` scales cells and state together.
            target_height: Of each picture, in px; its own height when None.

        Returns:
            One picture for each camera; of a batch, those of one frame after those of another.

        Raises:
            ValueError: If there are no maps or no pictures, or pictures are not in 0..1.
        """
        if attention_maps is None:
            raise ValueError(
                "attention_maps: none; the action came from the queue. Call select_action with "
                "force_model_run=True for maps at every step"
            )
        pictures = self._pictures(images, observation, list(attention_maps.maps))
        drawn = []
        for scene in attention_scenes(attention_maps, Observation(pictures)):
            for name, camera in scene.cameras.items():
                height = target_height or camera.picture.shape[0]
                style = AttentionStyle(
                    colormap=colormap,
                    overlay_alpha=overlay_alpha,
                    scale=scale,
                    target_height=height,
                    border="magenta" if show_proprio_border else "none",
                    proprio_border_width=proprio_border_width,
                )
                picture = draw_camera(scene, name, style, scale_range(scene, style))
                drawn.append(picture if use_rgb else np.ascontiguousarray(picture[..., ::-1]))
        return drawn

    def _pictures(
        self,
        images: Sequence[Any] | Mapping[str, Any] | None,
        observation: Observation | Mapping[str, Any] | None,
        cameras: list[str],
    ) -> dict[str, Tensor]:
        if images is None:
            if observation is None:
                raise ValueError("images and observation: both are missing; give one of them")
            images = (
                observation.images
                if isinstance(observation, Observation)
                else [observation[image_key(camera)] for camera in cameras]
            )
        if not isinstance(images, Mapping):
            if len(images) != len(cameras):
                raise ValueError(f"{len(images)} images for the cameras {cameras}; give one each")
            images = dict(zip(cameras, images, strict=True))
        return {camera: _channels_first(images[camera]) for camera in cameras}


def _to_lerobot(observation: Observation) -> dict[str, Tensor]:
    """LeRobot's keys, with pictures in 0..1 as its policies take them."""
    batch = {
        image_key(name): image / 255 if image.dtype == torch.uint8 else image
        for name, image in observation.images.items()
    }
    vectors = {
        STATE_KEY: observation.state,
        ENVIRONMENT_STATE_KEY: observation.environment_state,
    }
    return batch | {key: value for key, value in vectors.items() if value is not None}


def _placed(value: Tensor, like: Tensor, n_axes: int) -> Tensor:
    """Give a value the batch axis, the device and the precision that the policy computes in."""
    value = _batched(value, n_axes)
    return value.to(like.device, like.dtype if value.is_floating_point() else None)


def _batched(value: Any, n_axes: int) -> Tensor:
    """Put a batch axis in front where there is none."""
    tensor = torch.as_tensor(value)
    return tensor if tensor.ndim >= n_axes else tensor[None]


def _channels_first(image: Any) -> Tensor:
    """Pictures as policies see them, from tensors or from arrays with channels last."""
    tensor = torch.as_tensor(image)
    if tensor.ndim == 3:
        tensor = tensor[None]
    if tensor.shape[-3] != 3 and tensor.shape[-1] == 3:
        tensor = tensor.movedim(-1, -3)
    return tensor
