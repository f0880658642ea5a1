"""diffusers' own test files, first as they are, then with ldmfast in place.

    python tests/diffusers_suite.py DIFFUSERS_CHECKOUT/tests                       # both routes, hours on one core
    python tests/diffusers_suite.py DIFFUSERS_CHECKOUT/tests --route optimize -k inpaint --files 'pipelines/*'

Routes: classes, our classes under diffusers' names (`diffusers.UNet2DConditionModel` is `ldmfast.UNet`, ...); optimize,
every pipeline is put through `ldmfast.optimize` when it is made. Prints and writes a table: what stock passes, what
ours passes of that, and each test that stock passes and ours does not, with its reason (REASONS) where that is known.
Exit status 1 if there is one without a reason. The installed diffusers is tested; take the checkout of its version.
Nothing is downloaded: CLIP's tokenizer is one of single bytes, its tiny text towers are random; tests that need more
of the hub fail alike in stock. The LoRA files need the package parameterized, some others requests_mock.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
FILES = {
    "models": (
        "models/unets/test_models_unet_2d.py",
        "models/unets/test_models_unet_2d_condition.py",
        "models/autoencoders/test_models_autoencoder_kl.py",
        "models/autoencoders/test_models_vq.py",
    ),
    "schedulers": (
        "schedulers/test_scheduler_ddim.py",
        "schedulers/test_scheduler_ddpm.py",
        "schedulers/test_scheduler_pndm.py",
        "schedulers/test_schedulers.py",
    ),
    "pipelines": (
        "pipelines/stable_diffusion/test_stable_diffusion.py",
        "pipelines/stable_diffusion/test_stable_diffusion_img2img.py",
        "pipelines/stable_diffusion/test_stable_diffusion_inpaint.py",
        "pipelines/stable_diffusion_xl/test_stable_diffusion_xl.py",
        "pipelines/stable_diffusion_xl/test_stable_diffusion_xl_img2img.py",
        "pipelines/stable_diffusion_xl/test_stable_diffusion_xl_inpaint.py",
        "pipelines/controlnet/test_controlnet.py",
        "pipelines/controlnet/test_controlnet_sdxl.py",
        "pipelines/ip_adapters/test_ip_adapter_stable_diffusion.py",
        "pipelines/stable_diffusion_adapter/test_stable_diffusion_adapter.py",
        "pipelines/stable_diffusion_xl/test_stable_diffusion_xl_adapter.py",
        "pipelines/stable_diffusion/test_stable_diffusion_instruction_pix2pix.py",
        "pipelines/stable_diffusion_2/test_stable_diffusion_inpaint.py",
        "pipelines/stable_diffusion_2/test_stable_diffusion_depth.py",
        "pipelines/pag/test_pag_sd.py",
        "pipelines/pag/test_pag_sd_img2img.py",
        "pipelines/pag/test_pag_sd_inpaint.py",
        "pipelines/pag/test_pag_sdxl.py",
        "pipelines/pag/test_pag_sdxl_img2img.py",
        "pipelines/pag/test_pag_sdxl_inpaint.py",
    ),
    "lora": ("lora/test_lora_layers_sd.py", "lora/test_lora_layers_sdxl.py"),
}
IN_OPTIMIZE = ("pipelines", "lora")  # a model or a scheduler alone is not put through optimize

# (what a test's name contains, route or "" for both, why ours does not pass)
REASONS: tuple[tuple[str, str, str], ...] = (
    (
        "PNDMSchedulerTest::test_full_loop_with_v_prediction",
        "classes",
        "by choice, ours extrapolates noise where the model predicts v, as Stable Diffusion 2's own code does; "
        "one taken over by optimize does as diffusers",
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tests", type=Path, help="the folder tests/ of a diffusers checkout")
    parser.add_argument("--route", choices=("classes", "optimize"), help="only this one (default: both)")
    parser.add_argument("-k", help="only tests whose names match, as pytest's -k")
    parser.add_argument("--files", nargs="+", default=["*"], help="only files that match one, such as 'lora/*'")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/diffusers_suite.md"), help="the table")
    arguments = parser.parse_args()
    tests = arguments.tests.resolve()
    if not (tests / "testing_utils.py").is_file():
        parser.error(f"{tests} is not the tests/ of a diffusers checkout: it has no testing_utils.py")
    routes = [arguments.route] if arguments.route else ["classes", "optimize"]
    rows, differing = [], []
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder, "local"))
        write_text_encoders(Path(folder, "local"))
        for group, files in FILES.items():
            for file in files:
                chosen = any(fnmatch.fnmatch(file, pattern) for pattern in arguments.files)
                if not chosen or not (group in IN_OPTIMIZE or "classes" in routes):
                    continue
                stock = outcomes(tests, file, "stock", Path(folder), arguments.k)
                for route in routes:
                    if route == "classes" or group in IN_OPTIMIZE:
                        row, more = compared(
                            file, route, stock, outcomes(tests, file, route, Path(folder), arguments.k)
                        )
                        print(row, *more, sep="\n", flush=True)
                        rows.append(row)
                        differing += more
                        write_table(arguments.output, rows, differing)
    print(f"\n{arguments.output}")
    return 1 if any("reason not known" in line for line in differing) else 0


def write_table(output: Path, rows: list[str], differing: list[str]) -> None:
    """What was seen so far."""
    table = ["| file | route | stock passes | ours passes of these |", "| --- | --- | --- | --- |", *rows]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join([*table, "", *(differing or ["Every test that stock passes, ours passes."])]) + "\n")


def outcomes(tests: Path, file: str, route: str, folder: Path, words: str | None) -> dict[str, list[str]]:
    """{test: [outcome, what went wrong]} of one file of diffusers', run in a process of its own."""
    written = folder / "outcomes.json"
    written.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "DIFFUSERS_SUITE_ROUTE": route,
        "DIFFUSERS_SUITE_OUTCOMES": str(written),
        "DIFFUSERS_SUITE_LOCAL": str(folder / "local"),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "diffusers_suite_plugin", "-p", "no:cacheprovider"]
    command += ["--rootdir", str(tests.parent), str(tests / file), *(["-k", words] if words else [])]
    ran = subprocess.run(command, cwd=tests.parent, env=environment, capture_output=True, text=True)
    if ran.returncode not in (0, 1, 5) or not written.is_file():  # passed, some failed, none of them matched
        raise SystemExit(f"pytest did not come to its end on {file} ({route}):\n{(ran.stdout + ran.stderr)[-3000:]}")
    return json.loads(written.read_text())


def compared(file: str, route: str, stock: dict, ours: dict) -> tuple[str, list[str]]:
    """A row of the table, and a line for each test that stock passes and ours does not."""
    passes = [test for test, (outcome, _) in stock.items() if outcome == "passed"]
    lost = [test for test in passes if ours.get(test, ["missing"])[0] != "passed"]
    lines = []
    for test in lost:
        known = next((why for name, only, why in REASONS if name in test and only in ("", route)), None)
        outcome, said = ours.get(test, ["missing", "it was not run"])
        lines.append(f"- {test} ({route}) {outcome}: {known or f'reason not known: {said}'}")
    return f"| {file} | {route} | {len(passes)} | {len(passes) - len(lost)} |", lines


def write_tokenizer(folder: Path) -> None:
    """CLIP's tokenizer with the 256 bytes as its vocabulary, its special tokens where diffusers' tests have them."""
    import transformers
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    kept = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), ord("\xff") + 1)]
    others = range(256, 256 + 256 - len(kept))  # GPT-2's letters for the bytes that have none
    letters = [chr(code) for code in (*kept, *others)]
    words = ["<|startoftext|>", "<pad>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    made = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], pad_token="<pad>")
    made.model_max_length = 77
    made.save_pretrained(folder)
    if len(transformers.AutoTokenizer.from_pretrained(folder)) != len(words):
        raise RuntimeError(f"{folder}: the tokenizer lost words on the way to the disk")


def write_text_encoders(folder: Path) -> None:
    """CLIP's text tower as diffusers' LoRA tests take it from the hub, random; without and with projection."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=1000,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=5,
        num_attention_heads=4,
        projection_dim=32,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    for kind in (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection):
        kind(config).save_pretrained(folder / kind.__name__)


if __name__ == "__main__":
    sys.exit(main())
