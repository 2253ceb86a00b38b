"""Building and loading csrc/: on first use, never on import; once a machine, whoever asks first.

The library lies in `$GAN3D_CACHE/ops` (default `~/.cache/gan3d/ops`) under a name made of the sources, the compiler,
the processor and torch's version; whatever changes, another file is built beside it. `GAN3D_OPS=reference` uses plain
PyTorch, `GAN3D_OPS=native` insists on the compiled ops and shows the compiler's words if they cannot be had; unset, the
compiled ops serve where a compiler is found and the reference elsewhere, and the run says so once.
"""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)
CSRC = Path(__file__).resolve().parents[2] / "csrc"
CPU_FLAGS = ["-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
             "-fopenmp"]  # PyTorch's own OpenMP library serves: it is not linked a second time
CUDA_FLAGS = ["-O3", "--fmad=false", "--extended-lambda", "--expt-relaxed-constexpr"]

_registrations: list[Callable[[], None]] = []
_backend: str | None = None


def after_loading(register: Callable[[], None]) -> Callable[[], None]:
    """Decorator: run once the library is loaded (shape functions, derivatives, FLOP formulas of a family of ops)."""
    _registrations.append(register)
    if _backend in ("cpp", "cuda"):
        register()
    return register


def backend() -> str:
    """What the ops run on: "cuda" (CPU and CUDA kernels), "cpp" (CPU kernels) or "reference" (plain PyTorch)."""
    global _backend
    if _backend is None:
        _backend = _choose()
    return _backend


@torch.compiler.assume_constant_result
def _backend_of_this_process() -> str:
    return backend()


def native(tensor: Tensor) -> bool:
    """Whether compiled ops take this tensor; builds and loads them on first use."""
    chosen = _backend_of_this_process()
    return chosen != "reference" and (tensor.device.type in ("cpu", "meta") or
                                      (tensor.device.type == "cuda" and chosen == "cuda"))


def as_float(tensor: Tensor) -> Tensor:
    """float32 and float64 as they are, half precision in float32. Raises TypeError for anything else."""
    if tensor.dtype in (torch.float32, torch.float64):
        return tensor
    if tensor.dtype in (torch.float16, torch.bfloat16):
        return tensor.float()
    raise TypeError(f"expected a floating-point tensor, got {tensor.dtype}")


def _choose() -> str:
    pinned = os.environ.get("GAN3D_OPS", "")
    if pinned not in ("", "native", "reference"):
        raise ValueError(f"GAN3D_OPS={pinned!r}: set it to native or reference, or leave it unset")
    if pinned == "reference":
        log.info("ops: plain PyTorch, as GAN3D_OPS=reference asks")
        return "reference"
    try:
        missing = _missing()
        if missing:
            raise RuntimeError(missing)
        library, cuda = build()
        torch.ops.load_library(str(library))
    except Exception as problem:
        if pinned == "native":
            raise RuntimeError(f"GAN3D_OPS=native, but the compiled ops cannot be had:\n{problem}") from problem
        log.warning("ops: plain PyTorch, slower; GAN3D_OPS=native says why: %s", str(problem).strip().split("\n")[-1])
        return "reference"
    for register in _registrations:
        register()
    log.info("ops: %s", "compiled for CPU and CUDA" if cuda else "compiled for the CPU")
    return "cuda" if cuda else "cpp"


def _compiler() -> str:
    return os.environ.get("CXX", "g++" if sys.platform.startswith("linux") else "c++")


def _missing() -> str | None:
    if not CSRC.is_dir():
        return f"no sources at {CSRC}: install with `pip install -e .` from a clone"
    if shutil.which(_compiler()) is None:
        return f"no C++ compiler `{_compiler()}` on the PATH"
    if shutil.which("ninja") is None and not (Path(sys.executable).parent / "ninja").exists():
        return "no `ninja` on the PATH: pip install ninja"
    return None


def _with_cuda() -> bool:
    if not torch.cuda.is_available():
        return False
    from torch.utils.cpp_extension import CUDA_HOME

    return CUDA_HOME is not None and (Path(CUDA_HOME) / "bin" / "nvcc").exists()


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    return platform.machine() + flags


def key(cuda: bool) -> str:
    """A short hash of everything the library depends on."""
    digest = hashlib.sha256()
    for path in sorted(p for p in CSRC.iterdir() if p.suffix in (".h", ".cpp", ".cuh", ".cu")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    version = subprocess.run([_compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    devices = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())] if cuda else []
    for fact in (version, torch.__version__, str(torch.version.cuda), str(devices), sys.version, _processor(),
                 str(CPU_FLAGS + CUDA_FLAGS)):
        digest.update(fact.encode() + b"\0")
    return digest.hexdigest()[:16]


def build() -> tuple[Path, bool]:
    """The compiled library, built if it is not in the cache, and whether it has CUDA kernels.

    One process builds while the others wait (a file lock: it dies with its owner); a killed build leaves no library.
    """
    import fcntl

    cuda = _with_cuda()
    cache = Path(os.environ.get("GAN3D_CACHE", Path.home() / ".cache" / "gan3d")) / "ops"
    cache.mkdir(parents=True, exist_ok=True)
    library = cache / f"gan3d_ops_{key(cuda)}.so"
    if library.exists():
        return library, cuda
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(library, cuda)
    return library, cuda


def _compile(library: Path, cuda: bool) -> None:
    from torch.utils import cpp_extension

    sources = [str(path) for path in sorted(CSRC.glob("*.cpp"))] + ([str(CSRC / "ops.cu")] if cuda else [])
    log.warning("ops: compiling %s once (%s); about %s", CSRC.name, _compiler(), "3 minutes" if cuda else "a minute")
    start = time.monotonic()
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{path}"  # ninja of an environment not activated
    try:
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            cpp_extension.load(library.stem, sources, extra_cflags=CPU_FLAGS, extra_cuda_cflags=CUDA_FLAGS,
                               build_directory=folder, with_cuda=cuda, is_python_module=False, is_standalone=False)
            os.replace(Path(folder) / library.name, library)
    finally:
        os.environ["PATH"] = path
    log.warning("ops: compiled in %.0f s into %s", time.monotonic() - start, library)


def check_cuda(*architectures: str) -> None:
    """Compiles every CUDA kernel for these architectures ("sm_80", …), no more: what a machine with nvcc
    but no GPU can verify. Says so where there is no nvcc; raises CalledProcessError if a kernel does not compile.
    """
    from torch.utils import cpp_extension

    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("CUDA kernels: not compiled, no nvcc on the PATH")
        return
    start = time.monotonic()
    targets = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in architectures]
    includes = [f"-I{folder}" for folder in cpp_extension.include_paths()]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([nvcc, "-std=c++20", *CUDA_FLAGS, *targets, "-Xcompiler", "-fPIC", "--threads", "2",
                        "-diag-suppress", "20015,20012,20013", *includes, "-c", str(CSRC / "ops.cu"),
                        "-o", f"{folder}/ops.o"], check=True)
    print(f"CUDA kernels: compiled for {', '.join(architectures)} in {time.monotonic() - start:.0f} s; none was run")
