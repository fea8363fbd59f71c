"""The hardware of a run: the accelerator, bfloat16, the number of CPU threads, the memory allocator."""

import contextlib
import ctypes
import errno
import importlib.util
import os
import platform
import re
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nin.config.errors import locate_in_own_code, read_first_line
from nin.config.schema import FolderData, MachineError, Settings, Trainer, UserError, is_single_process

if TYPE_CHECKING:
    import torch

# A sweep's first process sets it for its workers: the number of threads of a run that has the machine to itself.
THREADS_VARIABLE = "NIN_THREADS"


def require_accelerator(trainer: Trainer) -> None:
    """Raises UserError if this machine lacks the accelerator that is requested by name, or for batch norm.

    Imports torch only if one is.
    """
    if trainer.accelerator in ("auto", "cpu") and not trainer.sync_batchnorm:
        return
    import torch

    if trainer.sync_batchnorm and not torch.cuda.is_available():
        raise UserError("trainer.sync_batchnorm=true: torch synchronizes batch norm on CUDA GPUs only; set it to false")
    if trainer.accelerator in ("auto", "cpu"):
        return
    cuda, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if {"gpu": bool(cuda or mps), "cuda": bool(cuda), "mps": mps}.get(trainer.accelerator, True):
        return
    found = f"{cuda} CUDA GPU(s)" if cuda else "an Apple GPU" if mps else "no GPU that torch can use, only the CPU"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = f"; CUDA_VISIBLE_DEVICES={visible!r} hides others, unset it to use them" if visible is not None else ""
    raise MachineError(
        f"trainer.accelerator={trainer.accelerator}: this machine has {found} (torch {torch.__version__}){hidden}; "
        f"use trainer={'gpu' if cuda else 'mps' if mps else 'cpu'}, or trainer=auto for the best one available"
    )


def require_working_gpu(device: "torch.device") -> None:
    """Checks that torch can use ``device``, if it is a CUDA GPU: the driver also counts GPUs that torch can't use.

    Raises:
        UserError: if there is no such GPU, the driver is too old, or the GPU is in use or has no free memory.
    """
    import torch

    if device.type != "cuda":
        return
    if (count := torch.cuda.device_count()) <= (device.index or 0):
        raise MachineError(
            f"trainer.devices: requests {device}, and torch can use {count} CUDA GPU(s), numbered from 0"
        )
    try:
        torch.ones(1, device=device)  # a kernel: a build of torch has those of some generations of GPUs
    except RuntimeError as error:  # also out of memory
        reason = read_first_line(error).split(". ")[0].rstrip(".")
        remedy = (
            "end the other programs that use the GPU (nvidia-smi lists them), choose another with CUDA_VISIBLE_DEVICES"
            if "out of memory" in reason or "busy" in reason
            else f"update the driver, which must support CUDA {torch.version.cuda}, or install a build of torch for "
            "this driver and GPU"
        )
        raise MachineError(
            f"trainer: torch {torch.__version__} can't use {device}: {reason}; {remedy}, or train without it: "
            "trainer=cpu"
        ) from error


def add_remedy(error: Exception, settings: Settings) -> None:
    """Adds what to try, below its traceback, to the error of a full GPU, a compilation, a memory format, batch norm."""
    import torch

    # Raised by ``x.view(len(x), -1)`` in a custom network, and by LBFGS.
    if settings.speed.channels_last and "view size is not compatible" in str(error):
        error.add_note(
            "speed.channels_last=true keeps weights and maps of convolutions in the channels-last memory format, which "
            ".view() refuses: set speed.channels_last=false, or use .reshape() or .flatten() in code of your own"
        )
    if "Expected more than 1 value per channel" in str(error):
        error.add_note(
            "Batch norm needs two or more values of each channel: set data.batch_size to 2 or more for each process, "
            "or apply it to larger maps"
        )
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        error.add_note("The network could not be compiled: set compile=false to train without it")
    # A process that finds no memory for CUDA itself has another class of error.
    if isinstance(error, torch.OutOfMemoryError) or re.search(r"CUDA.*out of memory|_STATUS_ALLOC_FAILED", str(error)):
        stored = ""
        if isinstance(settings.data, FolderData):
            stored = ", a smaller data.memory_limit_mib, above which images are not stored on the GPU"
        error.add_note(
            f"The GPU has too little free memory for data.batch_size={settings.data.batch_size}: end other programs "
            "that use it (nvidia-smi lists them); or start another run with a smaller data.batch_size, "
            "trainer.accumulate_grad_batches=2 to keep the number of images per step, trainer.precision=bf16-mixed"
            f"{stored}, or compile=false"
        )


def is_of_machine(error: Exception) -> bool:
    """Whether a run may succeed later with the same settings: a file could not be written, or a GPU failed."""
    import torch

    if isinstance(error, OSError):  # a file that code of the user's own misses will be missing again
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) or not locate_in_own_code(error)
    return isinstance(error, torch.AcceleratorError)


def resolve_precision(trainer: Trainer) -> int | str | None:
    """The ``precision`` argument of ``lightning.Trainer``.

    ``null`` is bf16-mixed on a GPU with native bfloat16 and float32 elsewhere; ``auto`` also uses native bfloat16 of a
    CPU. Weights, sums and the loss stay float32.
    """
    import torch

    if trainer.precision not in (None, "auto"):
        return trainer.precision
    on_gpu = trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    if on_gpu:
        gpu = torch.device("cuda", own_gpu(trainer.devices))
        require_working_gpu(gpu)
        with torch.cuda.device(gpu):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = trainer.accelerator in ("auto", "cpu") and trainer.precision == "auto" and cpu_has_bfloat16()
    return "bf16-mixed" if native else None


def own_gpu(devices: int | str | list[int]) -> int:
    """The index of the GPU that this process will use, of those that ``trainer.devices`` selects."""
    # srun's variable counts only beside its rank, which a run of one process removes where another program left it.
    of_srun = os.environ.get("SLURM_LOCALID", 0) if "SLURM_PROCID" in os.environ else 0
    process = int(os.environ.get("LOCAL_RANK", of_srun))
    if isinstance(devices, str) and "," in devices:
        devices = [int(index) for index in devices.split(",") if index.strip()]
    return devices[process % len(devices)] if isinstance(devices, list) and devices else process


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 natively; others emulate it slowly. Old versions of torch don't report it."""
    import torch

    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def missing_for_compile(device: "torch.device") -> str | None:
    """Describes what ``torch.compile`` needs for a CUDA GPU and this machine lacks; None if nothing is missing.

    Triton, which generates the kernels, compiles a few lines of C against Python's headers when it is first used.
    """
    import torch

    # Triton looks for the headers in this way (triton/runtime/build.py).
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    headers = Path(sysconfig.get_paths(scheme)["include"])
    if importlib.util.find_spec("triton") is None:
        return "the package triton is missing"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "there is no C compiler: install gcc or clang, or set CC"
    if not (headers / "Python.h").exists():
        return f"{headers} has no Python.h: install python3-dev, or use a Python of uv, which has it"
    if torch.version.cuda and (capability := torch.cuda.get_device_capability(device)) < (7, 0):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, and Triton needs 7.0"
    return None


def describe_device(device: "torch.device") -> str:
    """The name of a GPU; or the processor, the vector instructions that torch uses, and its number of threads."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    instructions = torch.backends.cpu.get_cpu_capability()  # they change the rounding
    return f"{device.type} ({_name_processor()}, {instructions}, {threads} thread{'s' * (threads != 1)})"


def _name_processor() -> str:
    with contextlib.suppress(OSError):  # only Linux has it
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def default_threads() -> int:
    """The number of CPU threads of a run that has the machine to itself."""
    import torch

    # Stored in the environment: `set_threads` changes what torch reports, and later jobs of this process need the
    # original value.
    return int(os.environ.setdefault(THREADS_VARIABLE, str(torch.get_num_threads())))


def set_threads(settings: Settings) -> None:
    """Sets the number of CPU threads to ``settings.threads``, or to the default."""
    import torch

    default = default_threads()
    torch.set_num_threads(settings.threads or default)
    if settings.threads and not is_single_process(settings.trainer):
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)  # otherwise Lightning sets another number in each process


# Parameters of mallopt(3), from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def retain_freed_memory() -> None:
    """Makes glibc keep freed memory for the next step instead of returning it to the kernel, which would clear it.

    On two cores that took up to a quarter of a small network's training time. Does nothing with other C libraries.
    """
    if glibc := _glibc():
        glibc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        glibc.mallopt(_M_MMAP_THRESHOLD, 2**25)  # the largest value that glibc accepts


@contextlib.contextmanager
def default_allocator() -> Iterator[None]:
    """Lets glibc behave as it does by default within the context, for comparison."""
    if glibc := _glibc():
        glibc.mallopt(_M_TRIM_THRESHOLD, 2**26)  # the value that its own adjustment reaches
        glibc.malloc_trim(0)
    try:
        yield
    finally:
        retain_freed_memory()


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
