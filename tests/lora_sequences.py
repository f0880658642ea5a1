"""Random sequences of what is done to LoRAs, weights and dtypes: the last picture is that of the final state, made new.

    python tests/lora_sequences.py --count 20          # each final state drawn by a process of its own
    python tests/lora_sequences.py --first 7 --count 1 # the seventh again

A tiny pipeline, diffusers' under `optimize` or ours, has LoRAs loaded, scaled, swapped, fused, unfused and unloaded,
its weights edited (in place, through .data, by new tensors) and its dtype moved, and draws after each, so that whatever
is kept from a step would show. A book is kept of what its weights and adapters must be by then (`State`); the weights
are compared with it, and the picture with that of a new pipeline which is put straight there.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from lora_pipelines import stable_diffusion, write_kohya
from safetensors.torch import load_file
from torch import nn

import ldmfast
from ldmfast.conditioning.text import TextEncoder
from ldmfast.pipeline import LatentDiffusionPipeline

KINDS = ("optimize", "ours")
FILES, STEPS = 3, 9
EDITED = {
    "unet": (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "mid_block.resnets.0.conv1",
        "up_blocks.1.attentions.0.proj_in",
        "conv_norm_out",
        "time_embedding.linear_1",
    ),
    "text_encoder": ("encoder.layers.0.mlp.fc1", "encoder.layers.1.self_attn.q_proj"),
}


@dataclasses.dataclass
class Adapter:
    """file  its number;   scale  None where it is loaded and not active;   rounded  whether it has been in bfloat16"""

    file: int
    scale: float | None
    rounded: bool


@dataclasses.dataclass
class State:
    """What a pipeline must be: its plain weights {network: {name: tensor}}, its dtype, its adapters."""

    kind: str
    weights: dict[str, dict[str, torch.Tensor]]
    dtype: torch.dtype = torch.float32
    adapters: list[Adapter] = dataclasses.field(default_factory=list)
    fused: list[Adapter] = dataclasses.field(default_factory=list)
    was_bfloat16: bool = False


def pipeline(kind: str):
    pipe = stable_diffusion()
    if kind == "optimize":
        return ldmfast.optimize(pipe)
    conditioner = TextEncoder(pipe.text_encoder, pipe.tokenizer, 7, name="tiny")
    made = ldmfast.optimize(pipe)
    return LatentDiffusionPipeline(made.unet, made.vae, made.scheduler, conditioner)


def networks(pipe) -> dict[str, nn.Module]:
    ours = isinstance(pipe, LatentDiffusionPipeline)
    return {"unet": pipe.unet, "text_encoder": pipe.conditioner.model if ours else pipe.text_encoder}


def draw(pipe) -> np.ndarray:
    """A picture of two steps, 0 to 1."""
    if isinstance(pipe, LatentDiffusionPipeline):
        return np.asarray(pipe("a cat", steps=2, seeds=3, size=(32, 32), guidance=3)[0]) / 255
    asked = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32, "guidance_scale": 3}
    return pipe("a cat", **asked, generator=torch.Generator().manual_seed(3)).images[0]


def weights(pipe) -> dict[str, dict[str, torch.Tensor]]:
    """{network: {name: parameter}} without the adapters, by the names that they have without them."""
    return {
        part: {name.replace(".base_layer", ""): p for name, p in network.named_parameters() if ".lora_" not in name}
        for part, network in networks(pipe).items()
    }


def delta(path: Path, adapter: Adapter) -> dict[str, dict[str, torch.Tensor]]:
    """{network: {weight: what the file adds to it at the adapter's scale}}, by kohya's formula."""
    table, found = load_file(path), {"unet": {}, "text_encoder": {}}
    for name in [key.removesuffix(".alpha") for key in table if key.endswith(".alpha")]:
        down, up = table[f"{name}.lora_down.weight"], table[f"{name}.lora_up.weight"]
        if adapter.rounded:
            down, up = down.bfloat16().float(), up.bfloat16().float()
        value = adapter.scale * table[f"{name}.alpha"].item() / len(down) * (up @ down)
        part = "unet" if name.startswith("lora_unet_") else "text_encoder"
        found[part][name.removeprefix("lora_unet_").removeprefix("lora_te_").removeprefix("text_model_")] = value
    return found


class Sequence:
    """One live pipeline, its book, and the steps that were taken."""

    def __init__(self, kind: str, seed: int, files: list[Path]) -> None:
        self.random, self.files, self.taken = random.Random(seed), files, []
        self.pipe = pipeline(kind)
        own = {part: {n: p.detach().clone() for n, p in table.items()} for part, table in weights(self.pipe).items()}
        self.state = State(kind, own)

    def run(self, steps: int = STEPS) -> np.ndarray:
        """Take so many steps, drawing after each; the last picture."""
        for _ in range(steps):
            possible = [self.edit, self.move]
            if self.state.fused:
                possible += [self.unfuse, self.unload]
            else:
                possible += [self.load, self.load]
                possible += [self.scale, self.swap, self.fuse, self.unload] if self.active() else []
            step = self.random.choice(possible)
            self.taken.append(step.__name__)
            step()
            picture = draw(self.pipe)
        return picture

    def active(self) -> list[Adapter]:
        return [a for a in self.state.adapters if a.scale is not None]

    # what is done to LoRAs: with diffusers' methods to its pipeline, with load_lora to ours

    def load(self) -> None:
        known = {a.file for a in self.state.adapters}
        free = [i for i in range(len(self.files)) if i not in known]
        if not free:
            return self.swap()
        new = Adapter(self.random.choice(free), 1.0, self.state.dtype is torch.bfloat16)
        if self.state.kind == "optimize":
            self.pipe.load_lora_weights(str(self.files[new.file]), adapter_name=f"f{new.file}")
        self.state.adapters.append(new)
        self._activate(self.active())

    def scale(self) -> None:
        for adapter in self.active():
            adapter.scale = self.random.choice([0.25, 0.5, 1.5])
        self._activate(self.active())

    def swap(self) -> None:
        """Some adapter alone, of those that are loaded."""
        kept = self.random.choice(self.state.adapters)
        for adapter in self.state.adapters:
            adapter.scale = 1.0 if adapter is kept else None
        self._activate([kept])

    def _activate(self, adapters: list[Adapter]) -> None:
        if self.state.kind == "optimize":
            self.pipe.set_adapters([f"f{a.file}" for a in adapters], [a.scale for a in adapters])
        else:
            ldmfast.load_lora(self.pipe, *[(self.files[a.file], a.scale) for a in adapters])

    def fuse(self) -> None:
        if self.state.kind == "optimize":
            self.pipe.fuse_lora()
        else:
            self._merge(True)
        self.state.fused = [dataclasses.replace(a) for a in self.active()]
        self._add(1)

    def unfuse(self) -> None:
        if self.state.kind == "optimize":
            self.pipe.unfuse_lora()
        else:
            self._merge(False)
        self._add(-1)
        self.state.fused = []

    def unload(self) -> None:
        """What is fused stays, as diffusers has it."""
        self.pipe.unload_lora_weights() if self.state.kind == "optimize" else ldmfast.load_lora(self.pipe)
        self.state.adapters, self.state.fused = [], []

    def _merge(self, merge: bool) -> None:
        """Ours has diffusers' methods on its U-Net; the text encoder's layers are peft's."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        for network in networks(self.pipe).values():
            for module in network.modules():
                if isinstance(module, BaseTunerLayer):
                    module.merge() if merge else module.unmerge()

    def _add(self, sign: int) -> None:
        for adapter in self.state.fused:
            for part, table in delta(self.files[adapter.file], adapter).items():
                own = self.state.weights[part]
                names = {n.removesuffix(".weight").removeprefix("text_model.").replace(".", "_"): n for n in own}
                for name, value in table.items():
                    weight = own[names[name]]
                    weight += (sign * value).to(weight.dtype)

    # what is done to the weights

    def edit(self) -> None:
        part = self.random.choice(list(EDITED))
        ending = self.random.choice(EDITED[part]) + ".weight"
        name, weight = next((n, p) for n, p in weights(self.pipe)[part].items() if n.endswith(ending))
        generator = torch.Generator().manual_seed(self.random.randrange(1 << 30))
        change = (0.1 * torch.randn(weight.shape, generator=generator)).to(weight.dtype)
        how = self.random.choice(["data", "in place", "new data"])
        if how == "data":
            weight.data.add_(change)
        elif how == "in place":
            with torch.no_grad():
                weight.add_(change)
        else:
            weight.data = weight.data + change
        self.state.weights[part][name] += change

    def move(self) -> None:
        state = self.state
        state.dtype = torch.float32 if state.dtype is torch.bfloat16 else torch.bfloat16
        self.pipe.to(state.dtype)
        state.weights = {part: {n: w.to(state.dtype) for n, w in t.items()} for part, t in state.weights.items()}
        if state.dtype is torch.bfloat16:
            state.was_bfloat16 = True
            for adapter in state.adapters:
                adapter.rounded = True


def fresh(state: State, files: list[Path]) -> np.ndarray:
    """The picture of a new pipeline that is put straight into a state."""
    pipe = pipeline(state.kind)
    active = [] if state.fused else [a for a in state.adapters if a.scale is not None]
    if rounded := [files[a.file] for a in active if a.rounded]:
        ldmfast.load_lora(pipe, *rounded)
    if state.was_bfloat16:  # the autoencoder's weights, too, which the book does not have
        pipe.to(torch.bfloat16).to(torch.float32)
    if active:
        ldmfast.load_lora(pipe, *[(files[a.file], a.scale) for a in active])
    pipe.to(state.dtype)
    for part, table in weights(pipe).items():
        for name, parameter in table.items():
            parameter.data.copy_(state.weights[part][name])
    return draw(pipe)


def compare(sequence: Sequence, got: np.ndarray, wanted: np.ndarray) -> str | None:
    """What is wrong with a live pipeline after its sequence, against its book and the new pipeline's picture."""
    state = sequence.state
    near, alike = (
        (0.02, 0.06) if state.was_bfloat16 else (1e-5, 2e-3)
    )  # fusing rounds; a picture of ours has 255 levels
    alike = max(alike, 1.01 / 255) if state.kind == "ours" else alike
    for part, table in weights(sequence.pipe).items():
        for name, parameter in table.items():
            if parameter.dtype is not state.dtype:
                return f"{part} {name} is {parameter.dtype}"
            far = (parameter - state.weights[part][name]).abs().max().item()
            if far > near:
                return f"{part} {name} is {far:.2g} from what it must be"
    far = float(np.abs(got - wanted).max())
    return f"its picture is {far:.2g} from the new pipeline's" if far > alike else None


def write_files(folder: Path) -> list[Path]:
    pipe = stable_diffusion()
    return [write_kohya(pipe, folder / f"{i}.safetensors", seed=i, size=0.2) for i in range(FILES)]


def final_state(sequence: Sequence) -> State:
    """The book, with the weights as they are: `compare` has held them to the book."""
    live = weights(sequence.pipe)
    own = {part: {name: p.detach().clone() for name, p in table.items()} for part, table in live.items()}
    return dataclasses.replace(sequence.state, weights=own)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20, help="sequences of each kind")
    parser.add_argument("--first", type=int, default=0, help="the seed of the first")
    arguments = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(Path(folder))
        for kind in KINDS:
            for seed in range(arguments.first, arguments.first + arguments.count):
                sequence = Sequence(kind, seed, files)
                got = sequence.run()
                with multiprocessing.get_context("spawn").Pool(1) as process:
                    wanted = process.apply(fresh, (final_state(sequence), files))
                said = compare(sequence, got, wanted)
                wrong += said is not None
                print(f"{kind} {seed}: {said or 'equal'} ({', '.join(sequence.taken)})", flush=True)
    print(f"{wrong} of {2 * arguments.count} sequences differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
