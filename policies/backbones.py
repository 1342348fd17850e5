"""Image encoders: a picture in, a grid of features out.

Two families: torchvision's residual networks, and a small convolutional network that trains from
scratch in minutes. ``token_stride`` says how many image pixels one output cell spans; for a ResNet
32 is the output of layer 4 and 16 that of layer 3.
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal

import torch
import torchvision.models.resnet as torchvision_resnet
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops.misc import FrozenBatchNorm2d

BackboneName = Literal["resnet18", "resnet34", "resnet50", "small_cnn"]
BackboneNorm = Literal["frozen_batch", "group"]

RESNETS = {
    "resnet18": ("BasicBlock", (2, 2, 2, 2)),
    "resnet34": ("BasicBlock", (3, 4, 6, 3)),
    "resnet50": ("Bottleneck", (3, 4, 6, 3)),
}
GROUP_CHANNELS = 16
FEW_CELLS = 16
"""Of a feature map; up to these, reading a convolution's weights takes longer than using them."""


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with 16 channels a group, which trains from scratch at any batch size."""
    return nn.GroupNorm(max(1, channels // GROUP_CHANNELS), channels)


def _infers_on_cpu(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()
    )


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, convolution: nn.Conv2d
) -> Float[Tensor, "batch channel height width"]:
    """Apply a convolution of this stride and padding, with these weights.

    For one small picture on a CPU torch takes a kernel that needs twice the time of what is here.
    """
    stride, dilation, groups = convolution.stride, convolution.dilation, convolution.groups
    padding = convolution.padding
    if len(x) > 1 or not _infers_on_cpu(x) or isinstance(padding, str):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if groups > 1 or x.shape[2] * x.shape[3] > FEW_CELLS * stride[0] * stride[1]:
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, dilation, groups)
    # The weights, read once in their order, are all the time that so few cells take.
    kernel = convolution.kernel_size
    patches = F.unfold(x, kernel, dilation, padding, stride).transpose(1, 2)
    cells = F.linear(patches, weight.flatten(1), bias)
    height = (x.shape[2] + 2 * padding[0] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    return rearrange(
        cells, "batch (height width) channel -> batch channel height width", height=height
    )


class MaxPool(nn.MaxPool2d):
    """The largest of 3 x 3 at every other cell; on one core in a third of the time, to the bit."""

    def __init__(self) -> None:
        super().__init__(kernel_size=3, stride=2, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        """Return the pooled map, (batch, channels, ceil(height / 2), ceil(width / 2))."""
        if not _infers_on_cpu(input):
            return F.max_pool2d(input, 3, 2, 1)
        # One axis after the other.
        n_rows, n_columns = ((size + 1) // 2 for size in input.shape[-2:])
        x = F.pad(input, (1, 1, 1, 1), value=-math.inf)
        x = _largest([x[..., start : start + 2 * n_rows - 1 : 2, :] for start in range(3)])
        return _largest([x[..., start : start + 2 * n_columns - 1 : 2] for start in range(3)])


def _largest(parts: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.maximum, parts)


def convolve_and_normalise(x: Tensor, convolution: nn.Conv2d, norm: nn.Module) -> Tensor:
    """Apply a convolution and its normalisation, a frozen one in one pass over the smaller side.

    A frozen batch norm is an affine map with constant coefficients: it folds into the weights, or
    scales what comes out where that is less (one picture, late layers). The same function and the
    same gradients.
    """
    if not isinstance(norm, FrozenBatchNorm2d):
        return norm(convolution(x))
    gain, shift, mean, variance = (
        norm.get_buffer(name) for name in ("weight", "bias", "running_mean", "running_var")
    )
    weight = convolution.weight
    stride_px = convolution.stride[0] * convolution.stride[1]
    n_out = x.shape[0] * x.shape[2] * x.shape[3] // stride_px * weight.shape[0]
    if n_out <= weight.numel():
        out = convolve(x, weight.to(x.dtype), None, convolution)
        return F.batch_norm(out, mean, variance, gain, shift, eps=norm.eps)
    scale = gain * (variance + norm.eps).rsqrt()
    folded, bias = weight * scale[:, None, None, None], shift - mean * scale
    return convolve(x, folded.to(x.dtype), bias.to(x.dtype), convolution)


class FoldedBasicBlock(torchvision_resnet.BasicBlock):
    """torchvision's BasicBlock (same parameters and names) with frozen norms folded."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, (batch, channels, height, width)."""
        out = self.relu(convolve_and_normalise(x, self.conv1, self.bn1))
        out = convolve_and_normalise(out, self.conv2, self.bn2)
        if self.downsample is not None:
            x = convolve_and_normalise(x, self.downsample[0], self.downsample[1])  # type: ignore[arg-type]
        return self.relu(out + x)


class FoldedBottleneck(torchvision_resnet.Bottleneck):
    """torchvision's Bottleneck (same parameters and names) with frozen norms folded."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, (batch, channels, height, width)."""
        out = self.relu(convolve_and_normalise(x, self.conv1, self.bn1))
        out = self.relu(convolve_and_normalise(out, self.conv2, self.bn2))
        out = convolve_and_normalise(out, self.conv3, self.bn3)
        if self.downsample is not None:
            x = convolve_and_normalise(x, self.downsample[0], self.downsample[1])  # type: ignore[arg-type]
        return self.relu(out + x)


class ResNetBackbone(nn.Module):
    """A residual network cut after layer 3 or layer 4; parameter names are torchvision's."""

    def __init__(
        self,
        name: Literal["resnet18", "resnet34", "resnet50"],
        norm: BackboneNorm,
        token_stride: int,
        pretrained_weights: str | None,
    ):
        super().__init__()
        if token_stride not in (16, 32):
            raise ValueError(
                f"token_stride={token_stride} is not available for {name}: "
                "use 32 (layer 4) or 16 (layer 3)"
            )
        if pretrained_weights is not None and norm != "frozen_batch":
            raise ValueError(
                f"backbone_weights={pretrained_weights!r} were trained with batch norm: set "
                "backbone_norm to frozen_batch, or backbone_weights to null"
            )
        block, layers = RESNETS[name]
        resnet = torchvision_resnet.ResNet(
            FoldedBasicBlock if block == "BasicBlock" else FoldedBottleneck,
            list(layers),
            norm_layer=FrozenBatchNorm2d if norm == "frozen_batch" else group_norm,
        )
        if pretrained_weights is not None:
            from torchvision.models import get_weight

            resnet.load_state_dict(get_weight(pretrained_weights).get_state_dict(progress=True))
        self.conv1, self.bn1, self.maxpool = resnet.conv1, resnet.bn1, MaxPool()
        self.layer1, self.layer2, self.layer3 = resnet.layer1, resnet.layer2, resnet.layer3
        channels = resnet.fc.in_features
        if token_stride == 32:
            self.layer4 = resnet.layer4
        else:
            self.layer4 = None
            channels //= 2
        self.out_channels = channels
        self.token_stride = token_stride

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch channels rows columns"]:
        """Return the feature map, one cell per ``token_stride`` pixels (rounded up)."""
        x = F.relu(convolve_and_normalise(images, self.conv1, self.bn1))
        x = self.layer3(self.layer2(self.layer1(self.maxpool(x))))
        return x if self.layer4 is None else self.layer4(x)


class SmallCNN(nn.Module):
    """A few strided convolutions with GroupNorm: trains from scratch, cheap on a CPU.

    Each stage halves the picture; the channel count doubles from ``width`` up to four times it.
    """

    def __init__(self, width: int, token_stride: int):
        super().__init__()
        n_stages = int(math.log2(token_stride)) if token_stride > 0 else 0
        if 2**n_stages != token_stride or n_stages < 2:
            raise ValueError(
                f"token_stride={token_stride} must be a power of two >= 4 for small_cnn"
            )
        stages: list[nn.Module] = []
        channels = 3
        for stage in range(n_stages):
            out_channels = width * 2 ** min(stage, 2)
            kernel = 5 if stage == 0 else 3
            stages += [
                nn.Conv2d(channels, out_channels, kernel, stride=2, padding=kernel // 2),
                group_norm(out_channels),
                nn.ReLU(inplace=True),
            ]
            channels = out_channels
        stages += [
            nn.Conv2d(channels, channels, 3, padding=1),
            group_norm(channels),
            nn.ReLU(inplace=True),
        ]
        self.stages = nn.Sequential(*stages)
        self.out_channels = channels
        self.token_stride = token_stride

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch channels rows columns"]:
        """Return the feature map, one cell per ``token_stride`` pixels (rounded up)."""
        return self.stages(images)


def build_backbone(
    name: BackboneName,
    norm: BackboneNorm,
    token_stride: int,
    width: int,
    pretrained_weights: str | None,
) -> ResNetBackbone | SmallCNN:
    """Build the encoder that a config names.

    Args:
        name: Architecture.
        norm: ``frozen_batch`` (as in ACT, meant for pretrained weights) or ``group``; the small
            CNN always uses GroupNorm.
        token_stride: Image pixels per output cell.
        width: Channels of the small CNN's first stage; unused by ResNets.
        pretrained_weights: torchvision weights such as ``ResNet18_Weights.IMAGENET1K_V1``.

    Raises:
        ValueError: If the combination does not exist; the message names the mend.
    """
    if name == "small_cnn":
        if pretrained_weights is not None:
            raise ValueError("small_cnn has no pretrained weights: set backbone_weights to null")
        return SmallCNN(width, token_stride)
    return ResNetBackbone(name, norm, token_stride, pretrained_weights)


def grid_size(height: int, width: int, token_stride: int) -> tuple[int, int]:
    """Rows and columns of the feature map of a picture of ``height`` x ``width`` px."""
    return math.ceil(height / token_stride), math.ceil(width / token_stride)


def receptive_field_px(backbone: ResNetBackbone | SmallCNN) -> int:
    """Height and width of the part of a picture that one output cell depends on, in px.

    Each convolution adds (kernel - 1) times the stride before it, along the longest path. The norms
    of GroupNorm see the whole picture besides.
    """
    field, stride = 1, 1
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Conv2d | nn.MaxPool2d) and "downsample" not in name:
            kernel, step = (
                size if isinstance(size, int) else size[0]
                for size in (module.kernel_size, module.stride)
            )
            field += (kernel - 1) * stride
            stride *= step
    return field


def to_unit_range(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turn ``uint8`` pictures into floats in 0..1; floating point pictures keep their values."""
    return images.to(dtype) / 255.0 if images.dtype == torch.uint8 else images.to(dtype)
