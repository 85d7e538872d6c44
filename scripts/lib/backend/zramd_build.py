"""Build backend: setuptools, plus the named build profiles of the compiled core.

The environment variable ZRAMD_BUILD picks a profile (release if it is not set):

    release   what is shipped: optimised, one abi3 wheel for CPython 3.11 and later
    debug     expensive invariants on, not optimised
    coverage  lines of nogil code are traced; .pyx and .c lie next to the extensions, where coverage looks
    asan      AddressSanitizer and UndefinedBehaviorSanitizer
    tsan      ThreadSanitizer

All that is built goes to build/: the package, complete, to build/PROFILE, the rest to build/tmp/PROFILE.
pip and scripts/build share these folders: what one has compiled the other does not compile again.
"""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setuptools import Extension
from setuptools.build_meta import *  # noqa: F403
from setuptools.command.bdist_wheel import bdist_wheel as _bdist_wheel
from setuptools.command.build import build as _build
from setuptools.command.build_ext import build_ext as _build_ext

LIMITED_API = 0x030B0000
LIMITED_API_TAG = "cp311"

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "initializedcheck": False,
    "cdivision": True,
    "auto_pickle": False,
}


@dataclass(frozen=True)
class Profile:
    """What sets one build apart from the others."""

    name: str
    cflags: tuple[str, ...]
    ldflags: tuple[str, ...] = ()
    limited_api: bool = False
    line_directives: bool = True  # reports and debuggers then name lines of the .pyx
    linetrace: bool = False


# The interpreter's own flags come first and hold -DNDEBUG and, on some systems, _FORTIFY_SOURCE, which
# needs optimisation and hides overflows from the sanitizers.
_CHECKED = ("-UNDEBUG", "-U_FORTIFY_SOURCE", "-fno-omit-frame-pointer")
# The interpreter's flags define signed overflow (-fwrapv), and then it would not be looked for.
_ASAN = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-wrapv")
# Statically: see core/device/zstd.pxd. Its names stay inside.
_ZSTD = ("-Wl,-Bstatic", "-lzstd", "-Wl,-Bdynamic", "-Wl,--exclude-libs,ALL")
_TSAN = ("-fsanitize=thread",)

PROFILES = {
    profile.name: profile
    for profile in (
        # -S: lines of the generated C are of no use; the names that profilers show stay.
        Profile("release", ("-O2", "-g0"), ("-Wl,-S",), limited_api=True, line_directives=False),
        Profile("debug", ("-O0", "-g3", "-DZRAMD_CHECK=3", *_CHECKED)),
        Profile(
            "coverage",
            ("-O0", "-g", "-DCYTHON_TRACE_NOGIL=1", "-DCYTHON_USE_SYS_MONITORING=0"),
            line_directives=False,
            linetrace=True,
        ),
        Profile("asan", ("-O1", "-g", "-DZRAMD_CHECK=2", *_CHECKED, *_ASAN), _ASAN),
        Profile("tsan", ("-O1", "-g", *_CHECKED, *_TSAN), _TSAN),
    )
}


def current_profile() -> Profile:
    """The profile that ZRAMD_BUILD names; SystemExit with the valid names if it names none."""
    name = os.environ.get("ZRAMD_BUILD") or "release"
    if name not in PROFILES:
        raise SystemExit(f"unknown build profile '{name}' in ZRAMD_BUILD; valid are: {', '.join(PROFILES)}")
    return PROFILES[name]


def pkg_config(*args: str) -> list[str]:
    """The words that pkg-config prints; SystemExit with a remedy if it cannot."""
    try:
        return subprocess.run(
            ["pkg-config", *args], check=True, stdout=subprocess.PIPE, text=True
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"'pkg-config {' '.join(args)}' failed ({error}): install pkg-config, liblz4-dev and libzstd-dev"
        ) from None


# Of Python's code objects, from 3.11 to 3.14: the limited API has no names for them.
CODE_FLAGS = {
    "CO_OPTIMIZED": 0x1,
    "CO_NEWLOCALS": 0x2,
    "CO_VARARGS": 0x4,
    "CO_VARKEYWORDS": 0x8,
    "CO_GENERATOR": 0x20,
    "CO_COROUTINE": 0x80,
    "CO_ASYNC_GENERATOR": 0x200,
}
_INSPECT = 'PyImport_ImportModule("inspect")'


class build(_build):
    """Builds into the profile's own folders, so that profiles live side by side."""

    def finalize_options(self) -> None:
        name = current_profile().name
        self.build_lib = f"{self.build_base}/{name}"
        self.build_temp = f"{self.build_base}/tmp/{name}"
        super().finalize_options()

    def run(self) -> None:
        self._prune()
        super().run()

    def _prune(self) -> None:
        """Removes what earlier builds left of sources that are gone: a wheel takes all that lies there."""
        built = Path(self.build_lib)
        for path in [path for path in built.rglob("*") if path.is_file()]:
            source = path.relative_to(built)
            if path.suffix in (".so", ".c"):
                source = source.with_name(source.name.split(".")[0] + ".pyx")
            by_tools = any(part == "__pycache__" or part.startswith(".") for part in source.parts)
            if by_tools or not source.exists():
                path.unlink()


class build_ext(_build_ext):
    """Compiles every .pyx that the template in pyproject.toml matches, as the profile says."""

    def finalize_options(self) -> None:
        self.profile = current_profile()
        self.parallel = self.parallel or os.cpu_count()
        template: Extension
        (template,) = self.distribution.ext_modules
        if "*" in template.sources[0]:
            sources = sorted(map(str, Path().glob(template.sources[0])))
            self.distribution.ext_modules = [self._extension(source) for source in sources]
        super().finalize_options()

    def _extension(self, source: str) -> Extension:
        macros: list[tuple[str, str | None]] = []
        if self.profile.limited_api:
            macros.append(("Py_LIMITED_API", f"0x{LIMITED_API:08X}"))
            macros += [(name, str(value)) for name, value in CODE_FLAGS.items()]
        return Extension(
            ".".join(Path(source).with_suffix("").parts),
            [source],
            define_macros=macros,
            py_limited_api=self.profile.limited_api,
            # no-sign-compare: Cython writes such comparisons itself, and each would warn.
            extra_compile_args=[
                "-Wno-sign-compare",
                # What is not of the limited API is not declared: an older gcc would only warn.
                "-Werror=implicit-function-declaration",
                *pkg_config("--cflags", "liblz4", "libzstd"),
                *self.profile.cflags,
            ],
            # as-needed: only the modules that call lz4 are linked with it
            extra_link_args=[
                "-Wl,--as-needed",
                *pkg_config("--libs", "liblz4"),
                *_ZSTD,
                *self.profile.ldflags,
            ],
        )

    def run(self) -> None:
        # Only building needs Cython: metadata can be had without it.
        from Cython.Build import cythonize
        from Cython.Compiler.Errors import CompileError

        c_dir = Path(self.build_lib if self.profile.linetrace else f"{self.build_temp}/c")
        flags = [__file__, "pyproject.toml"]
        newest_flags = max(Path(file).stat().st_mtime for file in flags)
        options: dict[str, Any] = {
            "build_dir": str(c_dir),
            "force": any(path.stat().st_mtime < newest_flags for path in c_dir.rglob("*.c")),
            "compiler_directives": DIRECTIVES | {"linetrace": self.profile.linetrace},
            "emit_linenums": self.profile.line_directives,
            "nthreads": self.parallel,
            "quiet": True,
        }
        try:
            translated = cythonize([Extension(e.name, e.sources) for e in self.extensions], **options)
        except CompileError as error:
            # Cython has shown what is wrong and where.
            raise SystemExit(f"cannot translate {error}") from None
        for extension, result in zip(self.extensions, translated, strict=True):
            if self.profile.linetrace:
                self.copy_file(extension.sources[0], str(c_dir / extension.sources[0]))
            extension.sources = result.sources
            if self.profile.limited_api:
                for source in result.sources:
                    _without_inspect(Path(source))
            extension.depends = [*result.depends, *flags]
        super().run()


def _without_inspect(source: Path) -> None:
    """Have a module not import `inspect`, where Cython 3.2 has it look up CODE_FLAGS.

    They are macros already, so it reads none of them; the import alone takes 0.65 MB of each server's locked
    memory and 11 ms of its start.
    """
    text = source.read_text()
    if _INSPECT in text:
        source.write_text(text.replace(_INSPECT, _INSPECT.replace("inspect", "sys")))


class bdist_wheel(_bdist_wheel):
    """Tags the wheel abi3 where the profile keeps to the Limited API."""

    def finalize_options(self) -> None:
        if current_profile().limited_api:
            self.py_limited_api = LIMITED_API_TAG
        super().finalize_options()
