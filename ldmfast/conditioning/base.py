"""What the denoiser is told, and the modules that turn it into tensors.

A `Conditioner` maps a list of inputs (captions, classes, boxes, maps, pictures) to a `Condition`; a `Condition` knows
how to call the U-Net. The encoders stand beside this file: conditioning_text.py, _tokens.py (classes, boxes),
_transformer.py (tokens through a transformer of their own), _spatial.py (maps, pictures).
The modes are Rombach et al. 2022's: none, concat, crossattn, hybrid (both), adm (a label beside the timestep).
"""

import dataclasses
import importlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ldmfast.conditioning import CONDITIONERS

MODES = ("none", "concat", "crossattn", "hybrid", "adm")
CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass
class Condition:
    """What the denoiser is told about N pictures; any part may be None.

    context       [N, S, E]     keys and values of cross-attention
    context_mask  [N, S] bool   False where a token is padding
    concat        [N, c, h, w]  joined to the latent along channels; [N, c, 1, 1] is spread over it
    label         [N] int64 or [N, E]   passed as class_labels ("adm")
    text_embeds   [N, P]        a pooled text state, and
    time_ids      [N, 6]        the picture's sizes, both passed as added_cond_kwargs (SDXL)
    """

    context: torch.Tensor | None = None
    context_mask: torch.Tensor | None = None
    concat: torch.Tensor | None = None
    label: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None

    def parts(self):
        """{name: tensor} of the parts that are there."""
        return {f.name: value for f in dataclasses.fields(self) if (value := getattr(self, f.name)) is not None}

    def to(self, device=None, dtype=None):
        """Move; `dtype` applies to the floating parts."""
        moved = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in self.parts().items()}
        return Condition(**moved)

    def __len__(self):
        """N, or 0 for a condition that says nothing."""
        return next((len(v) for v in self.parts().values()), 0)

    def __getitem__(self, index):
        """The condition of the pictures that `index` (slice, list or tensor) selects."""
        return Condition(**{k: v[index] for k, v in self.parts().items()})

    @staticmethod
    def cat(conditions):
        """One condition for all the pictures of several. Raises ValueError if they do not have the same parts."""
        conditions = list(conditions)
        kinds = {tuple(c.parts()) for c in conditions}
        if len(kinds) != 1:
            raise ValueError(f"Condition.cat: the conditions have different parts: {sorted(kinds)}")
        return Condition(**{name: _join([getattr(c, name) for c in conditions]) for name in kinds.pop()})

    def dropped(self, drop, empty):
        """This condition with `empty` (of N, or of 1) where `drop` [N] bool is true: guidance dropout."""

        def choose(name, told, nothing):
            told, nothing = _same_size([told, nothing.to(told.device, told.dtype)])
            return torch.where(drop.to(told.device).view(-1, *[1] * (told.ndim - 1)), nothing, told)

        other = empty.parts()
        return Condition(**{name: choose(name, value, other[name]) for name, value in self.parts().items()})

    def predict(self, unet, x, t):
        """The U-Net's output for the latents x [N, z, h, w] at the times t (a number, [] or [N]).

        unet  UNet or UNet2D, or diffusers' UNet2DConditionModel or UNet2DModel
        """
        if self.concat is not None:
            hint = self.concat.to(x.device, x.dtype)
            x = torch.cat([x, hint.expand(-1, -1, *x.shape[2:]) if hint.shape[2:] == (1, 1) else hint], dim=1)
        if not hasattr(unet.config, "cross_attention_dim"):  # UNet2DModel takes nothing but a label
            return unet(x, t, class_labels=self.label).sample
        more = {} if self.context_mask is None else {"encoder_attention_mask": self.context_mask}
        if self.text_embeds is not None:
            added = {"text_embeds": self.text_embeds, "time_ids": self.time_ids}
            more["added_cond_kwargs"] = {k: v.to(x.device, x.dtype) for k, v in added.items() if v is not None}
        context = None if self.context is None else self.context.to(x.device, x.dtype)
        return unet(x, t, encoder_hidden_states=context, class_labels=self.label, **more).sample


def _same_size(tensors):
    """Tensors of which some are [N, c, 1, 1], spread to the height and width of the others."""
    if tensors[0].ndim != 4:
        return tensors
    side = max(tuple(t.shape[2:]) for t in tensors)
    return [t.expand(-1, -1, *side) if t.shape[2:] == (1, 1) else t for t in tensors]


def _join(tensors, dim=0):
    return torch.cat(_same_size(tensors), dim=dim) if len(tensors) > 1 else tensors[0]


class Conditioner(nn.Module):
    """Base of the encoders: `encoder(inputs)` and `encoder.empty(n)` give a Condition.

    mode       one of MODES
    trainable  whether its parameters are trained with the denoiser (and its forward is differentiated)
    settings   the constructor's arguments, which config.json keeps
    option     the command-line option that its inputs come from: "class", "boxes" or "map"; None for others
    takes_pictures   what of a pipeline's image and mask it is told: ("image",), an input being the tensor [3, H, W];
                     ("image", "mask"), an input being {"image": [3, H, W], "mask": [1, H, W]}
    """

    mode = "none"
    option = None
    takes_pictures = ()
    trainable = False

    def __init__(self, **settings):
        super().__init__()
        self.settings = settings

    def forward(self, inputs):
        """A list of N inputs -> a Condition of N. Raises ValueError saying which input is wrong and why."""
        raise NotImplementedError

    def empty(self, n):
        """The condition that says nothing, n times: for guidance and its dropout."""
        raise NotImplementedError

    def complete(self, inputs, seeds):
        """The inputs of N pictures with what they leave open drawn, each by its picture's seed; here nothing is."""
        return inputs

    def cut(self, inputs):
        """What of the inputs is longer than what is read of it: a list of (caption, tokens that are read)."""
        return []

    def by_option(self):
        """{option: the conditioner that takes it}, of this one or of its members."""
        return {self.option: self} if self.option else {}

    @property
    def device(self):
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def save_pretrained(self, folder, *, dtype=None):
        """Write config.json, and model.safetensors if there are weights of its own (in `dtype`).

        Raises ValueError for an encoder out of a single file: it is saved by its name, and a file is not enough.
        """
        folder, name = Path(folder), self.settings.get("name")
        if name and Path(name).is_file():
            raise ValueError(f"{name} holds this {type(self).__name__}; convert it to a folder first (ldmfast convert)")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps({"_class_name": type(self).__name__, **self.settings}, indent=2) + "\n")
        weights = self.own_weights()
        if weights:
            cast = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in weights.items()}
            save_file({k: v.detach().cpu().contiguous() for k, v in cast.items()}, folder / WEIGHTS)

    def own_weights(self):
        """The state that is saved; an encoder that is frozen and known by name has none."""
        return self.state_dict()

    @classmethod
    def from_settings(cls, settings):
        return cls(**settings)


def load_conditioner(folder, *, dtype=None):
    """Read what `save_pretrained` wrote. Raises FileNotFoundError or ValueError naming the file."""
    folder = Path(folder)
    try:
        settings = json.loads((folder / CONFIG).read_text())
        name = settings.pop("_class_name")
        home = CONDITIONERS[name]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG} describes no conditioner of {', '.join(CONDITIONERS)}: {error}") from error
    if name == "Hybrid":
        members = {member: load_conditioner(folder / member, dtype=dtype) for member in settings["members"]}
        return Hybrid(**members)
    model = getattr(importlib.import_module(home), name).from_settings(settings)
    if wanted := model.own_weights():
        found = _read(folder / WEIGHTS)
        if odd := sorted(set(wanted) ^ set(found)):
            raise ValueError(f"{folder / WEIGHTS} is another {name}'s: only one of them has {odd[0]}")
        try:
            model.load_state_dict({**model.state_dict(), **found})
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ValueError(f"{folder / WEIGHTS} does not fit {CONFIG}: {reason}") from error
    return model.to(dtype) if dtype else model


def _read(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the conditioner's weights")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} could not be loaded: {error}") from error


class Unconditional(Conditioner):
    """Mode "none": nothing is told, whatever the inputs are."""

    def forward(self, inputs):
        return Condition()

    def empty(self, n):
        return Condition()


class Hybrid(Conditioner):
    """Several conditioners at once, as {name: conditioner}; an input is a dict with some of the names.

    Contexts are joined along the tokens, concats along the channels, in the members' order; a label may come from one
    of them only. A name that an input lacks is empty for that picture.
    """

    mode = "hybrid"

    def __init__(self, **members):
        super().__init__()
        self.members = nn.ModuleDict(members)

    @property
    def trainable(self):
        return any(m.trainable for m in self.members.values())

    def forward(self, inputs):
        for i, value in enumerate(inputs):
            if not isinstance(value, dict) or set(value) - set(self.members):
                raise ValueError(f"Hybrid: input {i} must be a dict with {', '.join(self.members)}; got {value!r:.80}")
        return _side_by_side([_told(member, name, inputs) for name, member in self.members.items()])

    def empty(self, n):
        return _side_by_side([m.empty(n) for m in self.members.values()])

    def cut(self, inputs):
        dicts = [value for value in inputs if isinstance(value, dict)]  # forward refuses the others
        told = {name: [value[name] for value in dicts if name in value] for name in self.members}
        return [long for name, member in self.members.items() for long in member.cut(told[name])]

    def by_option(self):
        return {name: member for name, member in self.members.items() if name == member.option}

    def complete(self, inputs, seeds):
        """An input for a member that `stands_for` another is drawn as that one's."""
        stand_ins = {name: m for name, m in self.members.items() if hasattr(m, "stands_for")}
        return [self._completed(value, seed, stand_ins) for value, seed in zip(inputs, seeds, strict=True)]

    @staticmethod
    def _completed(value, seed, stand_ins):
        given = [name for name in stand_ins if isinstance(value, dict) and name in value]
        for name in given:
            other = stand_ins[name].stands_for
            if other in value:
                raise ValueError(f"Hybrid: {name} is drawn as {other}, and this input has both; give one of them")
            value = {k: v for k, v in value.items() if k != name} | {other: stand_ins[name].draw(value[name], seed)}
        return value

    def save_pretrained(self, folder, *, dtype=None):
        for name, member in self.members.items():
            member.save_pretrained(Path(folder, name), dtype=dtype)
        settings = {"_class_name": "Hybrid", "members": list(self.members)}
        Path(folder, CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def _told(member, name, inputs):
    """The member's condition, empty where an input lacks `name`."""
    there = [value[name] for value in inputs if name in value]
    if len(there) == len(inputs) or not there:
        return member(there) if there else member.empty(len(inputs))
    rows = iter(range(len(there)))
    order = [next(rows) if name in value else len(there) for value in inputs]
    return Condition.cat([member(there), member.empty(1)])[order]


def _side_by_side(conditions):
    """One condition from those that several conditioners give for the same pictures."""
    by_name = {f.name: [] for f in dataclasses.fields(Condition)}
    for condition in conditions:
        for name, value in condition.parts().items():
            by_name[name].append(value)
    if len(by_name["label"]) > 1 or (by_name["context_mask"] and len(by_name["context"]) > 1):
        raise ValueError("Hybrid: only one of the conditioners may give a label, or a context with a mask")
    return Condition(**{name: _join(values, dim=1) for name, values in by_name.items() if values})
