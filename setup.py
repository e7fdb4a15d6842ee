"""Builds the kernels of csrc/; all metadata is in pyproject.toml.

``FASTGAN_BUILD`` says what to build: ``auto`` (default) the C++ part, and nothing where that fails;
``cpu`` the C++ part or an error; ``cuda`` the CUDA part too, with nvcc and without a GPU;
``none`` nothing, which leaves the reference path. ``TORCH_CUDA_ARCH_LIST`` names the GPUs that the
CUDA part is for, as ``8.0;9.0+PTX``.
"""

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-fvisibility=hidden", "-g0"]
# isa.cpp is compiled once for each; which one runs is decided on the user's machine.
ISA_FLAGS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    FLAGS.append("-DFASTGAN_X86")
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma"]
    ISA_FLAGS["avx512"] = [
        *("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mavx2", "-mfma"),
        "-mprefer-vector-width=512",
    ]
# For a sanitized build, say, whose reports name lines.
OWN_FLAGS = os.environ.get("FASTGAN_CXXFLAGS", "").split()
FLAGS += OWN_FLAGS
STRIP = [] if OWN_FLAGS else ["-s"]
CPU, CUDA = "fastgan._cpu", "fastgan._cuda"
FOLDERS = {CPU: Path("csrc/cpu"), CUDA: Path("csrc/cuda")}
SOURCES = ["bindings.cpp", "dispatch.cpp", "pool.cpp", "shapes.cpp"]
BUILDS = ("auto", "cpu", "cuda", "none")
WANTED = os.environ.get("FASTGAN_BUILD") or "auto"

# A product is rounded before it is added where the source does not say fmaf, so that what the
# sources compute on a CPU is what they compute on a GPU.
NVCC_FLAGS = ["-O3", "-std=c++17", "-fmad=false", "-cudart=static"]
NVCC_FLAGS += os.environ.get("FASTGAN_NVCCFLAGS", "").split()
# GPUs with asynchronous copies, bf16 and TF32, and PTX for those to come.
ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"


def nvcc():
    """The compiler: that of CUDACXX, of CUDA_HOME, or on the PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    in_home = str(Path(home) / "bin" / "nvcc") if home else "nvcc"
    found = shutil.which(os.environ.get("CUDACXX") or in_home)
    if found is None:
        raise SystemExit(
            "FASTGAN_BUILD=cuda: no nvcc on the PATH; install the CUDA toolkit, or name the "
            "compiler in CUDACXX"
        )
    return found


def compression_flags(compiler):
    """A fifth of the size, from nvcc 12.4 on; the driver unpacks what it loads."""
    said = subprocess.run([compiler, "--help"], capture_output=True, text=True).stdout
    return ["-compress-mode=size"] if "--compress-mode" in said else []


def architecture_flags():
    """What nvcc is told of TORCH_CUDA_ARCH_LIST."""
    flags = []
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
    for name in wanted.replace(";", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", name)
        if match is None:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST={wanted!r}: {name!r} is not of the form 8.0 or 8.0+PTX"
            )
        arch = match[1] + match[2]
        if int(match[1]) < 8:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST={wanted!r}: the kernels need 8.0 or later, not {name}"
            )
        flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
    return flags


class BuildKernels(build_ext):
    def run(self):
        if WANTED not in BUILDS:
            raise SystemExit(f"FASTGAN_BUILD={WANTED!r}: choose from {', '.join(BUILDS)}")
        if WANTED == "none":
            self.extensions = []
            return
        try:
            super().run()
        except Exception as error:
            if WANTED != "auto":
                raise
            self.extensions = []
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            # pip shows what a build prints only with -v; `fastgan doctor` says it again.
            print(f"fastgan: installing without the C++ kernels, they did not build: {reason}")

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        (self._build_cuda if ext.name == CUDA else self._build_cpu)(ext, str(target))

    def _build_cpu(self, ext, target):
        def compile_one(job):
            name, source, flags = job
            return self.compiler.compile(
                [str(FOLDERS[CPU] / source)],
                output_dir=str(Path(self.build_temp) / name),
                include_dirs=ext.include_dirs,
                extra_postargs=FLAGS + flags,
            )

        jobs = [(isa, "isa.cpp", flags) for isa, flags in ISA_FLAGS.items()]
        jobs += [("common", source, []) for source in SOURCES]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [name for names in pool.map(compile_one, jobs) for name in names]
        self.compiler.link_shared_object(
            objects, target, target_lang="c++", extra_postargs=[*FLAGS, *STRIP]
        )

    def _build_cuda(self, ext, target):
        compiler = nvcc()
        architectures = [*architecture_flags(), *compression_flags(compiler)]
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        # distutils has added Python's own folders to those of the other extension's compiler.
        includes = [f"-I{path}" for path in [*ext.include_dirs, *self.include_dirs]]

        def compile_one(source):
            made = str(folder / f"{Path(source).name}.o")
            hidden = ["-Xcompiler=-fPIC,-fvisibility=hidden"]
            self.spawn(
                [
                    compiler,
                    *NVCC_FLAGS,
                    *architectures,
                    *hidden,
                    *includes,
                    "-c",
                    source,
                    "-o",
                    made,
                ]
            )
            return made

        # The longest first.
        sources = sorted(ext.sources, key=lambda path: -Path(path).stat().st_size)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        self.spawn(
            [
                compiler,
                *NVCC_FLAGS,
                *architectures,
                "-shared",
                "-Xcompiler=-s",
                *objects,
                "-o",
                target,
            ]
        )


def extensions():
    try:
        import pybind11
    except ImportError:
        return []
    found = []
    for name, folder in FOLDERS.items():
        if name == CUDA and WANTED != "cuda":
            continue
        sources = (
            [*sorted(map(str, folder.glob("*.cu"))), str(folder / "bindings.cpp")]
            if name == CUDA
            else [str(folder / source) for source in ("isa.cpp", *SOURCES)]
        )
        found.append(
            Extension(
                name,
                sources,
                include_dirs=[pybind11.get_include()],
                depends=sorted(map(str, folder.iterdir())),
            )
        )
    return found


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
