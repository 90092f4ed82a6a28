"""augmentation.py: LeRobot's own image transforms, alike for all images of a sample, as a function of the sample."""

import numpy as np
import pytest
import torch
from helpers import lerobot_dataset
from lerobot.transforms import ImageTransforms, ImageTransformsConfig

from smolvla_shared import data
from smolvla_shared.augmentation import Augmentation, random_shift
from smolvla_shared.config import DataConfig, PolicyDataConfig
from smolvla_shared.data_loader import SampleDataset, SampleSpec
from smolvla_shared.data_order import SampleKey

CAMERA, WRIST = "observation.image", "observation.images.wrist"
# LeRobot's own ranges.
DEFAULTS = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.5, "hue": 0.05, "sharpness": 0.5}
JITTER = {f"random_{name}": x for name, x in DEFAULTS.items()}
KEYS = [SampleKey(*key) for key in [(0, 0, 0, 0), (0, 1, 0, 7), (5, 0, 0, 7), (5, 1, 0, 12)]]  # step, slot, _, row


def lerobots() -> ImageTransforms:
    """LeRobot's default transforms, all of them but the affine one."""
    config = ImageTransformsConfig(enable=True, max_num_transforms=len(DEFAULTS))
    del config.tfs["affine"]
    return ImageTransforms(config)


def seed_torch(seed: int, key: SampleKey) -> None:
    torch.manual_seed(int(np.random.default_rng([seed, key.step, key.slot, 1]).integers(1 << 63)))


def read(root, cameras: tuple[str, ...], seed: int, **options: float) -> tuple[data.RobotDataset, list]:
    """The dataset, and the images of KEYS by camera."""
    (dataset,) = data.open_datasets(DataConfig(roots=(root,)))
    augmentation = PolicyDataConfig(roots=(root,), **options).augmentation
    return dataset, SampleDataset([dataset], SampleSpec(cameras=cameras), seed, **augmentation)[KEYS].images


def test_images_are_those_of_a_lerobot_dataset_with_its_default_transforms(labelled_dataset):
    """Under the same torch seed."""
    dataset, (images,) = read(labelled_dataset, (CAMERA,), seed=3, **JITTER)
    theirs, plain = lerobot_dataset(dataset, image_transforms=lerobots()), lerobot_dataset(dataset)
    for key, image in zip(KEYS, images):
        seed_torch(3, key)
        assert (image - theirs[key.row][CAMERA] * 255).abs().max() <= 0.51  # rounded to uint8
        assert (image - plain[key.row][CAMERA] * 255).abs().max() > 5
    assert not torch.equal(images[1], images[2])  # one frame in two steps


def test_cameras_of_a_sample_change_alike(image_dataset):
    """As LeRobot changes each of them under the same seed; their sizes differ."""
    dataset, images = read(image_dataset, (CAMERA, WRIST), seed=0, **JITTER)
    plain, transforms = lerobot_dataset(dataset), lerobots()
    for camera, of_camera in zip((CAMERA, WRIST), images):
        for key, image in zip(KEYS, of_camera):
            seed_torch(0, key)
            assert (image - transforms(plain[key.row][camera]) * 255).abs().max() <= 0.51


@pytest.mark.parametrize("name", JITTER)
def test_each_option_is_the_lerobot_transform_of_its_name(labelled_dataset, name):
    dataset, (images,) = read(labelled_dataset, (CAMERA,), seed=0, **{name: JITTER[name]})
    transform, plain = lerobots().transforms[name.removeprefix("random_")], lerobot_dataset(dataset)
    for key, image in zip(KEYS, images):
        seed_torch(0, key)
        torch.multinomial(torch.ones(1), 1)  # LeRobot draws which transforms to apply, here of one
        expected = transform(plain[key.row][CAMERA]) * 255
        assert (image - expected).abs().max() <= 0.51


def test_brightness_is_multiplied_by_factors_of_the_whole_range():
    augment, grey = Augmentation(random_brightness=0.2), torch.full((3, 4, 6), 100, dtype=torch.uint8)
    values = []
    for slot in range(300):
        image = augment(grey, (0, 0, slot))
        assert (image == image[0, 0, 0]).all() and image.dtype == torch.uint8
        values.append(image[0, 0, 0].item())
    assert (min(values), max(values)) == (80, 120)
    assert np.mean(values) == pytest.approx(100, abs=2)  # uniform: 3 standard deviations of the mean


def test_a_change_is_a_function_of_seed_step_and_slot_and_leaves_the_global_generator_alone():
    augment = Augmentation(random_shift=0.1, **JITTER)
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    first = augment(image, (0, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(augment(image, (0, 1, 2)), first)
    for other in [(1, 1, 2), (0, 2, 2), (0, 1, 3), (0, 2, 1)]:
        assert not torch.equal(augment(image, other), first)


def test_options_that_change_nothing_read_the_frames_themselves(labelled_dataset):
    assert not Augmentation() and not Augmentation(random_hue=0.0)
    dataset, (images,) = read(labelled_dataset, (CAMERA,), seed=0)
    assert torch.equal(images, dataset.read_frames(CAMERA, [key.row for key in KEYS]))


# --- shift ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_random_shift_moves_the_image_and_repeats_its_border(dtype):
    image = torch.arange(3 * 20 * 10).view(3, 20, 10).remainder(251).to(dtype)
    padded = np.pad(image.numpy(), [(0, 0), (2, 2), (1, 1)], mode="edge")  # a tenth of the sides
    shifts = {(y, x): padded[:, y : y + 20, x : x + 10] for y in range(5) for x in range(3)}
    seen = set()
    for seed in range(200):
        shifted = random_shift(image, 0.1, np.random.default_rng(seed))
        assert (shifted.shape, shifted.dtype) == (image.shape, dtype)
        seen |= {offset for offset, expected in shifts.items() if np.array_equal(shifted.numpy(), expected)}
        assert torch.equal(shifted, random_shift(image, 0.1, np.random.default_rng(seed)))
    assert seen == set(shifts)


def test_random_shift_by_nothing_changes_nothing():
    image = torch.randint(0, 256, (3, 20, 10), dtype=torch.uint8)
    assert torch.equal(random_shift(image, 0.0, np.random.default_rng(0)), image)


def test_images_of_all_sizes_shift_by_the_same_share():
    """Ramps of 100 and of 200 columns: the middle pixel tells by how much of the width an image has moved."""
    augment, shares = Augmentation(random_shift=0.2), []
    for slot in range(50):
        moved = []
        for width in (100, 200):
            ramp = torch.arange(width).to(torch.uint8).expand(3, 40, width).contiguous()
            moved.append((augment(ramp, (0, 0, slot))[0, 20, width // 2].item() - width // 2) / width)
        assert moved[0] == pytest.approx(moved[1], abs=0.01)
        shares.append(moved[0])
    assert min(shares) < -0.15 and max(shares) > 0.15
