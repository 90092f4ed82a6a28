"""Random changes of the policy's images in training. Colours and sharpness change by LeRobot's image transforms."""

import numpy as np
import torch
import torch.nn.functional as F
from lerobot.transforms import ImageTransformConfig, ImageTransforms, ImageTransformsConfig
from torch import Tensor

from smolvla_shared.preprocess import unit_range


def random_shift(image: Tensor, share: float, rng: np.random.Generator) -> Tensor:
    """Move an image [3, h, w] by up to `share` of its sides, repeating the border (DrQ, arXiv 2004.13649)."""
    height, width = image.shape[-2:]
    pad_y, pad_x = round(share * height), round(share * width)
    # Drawn as shares, so that images of other sizes move alike.
    top, left = (int(drawn * (2 * pad + 1)) for drawn, pad in zip(rng.random(2), (pad_y, pad_x)))
    padded = F.pad(image[None].float(), (pad_x, pad_x, pad_y, pad_y), mode="replicate")[0]
    return padded[:, top : top + height, left : left + width].to(image.dtype)


class Augmentation:
    """Changes that every sample draws for itself; all of its images change alike.

    random_shift:        see random_shift
    random_brightness, random_contrast, random_saturation, random_sharpness: x; a factor is drawn from [1 - x, 1 + x]
    random_hue:          x; the hue is turned by an angle of [-x, x], as a share of the circle of colours
    """

    def __init__(self, random_shift: float = 0.0, **jitter: float):
        self.random_shift = random_shift
        stated = {name.removeprefix("random_"): x for name, x in jitter.items() if x}
        kinds = {name: "SharpnessJitter" if name == "sharpness" else "ColorJitter" for name in stated}
        tfs = {name: ImageTransformConfig(type=kinds[name], kwargs={name: x}) for name, x in stated.items()}
        # All of them in a row. LeRobot applies 3 that it draws, unless its max_num_transforms says otherwise.
        options = ImageTransformsConfig(enable=True, max_num_transforms=len(tfs), tfs=tfs)
        self.jitter = ImageTransforms(options) if tfs else None

    def __bool__(self) -> bool:
        return bool(self.random_shift or self.jitter)

    def __call__(self, image: Tensor, sample: tuple[int, ...]) -> Tensor:
        """One of a sample's images, [3, h, w] uint8, before and after.

        sample: (seed, step, slot), which the change is a function of
        """
        rng = np.random.default_rng([*sample, 1])  # 1: not the stream that noise and times are drawn from
        seed = int(rng.integers(1 << 63))
        if self.random_shift:
            image = random_shift(image, self.random_shift, rng)
        if not self.jitter:
            return image
        with torch.random.fork_rng(devices=[]):  # LeRobot's transforms draw from torch's global generator
            torch.manual_seed(seed)
            return (self.jitter(unit_range(image)) * 255).round().to(torch.uint8)
