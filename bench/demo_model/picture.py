"""Draws the picture that the package carries: a scene composed by hand, so in no training set.

python -m bench.demo_model.picture llava_engine/demo/picture.jpg
"""

import argparse
from pathlib import Path

from bench.demo_model.scenes import Background, Scene, Shape, Writing, render

PICTURE = Scene(
    seed=2026,
    index=0,
    width=600,
    height=480,
    background=Background("gradient", (150, 190, 196), (84, 100, 128), 1.2, 0.2),
    shapes=(
        Shape("star", "yellow", "large", 0, 2, 0.80, 0.20, 0.148, 0.10, (246, 212, 44)),
        Shape("heart", "red", "large", 1, 0, 0.21, 0.47, 0.142, -0.12, (214, 40, 46)),
        Shape("circle", "white", "small", 1, 1, 0.52, 0.53, 0.068, 0.0, (248, 248, 250)),
    ),
    writing=Writing("HELLO", 2, 0.5, 0.82, 0.145, True, (250, 250, 250)),
    noise=2.0,
    quality=0,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    render(PICTURE).save(parser.parse_args().out, "JPEG", quality=92)


if __name__ == "__main__":
    main()
