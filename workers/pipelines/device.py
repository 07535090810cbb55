"""Which device and number type this worker uses, and how much it may keep there."""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from farm.modelfiles import read_json
from farm.settings import Settings
from workers.pipelines.heap import keep_pages
from workers.pipelines.spread import Spread

CPU_BUDGET = 4 * 1024**3
GPU_SHARE = 0.8
HOST_SHARE = 0.25
CPU_SHARE = 0.5
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where a container reads how much memory it may take, cgroups 2 and 1."""
CGROUP_USED = {"memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"}
"""Beside each, how much it takes."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Device:
    """A torch device, the number type for weights, and the bytes of weights that may stay there."""

    place: torch.device
    dtype: torch.dtype
    budget: int
    spread: Spread = field(default_factory=Spread)
    open: bool = False
    """The settings leave the number type to the model."""

    def dtype_of(self, folder: Path) -> torch.dtype:
        """The number type a checkpoint is loaded in: on a GPU its own profile may choose where the settings do not."""
        if self.on_cpu or not self.open or not (folder / "profile.json").exists():
            return self.dtype
        return DTYPES.get(str(read_json(folder / "profile.json").get("dtype")), self.dtype)

    @property
    def on_cpu(self) -> bool:
        return self.place.type == "cpu"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def vae_dtype(self) -> torch.dtype:
        """For a VAE that overflows in float16."""
        bfloat = self.place.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if bfloat else torch.float32

    def free(self) -> None:
        """Give unused memory back. Call it outside `except`, where the traceback still holds the tensors."""
        gc.collect()
        if self.place.type == "cuda":
            torch.cuda.empty_cache()
        elif self.place.type == "mps":
            torch.mps.empty_cache()

    def finish(self) -> None:
        """Wait until the device has done what it was asked: for measuring."""
        if self.place.type == "cuda":
            torch.cuda.synchronize(self.place)

    def here(self) -> AbstractContextManager[Any]:
        """What a thread of its own does, it does on this device: each thread has a current one."""
        return torch.cuda.device(self.place) if self.place.type == "cuda" else nullcontext()

    @property
    def room(self) -> int:
        """Bytes that activations may take now. What torch keeps of a GPU without using it counts as free; what a CPU's
        process keeps of its freed memory does not."""
        if self.place.type != "cuda":
            return free_memory()
        free, _ = torch.cuda.mem_get_info(self.place)
        return free + torch.cuda.memory_reserved(self.place) - torch.cuda.memory_allocated(self.place)

    @property
    def micro_batch(self) -> int:
        """Images denoised together unless the settings say otherwise. Measured with crack-tiny on two cores, whose
        caches hold few weights at once: 16 are rendered in 0.83 to 0.99 of the time of two times 8."""
        return 16 if self.on_cpu else 8

    @property
    def decode_pixels(self) -> int:
        """Pixels decoded in one go. A CPU keeps its cores busy to the end with small pieces; a GPU wants them few
        enough that the VAE at 1024x1024 does not need more memory than the UNet."""
        return 128 * 128 if self.on_cpu else 4 * 1024 * 1024


def choose(settings: Settings) -> Device:
    """The device the settings ask for. Raises ValueError when it is not there."""
    name = settings.device
    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"FARM_DEVICE={settings.device}: this machine has {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("FARM_DEVICE=mps: this machine has no Metal device")
    if device.type not in {"cpu", "cuda", "mps"}:
        raise ValueError(f"FARM_DEVICE={settings.device}: must be auto, cpu, cuda:N or mps")
    if settings.threads and device.type == "cpu":
        torch.set_num_threads(settings.threads)
    if device.type == "cpu":
        # Before the threads of the spread have heaps of their own.
        keep_pages()
    spread = Spread(torch.get_num_threads() if device.type == "cpu" else 1)
    dtype = settings.dtype if settings.dtype != "auto" else ("float32" if device.type == "cpu" else "float16")
    budget = settings.device_budget_bytes or _budget(device)
    return Device(device, DTYPES[dtype], budget, spread, open=settings.dtype == "auto")


def _budget(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory * GPU_SHARE)
    return min(CPU_BUDGET, int(machine_memory() * CPU_SHARE))


def host_budget() -> int:
    """Bytes of host memory for parsed adapters and cold checkpoints, where no setting says how many."""
    return int(machine_memory() * HOST_SHARE)


def machine_memory() -> int:
    """Bytes of memory this process may take: the machine's, or its container's where that has fewer."""
    told = [int(text) for file in CGROUP_LIMITS if file.exists() and (text := file.read_text().strip()).isdigit()]
    return min([psutil.virtual_memory().total, *told])


def free_memory() -> int:
    """Bytes of memory this process could take now: what the machine has available, or its container where that has
    less. Files that the container only keeps for itself in case they are read again count as free."""
    left = [psutil.virtual_memory().available]
    for limit in CGROUP_LIMITS:
        used = limit.parent / CGROUP_USED[limit.name]
        if not (limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit()):
            continue
        told = dict(line.split(maxsplit=1) for line in _lines(limit.parent / "memory.stat"))
        kept = int(told.get("total_inactive_file", told.get("inactive_file", "0")))
        left.append(int(text) - int(used.read_text()) + kept)
    return max(0, min(left))


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error says that the device (or the host) has no room; torch has no one type for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    # The last one of cuBLAS and cuDNN, whose workspace found no room.
    said = ("can't allocate memory", "out of memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in text for words in said)


def is_fatal(error: BaseException) -> bool:
    """Whether this process cannot use its device any more, however often it tries."""
    accelerator = getattr(torch, "AcceleratorError", None)
    return (accelerator is not None and isinstance(error, accelerator)) or "CUDA error" in str(error)
