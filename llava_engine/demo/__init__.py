"""The demo checkpoint llava-tiny, a tiny trained LLaVA, and a picture to try it on.

Only says where they lie. How the checkpoint is made: bench/demo_model/.
"""

from pathlib import Path

__all__ = ["model_dir", "picture_path"]

_HERE = Path(__file__).resolve().parent


def model_dir() -> Path:
    """The checkpoint's directory, in the Hugging Face layout."""
    return _HERE / "llava-tiny"


def picture_path() -> Path:
    """A JPEG that the checkpoint never trained on."""
    return _HERE / "picture.jpg"
