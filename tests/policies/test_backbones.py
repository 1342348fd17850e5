"""The receptive field is what a cell really depends on."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops.misc import FrozenBatchNorm2d

from policies.backbones import MaxPool, build_backbone, convolve_and_normalise, receptive_field_px


@pytest.mark.parametrize(
    ("name", "token_stride", "field_px"),
    # Araujo et al. 2019, "Computing receptive fields", give 435 for ResNet-18.
    [("resnet18", 32, 435), ("resnet18", 16, 211), ("small_cnn", 16, 65)],
)
def test_receptive_fields(name, token_stride, field_px):
    backbone = build_backbone(name, "frozen_batch", token_stride, 8, None)
    assert receptive_field_px(backbone) == field_px


@pytest.mark.parametrize(("name", "token_stride"), [("resnet18", 16), ("small_cnn", 8)])
def test_a_cell_depends_on_no_pixel_beyond(name, token_stride):
    backbone = build_backbone(name, "frozen_batch", token_stride, 8, None).double().eval()
    norms = [module for module in backbone.modules() if isinstance(module, torch.nn.GroupNorm)]
    for norm in norms:
        # Its moments come from the whole picture.
        norm.forward = lambda x: x
    field = receptive_field_px(backbone)
    size = 2 * field + 64
    picture = torch.rand(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    cells = backbone(picture)
    middle = cells.shape[-1] // 2
    (gradient,) = torch.autograd.grad(cells[..., middle, middle].sum(), picture)
    rows = gradient.abs().sum((0, 1, 3)).nonzero().flatten()
    extent = int(rows.max() - rows.min() + 1)
    assert 0.5 * field < extent <= field


def frozen_norm(channels: int) -> FrozenBatchNorm2d:
    norm = FrozenBatchNorm2d(channels)
    for name, low in (
        ("weight", 0.5),
        ("bias", -1.0),
        ("running_mean", -1.0),
        ("running_var", 0.5),
    ):
        norm.get_buffer(name).uniform_(low, 2.0)
    return norm


@pytest.mark.parametrize("size", [(3, 3), (7, 5), (24, 32)])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_frozen_norm_is_the_same_function_wherever_it_is_applied(size, kernel, stride, batch):
    """In the weights or behind them, with a gradient or without, one picture or several."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(6, 40, kernel, stride, kernel // 2, bias=False)
    norm = frozen_norm(40)
    x = torch.randn(batch, 6, *size)
    expected = norm(convolution(x))
    expected.square().sum().backward()
    assert convolution.weight.grad is not None
    gradient, convolution.weight.grad = convolution.weight.grad, None
    out = convolve_and_normalise(x, convolution, norm)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    out.square().sum().backward()
    torch.testing.assert_close(convolution.weight.grad, gradient, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        inferred = convolve_and_normalise(x, convolution, norm)
    torch.testing.assert_close(inferred, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("token_stride", [16, 32])
def test_one_picture_has_the_features_that_it_has_in_a_batch(name, token_stride):
    torch.manual_seed(0)
    backbone = build_backbone(name, "frozen_batch", token_stride, 8, None).eval()
    pictures = torch.rand(2, 3, 96, 80)
    with torch.no_grad():
        both = backbone(pictures)
        single = torch.cat([backbone(picture[None]) for picture in pictures])
    assert single.std() > 0
    torch.testing.assert_close(single, both, rtol=1e-4, atol=1e-4 * float(both.abs().max()))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 8), (47, 48), (48, 48)])
def test_pooling_is_torchs_to_the_bit(size):
    x = torch.randn(2, 3, *size)
    x[0, 0, 0, 0] = torch.nan
    with torch.no_grad():
        torch.testing.assert_close(
            MaxPool()(x), F.max_pool2d(x, 3, 2, 1), rtol=0, atol=0, equal_nan=True
        )
    held = x.nan_to_num().requires_grad_()
    MaxPool()(held).sum().backward()
    assert held.grad is not None
    assert held.grad.any()
