"""Pictures to embedding rows on the CPU, against transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from support.checkpoints import make_checkpoint
from support.pictures import random_pictures, values
from transformers import LlavaForConditionalGeneration

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
        expected = torch.stack(list(oracle.get_image_features(pixels).pooler_output))
        for count in (1, MOST_AT_ONCE, MOST_AT_ONCE + 1, len(pictures)):
            rows = encoder(pictures[:count])
            torch.testing.assert_close(rows, expected[:count], rtol=1e-5, atol=1e-5)
