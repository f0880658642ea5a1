"""`ldmfast tune`: measures, on this machine, every backend of every op at a network's shapes.

The times go into a file of this machine's own (~/.cache/ldmfast/speeds, or LDMFAST_SPEEDS), by which the choice between
backends goes from then on, in place of the table that ldmfast ships. `ldmfast.explain(op, ...)` says where a choice
comes from. A new driver, torch or ldmfast is another machine. What has one backend only is not measured.
"""

from __future__ import annotations

from ldmfast.commands.common import command

OFTEN = 20  # rows between two writes
DTYPES = ("float32", "bfloat16", "float16")


def add(commands):
    made = command(commands, "tune", "measure the backends on this machine, and choose by that", run)
    made.description = __doc__.partition("\n\n")[0] + " " + __doc__.partition("\n\n")[2]
    made.add_argument("--work", nargs="+", default=["sd15", "vae"], choices=["sd15", "sdxl", "vae"], help="networks")
    made.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    made.add_argument("--dtype", nargs="+", choices=DTYPES, help="(default: float32; on a GPU both others)")
    made.add_argument("--op", nargs="+", default=[], help="these only; what others measured before stays")
    made.add_argument("--size", type=int, help="side of the latents (default: the network's own)")
    made.add_argument("--batch", type=int, default=1, help="pictures; a U-Net sees two samples of each (default: 1)")
    made.add_argument("--seconds", type=float, default=0.2, help="of measuring, a shape and backend (default: 0.2)")
    made.add_argument("--tiny", action="store_true", help="networks of a few channels, to try the command")
    made.add_argument("--clear", action="store_true", help="remove what was measured, and measure nothing")


def run(arguments):
    import torch

    from ldmfast.commands.measuring import clock, shapes
    from ldmfast.ops.measured import tuned
    from ldmfast.ops.registry import OPS

    if arguments.clear:
        for path in tuned.clear():
            print(f"removed {path}")
        return
    if unknown := sorted(set(arguments.op) - set(OPS)):
        raise ValueError(f"--op {unknown[0]} is no op; there are {', '.join(OPS)}")
    kind = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda cannot be used: torch finds no GPU")
    place = torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    if tuned.path_of(place) is None:
        raise ValueError(f"{tuned.VARIABLE}=off: there is no folder for what is measured")
    device, rows = clock.device(kind), _kept(place, arguments.op)
    kept, measured = len(rows), set()
    for dtype in arguments.dtype or (["float16", "bfloat16"] if kind == "cuda" else ["float32"]):
        for work in arguments.work:
            for call in shapes.calls(work, getattr(torch, dtype), kind, arguments):
                if call.key in measured or arguments.op and call.op.name not in arguments.op:
                    continue
                measured.add(call.key)
                if row := _row(call, device, arguments.seconds):
                    rows.append(row)
                    if len(rows) % OFTEN == 0:  # what a run that is cut short measured counts, too
                        tuned.write(place, rows, _today())
    if len(rows) == kept:
        print("nothing to measure: no op has two backends here")
        return
    print(tuned.write(place, rows, _today()))


def _kept(place, only: list[str]) -> list[dict]:
    """The rows of other ops, where only some are measured anew."""
    from ldmfast import files
    from ldmfast.ops.measured import tuned

    path = tuned.path_of(place)
    if not only or not path.exists():
        return []
    return [row for row in files.read_json(path)["rows"] if row["op"] not in only]


def _row(call, device, seconds: float) -> dict | None:
    """The times of one op at one shape, printed, too; None where fewer than two backends run it."""
    import torch

    from ldmfast import files
    from ldmfast.commands.measuring import clock
    from ldmfast.ops.registry import RANKS

    args = call.tensors(device.kind)
    able = [b.name for b in call.op.automatic(device.kind) if RANKS[b.name] >= 0 and b.refusal(args) is None]
    if len(able) < 2:
        return None
    with torch.inference_mode():
        times = {}
        for name in able:
            run = call.op.backends[name].run
            try:
                times[name] = clock.per_call(device, [lambda r=run: r(*args)], seconds, call.launches(device))
            except RuntimeError as error:  # of a kernel that does not compile, or memory that is not there
                if "CUDA error" in str(error):  # nothing more can be measured in this process
                    raise
                print(f"{call.op.name} {name} is left out: {files.first_line(error)}")
    if len(times) < 2:
        return None
    best = min(times, key=times.get)
    sizes = " ".join(f"{name} {value}" for name, value in call.sizes.items())
    timed = "  ".join(f"{name} {1e6 * took:.1f} us{' *' * (name == best)}" for name, took in times.items())
    print(f"{call.op.name:<18} {call.dtype:<9} {sizes:<60}  {timed}", flush=True)
    return {"op": call.op.name, "dtype": call.dtype, "sizes": call.sizes, "seconds": times}


def _today() -> str:
    import datetime

    return datetime.date.today().isoformat()
