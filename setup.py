"""Builds the C++ kernels of csrc/; all metadata is in pyproject.toml.

``FASTGAN_BUILD`` says what to build: ``auto`` (default) the C++ part, and nothing where that fails;
``cpu`` the C++ part or an error; ``none`` nothing, which leaves the reference path.
"""

import os
import platform
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
FOLDER = Path("csrc/cpu")
SOURCES = ["bindings.cpp", "dispatch.cpp", "pool.cpp", "shapes.cpp"]


class BuildKernels(build_ext):
    def run(self):
        wanted = os.environ.get("FASTGAN_BUILD") or "auto"
        if wanted not in ("auto", "cpu", "none"):
            raise SystemExit(f"FASTGAN_BUILD={wanted!r}: choose from auto, cpu, none")
        if wanted == "none":
            self.extensions = []
            return
        try:
            super().run()
        except Exception as error:
            if wanted == "cpu":
                raise
            self.extensions = []
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            # pip shows what a build prints only with -v; `fastgan doctor` says it again.
            print(f"fastgan: installing without the C++ kernels, they did not build: {reason}")

    def build_extension(self, ext):
        def compile_one(job):
            name, source, flags = job
            return self.compiler.compile(
                [str(FOLDER / source)],
                output_dir=str(Path(self.build_temp) / name),
                include_dirs=ext.include_dirs,
                extra_postargs=FLAGS + flags,
            )

        jobs = [(isa, "isa.cpp", flags) for isa, flags in ISA_FLAGS.items()]
        jobs += [("common", source, []) for source in SOURCES]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [name for names in pool.map(compile_one, jobs) for name in names]
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, str(target), target_lang="c++", extra_postargs=[*FLAGS, *STRIP]
        )


def extensions():
    try:
        import pybind11
    except ImportError:
        return []
    files = sorted(str(path) for path in FOLDER.iterdir())
    return [
        Extension(
            "fastgan._cpu",
            [str(FOLDER / source) for source in ("isa.cpp", *SOURCES)],
            include_dirs=[pybind11.get_include()],
            depends=files,
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
