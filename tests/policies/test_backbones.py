"""The receptive field is what a cell really depends on."""

import pytest
import torch

from policies.backbones import build_backbone, receptive_field_px


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
