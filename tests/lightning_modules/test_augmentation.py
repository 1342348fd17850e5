import pytest
import torch

from lightning_modules.augmentation import ImageAugmentation, shift_image
from policies.interface import Batch, Observation


def batch_of(images):
    n = len(images)
    index = torch.arange(n)
    return Batch(
        Observation({"image": images}),
        torch.zeros(n, 4, 2),
        torch.zeros(n, 4, dtype=torch.bool),
        index,
        index,
    )


def test_a_shift_moves_each_picture_by_its_own_amount():
    image = torch.zeros(2, 3, 9, 9, dtype=torch.uint8)
    image[:, :, 4, 4] = 255
    moved = shift_image(image, torch.tensor([[2, -1], [0, 3]]))
    assert [tuple(place.tolist()) for place in moved[:, 0].nonzero()] == [(0, 6, 3), (1, 4, 7)]


def test_the_border_is_repeated_into_the_gap():
    image = torch.arange(5.0).expand(1, 3, 5, 5)
    assert shift_image(image, torch.tensor([[0, 2]]))[0, 0, 0].tolist() == [0, 0, 0, 1, 2]


def test_history_frames_move_together():
    image = torch.rand(4, 2, 3, 8, 8)
    moved = shift_image(image, torch.tensor([[1, 2], [0, 0], [-3, 1], [2, 2]]))
    for step in range(2):
        alone = shift_image(image[:, step], torch.tensor([[1, 2], [0, 0], [-3, 1], [2, 2]]))
        torch.testing.assert_close(moved[:, step], alone)


def test_the_same_seed_gives_the_same_pictures_and_another_seed_others():
    images = torch.randint(0, 256, (6, 3, 12, 12), dtype=torch.uint8)
    change = ImageAugmentation(shift_px=3, brightness=0.2, contrast=0.2)

    def changed(seed):
        augmented = change(batch_of(images), torch.Generator().manual_seed(seed))
        return augmented.observation.images["image"]

    torch.testing.assert_close(changed(1), changed(1), atol=0, rtol=0)
    assert not torch.equal(changed(1), changed(2))


def test_brightness_scales_and_keeps_the_range():
    images = torch.full((64, 3, 4, 4), 0.5)
    change = ImageAugmentation(brightness=0.2)
    out = change(batch_of(images), torch.Generator().manual_seed(0)).observation.images["image"]
    level = out.mean(dim=(1, 2, 3))
    assert level.min() >= 0.4 - 1e-6
    assert level.max() <= 0.6 + 1e-6
    assert level.std() > 0.02


def test_impossible_amounts_are_refused():
    with pytest.raises(ValueError, match="shift_px=-1"):
        ImageAugmentation(shift_px=-1)
    with pytest.raises(ValueError, match=r"contrast=1\.5"):
        ImageAugmentation(contrast=1.5)
