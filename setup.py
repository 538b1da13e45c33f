"""Build hook: the package is pure Python until csrc/ brings the CUDA library."""

from setuptools import setup

setup()
