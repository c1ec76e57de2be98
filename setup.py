"""Builds the compiled library when dsv4 is installed; everything else about the package is in pyproject.toml.

The kernels of the engine are compiled once for each form, with the options that let the compiler use the instructions
of that form and a name of its own (`FORM`); which form runs is decided on the machine that runs it
(model/kernels/binding.py).
A form that this compiler cannot build is left out, and without a compiler there is no library: dsv4 works without it,
slowly. The library has nothing of Python in it, so a wheel is for a platform, not for a Python version.
"""

import os
import platform
import runpy
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

PACKAGE = Path("src/dsv4")
COMPILED = runpy.run_path(str(PACKAGE / "compiled.py"))
KERNELS = PACKAGE / "model" / "kernels" / "c"
CASTS = PACKAGE / "quant" / "c"
WRITE = PACKAGE / "convert" / "write" / "c"
PROOF = PACKAGE / "convert" / "proof" / "c"
# Once for all forms, with no instruction that some processor lacks.
COMMON = [CASTS / f"{name}.c" for name in ("fp4_to_fp8", "from_bf16", "scale_choice", "mxfp4_blocks")]
COMMON += [WRITE / "sha256.c", PROOF / "bands.c", KERNELS / "threads.c", KERNELS / "processor.c"]
PER_FORM = [KERNELS / f"{name}.c" for name in ("linear", "attention", "index", "small", "experts", "keys", "token")]
# -ffp-contract=off: a product and a sum are two roundings, unless the source says otherwise. -Wno-psabi: vectors wider
# than the machine's registers are passed between inlined functions only, so by no ABI.
OPTIONS = ["-O3", "-g0", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
X86_64 = {"avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16", "-mavx512vbmi"]}
FORMS = {"x86_64": X86_64, "AMD64": X86_64, "aarch64": {"neon": []}, "arm64": {"neon": []}}
PLAIN = ["-DNO_VECTORS"]


def machine() -> str:
    """The processor that is built for: another than this one if the variable of cross builds of Python says so."""
    return os.environ.get("_PYTHON_HOST_PLATFORM", "").rpartition("-")[2] or platform.machine()


def forms() -> dict[str, list[str]]:
    """The forms that the compiler may know, and the options of each."""
    return {"plain": PLAIN, **FORMS.get(machine(), {})}


class BuildForms(build_ext):
    """Compiles the kernels once for each form, and links all into one library without a Python version in its name."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # no PyInit function

    def build_extension(self, ext: Extension) -> None:
        ext.extra_objects = [object for form, options in forms().items() for object in self._objects(form, options)]
        super().build_extension(ext)

    def _objects(self, form: str, options: list[str]) -> list[str]:
        compiled: list[str] = []
        try:
            for source in PER_FORM:
                compiled += self.compiler.compile(
                    [str(source)],
                    output_dir=str(Path(self.build_temp) / form),
                    extra_postargs=[*OPTIONS, *options, f"-DFORM={form}"],
                    depends=[str(path) for path in COMPILED["sources"](PACKAGE)],
                )
        except CompileError:
            if form == "plain":
                raise
            return []
        return compiled


class PlatformWheel(bdist_wheel):
    """A wheel for every Python 3 on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def extension() -> Extension:
    """The library, as setuptools is to build it."""
    options: dict[str, Any] = {"optional": True}  # without a compiler it is left out
    return Extension(
        "dsv4.quant._compiled",
        [str(path) for path in COMMON],
        define_macros=[("DSV4_FINGERPRINT", f'"{COMPILED["fingerprint"](PACKAGE)}"')],
        extra_compile_args=OPTIONS,
        extra_link_args=["-pthread", "-lm"],
        depends=[str(path) for path in COMPILED["sources"](PACKAGE)],
        **options,
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildForms, "bdist_wheel": PlatformWheel})
