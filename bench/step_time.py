"""One SD1.5 step at 512x512 with guidance (two 64x64 samples, guidance, DDIM): ours and its rivals, in one run.

    python bench/step_time.py --json step.json                 on a GPU: every row, float16
    python bench/step_time.py --device cpu --dtype bfloat16    on a CPU: stock eager and ours

Rows: stock diffusers eager; ours; ours in a CUDA graph; stock under torch.compile(mode="max-autotune") with CUDA
graphs (--no-compile leaves it out). The JSON is written after every row, so a run that is cut short keeps its rows.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import diffusers  # noqa: E402
import networks  # noqa: E402
import torch  # noqa: E402

from ldmfast import DDIMScheduler, UNet  # noqa: E402

GUIDANCE = 7.5


def step(unet, scheduler, arguments: dict, fused: bool) -> Callable[[], torch.Tensor]:
    """A function that makes one step on fixed latents: what a pipeline does between two timesteps."""
    latents, t, context = arguments["sample"], arguments["timestep"], arguments["encoder_hidden_states"]

    def run():
        output = unet(torch.cat([latents, latents]), t, context, return_dict=False)[0]
        if fused:
            return scheduler.step(output, t, latents, guidance=GUIDANCE, return_dict=False)[0]
        unconditional, conditional = output.chunk(2)
        output = unconditional + GUIDANCE * (conditional - unconditional)
        return scheduler.step(output, t, latents, return_dict=False)[0]

    return run


def in_graph(run: Callable) -> Callable[[], torch.Tensor]:
    """run, recorded once in a CUDA graph and replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = run()

    def replay():
        graph.replay()
        return answer

    return replay


def milliseconds(run: Callable, device: str, seconds: float) -> list[float]:
    """The time of each call, for about `seconds`: CUDA events on a GPU, else the wall clock."""
    for _ in range(3 if device == "cuda" else 1):
        run()
    times, deadline = [], time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times) < 3:
        if device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            run()
            times.append((time.perf_counter() - begin) * 1e3)
    return times


def rows(device: str, dtype: torch.dtype, compiled: bool):
    """(name, what makes the function) of every row."""
    stock = networks.sd15(dtype, device)
    ours = UNet.from_unet(copy.deepcopy(stock))
    schedulers = [
        kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
        for kind in (diffusers.DDIMScheduler, DDIMScheduler)
    ]
    for scheduler in schedulers:
        scheduler.set_timesteps(50, device)
    arguments = networks.inputs(1, dtype, device)
    arguments["encoder_hidden_states"] = networks.inputs(2, dtype, device)["encoder_hidden_states"]
    mine = step(ours, schedulers[1], arguments, fused=True)
    yield "diffusers, eager", lambda: step(stock, schedulers[0], arguments, fused=False)
    yield "ldmfast", lambda: mine
    if device == "cuda":
        yield "ldmfast, CUDA graph", lambda: in_graph(mine)
    if device == "cuda" and compiled:
        stock.to(memory_format=torch.channels_last)
        fast = torch.compile(stock, mode="max-autotune", fullgraph=True)
        yield "diffusers, torch.compile max-autotune", lambda: step(fast, schedulers[0], arguments, fused=False)


def record(device: str, dtype: torch.dtype) -> dict:
    return {
        "what": "SD1.5 step at 512x512 with guidance: U-Net on two 64x64 samples, guidance, DDIM",
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "rows": [],
    }


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--seconds", type=float, default=4.0, help="of measuring, a row")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    found, reference, failed = record(options.device, dtype), None, False
    for name, make in rows(options.device, dtype, not options.no_compile):
        try:
            row, answer = measure(make, options.device, options.seconds)
        except Exception as error:  # a rival or a graph that fails is a row too, and the exit status says so
            row, answer, failed = {"error": f"{type(error).__name__}: {error}"}, None, True
        if answer is not None:
            reference = answer if reference is None else reference
            row["difference_to_diffusers"] = networks.error(answer, reference)
        found["rows"].append({"name": name, **row})
        print(f"{name:40} " + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=2) + "\n")
    return int(failed)


def measure(make: Callable, device: str, seconds: float) -> tuple[dict, torch.Tensor]:
    """(figures, the first answer) of one row."""
    begin = time.perf_counter()
    run = make()
    answer = run().clone()
    first = time.perf_counter() - begin
    times = milliseconds(run, device, seconds)
    figures = {"median_ms": round(statistics.median(times), 4), "min_ms": round(min(times), 4), "runs": len(times)}
    return {**figures, "first_call_s": round(first, 2)}, answer


if __name__ == "__main__":
    sys.exit(main())
