"""LeRobot's own policies (Diffusion Policy, VQ-BeT, ACT, ...) behind our stateless view.

LeRobot's ``select_action`` keeps queues of observations and actions; a diagnostic that went through
it would change what the policy does next and would see old plans. Here every prediction is a
function of the observation it is given: the queues are neither read nor written.

Chunk step 0 is the action for the newest observed instant. Diffusion Policy denoises a whole
``horizon`` that begins ``n_obs_steps - 1`` steps earlier; the view returns the part from now on,
``horizon - n_obs_steps + 1`` steps, of which LeRobot executes the first ``n_action_steps``.
"""

import contextlib
import io
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from policies.atomic_files import apply_umask
from policies.backbones import to_unit_range
from policies.checkpoint_files import CheckpointError
from policies.interface import Batch, DataSchema, Observation
from policies.lerobot_chunks import DiffusionChunks, chunk_source
from policies.lerobot_config import (
    ENVIRONMENT_STATE_KEY,
    STATE_KEY,
    build_policy,
    config_from_dict,
    extras_explained,
    missing_statistics,
    refuse_without_chunks,
    schema_of,
)
from policies.lerobot_format import (
    CONFIG_FILE,
    POSTPROCESSOR_FILE,
    PREPROCESSOR_FILE,
    RELATIVE_STEP,
    WEIGHTS_FILE,
    LeRobotFormatError,
    Statistics,
    StatisticsSource,
    act_from_lerobot,
    as_format_error,
    has_relative_actions,
    image_key,
    no_statistics,
    read_config,
    read_processor,
    read_safetensors,
    read_weights,
    state_file,
)

if TYPE_CHECKING:
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.pretrained import PreTrainedPolicy
    from lerobot.processor import PolicyProcessorPipeline

    from policies.act import ACTPolicy

CHECKPOINT_KEY = "lerobot"
"""Entry of our checkpoints that holds a LeRobot policy's ``config`` and ``statistics``."""
POLICY_PREFIX = "policy."
"""Of the policy's weights in our checkpoints."""
RUNS_FOREIGN_CODE = ("gaussian_actor", "groot", "pi0_fast", "wall_x")
"""LeRobot's types that have transformers run Python files of repositories that the policy names."""
STEPS_THAT_LOAD_NOTHING = (
    "absolute_actions_processor",
    "device_processor",
    "eo1_conversation_template_processor",
    "evo1_action_processor",
    "evo1_pad_action_processor",
    "evo1_pad_state_processor",
    "fastwam_action_toggle_processor",
    "image_crop_resize_processor",
    "map_delta_action_to_robot_action",
    "map_tensor_to_delta_action_dict",
    "molmoact2_action_frame_transform",
    "molmoact2_clamp_action",
    "molmoact2_clamp_normalized",
    "molmoact2_masked_normalizer",
    "molmoact2_masked_unnormalizer",
    "molmoact2_state_frame_transform",
    "normalizer_processor",
    "pi05_prepare_state_tokenizer_processor_step",
    "pi0_new_line_processor",
    RELATIVE_STEP,
    "rename_observations_processor",
    "smolvla_new_line_processor",
    "to_batch_processor",
    "to_batch_processor_action",
    "to_batch_processor_complementary_data",
    "to_batch_processor_observation",
    "unnormalizer_processor",
    "vla_jepa_binarize_gripper",
    "vla_jepa_clip_actions",
    "vla_jepa_pre_snap_gripper",
    "xvla_add_domain_id",
    "xvla_image_scale",
    "xvla_image_to_float",
    "xvla_imagenet_normalize",
    "xvla_rotation_6d_to_axis_angle",
)
"""LeRobot's processor steps that are made of their settings and tensors alone."""
TOKENIZER_STEP = "tokenizer_processor"
"""The one step that may load something: a tokenizer, whose own Python files are not run."""


class LeRobotPolicyView:
    """A LeRobot policy with its processors, as rollouts and diagnostics see it.

    Predictions are deterministic: the noise of a stochastic policy is drawn from a generator that
    is seeded with the observed state, so the same observation always gets the same chunk, whatever
    else is in its batch (VQ-BeT: for the same batch), while noise is independent along an episode,
    as in LeRobot.

    Args:
        policy: Any LeRobot policy that predicts chunks.
        preprocessor: Its processor of observations, with statistics.
        postprocessor: Its processor of actions.
        seed: Of the noise, together with the observed state.
        task: What a language-conditioned policy is told to do.

    Raises:
        ValueError: If the policy cannot answer an observation by itself.
    """

    def __init__(
        self,
        policy: "PreTrainedPolicy",
        preprocessor: "PolicyProcessorPipeline",
        postprocessor: "PolicyProcessorPipeline",
        seed: int = 0,
        task: str | None = None,
    ):
        self.policy = policy
        self.preprocessor = preprocessor
        self.postprocessor = postprocessor
        self.seed = seed
        self.task = task
        self._data_schema = schema_of(policy.config)
        self._chunks = chunk_source(policy)

    @property
    def data_schema(self) -> DataSchema:
        """The data the policy was made for."""
        return self._data_schema

    @property
    def chunk_size(self) -> int:
        """Steps predicted from the observed instant on."""
        return self._chunks.chunk_size

    @property
    def n_action_steps(self) -> int:
        """Steps of a chunk that LeRobot executes before the next prediction."""
        return self._chunks.n_action_steps

    @property
    def n_obs_steps(self) -> int:
        """Steps of observation history; 1 means no ``obs_step`` axis."""
        return self.policy.config.n_obs_steps

    @property
    def device(self) -> torch.device:
        """Where the policy lives."""
        return next(self.policy.parameters()).device

    @torch.no_grad()
    def predict_chunk(
        self,
        observation: Observation,
        queries: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        noise: Float[Tensor, "batch horizon action"] | None = None,
    ) -> Float[Tensor, "batch query action"]:
        """Predict actions in data units.

        Args:
            observation: What the policy sees, on the policy's device.
            queries: Chunk steps to return; all when None.
            generator: Draw the noise of the whole batch from it, as LeRobot draws it from the
                global one.
            noise: Diffusion Policy's initial noise, in place of drawn noise.

        Raises:
            ValueError: If the observation lacks something or has the wrong shape, or a query lies
                outside the chunk.
        """
        self._check_queries(queries)
        batch = self._normalise(observation)
        with _evaluating(self.policy):
            encoded = self._chunks.encode(batch)
            generators = generator or self._generators(observation)
            chunk = self._chunks.sample(encoded, 1, generators, noise)
        return self._to_data_units(chunk if queries is None else chunk[:, list(queries)])

    @torch.no_grad()
    def sample_chunks(
        self,
        observation: Observation,
        n_samples: int,
        seed: int = 0,
        queries: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch sample query action"]:
        """Draw several chunks per observation; the observation is encoded once (diffusion).

        Sample j of every observation comes from the same noise (common random numbers), so that
        differences between observations are theirs. VQ-BeT and others share it per batch only.

        Args:
            observation: What the policy sees, on the policy's device.
            n_samples: Chunks per observation.
            seed: Of the noise.
            queries: Chunk steps to return; all when None.

        Raises:
            ValueError: If the policy is deterministic, ``n_samples`` is not positive, or as in
                :meth:`predict_chunk`.
        """
        if not self._chunks.is_random:
            raise ValueError(
                f"LeRobot's {self.policy.config.type} answers an observation in one way only: "
                "there is nothing to sample (load its folder to get our ACT, which has a latent)"
            )
        if n_samples < 1:
            raise ValueError(f"n_samples={n_samples} must be at least 1")
        self._check_queries(queries)
        batch = self._normalise(observation)
        n_observations = len(next(iter(observation.images.values()), observation.state))  # pyright: ignore[reportArgumentType]
        streams = _common_streams(seed, n_samples, n_observations)
        with _evaluating(self.policy):
            chunk = self._chunks.sample(self._chunks.encode(batch), n_samples, streams, None)
        chunk = chunk if queries is None else chunk[:, list(queries)]
        # All samples of an observation as one long chunk, so that relative actions find its state.
        actions = self._to_data_units(
            rearrange(
                chunk,
                "(batch sample) query action -> batch (sample query) action",
                sample=n_samples,
            )
        )
        return rearrange(
            actions,
            "batch (sample query) action -> batch sample query action",
            sample=n_samples,
        )

    def diffusion(self, observation: Observation) -> "HorizonDiffusion":
        """The denoising process behind the chunks of some observations, each encoded once.

        Args:
            observation: What the policy sees, on the policy's device.

        Raises:
            ValueError: If the policy is no Diffusion Policy, a dimension of its actions has no
                scale, or as in :meth:`predict_chunk`.
        """
        chunks = self._chunks
        if not isinstance(chunks, DiffusionChunks):
            raise ValueError(
                f"LeRobot's {self.policy.config.type} predicts no noise: only Diffusion Policy "
                "(type 'diffusion') does"
            )
        # What is encoded in inference mode could not take part in gradients later.
        with torch.inference_mode(False), torch.no_grad():
            batch = self._normalise(observation)
            with _evaluating(self.policy):
                encoded = chunks.encode(batch)
            # Every scaling of LeRobot's is affine in each dimension: two points say all of it.
            ends = encoded.new_zeros(len(encoded), 2, self._data_schema.action_dim)
            ends[:, 1] = 1
            offset, one = self._to_data_units(ends).double().unbind(1)
            scale = one - offset
        constant = (scale <= 0).any(0).nonzero().flatten().tolist()
        if constant:
            raise ValueError(
                f"action dimensions {constant} never change in the policy's statistics: actions "
                "have no density there"
            )
        return HorizonDiffusion(chunks, encoded, offset, scale[0])

    def training_batch(self, batch: Batch) -> dict[str, Any]:
        """Give a batch the form that the policy's ``forward`` takes, normalised."""
        values = self._observation_values(batch.observation)
        values["action"] = batch.actions.float()
        values["action_is_pad"] = batch.action_is_pad
        return self._preprocess(values)

    def export_lerobot(self, folder: Path) -> None:
        """Write a folder that LeRobot loads, with ``save_pretrained`` of policy and processors.

        Raises:
            FileExistsError: If the folder holds something.
        """
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} is not empty: choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        config = self.policy.config
        kept = config.device, config.push_to_hub
        config.device, config.push_to_hub = "cpu", False
        try:
            self.policy.save_pretrained(folder)
        finally:
            config.device, config.push_to_hub = kept
        from lerobot.processor import NormalizerProcessorStep, UnnormalizerProcessorStep

        for pipeline, name in (
            (self.preprocessor, PREPROCESSOR_FILE),
            (self.postprocessor, POSTPROCESSOR_FILE),
        ):
            _place(pipeline, torch.device("cpu"))
            steps: Sequence[Any] = pipeline.steps
            for step in steps:
                if isinstance(step, NormalizerProcessorStep | UnnormalizerProcessorStep):
                    # LeRobot casts statistics to the type of the data, bf16 perhaps.
                    step.to(device="cpu", dtype=torch.float32)
            pipeline.save_pretrained(folder, config_filename=name)
        for file in folder.glob("*.safetensors"):
            apply_umask(file)

    def _check_queries(self, queries: Sequence[int] | None) -> None:
        if queries is not None and not all(0 <= query < self.chunk_size for query in queries):
            raise ValueError(f"queries {list(queries)} must lie in 0..{self.chunk_size - 1}")

    def _normalise(self, observation: Observation) -> dict[str, Any]:
        return self._preprocess(self._observation_values(observation))

    def _preprocess(self, values: dict[str, Any]) -> dict[str, Any]:
        _place(self.preprocessor, self.device)
        batch = self.preprocessor(values)
        if self.n_obs_steps == 1 and self._chunks.needs_step_axis:
            for key in self.policy.config.input_features or {}:
                batch[key] = rearrange(batch[key], "batch ... -> batch 1 ...")
        return batch

    def _to_data_units(
        self, actions: Float[Tensor, "batch query action"]
    ) -> Float[Tensor, "batch query action"]:
        _place(self.postprocessor, self.device)
        return self.postprocessor(actions.float())

    def _observation_values(self, observation: Observation) -> dict[str, Any]:
        """Check an observation and give it LeRobot's keys, pictures in 0..1.

        Raises:
            ValueError: If something is missing or has the wrong shape.
        """
        schema = self._data_schema
        leading = 1 if self.n_obs_steps == 1 else 2
        values: dict[str, Any] = {}
        for camera, size in schema.cameras.items():
            if camera not in observation.images:
                raise ValueError(
                    f"camera {camera!r} is missing; the observation has {list(observation.images)}"
                )
            image = observation.images[camera]
            self._check_shape(f"camera {camera!r}", image, leading, (3, *size))
            values[image_key(camera)] = to_unit_range(image)
        for key, dim, value in (
            (STATE_KEY, schema.state_dim, observation.state),
            (
                ENVIRONMENT_STATE_KEY,
                schema.environment_state_dim,
                observation.environment_state,
            ),
        ):
            if not dim:
                continue
            if value is None:
                raise ValueError(f"the policy reads {key}, but the observation has none")
            self._check_shape(key, value, leading, (dim,))
            values[key] = value.float()
        if self.task is not None:
            values["task"] = [self.task] * len(next(iter(values.values())))
        return values

    def _check_shape(self, name: str, value: Tensor, leading: int, shape: tuple[int, ...]) -> None:
        steps_fit = leading == 1 or (value.ndim > 1 and value.shape[1] == self.n_obs_steps)
        if value.ndim != leading + len(shape) or value.shape[leading:] != shape or not steps_fit:
            axes = "batch" if leading == 1 else f"batch, n_obs_steps={self.n_obs_steps}"
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; the policy was made for ({axes}) + {shape}"
            )

    def _generators(self, observation: Observation) -> list[torch.Generator]:
        """One generator per row, seeded by what is observed there."""
        seen = observation.state
        if seen is None:
            seen = next(iter(observation.images.values()))
        rows = seen.detach().cpu().contiguous()
        return [
            torch.Generator().manual_seed(zlib.crc32(row.numpy().tobytes(), self.seed))
            for row in rows
        ]


class HorizonDiffusion:
    """Diffusion over whole horizons of actions, given some observations, in data units.

    ``noised = horizon + level * scale * eps`` with eps ~ N(0, 1): the variance exploding form of
    LeRobot's process (Karras et al. 2022, https://arxiv.org/abs/2206.00364), which turns
    normalised horizons into data units by ``offset + scale * normalised``.

    Args:
        chunks: How the policy denoises.
        encoded: Its observations.
        offset: Data units of a normalised 0.
        scale: Data units of a normalised 1, beyond the offset.
    """

    def __init__(
        self,
        chunks: DiffusionChunks,
        encoded: Float[Tensor, "frame condition"],
        offset: Float[Tensor, "frame action"],
        scale: Float[Tensor, " action"],
    ):
        self._chunks = chunks
        self._encoded = encoded
        self.offset = offset
        self.scale = scale

    @property
    def horizon(self) -> int:
        """Steps of a horizon, past ones included."""
        return self.n_past + self._chunks.chunk_size

    @property
    def n_past(self) -> int:
        """Steps of a horizon before the observed instant."""
        return self._chunks.first

    @property
    def noise_levels(self) -> Float[Tensor, " timestep"]:
        """Standard deviations of the noise in training, in units of ``scale``, ascending."""
        return self._chunks.noise_levels

    def predict_noise(
        self,
        noised: Float[Tensor, "row horizon action"],
        level: float,
        frames: Int[Tensor, " row"],
    ) -> Float[Tensor, "row horizon action"]:
        """Predict eps, of unit variance; gradients flow.

        Args:
            noised: Horizons with noise, data units.
            level: Of the noise, within :attr:`noise_levels`.
            frames: Observation that each row belongs to.
        """
        normalised = (noised - self.offset[frames, None]) / self.scale
        with _evaluating(self._chunks.policy):
            return self._chunks.predict_noise(self._encoded[frames], normalised, level)

    def sample_horizons(self, seed: int = 0) -> Float[Tensor, "frame horizon action"]:
        """Draw one horizon per observation; from ``n_past`` on it is ``sample_chunks(...)[:, 0]``.

        Args:
            seed: Of the noise, which all observations share.
        """
        streams = _common_streams(seed, 1, len(self._encoded))
        with torch.no_grad(), _evaluating(self._chunks.policy):
            horizons = self._chunks.denoise(self._encoded, 1, streams, None)
        return self.offset[:, None] + self.scale * horizons.double()


def load_lerobot_policy(
    folder: Path,
    device: str | torch.device = "cpu",
    seed: int = 0,
    task: str | None = None,
    statistics: StatisticsSource | None = None,
) -> LeRobotPolicyView:
    """Load a folder that LeRobot wrote, in eval mode, scaled by the folder's own statistics.

    Args:
        folder: With ``config.json``, ``model.safetensors`` and both processors; those that LeRobot
            makes for a new policy stand in where there are none.
        device: Where the policy goes.
        seed: Of the noise of stochastic policies.
        task: What a language-conditioned policy is told to do.
        statistics: Finds statistics if the folder brings none.

    Raises:
        LeRobotFormatError: If a file is missing or damaged, weights do not fit, a feature has no
            statistics, or the policy needs packages that are not installed.
    """
    values = read_config(folder)
    config_file = folder / CONFIG_FILE
    _refuse_foreign_code(values.get("type"), config_file)
    weights = read_weights(folder)
    _refuse_legacy(weights, folder)
    with _building(config_file, values.get("type")):
        config = config_from_dict(values, config_file)
    try:
        refuse_without_chunks(config)
    except ValueError as error:
        raise LeRobotFormatError(config_file, str(error), "Load another policy") from error
    with _building(config_file, config.type):
        policy = _with_weights(config, folder)
        preprocessor, postprocessor = _read_processors(config, folder)
        view = LeRobotPolicyView(policy.to(device).eval(), preprocessor, postprocessor, seed, task)
        found = {**_statistics_of(preprocessor), **_statistics_of(postprocessor)}
        missing = _missing(config, preprocessor, postprocessor)
    if missing and not found and statistics is not None:
        are_relative = _has_relative_actions(preprocessor, folder)
        found = statistics(view.data_schema, view.chunk_size, are_relative)
        for pipeline in (preprocessor, postprocessor):
            _scale_by(pipeline, found)
        missing = _missing(config, preprocessor, postprocessor)
    if missing:
        raise no_statistics(folder, missing, found)
    return view


def processors_for(
    config: "PreTrainedConfig", statistics: Statistics
) -> tuple["PolicyProcessorPipeline", "PolicyProcessorPipeline"]:
    """Make a new policy's processors.

    Raises:
        ValueError: If a feature that must be scaled has no statistics.
    """
    missing = missing_statistics(config, statistics)
    if missing:
        raise ValueError(
            f"no statistics for {', '.join(missing)}; choose another mode in "
            "policy_config.normalization_mapping, e.g. MEAN_STD or MIN_MAX"
        )
    from lerobot.policies.factory import make_pre_post_processors

    return make_pre_post_processors(config, dataset_stats=statistics)  # pyright: ignore[reportArgumentType]


def lerobot_policy_from_checkpoint(
    checkpoint: Mapping[str, Any], path: Path, device: str | torch.device = "cpu"
) -> "tuple[LeRobotPolicyView | ACTPolicy, float | None]":
    """Rebuild a policy from a checkpoint of ``LeRobotPolicyModule``.

    LeRobot's ACT comes back as ours, which equals it and lets diagnostics look inside.

    Returns:
        The policy in eval mode, and the temporal ensembling coefficient it is configured with.

    Raises:
        CheckpointError: If the checkpoint holds no LeRobot policy.
        LeRobotFormatError: If its parts do not fit together.
    """
    saved = checkpoint.get(CHECKPOINT_KEY)
    weights = {
        name.removeprefix(POLICY_PREFIX): value
        for name, value in checkpoint.get("state_dict", {}).items()
        if name.startswith(POLICY_PREFIX)
    }
    if saved is None or not weights:
        raise CheckpointError(
            f"{path}: it holds no LeRobot policy; give a checkpoint of a LeRobotPolicyModule run"
        )
    with as_format_error(path):
        parts = {name: dict(saved[name]) for name in ("config", "statistics")}
        _refuse_foreign_code(parts["config"]["type"], path)
    if parts["config"]["type"] == "act":
        loaded = act_from_lerobot(
            parts["config"], weights, parts["statistics"], path, device=device
        )
        return loaded.policy, loaded.temporal_ensemble_coeff
    with _building(path, parts["config"]["type"]):
        config = config_from_dict(parts["config"], path)
        policy = build_policy(config)
        processors = processors_for(config, parts["statistics"])
        view = LeRobotPolicyView(policy.to(device).eval(), *processors)
    try:
        policy.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: the weights do not fit the policy ({shorten(str(error), 400)})"
        ) from error
    return view, None


@contextlib.contextmanager
def _building(source: Path, policy_type: Any) -> Iterator[None]:
    """Let LeRobot make a policy of a stranger's settings, without a stranger's code.

    Raises:
        LeRobotFormatError: In place of whatever it raises.
    """
    _run_no_remote_code()
    refused = _refused(source, "make a policy of it", "Check the config, or copy it again")
    with extras_explained(source, str(policy_type)), refused:
        yield


@contextlib.contextmanager
def _refused(source: Path, what: str, mend: str) -> Iterator[None]:
    """Say what LeRobot cannot do; each of its types and steps has its own ways to refuse.

    Raises:
        LeRobotFormatError: In place of whatever it raises, but a package that is missing.
    """
    try:
        yield
    except (ImportError, LeRobotFormatError):
        raise
    except Exception as error:
        problem = f"LeRobot cannot {what} ({type(error).__name__}: {shorten(str(error), 300)})"
        raise LeRobotFormatError(source, problem, mend) from error


def _run_no_remote_code() -> None:
    """Have transformers refuse Python files of a repository where it would ask on the terminal."""
    try:
        from transformers import dynamic_module_utils  # pyright: ignore[reportMissingImports]
    except ImportError:
        return
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0


def _refuse_legacy(weights: Mapping[str, Tensor], folder: Path) -> None:
    legacy = [name for name in weights if ".buffer_" in name]
    if legacy:
        raise LeRobotFormatError(
            folder / WEIGHTS_FILE,
            f"statistics lie among the weights ({legacy[0]}), as before LeRobot 0.4",
            "Convert it: python -m lerobot.processor.migrate_policy_normalization "
            f"--pretrained-path {folder}",
        )


def _with_weights(config: "PreTrainedConfig", folder: Path) -> "PreTrainedPolicy":
    from lerobot.policies.factory import get_policy_class
    from lerobot.policies.pretrained import PreTrainedPolicy
    from safetensors.torch import load_model

    policy_class = get_policy_class(config.type)
    if policy_class.from_pretrained.__func__ is not PreTrainedPolicy.from_pretrained.__func__:
        # Some policies rename weights while loading; LeRobot prints what it does.
        with contextlib.redirect_stdout(io.StringIO()):
            return policy_class.from_pretrained(folder, config=config)
    policy = policy_class(config)
    try:
        # LeRobot itself loads leniently: a misnamed tensor would stay random.
        load_model(policy, folder / WEIGHTS_FILE, strict=True)
    except RuntimeError as error:
        raise LeRobotFormatError(
            folder / WEIGHTS_FILE,
            shorten(str(error), 400),
            "The weights must belong to this config.json",
        ) from error
    return policy


def _read_processors(
    config: "PreTrainedConfig", folder: Path
) -> tuple["PolicyProcessorPipeline", "PolicyProcessorPipeline"]:
    from lerobot.policies.factory import make_pre_post_processors

    found = [read_processor(folder / name) for name in (PREPROCESSOR_FILE, POSTPROCESSOR_FILE)]
    if found == [None, None]:
        return make_pre_post_processors(config)
    overrides: list[dict[str, Any]] = []
    for name, pipeline in zip((PREPROCESSOR_FILE, POSTPROCESSOR_FILE), found, strict=True):
        if pipeline is None:
            raise LeRobotFormatError(
                folder / name,
                "no such file, but the other processor is there",
                "Copy the whole policy folder again",
            )
        _refuse_foreign_steps(pipeline, folder / name)
        for step in pipeline["steps"]:
            if step.get("state_file") is not None:
                read_safetensors(state_file(folder, step))
        # A policy saved on a GPU must load without one.
        moves = any(step["registry_name"] == "device_processor" for step in pipeline["steps"])
        overrides.append({"device_processor": {"device": "cpu"}} if moves else {})
    with _refused(folder, "read its processors", "Copy the whole folder again"):
        return make_pre_post_processors(
            config,
            pretrained_path=str(folder),
            preprocessor_overrides=overrides[0],
            postprocessor_overrides=overrides[1],
        )


def _refuse_foreign_code(policy_type: Any, source: Path) -> None:
    """Refuse types that would run what a repository of the author's choice holds.

    Raises:
        LeRobotFormatError: Naming the type.
    """
    if policy_type in RUNS_FOREIGN_CODE:
        raise LeRobotFormatError(
            source,
            f"LeRobot's {policy_type} runs Python code of repositories that this file names",
            _TRUSTED,
        )


def _refuse_foreign_steps(pipeline: Mapping[str, Any], path: Path) -> None:
    """Let only those steps of LeRobot's own through that run no code from elsewhere.

    Raises:
        LeRobotFormatError: Naming the step.
    """
    from lerobot.processor import ProcessorStepRegistry

    known = ProcessorStepRegistry.list()
    for step in pipeline["steps"]:
        name = step["registry_name"]
        if name not in known:
            raise LeRobotFormatError(
                path,
                f"step {shorten(ascii(name), 80)} is unknown to the installed LeRobot",
                "Install the version of LeRobot that wrote it",
            )
        if name not in (*STEPS_THAT_LOAD_NOTHING, TOKENIZER_STEP):
            raise LeRobotFormatError(
                path,
                f"step {name!r} is none of those that are known to load nothing: it could run "
                "Python code of a repository that its settings name",
                _TRUSTED,
            )


_TRUSTED = "Run the policy in LeRobot itself, if you trust where it comes from"


def _common_streams(seed: int, n_samples: int, n_observations: int) -> list[torch.Generator]:
    """Random numbers for each sample, the same for every observation."""
    source = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**62, (n_samples,), generator=source).tolist()
    return [torch.Generator().manual_seed(seed) for seed in seeds * n_observations]


def _statistics_of(pipeline: "PolicyProcessorPipeline") -> Statistics:
    """Statistics that a pipeline's scaling steps hold."""
    from lerobot.processor import NormalizerProcessorStep, UnnormalizerProcessorStep

    statistics: Statistics = {}
    for step in pipeline.steps:
        if isinstance(step, NormalizerProcessorStep | UnnormalizerProcessorStep):
            for name, value in step.state_dict().items():
                key, _, statistic = name.rpartition(".")
                statistics.setdefault(key, {})[statistic] = value
    return statistics


def _scale_by(pipeline: "PolicyProcessorPipeline", statistics: Statistics) -> None:
    """Give a pipeline's scaling steps their statistics."""
    from lerobot.processor import NormalizerProcessorStep, UnnormalizerProcessorStep

    steps: Sequence[Any] = pipeline.steps
    for step in steps:
        if isinstance(step, NormalizerProcessorStep | UnnormalizerProcessorStep):
            step.stats = statistics
            step.to()


def _has_relative_actions(preprocessor: "PolicyProcessorPipeline", folder: Path) -> bool:
    from lerobot.processor import RelativeActionsProcessorStep

    steps: Sequence[Any] = preprocessor.steps
    described = [
        {"registry_name": RELATIVE_STEP, "config": step.get_config()}
        for step in steps
        if isinstance(step, RelativeActionsProcessorStep)
    ]
    return has_relative_actions({"steps": described}, folder)


def _missing(
    config: "PreTrainedConfig",
    preprocessor: "PolicyProcessorPipeline",
    postprocessor: "PolicyProcessorPipeline",
) -> list[str]:
    """Features that one of the pipelines would pass through unscaled."""
    missing = missing_statistics(config, _statistics_of(preprocessor))
    scaled_back = missing_statistics(config, _statistics_of(postprocessor))
    return missing + [
        text for text in scaled_back if text.startswith("action ") and text not in missing
    ]


def _place(pipeline: "PolicyProcessorPipeline", device: torch.device) -> None:
    """Let a pipeline work on ``device``: Lightning and callers move policies at will."""
    from lerobot.processor import DeviceProcessorStep

    steps: Sequence[Any] = pipeline.steps
    pipeline.steps = [
        DeviceProcessorStep(device=str(device), float_dtype=step.float_dtype)
        if isinstance(step, DeviceProcessorStep) and step.tensor_device != device
        else step
        for step in steps
    ]


@contextlib.contextmanager
def _evaluating(policy: nn.Module) -> Iterator[None]:
    """Switch to eval mode (no dropout, central crops), then back, module by module."""
    training = [module for module in policy.modules() if module.training]
    policy.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
