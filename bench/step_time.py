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
    """(name, function) of every row, each made when it is asked for."""
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
    yield "diffusers, eager", step(stock, schedulers[0], arguments, fused=False)
    yield "ldmfast", step(ours, schedulers[1], arguments, fused=True)
    if device == "cuda":
        yield "ldmfast, CUDA graph", in_graph(step(ours, schedulers[1], arguments, fused=True))
        if compiled:
            stock.to(memory_format=torch.channels_last)
            fast = torch.compile(stock, mode="max-autotune", fullgraph=True)
            yield "diffusers, torch.compile max-autotune", step(fast, schedulers[0], arguments, fused=False)


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
    found, reference = record(options.device, dtype), None
    for name, run in rows(options.device, dtype, not options.no_compile):
        begin = time.perf_counter()
        answer = run().clone()
        first = time.perf_counter() - begin
        reference = answer if reference is None else reference
        times = milliseconds(run, options.device, options.seconds)
        row = {
            "name": name,
            "median_ms": statistics.median(times),
            "min_ms": min(times),
            "runs": len(times),
            "first_call_s": first,
            "difference_to_diffusers": networks.error(answer, reference),
        }
        found["rows"].append(row)
        ratio = found["rows"][0]["median_ms"] / row["median_ms"]
        print(f"{name:40} {row['median_ms']:10.3f} ms  {ratio:5.2f} x eager  first call {first:.1f} s", flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
