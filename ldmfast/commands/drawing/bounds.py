"""Numbers, sizes and memory of what is asked for, checked before anything heavy is imported."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

from ldmfast.commands.drawing.described import Described

MOST = {"number": 4096, "batch": 1024, "columns": 4096, "scale": 64, "preview_every": 10**6, "steps": 10**6}
SIDE = 16384  # pixels of a picture, or of the sheet of them
PIXELS = 2**27  # of the sheet: 400 MB of it in memory
SIDES = {".webp": 16383, ".jpg": 65535, ".jpeg": 65535}  # what the formats hold
DEVICE = re.compile(r"cpu|mps|(cuda|xpu)(:\d+)?")
BATCH = 16
# How often a decoder holds its widest activation, [N, channels, H, W]: 7.7 times at 1x512x512 and 6.0 at 16x256x256,
# float32, the shipped autoencoder's channels (peak of the resident set, torch 2.13, one thread)
HELD = 8
DRIVER = Path("/proc/driver/nvidia/version")


def check_numbers(arguments) -> None:
    """The numbers of `arguments` that are given and that `sample` or `evaluate` has. Raises ValueError."""
    for name, most in MOST.items():
        value = getattr(arguments, name, None)
        if value is not None and not 1 <= value <= most:
            raise ValueError(
                f"{_option(name)} {value} must be at least 1{'' if value < 1 else f', and at most {most}'}"
            )
    for name in ("eta", "guidance_rescale"):
        _within(name, getattr(arguments, name, None), 0, 1)
    _within("guidance", getattr(arguments, "guidance", None), 0, math.inf)
    strength = getattr(arguments, "strength", None)
    if strength is not None and not 0 < strength <= 1:
        raise ValueError(f"--strength {strength} must lie above 0, and be at most 1")
    if strength is not None and not int(arguments.steps * strength):
        raise ValueError(f"--strength {strength} of --steps {arguments.steps} is less than one step; raise either")
    if not 0 <= arguments.seed < 2**63:
        raise ValueError(f"--seed {arguments.seed} must lie between 0 and 2**63 - 1")


def _within(name, value, low, high):
    if value is not None and not (low <= value <= high and math.isfinite(value)):
        wanted = f"between {low} and {high}" if math.isfinite(high) else f"finite, and {low} or more"
        raise ValueError(f"{_option(name)} {value} must be {wanted}")


def _option(name):
    return f"--{name.replace('_', '-')}"


def check_device(device: str | None) -> None:
    """Raises ValueError for what names no device that PyTorch draws on."""
    if device is not None and not DEVICE.fullmatch(device):
        raise ValueError(f"--device {device} is none of cpu, cuda, cuda:1, ..., mps, xpu")


def check_output(output: str) -> None:
    """That a picture of this name can be written. Raises ValueError or OSError; `writing` tries it, too."""
    from ldmfast.pictures import FORMATS

    path = Path(output)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: a picture's name ends in {', '.join(FORMATS)}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give a file name")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}")


def check_size(size: tuple[int, int], model: Described) -> None:
    """Raises ValueError for a size that the autoencoder cannot halve, or beyond `SIDE`."""
    width, height = size
    if min(size) < 1 or width % model.factor or height % model.factor:
        raise ValueError(f"--size {width}x{height}: both sides must be multiples of {model.factor}, and above 0")
    if max(size) > SIDE:
        raise ValueError(f"--size {width}x{height}: a picture has at most {SIDE} pixels a side")


def check_sheet(size: tuple[int, int], count: int, columns: int | None, scale: int, output: str, gap: int = 4) -> None:
    """`count` pictures of `size` (width, height), enlarged by `scale`, in rows. Raises ValueError if too large."""
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    width = columns * (size[0] * scale + gap) - gap
    height = math.ceil(count / columns) * (size[1] * scale + gap) - gap
    suffix = Path(output).suffix.lower()
    most = SIDES.get(suffix, 10**9)
    if width * height > PIXELS or max(width, height) > most:
        what = f"{count} pictures of {size[0]}x{size[1]} at" if count > 1 else f"a picture of {size[0]}x{size[1]} at"
        limit = f"{PIXELS / 2**20:.0f} million in all" if width * height > PIXELS else f"{most} a side for {suffix}"
        raise ValueError(
            f"{what} --scale {scale}: that is {width}x{height} pixels, and at most {limit} are written; "
            "lower --scale, --size or --number"
        )


def needed(size: tuple[int, int], batch: int, model: Described, dtype: str) -> int:
    """Bytes that drawing `batch` pictures at once takes beside the weights, about: the decoder's activations."""
    return size[0] * size[1] * batch * model.channels * HELD * (4 if dtype == "float32" else 2)


def free_memory() -> int | None:
    """Bytes of memory that this process may still take, also in a container; None where the system does not say."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii")
        found.append(1024 * int(re.search(r"^MemAvailable: +(\d+) kB", lines, re.MULTILINE)[1]))
    except (OSError, TypeError):
        if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
            found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        found.append(int(limit) - int(used))
    except (OSError, ValueError):  # no such group, or one without a limit ("max")
        pass
    return max(0, min(found)) if found else None


def batch_that_fits(asked: int | None, size: tuple[int, int], model: Described, dtype: str, device: str | None) -> int:
    """Pictures to draw at once: `asked`, or else at most BATCH that fit into memory.

    Raises ValueError where not even one fits, or what was asked for. Of a GPU's memory nothing is known here.
    """
    free = free_memory() if device == "cpu" or (device is None and not DRIVER.exists()) else None
    if free is None:
        return asked or BATCH
    one = needed(size, 1, model, dtype)
    fits = int(free // one)
    if fits < (asked or 1):
        what = f"{asked} pictures of {size[0]}x{size[1]}" if (asked or 1) > 1 else f"a picture of {size[0]}x{size[1]}"
        raise ValueError(
            f"{what} takes about {_gib(one * (asked or 1))} of memory, and {_gib(free)} are free: "
            f"lower {'--batch or ' if (asked or 1) > 1 else ''}--size"
        )
    return asked or min(BATCH, fits)


def _gib(count):
    return f"{count / 2**30:.1f} GiB" if count < 2**40 else f"{count / 2**40:.0f} TiB"
