"""`ldmfast profile`: where the time of a step goes.

For each row: a step under torch.profiler, a table by class (convolution, linear, attention, norm, elementwise, gaps), a
trace (chrome://tracing, Perfetto), and the command lines for Nsight Systems and Nsight Compute, which run the same step
between cudaProfilerStart and Stop with a range around each op and block. Without a GPU the same for the processor.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ldmfast import files
from ldmfast.commands.common import command

KEYS = ("ours", "ours-graph", "ours-own-graph", "ours-triton", "stock", "stock-last", "stock-graph", "stock-overhead")


def add(commands):
    made = command(
        commands, "profile", "where the time of a step goes: tables, traces, nsys and ncu command lines", run
    )
    made.description = __doc__.partition("\n\n")[2]
    made.add_argument("--work", default="sd15", choices=["sd15", "sdxl", "vae", "train"], help="(default: sd15)")
    made.add_argument("--model", help="profile this model's U-Net instead: a folder, a released file, one that ships")
    made.add_argument(
        "--row", action="append", choices=KEYS, help="may be given again (default: ours, and ours-graph on a GPU)"
    )
    made.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    made.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="(default: float16, float32 on a CPU)"
    )
    made.add_argument("--batch", type=int, help="pictures (default: 1, of a training step 4)")
    made.add_argument("--steps", type=int, default=3, help="in the trace (default: 3)")
    made.add_argument("--tiny", action="store_true", help="a network of a few channels, to try the command")
    made.add_argument("-o", "--output", default="profile", help="folder (default: profile)")
    made.add_argument("--window", action="store_true", help="only run the steps, for nsys and ncu: nothing is written")
    made.add_argument("--kernels", default="ldmfast", help="of ncu's command line: a part of the kernels' full names")


def run(arguments):
    import torch

    from ldmfast.commands.measuring import clock, works

    if arguments.steps < 1:
        raise ValueError(f"--steps is {arguments.steps}, expected 1 or more")
    kind = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda cannot be used: torch finds no GPU")
    dtype = getattr(torch, arguments.dtype or ("float16" if kind == "cuda" else "float32"))
    device = clock.device(kind)
    if arguments.model:
        work = _of_model(arguments.model, dtype, kind, arguments.batch)
    else:
        work = works.Work(arguments.work, dtype, kind, arguments.tiny, arguments.batch)
    keys = arguments.row or (["ours", "ours-graph"] if kind == "cuda" and not work.trains else ["ours"])
    for key in keys:
        if arguments.window:
            _window(key, work, device, arguments.steps)
        else:
            _profile(key, work, device, arguments)


def _of_model(source: str, dtype, kind: str, batch: int | None):
    """The work of a step with the U-Net of a model, stock's beside it with the same weights."""
    import diffusers

    from ldmfast.commands.measuring import works
    from ldmfast.pipeline import LatentDiffusionPipeline

    ours = LatentDiffusionPipeline.from_pretrained(source, dtype=dtype).unet.to(kind)
    if not isinstance(ours, diffusers.UNet2DConditionModel):
        raise ValueError(f"--model {source} has a {type(ours).__name__}, expected a U-Net that a prompt conditions")
    work = works.Work("sd15", dtype, kind, batch=batch)
    work.config, work.side, work.ours = dict(ours.config), int(ours.config.sample_size), ours
    stock = diffusers.UNet2DConditionModel.from_config(dict(ours.config)).to(kind, dtype).eval()
    stock.load_state_dict(ours.state_dict())
    work.stock = stock.requires_grad_(False)
    return work


def _prepared(key: str, work, device):
    """(the row, its step after a first call)"""
    import torch

    from ldmfast.commands.measuring import rows

    row = rows.BY_KEY[key]
    if row.works is not None and work.name not in row.works:
        raise ValueError(f"--row {key} is no row of {work.name}")
    step = rows.prepared(row, work, device)
    with torch.no_grad():
        step()
    device.wait()
    return row, step


def _window(key: str, work, device, steps: int) -> None:
    """`steps` of them between cudaProfilerStart and Stop, ops and blocks in ranges."""
    import torch

    from ldmfast.commands.measuring.rows import BY_KEY, settings
    from ldmfast.ops.measured.ranges import ranges

    row = BY_KEY[key]
    model = work.ours if row.ours else work.stock
    with settings(row), ranges(model), torch.no_grad():
        _, step = _prepared(key, work, device)
        if device.kind == "cuda":
            torch.cuda.profiler.start()
        for _ in range(steps):
            step()
        device.wait()
        if device.kind == "cuda":
            torch.cuda.profiler.stop()
    print(f"{row.name}: {steps} steps")


def _profile(key: str, work, device, arguments) -> None:
    import json
    import statistics

    import torch

    from ldmfast.commands.measuring import clock, trace
    from ldmfast.commands.measuring.rows import BY_KEY, settings
    from ldmfast.ops.measured.ranges import ranges

    row, folder = BY_KEY[key], Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    print("\n".join(command_lines(key, arguments)))
    with settings(row), torch.no_grad():
        _, step = _prepared(key, work, device)
        unwatched = statistics.median(clock.times(device, step, 0.0 if work.trains or arguments.tiny else 1.0))
        with ranges(work.ours if row.ours else work.stock):
            found = trace.recorded(step, device, arguments.steps, folder / f"{key}.trace.json")
    found = {
        "what": "parts",
        "row": row.name,
        "machine": device.about(),
        "work": work.name if not arguments.model else Path(arguments.model).name,
        "dtype": str(work.dtype).removeprefix("torch."),
        "size": work.side,
        "batch": work.batch,
        "total_s": round(unwatched, 7),
        "total_is": "a step without the profiler; the parts are of one under it, where the host is slower",
        **found,
    }
    print("\n".join(table(found)))
    files.write_text(folder / f"{key}.json", json.dumps(found, indent=1) + "\n")
    print(f"{folder / key}.json, {folder / key}.trace.json\n")


def command_lines(key: str, arguments) -> list[str]:
    """What runs this step under nsys and under ncu."""
    wanted = ["--work", arguments.work, "--row", key, "--steps", str(arguments.steps), "--window"]
    for name in ("model", "dtype", "batch"):
        if getattr(arguments, name):
            wanted += [f"--{name}", str(getattr(arguments, name))]
    wanted += ["--tiny"] * arguments.tiny
    mine, place = f"{Path(sys.executable).name} -m ldmfast profile {' '.join(wanted)}", f"{arguments.output}/{key}"
    return [
        "nsys profile --trace cuda,nvtx,cudnn,cublas --capture-range cudaProfilerApi --capture-range-end stop "
        f"--cuda-graph-trace node --force-overwrite true -o {place} {mine}",
        f"ncu --profile-from-start off --graph-profiling node --kernel-name-base demangled "
        f"-k regex:{arguments.kernels} -s 2 -c 20 --set full --import-source yes --clock-control none --nvtx "
        f"-f -o {place} {mine}",
    ]


def table(found: dict) -> list[str]:
    """The classes and the longest kernels, as aligned text."""
    total = sum(part["seconds"] for part in found["parts"])
    lines = [
        f"{found['row']}, {found['work']}, {found['dtype']}: {1e3 * found['total_s']:.3f} ms a step "
        f"({1e3 * total:.3f} ms under the profiler)",
        f"{'class':<14}{'ms':>10}{'share':>8}{'calls':>10}",
    ]
    for part in found["parts"]:
        lines.append(
            f"{part['part']:<14}{1e3 * part['seconds']:>10.4f}{part['seconds'] / total:>8.1%}{part['calls']:>10}"
        )
    lines.append(f"{'longest':<14}{'ms':>10}{'':>8}{'calls':>10}")
    for one in found["longest"][:12]:
        short = one["name"] if len(one["name"]) < 80 else one["name"][:77] + "..."
        lines.append(f"{one['class']:<14}{1e3 * one['seconds']:>10.4f}{'':>8}{one['calls']:>10}  {short}")
    return lines
