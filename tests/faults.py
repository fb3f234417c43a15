"""Faults to order: a process that is killed, told to stop, or out of disk space at its n-th operation on files."""

import errno
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FAULTS = {
    "kill": "SIGKILL before the operation",
    "tear": "killed by the kernel inside the next write, after 64 bytes (RLIMIT_FSIZE)",
    "tear log": "killed by the kernel inside the next line of the log (RLIMIT_FSIZE)",
    "full": "no space from here on: ENOSPC where a file is made, EFBIG where one is written to (RLIMIT_FSIZE)",
    "term": "SIGTERM",
    "int": "SIGINT",
    "term twice": "SIGTERM, and again after three more operations",
}
TORN_AT = 64  # bytes


def watch(folder: Path, on_operation: Callable[[str], None]) -> None:
    """From here on, call `on_operation("verb path")` before each operation of this process on files in a folder."""
    import safetensors.torch
    import torch

    def report(verb: str, path: Any, dir_fd: int = -1) -> None:
        parent = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd >= 0 else ""
        path = os.path.abspath(os.path.join(parent, os.fsdecode(path)))
        if Path(path).is_relative_to(folder):
            on_operation(f"{verb} {os.path.relpath(path, folder)}")

    def hook(event: str, args: tuple[Any, ...]) -> None:
        match event, args:
            case "open", (str() | os.PathLike() as path, _, int() as flags) if flags & (os.O_WRONLY | os.O_RDWR):
                report("create", path)
            case "os.mkdir", (path, _, dir_fd):
                report("create", path, dir_fd)
            case "os.rename", (_, path, _, dir_fd):
                report("rename", path, dir_fd)
            case (("os.remove" | "os.rmdir"), (path, dir_fd)):
                report("remove", path, dir_fd)

    def reported(verb: str, function: Callable[..., Any], path_of: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            report(verb, path_of(*args))
            return function(*args, **kwargs)

        return wrapper

    sys.addaudithook(hook)
    # which have no audit events: the last two write their files in C++ and in Rust
    os.fsync = reported("flush", os.fsync, lambda file: os.readlink(f"/proc/self/fd/{file}"))
    torch.save = reported("write", torch.save, lambda state, path: path)
    safetensors.torch.serialize_file = reported(
        "write", safetensors.torch.serialize_file, lambda tensors, path, *more: path
    )


class Injector:
    """Prints each operation, and strikes at the n-th; for `watch`."""

    def __init__(self, fault: str | None, at: int | None, log: Path):
        self.fault = fault
        self.at = at
        self.log = log
        self.count = 0

    def __call__(self, operation: str) -> None:
        """Count an operation."""
        self.count += 1
        print(f"\noperation {self.count}: {operation}", flush=True)
        if self.count == self.at:
            self.strike()
        elif self.at is not None and self.count > self.at:
            if self.fault == "term twice" and self.count == self.at + 3:
                os.kill(os.getpid(), signal.SIGTERM)
            if self.fault == "full" and operation.startswith("create"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def strike(self) -> None:
        """Do what the fault says."""
        print(f"\n{self.fault} at {time.monotonic()}", flush=True)
        match self.fault:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "term" | "term twice":
                os.kill(os.getpid(), signal.SIGTERM)
            case "int":
                os.kill(os.getpid(), signal.SIGINT)
            case "tear":
                limit_files(TORN_AT, signal.SIG_DFL)
            case "tear log":
                limit_files((self.log.stat().st_size if self.log.exists() else 0) + 20, signal.SIG_DFL)
            case "full":
                limit_files(0, signal.SIG_IGN)


def limit_files(size: int, action: signal.Handlers) -> None:
    """Let no file grow beyond a size: the kernel's signal ends a process that tries; if ignored, writing fails."""
    signal.signal(signal.SIGXFSZ, action)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
