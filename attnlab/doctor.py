"""What works on this machine, what does not, and why."""

import importlib.metadata
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "jaxtyping", "numpy", "libtpu")


@dataclass(frozen=True)
class Report:
    """What `examine` found; every value is ready to print."""

    python: str
    versions: dict[str, str | None]
    devices: list[str]
    memory: str
    implementations: dict[str, str | None]  # None: works here; else the reason why not
    cache_folder: Path
    data: dict[str, str]
    problems: list[str] = field(default_factory=list)


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def memory() -> str:
    """The machine's memory in GiB, "free of total", as far as the system tells."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total = page * os.sysconf("SC_PHYS_PAGES") / 2**30
        free = page * os.sysconf("SC_AVPHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        return "unknown"
    return f"{free:.1f} GiB free of {total:.1f} GiB"


def examine() -> Report:
    """Looks at devices, versions, implementations, memory and data; needs no network."""
    problems = []
    try:
        import jax

        devices = [
            f"{device.platform}:{device.id} {device.device_kind}{_device_memory(device)}"
            for device in jax.devices()
        ]
    except Exception as error:  # a broken driver must not stop the examination
        devices = []
        problems.append(f"jax finds no device: {str(error).splitlines()[0]}")
    try:
        from attnlab.core.attention import availability

        implementations = dict(availability())
    except Exception as error:
        implementations = {}
        problems.append(f"the implementations cannot be asked: {error}")
    from attnlab.tasks.text import cache_folder

    return Report(
        python=f"{platform.python_version()} ({platform.system()} {platform.machine()},"
        f" {os.cpu_count()} CPU cores)",
        versions={package: version(package) for package in PACKAGES},
        devices=devices,
        memory=memory(),
        implementations=implementations,
        cache_folder=cache_folder(),
        data=_data(),
        problems=problems,
    )


def _device_memory(device) -> str:
    try:
        limit = (device.memory_stats() or {}).get("bytes_limit")
    except Exception:  # not every backend can say
        limit = None
    return "" if limit is None else f", {limit / 2**30:.1f} GiB"


def _data() -> dict[str, str]:
    import sysconfig

    from attnlab.tasks.text import SHAKESPEARE_FILE, find_shakespeare, shakespeare

    file = find_shakespeare()
    if file is None:
        found = "not here; downloaded on first use, or put it in the folder ATTNLAB_DATA names"
    else:
        try:
            shakespeare()
            found = f"{file} (SHA-256 right)"
        except (ValueError, OSError) as error:
            found = str(error)
    stdlib = Path(sysconfig.get_path("stdlib"))
    count = len(list(stdlib.glob("*.py")))
    return {
        f"shakespeare ({SHAKESPEARE_FILE})": found,
        "stdlib": f"{stdlib} ({count} modules)" if count else f"{stdlib} holds no source",
    }
