"""Small LeRobot policies with known statistics, and episodes to run them on."""

from pathlib import Path

import torch

from policies.interface import DataSchema, Observation
from policies.lerobot_config import build_config, build_policy
from policies.lerobot_view import processors_for

SIZE = (32, 32)
SCHEMA = DataSchema(cameras={"image": SIZE}, state_dim=2, action_dim=2)
STATISTICS = {
    "observation.image": {
        "mean": torch.tensor([0.5, 0.45, 0.55]).reshape(3, 1, 1),
        "std": torch.tensor([0.3, 0.25, 0.2]).reshape(3, 1, 1),
        "min": torch.zeros(3, 1, 1),
        "max": torch.ones(3, 1, 1),
    },
    "observation.state": {
        "mean": torch.tensor([230.0, 290.0]),
        "std": torch.tensor([95.0, 105.0]),
        "min": torch.tensor([13.0, 32.0]),
        "max": torch.tensor([497.0, 511.0]),
    },
    "action": {
        "mean": torch.tensor([235.0, 285.0]),
        "std": torch.tensor([98.0, 110.0]),
        "min": torch.tensor([12.0, 25.0]),
        "max": torch.tensor([511.0, 505.0]),
    },
}
"""Of the size of PushT's, in px; pictures in 0..1."""

TINY = {
    "act": {
        "n_action_steps": 5,
        "dim_model": 32,
        "n_heads": 4,
        "dim_feedforward": 48,
        "latent_dim": 6,
        "n_encoder_layers": 2,
        "n_vae_encoder_layers": 1,
    },
    "diffusion": {
        "n_action_steps": 3,
        "down_dims": [16, 32],
        "n_groups": 4,
        "diffusion_step_embed_dim": 16,
        "num_train_timesteps": 6,
        "spatial_softmax_num_keypoints": 4,
        "use_group_norm": True,
        "crop_shape": [28, 28],
    },
    "vqbet": {
        "n_obs_steps": 2,
        "n_action_pred_token": 2,
        "action_chunk_size": 3,
        "crop_shape": [28, 28],
        "use_group_norm": True,
        "spatial_softmax_num_keypoints": 4,
        "n_vqvae_training_steps": 2,
        "vqvae_n_embed": 4,
        "vqvae_embedding_dim": 16,
        "vqvae_enc_hidden_dim": 16,
        "gpt_block_size": 20,
        "gpt_input_dim": 16,
        "gpt_output_dim": 16,
        "gpt_n_layer": 1,
        "gpt_n_head": 2,
        "gpt_hidden_dim": 16,
    },
}
WINDOW = {"act": 7, "diffusion": 8, "vqbet": 5}


def lerobot_policy(policy_type: str, schema: DataSchema = SCHEMA, **changes):
    """A tiny policy of LeRobot's in eval mode, with its processors."""
    torch.manual_seed(0)
    settings = {**TINY[policy_type], **changes}
    policy = build_policy(build_config(policy_type, settings, schema, WINDOW[policy_type])).eval()
    for name, buffer in policy.named_buffers():
        # Frozen norms start as the identity; give them values so that they are really tested.
        if name.startswith("model.backbone") and name.endswith(("running_var", "weight")):
            buffer.uniform_(0.5, 1.5)
        elif name.startswith("model.backbone"):
            buffer.normal_(std=0.1)
        elif name.endswith("discretized"):
            buffer.fill_(True)
    return policy, *processors_for(policy.config, STATISTICS)


def write_folder(folder: Path, policy, preprocessor, postprocessor) -> Path:
    """What ``lerobot-train`` writes to ``pretrained_model``."""
    for part in (policy, preprocessor, postprocessor):
        part.save_pretrained(folder)
    return folder


def episode(n_steps: int, schema: DataSchema = SCHEMA, seed: int = 0) -> list[Observation]:
    """Batches of one observation, in order of time."""
    generator = torch.Generator().manual_seed(seed)

    def vector(dim: int):
        return 512 * torch.rand(1, dim, generator=generator) if dim else None

    return [
        Observation(
            images={
                name: torch.randint(256, (1, 3, *size), dtype=torch.uint8, generator=generator)
                for name, size in schema.cameras.items()
            },
            state=vector(schema.state_dim),
            environment_state=vector(schema.environment_state_dim),
        )
        for _ in range(n_steps)
    ]


def with_history(observations: list[Observation], step: int, n_obs_steps: int) -> Observation:
    """The last steps up to ``step``; before the start the first observation repeats."""
    seen = [observations[max(0, step - back)] for back in reversed(range(n_obs_steps))]
    return Observation(
        images={
            name: torch.stack([each.images[name] for each in seen], dim=1)
            for name in seen[0].images
        },
        state=torch.stack([each.state for each in seen], dim=1),
    )


def to_lerobot(observation: Observation) -> dict:
    """What LeRobot's evaluation hands to the preprocessor."""
    values = {"observation.state": observation.state}
    for name, image in observation.images.items():
        key = f"observation.{name}" if name == "image" else f"observation.images.{name}"
        values[key] = image.float() / 255
    if observation.environment_state is not None:
        values["observation.environment_state"] = observation.environment_state
    return {key: value for key, value in values.items() if value is not None}


def lerobot_step(policy, preprocessor, postprocessor, observation: Observation):
    """One control step exactly as in ``lerobot-eval``."""
    return postprocessor(policy.select_action(preprocessor(to_lerobot(observation))))
