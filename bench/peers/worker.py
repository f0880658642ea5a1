"""One engine, in a process of its own: it prepares a piece of work, then does it whenever it is asked to.

bench/peers/compare.py starts it and writes a line of JSON for each wish, and reads a line back:

    {"prepare": {"work": "unet", "dtype": "bfloat16", "size": 64, "batch": 1, "cache": "build/peers"}}
                     -> {"output": the file with what it computed, "prepare_s": ..., "first_s": ...}
    {"run": true}    -> {"seconds": ..., "idle_cpu_s": what it took of the processor while the others ran}

`prepare_mib` is the most that the process has held until its first call is done, `memory_mib` in the calls after it:
pages in memory, weights and those of mapped files included; `held_mib` is what it holds before the
first call. Networks have random weights of one seed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

BENCH = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(BENCH.parent), str(BENCH)]

import networks  # noqa: E402
import torch  # noqa: E402

STEPS, GUIDANCE = 20, 7.5


class Wrapped(torch.nn.Module):
    """A network with plain tensors in and one out, as converters and loops take it."""

    def __init__(self, model: torch.nn.Module, work: str):
        super().__init__()
        self.model, self.work = model, work

    def forward(self, *inputs):
        if self.work == "vae":
            return self.model.decode(*inputs, return_dict=False)[0]
        sample, timestep, context, *added = inputs
        named = {"added_cond_kwargs": dict(zip(("text_embeds", "time_ids"), added, strict=True))} if added else {}
        return self.model(sample, timestep, context, return_dict=False, **named)[0]


def example(work: str, batch: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    if work == "vae":
        return (networks.inputs(batch, dtype, size=size)["sample"],)
    return tuple(networks.inputs(batch, dtype, size=size, width=2048 if work == "sdxl" else 768).values()) + (
        networks.sdxl_added(batch, dtype) if work == "sdxl" else ()
    )


def stock(work: str, dtype: torch.dtype, **others) -> Callable:
    model = {"unet": networks.sd15, "sdxl": networks.sdxl, "vae": networks.sd15_vae}[work](torch.float32)
    return Wrapped(model.to(dtype), work)


def ldmfast(work: str, dtype: torch.dtype, **others) -> Callable:
    from ldmfast import AutoencoderKL, UNet

    wrapped = stock(work, dtype)
    wrapped.model = (AutoencoderKL if work == "vae" else UNet).adopt(wrapped.model)
    return wrapped


def compiled(work: str, dtype: torch.dtype, **others) -> Callable:
    """torch.compile with freezing, which lays the weights out for oneDNN once."""
    import torch._inductor.config

    torch._inductor.config.freezing = True
    return torch.compile(stock(work, dtype))


def openvino(work: str, dtype: torch.dtype, cache: str, inputs: tuple, **others) -> Callable:
    """OpenVINO at the precision of dtype."""
    import openvino

    core = openvino.Core()
    network = core.read_model(converted(work, cache))
    # its file takes any size; sizes that it knows beforehand are what it is fastest at
    network.reshape({port: list(given.shape) for port, given in zip(network.inputs, inputs, strict=True)})
    precision = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    settings = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    network = core.compile_model(network, "CPU", {**settings, "INFERENCE_NUM_THREADS": torch.get_num_threads()})

    def call(*inputs):
        found = network([tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy() for tensor in inputs])
        return torch.from_numpy(found[0])

    return call


def converted(work: str, cache: str) -> Path:
    """OpenVINO's file of the network in float32, which is made once."""
    import openvino

    kept = Path(cache) / f"{work}-{importlib.metadata.version('openvino')}" / "model.xml"
    if not kept.exists():
        network, given = stock(work, torch.float32), example(work, 1, 64, torch.float32)
        model = openvino.convert_model(network, example_input=given)
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_name("partial.xml")
        openvino.save_model(model, partial, compress_to_fp16=False)
        os.replace(partial.with_suffix(".bin"), kept.with_suffix(".bin"))
        os.replace(partial, kept)
    return kept


ENGINES = {"stock": stock, "compile": compiled, "ldmfast": ldmfast, "openvino": openvino}


def picture(engine: Callable, dtype: torch.dtype, size: int, batch: int, **named) -> Callable[[], torch.Tensor]:
    """20 DDIM steps with guidance and the decoding, without the text encoder."""
    given = {"unet": example("unet", 2 * batch, size, dtype), "vae": example("vae", batch, size, dtype)}
    unet, vae = (engine(work=work, dtype=dtype, inputs=inputs, **named) for work, inputs in given.items())
    ours = engine is ldmfast
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    if ours:
        from ldmfast import DDIMScheduler
    else:
        from diffusers import DDIMScheduler
    start, _, context = given["unet"]
    start = start[:batch]

    def run():
        scheduler, x = DDIMScheduler(**schedule), start
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            output = unet(torch.cat([x, x]), t, context).to(dtype)
            if ours:
                x = scheduler.step(output, t, x, guidance=GUIDANCE, return_dict=False)[0]
                continue
            unconditional, conditional = output.chunk(2)
            x = scheduler.step(unconditional + GUIDANCE * (conditional - unconditional), t, x, return_dict=False)[0]
        return vae(x)

    return run


def prepared(engine: Callable, work: str, dtype: str, size: int, batch: int, cache: str) -> Callable[[], torch.Tensor]:
    dtype = getattr(torch, dtype)
    if work == "picture":
        return picture(engine, dtype, size, batch, cache=cache)
    inputs = example(work, batch, size, dtype)
    call = engine(work=work, dtype=dtype, cache=cache, inputs=inputs)
    return lambda: call(*inputs)


def memory(field: str = "VmHWM") -> float:
    """MiB that this process has held at most since `forget_peak`, or with VmRSS holds now."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    return round(int(status.read_text().partition(f"{field}:")[2].split()[0]) / 1024, 1)


def forget_peak() -> None:
    """The most that was held begins anew (proc(5), clear_refs)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # memory_mib then has the preparation in it


def first_answer(engine: Callable, wish: dict) -> tuple[Callable, dict]:
    """(what a round calls, the answer to `prepare`)"""
    begin = time.perf_counter()
    run = prepared(engine, **wish)
    ready, held = time.perf_counter(), memory("VmRSS")
    output = run()
    first = time.perf_counter()
    path = Path(wish["cache"]) / f"{engine.__name__}.pt"
    torch.save(output.float(), path)
    answer = {"output": str(path), "prepare_s": round(ready - begin, 3), "first_s": round(first - ready, 4)}
    answer |= {"held_mib": held, "prepare_mib": memory()}
    forget_peak()
    return run, answer


@torch.inference_mode()
def serve(engine: Callable, answers) -> None:
    run, rest = None, None
    for wish in map(json.loads, iter(sys.stdin.readline, "")):
        if "convert" in wish:
            answer = {"file": str(converted(**wish["convert"]))}
        elif "prepare" in wish:
            run, answer = first_answer(engine, wish["prepare"])
        else:
            idle = 0.0 if rest is None else time.process_time() - rest
            begin = time.perf_counter()
            run()
            answer = {"seconds": time.perf_counter() - begin, "idle_cpu_s": round(idle, 3), "memory_mib": memory()}
        rest = time.process_time()
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", choices=ENGINES)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    serve(ENGINES[options.engine], answers)


if __name__ == "__main__":
    main()
