"""A real ACT whose weights are set by hand to look at one cell of one camera."""

import math

import torch
from einops import rearrange
from torch import Tensor

from policies.act import ACTPolicy
from policies.backbones import SmallCNN
from policies.interface import Observation
from policies.normalisation import camera_key

STRIDE = 16
CAMERAS = {"top": [32, 48], "wrist": [48, 32], "front": [64, 48]}
DIM, HEADS = 16, 2
COLOUR_MEAN, COLOUR_STD = 0.3, 0.25
CONSTANT = 5.0
SHARPNESS = 40.0


def planted_policy(n_cameras: int, camera: str, cell: tuple[int, int]) -> ACTPolicy:
    """Both action dimensions rise with the brightness of one cell, and depend on nothing else.

    The backbone averages each cell's pixels, the encoder passes tokens through, and all attention
    goes to one place of the sequence.

    Args:
        n_cameras: The first so many of ``CAMERAS``.
        camera: Where the policy looks.
        cell: (row, column) of the token grid.
    """
    policy = ACTPolicy(
        cameras=dict(list(CAMERAS.items())[:n_cameras]),
        state_dim=2,
        action_dim=2,
        chunk_size=4,
        latent_dim=2,
        dim_model=DIM,
        n_heads=HEADS,
        dim_feedforward=DIM,
        n_encoder_layers=2,
        n_posterior_layers=1,
        pre_norm=True,
        backbone="small_cnn",
        backbone_width=16,
        token_stride=STRIDE,
    ).double()
    network = policy.network
    for name in policy.data_schema.cameras:
        policy.normaliser.image(name).set(
            torch.full((3,), COLOUR_MEAN), torch.full((3,), COLOUR_STD)
        )
    for feature in (policy.normaliser.state, policy.normaliser.action):
        assert feature is not None
        feature.set(torch.full((2,), 256.0), torch.full((2,), 100.0))
    norms = [module for module in network.modules() if isinstance(module, torch.nn.LayerNorm)]
    kept = {parameter for norm in norms for parameter in norm.parameters()}
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter not in kept:
                parameter.zero_()
        assert isinstance(network.backbone, SmallCNN)
        _average_cells(network.backbone)
        content, constant, start = (_direction(first) for first in (1, 3, 5))
        network.image_projection.weight[:, 0, 0, 0] = content
        network.image_projection.bias.copy_(CONSTANT * constant)
        # Every token has a constant part, so that its norm hardly depends on the content.
        for projection in (network.latent_projection, network.state_projection):
            projection.bias.copy_(CONSTANT * constant)
        for name in policy.data_schema.cameras:
            position = network.get_buffer(f"position_{camera_key(name)}")
            position.zero_()
            if name == camera:
                columns = policy.data_schema.cameras[name][1] // STRIDE
                position[cell[0] * columns + cell[1]] = _marker()
        for layer in network.encoder.layers:
            _look_at_marker(layer.self_attention)
        decoder = network.decoder.layers[0]
        decoder.self_attention.out_proj.bias.copy_(CONSTANT * start)
        _look_at_marker(decoder.cross_attention)
        decoder.cross_attention.in_proj_weight[2 * DIM :] = torch.outer(content, content) / 4
        decoder.cross_attention.out_proj.weight.copy_(torch.eye(DIM))
        network.action_head.weight[0] = content / 4
        network.action_head.weight[1] = content / 8
    return policy.eval()


def planted_pictures(
    n_cameras: int, camera: str, cell: tuple[int, int], n_frames: int = 2, seed: int = 0
) -> Observation:
    """Dim noise everywhere, and light on the cell that the planted policy looks at."""
    generator = torch.Generator().manual_seed(seed)
    images = {
        name: torch.randint(
            110, (n_frames, 3, *CAMERAS[name]), dtype=torch.uint8, generator=generator
        )
        for name in list(CAMERAS)[:n_cameras]
    }
    bright = torch.randint(
        180, 256, (n_frames, 3, STRIDE, STRIDE), dtype=torch.uint8, generator=generator
    )
    window(images[camera], cell).copy_(bright)
    return Observation(images, 512 * torch.rand(n_frames, 2, generator=generator).double())


def window(pictures: Tensor, cell: tuple[int, int]) -> Tensor:
    """The pixels of a cell, as a view."""
    top, left = (STRIDE * place for place in cell)
    return pictures[..., top : top + STRIDE, left : left + STRIDE]


def _average_cells(backbone: SmallCNN) -> None:
    """Let channel 0 hold each cell's brightness: means of 2 x 2, of whole blocks only."""
    loud = 100.0
    convolutions = [module for module in backbone.stages if isinstance(module, torch.nn.Conv2d)]
    norms = [module for module in backbone.stages if isinstance(module, torch.nn.GroupNorm)]
    for convolution, norm in zip(convolutions, norms, strict=True):
        first = convolution.kernel_size[0] // 2
        if convolution.stride[0] == 2:
            convolution.weight[0, 0, first : first + 2, first : first + 2] = 1 / 4
        else:
            convolution.weight[0, 0, first, first] = 1
        # Constant channels set the norm's mean and spread, whatever the picture is.
        convolution.bias[1:8], convolution.bias[8:15] = loud, -loud
        norm.weight[0] = loud * math.sqrt(14 / 16)
    colours = convolutions[0]
    colours.weight[0] = colours.weight[0, :1] / 3
    # What was subtracted comes back: brightness is not negative.
    colours.bias[0] = COLOUR_MEAN / COLOUR_STD


def _look_at_marker(attention: torch.nn.Module) -> None:
    """Attend, in every head, to where the position is the marker; values stay 0."""
    attention.in_proj_bias[:DIM] = SHARPNESS * _marker()
    attention.in_proj_weight[DIM : 2 * DIM] = torch.diag(_marker())


def _marker() -> Tensor:
    """The first dimension of every head."""
    return _by_head(torch.nn.functional.one_hot(torch.tensor(0), DIM // HEADS))


def _direction(first: int) -> Tensor:
    """Of mean 0, which LayerNorm leaves alone, orthogonal to the marker."""
    head = torch.zeros(DIM // HEADS)
    head[first], head[first + 1] = 1, -1
    return _by_head(head)


def _by_head(head: Tensor) -> Tensor:
    return rearrange(head.double().expand(HEADS, -1), "head dim -> (head dim)")
