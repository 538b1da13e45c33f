"""Builds csrc/ into llava_engine/_kernels.so: `python setup.py build_csrc`.

nvcc is called directly, since torch's CUDAExtension refuses a CPU-only torch, and the library uses
torch's stable ABI alone: one file for every Python and every torch from 2.11 on. Without nvcc, or
without torch's headers, the build says so in one line and the package is installed without it. An
editable install never builds; a wheel does (`pip wheel . --no-build-isolation`).

Build variables: LLAVA_BUILD_CUDA=0 skips it; LLAVA_CUDA_ARCHS (default "90a"; a release has
"80 86 89 90a") says which GPUs for; NVCC names another nvcc.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
SOURCES = ROOT / "csrc"
BUILD = ROOT / "build" / "csrc"
LIBRARY = ROOT / "llava_engine" / "_kernels.so"
STABLE_ABI = "0x020b000000000000"  # torch 2.11


def why_not() -> str | None:
    """What keeps the CUDA library from being built, or None."""
    if os.environ.get("LLAVA_BUILD_CUDA") == "0":
        return "LLAVA_BUILD_CUDA=0"
    if nvcc() is None:
        return "nvcc is not on the PATH"
    if importlib.util.find_spec("torch") is None:
        return "torch, whose headers it needs, is not installed here"
    return None


def nvcc() -> str | None:
    return shutil.which(os.environ.get("NVCC", "nvcc"))


def build_library() -> None:
    """Compile what is older than its source, or than any header, and link."""
    compiler = nvcc()
    spec = importlib.util.find_spec("torch")
    assert compiler is not None and spec is not None and spec.origin is not None
    torch = Path(spec.origin).parent
    architectures = os.environ.get("LLAVA_CUDA_ARCHS", "90a").replace(";", " ").split()
    flags = ["-O3", "-std=c++20", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-DUSE_CUDA"]
    flags += [f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
    flags += [f'-DLLAVA_ARCHITECTURES="{" ".join(architectures)}"']
    # As system headers: torch's own warnings are not ours.
    flags += ["-isystem", f"{torch}/include", "-isystem", f"{torch}/include/torch/csrc/api/include"]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]

    BUILD.mkdir(parents=True, exist_ok=True)
    stamp = BUILD / "flags"
    recipe = "\n".join([compiler, *flags])
    if not stamp.exists() or stamp.read_text() != recipe:
        for stale in BUILD.glob("*.o"):
            stale.unlink()
        stamp.write_text(recipe)
    headers = [*SOURCES.glob("*.cuh"), *SOURCES.glob("*.h")]
    newest_header = max(path.stat().st_mtime for path in headers)

    def compile_one(source: Path) -> Path:
        made = BUILD / f"{source.name}.o"
        wanted = max(source.stat().st_mtime, newest_header)
        if not made.exists() or made.stat().st_mtime < wanted:
            subprocess.run([compiler, *flags, "-c", str(source), "-o", str(made)], check=True)
        return made

    sources = sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("*.cpp")])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(made) for made in pool.map(compile_one, sources)]
    # libtorch_cuda must be a NEEDED entry, or its stream functions are not found at load time; so
    # where only a CPU torch is installed, an empty library of that name stands in for the link.
    stub = BUILD / "libtorch_cuda.so"
    empty = ["-shared", "-Xcompiler", "-fPIC", "-Xlinker", "-soname=libtorch_cuda.so"]
    subprocess.run([compiler, *empty, "-x", "c", "/dev/null", "-o", str(stub)], check=True)
    link = ["-shared", "-cudart", "static", "-Xlinker", "--no-as-needed"]
    link += [f"-L{torch}/lib", f"-L{BUILD}", "-ltorch_cuda", "-ltorch_cpu", "-lc10"]
    fresh = BUILD / LIBRARY.name
    subprocess.run([compiler, *objects, *link, "-o", str(fresh)], check=True)
    os.replace(fresh, LIBRARY)  # a process that has the old one loaded keeps it
    print(f"built {LIBRARY.relative_to(ROOT)} for {', '.join(architectures)}")


class BuildCsrc(Command):
    """Compile csrc/ where that is possible; say why where it is not."""

    description = "compile the CUDA kernels into llava_engine/_kernels.so"
    user_options: list[tuple[str, str | None, str]] = []

    def initialize_options(self) -> None: ...

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        reason = why_not()
        if reason is None:
            build_library()
        else:
            print(f"CUDA kernels not built: {reason}.")


class BuildPy(build_py):
    """The package's files, and in a wheel the compiled library among them."""

    def run(self) -> None:
        if not self.editable_mode:
            self.run_command("build_csrc")
        super().run()


setup(cmdclass={"build_csrc": BuildCsrc, "build_py": BuildPy})
