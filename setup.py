"""Builds mlp_ext._C against the torch that is installed: CPU kernels and, on request, CUDA kernels.

Only commands that compile need torch; an sdist is made without it. A wheel requires the minor
version of torch that it was built against, and its version ends in it, as 0.3.0+torch2.15.

MLP_EXT_CUDA = auto (default: CUDA where a GPU is here or TORCH_CUDA_ARCH_LIST is set), 1 (CUDA or
an error), 0 (never look). MLP_EXT_ISA = all (default), native (the CPU kernels of this processor
alone, which compile in half the time). MLP_EXT_ANY_TORCH = 1 tries a torch that is not in the range
of pyproject.toml. MAX_JOBS bounds the compilers that run at once. TORCH_CUDA_ARCH_LIST names
architectures, as "8.0;9.0+PTX"; without it those of the GPUs here, else these. CUTLASS_HOME is a
folder with include/cutlass/cutlass.h, without it that of the package nvidia-cutlass.
MLP_EXT_SANITIZE = 1 adds AddressSanitizer and UBSan to the CPU's code, for `make sanitize`.

The same files make the same archives and the same binary, byte by byte, in any folder. Their date
is SOURCE_DATE_EPOCH, by default that of the commit.
"""

from __future__ import annotations

import gzip
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import setuptools

if int(setuptools.__version__.partition(".")[0]) < 77:  # without isolation pip does not look
    sys.exit(
        f"mlp_ext needs setuptools 77 or newer, and {setuptools.__version__} is installed: type "
        "`pip install --upgrade setuptools`"
    )

from setuptools.command.sdist import sdist
from setuptools.config.pyprojecttoml import read_configuration

ROOT = Path(__file__).resolve().parent
PROJECT = read_configuration(ROOT / "pyproject.toml", expand=False)["project"]
COMPILING = {
    *("build", "build_ext", "install", "develop"),
    *("bdist_wheel", "dist_info", "editable_wheel"),  # what pip and uv call for a wheel
} & {*sys.argv}


def check_torch() -> str:
    """The minor version of the torch that is installed, as 2.15; exits unless it is in range."""
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        sys.exit(
            "mlp_ext is compiled against the torch that is installed, and there is none here: type "
            "`pip install torch` and then `pip install --no-build-isolation .`"
        )
    (requirement,) = PROJECT["dependencies"]
    oldest, end = map(int, re.findall(r"2\.(\d+)", requirement))
    minor = ".".join(version.split(".")[:2])
    known = [f"2.{n}" for n in range(oldest, end)]
    if minor not in known and os.environ.get("MLP_EXT_ANY_TORCH") != "1":
        sys.exit(
            f"mlp_ext {PROJECT['version']} is for torch {known[0]} to {known[-1]}, and {version} "
            f'is installed: type `pip install "{requirement}"`, or set MLP_EXT_ANY_TORCH=1 to try '
            f"{version}"
        )
    return minor


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


if "t" in sys.abiflags:
    sys.exit("mlp_ext needs the GIL, and this Python is free-threaded: use python3.13, not 3.13t")
if not os.access(ROOT, os.W_OK):
    sys.exit(f"the build writes into {ROOT}, which is read-only: copy the folder and build there")
if COMPILING:
    TORCH = check_torch()
    VERSION = f"{PROJECT['version']}+torch{TORCH}"
    if shutil.which(compiler()[0]) is None:
        sys.exit(
            f"mlp_ext needs a C++ compiler, and {compiler()[0]} is not found: install g++, or set "
            "CXX to one"
        )
    try:
        import torch
        from torch.utils import cpp_extension
    except (ImportError, OSError) as error:
        sys.exit(f"torch is installed, but cannot be imported: {error}")


def date() -> str:
    """Seconds: of the last commit here, or of the sdist, whose files have its date."""
    with suppress(OSError):
        command = ["git", "log", "-1", "--format=%ct", "--", "."]
        told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
        if told:
            return told
    return str(int((ROOT / "pyproject.toml").stat().st_mtime))


os.environ.setdefault("SOURCE_DATE_EPOCH", date())


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


def joined(folder: str) -> str:
    """A file that includes all of csrc/folder: read once, torch's headers take half of the time."""
    to = ROOT / "build" / "joined" / f"{folder}.cpp"
    text = "".join(
        f'#include "{Path(file).relative_to("csrc")}"\n' for file in sources(f"{folder}/*.cpp")
    )
    if not to.exists() or to.read_text() != text:  # else ninja would compile it again
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(text)
    return str(to.relative_to(ROOT))


def say(line: str) -> None:
    """Tells it on the terminal, where pip would swallow it."""
    print(f"mlp_ext: {line}", flush=True)
    if not sys.stdout.isatty():
        with suppress(OSError), open("/dev/tty", "w") as terminal:
            terminal.write(f"\nmlp_ext: {line}\n")


def use_cuda() -> tuple[bool, str]:
    """Whether to compile CUDA kernels, and why."""
    wish = os.environ.get("MLP_EXT_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        sys.exit(f"MLP_EXT_CUDA must be auto, 0 or 1, got {wish!r}")
    if wish == "0":
        return False, "MLP_EXT_CUDA=0"
    if wish == "1":
        reason = "MLP_EXT_CUDA=1"
    elif os.environ.get("TORCH_CUDA_ARCH_LIST"):
        reason = "TORCH_CUDA_ARCH_LIST is set"
    elif torch.cuda.is_available():
        reason = "a GPU is here"
    else:
        return False, "torch finds no GPU; MLP_EXT_CUDA=1 or TORCH_CUDA_ARCH_LIST asks for CUDA"
    missing = []
    if torch.version.cuda is None:
        missing.append(f"a torch with CUDA (torch {torch.__version__} has none)")
    toolkit = find_toolkit()
    if toolkit is None:
        missing.append("a CUDA toolkit with nvcc (set CUDA_HOME)")
    if missing and wish == "1":
        sys.exit(f"MLP_EXT_CUDA=1 needs {' and '.join(missing)}")
    if torch.version.cuda is None or toolkit is None:
        return False, f"CUDA needs {' and '.join(missing)}"
    if toolkit.partition(".")[0] != torch.version.cuda.partition(".")[0]:
        sys.exit(
            f"torch {torch.__version__} is built with CUDA {torch.version.cuda}, and the toolkit "
            f"in {cpp_extension.CUDA_HOME} is {toolkit}: set CUDA_HOME to one of the same major "
            "version, or MLP_EXT_CUDA=0 to build for the CPU alone"
        )
    return True, reason


def find_toolkit() -> str | None:
    """The version of the toolkit, or None. Mends CUDA_HOME where nvcc on PATH only calls it."""
    nvcc = Path(cpp_extension.CUDA_HOME or "/nonexistent", "bin", "nvcc")
    try:
        command = [nvcc, "--dryrun", "-x", "cu", os.devnull]
        told = subprocess.run(command, capture_output=True, text=True).stderr
    except OSError:
        return None
    here = re.search(r"_HERE_=(.*)", told)
    version = re.search(r"__CUDACC_VER_MAJOR__=(\d+).*?__CUDACC_VER_MINOR__=(\d+)", told)
    if here is None or version is None:
        return None
    cpp_extension.CUDA_HOME = str(Path(here[1].strip()).parent)
    return ".".join(version.groups())


def cutlass() -> tuple[Path, str] | None:
    """The folder of CUTLASS's headers and its version, or None."""
    home = os.environ.get("CUTLASS_HOME")
    package = find_spec("cutlass_library")
    if home:
        include = Path(home, "include")
    elif package and package.origin:
        include = Path(package.origin).parent / "source" / "include"
    else:
        return None
    try:
        header = (include / "cutlass" / "version.h").read_text()
    except OSError as error:
        sys.exit(f"CUTLASS must have include/cutlass/version.h (set CUTLASS_HOME): {error}")
    return include, ".".join(re.findall(r"#define CUTLASS_(?:MAJOR|MINOR|PATCH) (\d+)", header))


def cuda_arch_flags() -> list[str]:
    """As torch reads TORCH_CUDA_ARCH_LIST, but 9.0 is 9.0a.

    Every GPU of compute capability 9.0 runs code for 9.0a, which alone may use its tensor cores'
    own instructions. PTX stays that of 9.0, since what is newer does not run 9.0a.
    """
    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = "8.0;9.0+PTX"
    flags = cpp_extension._get_cuda_arch_flags()
    return [f.replace("compute_90,code=sm_90", "compute_90a,code=sm_90a") for f in flags]


def prefix_maps(build_temp: str) -> list[str]:
    """The names of source files, which assertions print, without the folders of this machine.

    With base_dir, ccache makes them relative to build_temp.
    """
    folders = [ROOT, Path(torch.__file__).absolute().parents[1]]  # the last that fits counts
    return [
        f"-ffile-prefix-map={path}/="
        for folder in folders
        for path in (folder, os.path.relpath(folder, build_temp))
    ]


def instruction_sets() -> list[str]:
    """Those to compile the CPU kernels for, the most capable first: csrc/cpu/targets/ has each."""
    wish = os.environ.get("MLP_EXT_ISA", "all")
    if wish not in ("all", "native"):
        sys.exit(f"MLP_EXT_ISA must be all or native, got {wish!r}")
    if wish == "native":
        capability = torch.backends.cpu.get_cpu_capability()
        return [{"AVX512": "avx512", "AVX2": "avx2"}.get(capability, "generic")]
    x86 = platform.machine() in ("x86_64", "AMD64")
    return ["avx512", "avx2", "generic"] if x86 else ["generic"]


class Distribution(setuptools.Distribution):
    """Where something is compiled, what pyproject.toml says is narrowed to the torch used."""

    def parse_config_files(self, *args: Any, **kwargs: Any) -> None:
        super().parse_config_files(*args, **kwargs)
        if COMPILING:
            self.metadata.version = VERSION
            self.install_requires = self.metadata.install_requires = [f"torch=={TORCH}.*"]


class Sdist(sdist):
    """The same bytes for the same files: sorted, of one date, owned by nobody."""

    def make_archive(self, base_name: Any, format: str, *args: Any, **kwargs: Any) -> str:
        if format != "gztar":
            sys.exit(f"the sdist is a gztar, not a {format}")
        date, folder = int(os.environ["SOURCE_DATE_EPOCH"]), kwargs["base_dir"]

        def plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
            if member.name.endswith(".egg-info"):
                return None  # setuptools' own notes, which depend on earlier builds
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mtime, member.mode = date, 0o755 if member.mode & 0o100 else 0o644
            return member

        with (
            open(f"{base_name}.tar.gz", "wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=date) as packed,
            tarfile.open(fileobj=packed, mode="w") as archive,
        ):
            archive.add(folder, filter=plain)
        return file.name


options: dict[str, Any] = {"cmdclass": {"sdist": Sdist}}
if COMPILING:
    CUDA, WHY = use_cuda()
    ISAS = instruction_sets()
    ARCH_FLAGS = cuda_arch_flags() if CUDA else []
    CUTLASS = cutlass() if any("sm_90a" in flag for flag in ARCH_FLAGS) else None
    # Where there are buffers of characters alone: -fstack-protector-strong, where there are arrays,
    # costs narrow layers 12 to 26 %.
    CXX_FLAGS = [
        *("-O3", "-g0", "-std=c++20", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=fast"),
        *("-Wall", "-Wno-psabi", "-Wno-unknown-pragmas", "-fstack-protector"),
    ]
    # Without NDEBUG the assertions in CUTLASS's kernels make ptxas serialise its wgmma.
    NVCC_FLAGS = ["-O3", "-std=c++20", "-DNDEBUG"]
    NVCC_FLAGS += ["--compiler-options=-fvisibility=hidden,-fstack-protector"]
    LINK_FLAGS = [
        "-fopenmp",  # at::parallel_for is inlined here, and serial without
        # Some compilers bring libstdc++ as an archive alone. Exported, its streams mix with those
        # that torch loaded, and the first number in an error message ends the message or the
        # process.
        f"-Wl,--version-script={ROOT / 'csrc' / 'python' / 'exports.map'}",
        "-Wl,-z,relro,-z,now",
    ]
    if os.environ.get("MLP_EXT_SANITIZE") == "1":
        # Without the types of dynamic objects, which torch's libraries may not tell.
        SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr"]
        CXX_FLAGS += [*SANITIZERS, "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1"]
        LINK_FLAGS += SANITIZERS
    else:
        CXX_FLAGS += ["-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2"]
    # What takes longest to compile comes first, so that no processor ends up idle.
    SOURCES = [joined(folder) for folder in ("ops", "python", "cpu")]
    SOURCES += [file for isa in ISAS for file in sources(f"cpu/targets/{isa}_*.cpp")]
    if CUDA:
        SOURCES = [*sources("cuda/*/*.cu"), joined("cuda"), *SOURCES]
    if CUTLASS:
        NVCC_FLAGS += ["-isystem", str(CUTLASS[0])]
    else:
        SOURCES = [source for source in SOURCES if not source.endswith("sm90.cu")]
    Extension = cpp_extension.CUDAExtension if CUDA else cpp_extension.CppExtension
    extension = Extension(
        "mlp_ext._C",
        SOURCES,
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[
            ("MLP_EXT_VERSION", f'"{VERSION}"'),
            ("MLP_EXT_TORCH", torch.__version__),  # a changed command line, so that ninja rebuilds
            ("MLP_EXT_CUTLASS", str(int(CUTLASS is not None))),
            ("MLP_EXT_TARGETS(DO)", " ".join(f"DO({isa})" for isa in ISAS)),
        ],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS + ARCH_FLAGS},
        extra_link_args=LINK_FLAGS,
    )

    class Build(cpp_extension.BuildExtension):
        """Also records, beside _C, what it was built against, for a check before _C is loaded."""

        def finalize_options(self) -> None:
            super().finalize_options()
            self.force = True  # never keep a _C of another torch; what is stale, ninja knows better

        def run(self) -> None:
            kind = f"for CUDA {torch.version.cuda} and the CPU" if CUDA else "for the CPU alone"
            say(f"compiling {kind} against torch {torch.__version__} ({WHY})")
            if CUDA and not CUTLASS and any("sm_90a" in flag for flag in ARCH_FLAGS):
                say(
                    "there is no CUTLASS here (CUTLASS_HOME, or the package nvidia-cutlass): in "
                    "large layers sigmoid and tanh will be a pass of their own"
                )
            if not self.use_ninja:
                say("without ninja, files compile one by one: `pip install ninja` uses all cores")
            maps = prefix_maps(self.build_temp)
            extension.extra_compile_args["cxx"] += maps
            extension.extra_compile_args["nvcc"] += [f"--compiler-options={m}" for m in maps]
            super().run()
            package = ROOT / "mlp_ext" if self.inplace else Path(self.build_lib) / "mlp_ext"
            banner = subprocess.run(
                [*compiler(), "--version"], capture_output=True, text=True
            ).stdout
            (package / "_built.py").write_text(
                "# Written by setup.py.\n"
                f"TORCH_VERSION = {torch.__version__!r}\n"
                f"CXX = {banner.partition(chr(10))[0]!r}\n"
                f"CUDA_VERSION = {torch.version.cuda if CUDA else None!r}\n"
                f"CUDA_ARCHS = {[flag.rpartition('=')[2] for flag in ARCH_FLAGS]!r}\n"
                f"CUTLASS_VERSION = {CUTLASS[1] if CUTLASS else None!r}\n"
            )

    options["ext_modules"] = [extension]
    options["cmdclass"]["build_ext"] = Build
setuptools.setup(distclass=Distribution, **options)
