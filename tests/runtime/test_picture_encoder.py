"""Pictures to embedding rows on the CPU, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from support.checkpoints import make_checkpoint
from support.pictures import random_image, random_pictures, values
from transformers import LlavaForConditionalGeneration

from llava_engine.image.preprocess import ImageProcessorConfig, decoded_picture
from llava_engine.network.weights import load_model
from llava_engine.runtime.picture_encoder import MOST_AT_ONCE, PictureEncoder
from llava_engine.runtime.streams import DeviceStreams

CPU = torch.device("cpu")


def test_more_pictures_than_go_at_once(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    oracle = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    model = load_model(tmp_path, device=CPU, dtype=torch.float32)
    encoder = PictureEncoder(model, DeviceStreams(CPU), captures=True)
    pictures = random_pictures(3, 2 * MOST_AT_ONCE + 3, model.config.vision.image_size)
    pixels = torch.from_numpy(np.stack([values(picture) for picture in pictures]))
    with torch.inference_mode():
        expected = list(oracle.get_image_features(pixels).pooler_output)
        for count in (1, MOST_AT_ONCE, MOST_AT_ONCE + 1, len(pictures)):
            rows = encoder(pictures[:count])
            torch.testing.assert_close(rows, expected[:count], rtol=1e-5, atol=1e-5)


def test_a_step_of_pictures_is_one_upload_of_what_differs(tmp_path: Path) -> None:
    """Each gives up Python's lock, for which others may keep it waiting."""
    uploads: list[list[npt.NDArray[Any]]] = []

    class CountedStreams(DeviceStreams):
        def upload(self, arrays: list[npt.NDArray[Any]]) -> tuple[torch.Tensor, list[int]]:
            uploads.append(arrays)
            return super().upload(arrays)

    make_checkpoint(tmp_path)
    model = load_model(tmp_path, device=CPU, dtype=torch.float32)
    side = model.config.vision.image_size
    processor = ImageProcessorConfig(shortest_edge=side, crop_size=(side, side))
    generator = np.random.default_rng(5)
    sizes = [(60, 90), (60, 90), (90, 60), (60, 90)]
    pictures = [
        decoded_picture(random_image(generator, *size), processor, resample=False) for size in sizes
    ]
    encoder = PictureEncoder(model, CountedStreams(CPU), captures=True)
    with torch.inference_mode():
        expected = [encoder([picture])[0] for picture in pictures]
        uploads.clear()
        rows = encoder([*pictures, pictures[0]])
    torch.testing.assert_close(rows, [*expected, expected[0]], rtol=1e-5, atol=1e-5)
    (arrays,) = uploads
    # Four pictures' pixels, the levels, and two passes for each of the two shapes.
    assert len(arrays) == 4 + 1 + 2 * 2
