"""Runs the stages of bench/gpu.sh, which says how it is called. OUT/stages.json has a row for each command."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATH = [str(ROOT / "bench" / "gpu"), str(ROOT), *sys.path]  # as a script has it that is started by itself
sys.path[:0] = [str(ROOT / "bench" / "gpu")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import stages  # noqa: E402
from record import LOST, RED, STARTED, Record  # noqa: E402

TRIES = 3  # of a command that lost its device
TAIL = 1500  # characters of a command's output that its row keeps


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Everything that needs a GPU: see the head of bench/gpu.sh.")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="A, B, C, D (default: all)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these commands of the stages")
    parser.add_argument("--carried", type=Path, help="what bench/gpu/carry.py made")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the JSON in OUT has")
    parser.add_argument("--dry", action="store_true", help="on the CPU, tiny")
    options = parser.parse_args(argv)
    if unknown := sorted(set(options.stages) - set(stages.STAGES)):
        parser.error(f"no stage {unknown[0]}; there are {', '.join(stages.STAGES)}")
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ[STARTED] = str(time.time())
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ["PYTHONUNBUFFERED"] = "1"
    os.environ["LDMFAST_SPEEDS"] = str(options.out / "speeds")
    if options.dry:
        os.environ["LDMFAST_BENCH_DEVICE"] = "cpu"
    elif options.carried:
        unpack(options.carried.resolve(), options.out)
    return run(options)


def run(options) -> int:
    """Every command of every stage, in order; 1 if one of them failed."""
    record = Record(options.out / "stages.json", {"what": "stages", "python": sys.version.split()[0]}, resume=True)
    wanted = options.stages or list(stages.STAGES)
    names = {f"{stage} {command.name}" for stage in wanted for command in stages.STAGES[stage]}
    record.content["rows"] = [row for row in record.content["rows"] if row["name"] not in names]  # they run anew
    failed = False
    for stage in wanted:
        end = time.time() + stages.STAGE
        for command in stages.STAGES[stage]:
            if options.only and command.name not in options.only:
                continue
            os.environ[RED] = ",".join(red(record))
            print(f"\n== {stage} {command.name} ({end - time.time():.0f} s left of the stage)", flush=True)
            row = record.measure(f"{stage} {command.name}", lambda c=command, e=end: result(c, options, e))
            failed |= row.get("rc") != 0
    print(f"\n== red: {', '.join(red(record)) or 'nothing'}")
    return int(failed)


def red(record: Record) -> list[str]:
    """The checks that failed so far; that they have not run is said, too."""
    rows = record.content["rows"]
    found = [row["name"] for row in rows if row.get("rc") != 0]
    if not any(row["name"] == "A cuda" for row in rows):
        found.append("the tests of stage A did not run here")
    return found


def result(command: stages.Command, options, end: float) -> dict:
    """The row of one command: its exit status, seconds, the tests' counts, the end of what it said."""
    if options.carried and command.name == "build" and not options.dry:
        return {"rc": 0, "carried": str(options.carried)}
    argv, tool = stages.placed(command.argv, options.out), stages.placed(command.tool, options.out)
    begin = time.time()
    if options.dry:
        stages.check_tool(tuple(tool)) if tool else None
        rc, said = tried([*argv, *command.dry])
    else:
        if tool and not shutil.which(tool[0]):
            return {"rc": 127, "said": f"{tool[0]} is not on PATH"}
        limit = min(command.limit, end - time.time())
        if limit < 5:
            return {"rc": 124, "said": "the time of the stage was over"}
        whole = tool if command.name == "smi" else [*tool, sys.executable, *argv]
        log = options.out / f"{command.name}.log"
        rc = started(whole + (["--resume"] if options.resume and command.json else []), begin + limit, log)
        for _ in range(TRIES - 1):
            if rc != LOST or not command.json:
                break
            print("the device was lost; the next process goes on behind the row that did it", flush=True)
            rc = started([*whole, "--resume"], begin + limit, log)
        said = log.read_text(errors="replace")
    found = {"rc": rc, "seconds": round(time.time() - begin, 1)}
    file = options.out / f"{command.name}.xml"
    if not options.dry and file.exists():
        found["tests"] = counts(file)
        if found["tests"]["tests"] == found["tests"]["skipped"] and not rc:
            found["rc"], said = 5, "every test was skipped"
            rc = 5
    if rc:
        found["said"] = said[-TAIL:]
    return found


def started(command: list[str], end: float, log: Path) -> int:
    """Runs a command until `end` at most, its output shown and added to the log; its exit status, 124 if it was cut."""
    print("+ " + " ".join(command), flush=True)
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        show = subprocess.Popen(["tee", "-a", str(log)], stdin=process.stdout, cwd=ROOT)
        process.stdout.close()
        file.flush()
        try:
            return process.wait(max(1.0, end - time.time()))
        except subprocess.TimeoutExpired:
            return 124
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its workers, too
            process.wait()
            show.wait(10)


def tried(argv: list[str]) -> tuple[int, str]:
    """(exit status, output) of a command in a dry run: scripts and `-m ldmfast` in this process, others in another."""
    script = ROOT / argv[0]
    said = io.StringIO()
    with contextlib.redirect_stdout(Both(said)):
        try:
            if argv[:2] == ["-m", "ldmfast"]:
                from ldmfast.commands import cli

                return cli.main(argv[2:]), said.getvalue()
            if script.parent == ROOT / "bench" / "gpu":
                with alone(script) as module:
                    return module.main(argv[1:]), said.getvalue()
        except SystemExit as error:  # argparse's
            return int(error.code or 0), said.getvalue()
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


class Both(io.TextIOBase):
    """Writes to standard output and to a text beside it."""

    def __init__(self, beside: io.StringIO) -> None:
        self.beside, self.shown = beside, sys.stdout

    def write(self, text: str) -> int:
        self.shown.write(text)
        return self.beside.write(text)

    def flush(self) -> None:
        self.shown.flush()


@contextlib.contextmanager
def alone(script: Path):
    """Context giving a script as a module that finds only what it would find in a process of its own."""
    ours = [name for name, module in sys.modules.items() if name != "__main__" and of_the_benches(module)]
    kept, path = {name: sys.modules.pop(name) for name in ours}, sys.path
    sys.path = list(PATH)
    try:
        spec = importlib.util.spec_from_file_location(script.stem, script)
        sys.modules[script.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[script.stem])
        yield sys.modules[script.stem]
    finally:
        sys.path = path
        for name in [n for n, module in sys.modules.items() if n != "__main__" and of_the_benches(module)]:
            del sys.modules[name]
        sys.modules.update(kept)


def of_the_benches(module) -> bool:
    """Whether it lies in bench/ or tests/."""
    file = Path(getattr(module, "__file__", None) or "/")
    return any(room in file.parents for room in (ROOT / "bench", ROOT / "tests"))


def counts(file: Path) -> dict:
    """{"tests", "failed", "skipped", "first": names of some that failed} of pytest's XML."""
    suites = list(ElementTree.parse(file).getroot().iter("testsuite"))
    found = {name: sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "skipped")}
    found["failed"] = sum(int(suite.get(name, 0)) for suite in suites for name in ("failures", "errors"))
    bad = [case.get("name") for suite in suites for case in suite.iter("testcase") if len(case.findall("failure"))]
    return found | {"first": bad[:20]}


def unpack(carried: Path, out: Path) -> None:
    """Puts the carried modules beside the package, the wheels on the path. Raises SystemExit where they do not fit."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    modules = sorted(carried.glob(f"modules/ldmfast/*{suffix}"))
    if not modules:
        raise SystemExit(f"bench/gpu.sh: {carried} has no modules for {suffix}: python bench/gpu/carry.py --python ...")
    for module in modules:
        shutil.copy2(module, ROOT / "ldmfast" / module.name)
    if wheels := sorted(map(str, carried.glob("wheels/*.whl"))):
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade", "--target"]
        subprocess.run([*command, str(out / "site"), *wheels], check=True)
        os.environ["PYTHONPATH"] = os.pathsep.join([os.environ["PYTHONPATH"], str(out / "site")])


if __name__ == "__main__":
    sys.exit(main())
