r"""How a prompt is read: weights of its words, layers of the text tower that are left out, prompts of any length.

The grammar is that of AUTOMATIC1111's web UI:

    (word)           times 1.1;  ((word)): 1.1 * 1.1
    [word]           divided by 1.1
    (word:1.3)       times 1.3;  brackets in brackets multiply
    \( \) \[ \] \\   the characters themselves
    BREAK            begins another chunk, in a long prompt

A bracket that is never closed reaches to the prompt's end. Its other signs change the prompt from step to step,
[from:to:0.5] and [a|b], or name a LoRA, <lora:name:1>: they are refused by name, not drawn as words.
Source: github.com/AUTOMATIC1111/stable-diffusion-webui, wiki, "Features: Attention/emphasis".
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

FACTOR = 1.1  # of a bracket without a number
BREAK = "BREAK"
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
_EXPLICIT = re.compile(rf"(?<!\\)\(.*:\s*{_NUMBER}\s*\)", re.DOTALL)
_PIECES = re.compile(
    rf"\\(?P<literal>[()\[\]\\])|:\s*(?P<weight>{_NUMBER})\s*\)|(?P<bracket>[()\[\]])|(?P<text>[^\\()\[\]:]+|[:\\])"
)
_FILES = (  # what else the web UI reads
    (re.compile(r"<(?:lora|lyco):[^>]+>"), "names a LoRA; give its file: lora=(FILE, scale), --lora FILE:SCALE"),
    (re.compile(r"<hypernet:[^>]+>"), "names a hypernetwork, which ldmfast does not take"),
)
_STEPS = (
    (
        re.compile(rf"(?<!\\)\[[^\[\]]*:\s*{_NUMBER}\s*\]"),
        "changes the prompt between steps, which ldmfast does not do",
    ),
    (re.compile(r"(?<!\\)\[[^\[\]]*\|[^\[\]]*\]"), "changes the prompt between steps, which ldmfast does not do"),
)


@dataclass(frozen=True)
class PromptReading:
    """How a call wants its prompts read; only models whose text encoder is CLIP's take other than this.

    clip_skip  how many of the tower's last layers are left out, in diffusers' counting: 0 and None none, 1 the last;
               the web UI's "Clip skip" is one more. Of the prompts alone, not of the negative ones, as in diffusers
    weights    True: the grammar above; False: brackets are characters like others; None: the grammar where a prompt
               has an explicit weight, "(word:1.3)"
    long       True: a prompt of any length, in chunks of 75 tokens that the tower reads one by one; False: its first 75
    """

    clip_skip: int | None = None
    weights: bool | None = None
    long: bool = False

    def negative(self) -> PromptReading:
        return replace(self, clip_skip=None)

    def asked(self) -> list[str]:
        """What other than the default is asked for, by the names of the pipeline's arguments."""
        asked = {"clip_skip": self.clip_skip, "prompt_weights": self.weights, "long_prompts": self.long}
        return [f"{name}={value}" for name, value in asked.items() if value]

    def skipped(self, layers: int) -> int:
        """The layers to leave out of a tower of so many. Raises ValueError."""
        skip = 0 if self.clip_skip is None else self.clip_skip
        if isinstance(skip, bool) or not isinstance(skip, int) or not 0 <= skip < layers:
            raise ValueError(
                f"clip_skip={skip!r} must be a whole number from 0 to {layers - 1}: the tower has {layers} layers"
            )
        return skip


def pieces(prompt: str, weights: bool | None = None) -> list[tuple[str, float]]:
    """[(text, weight)] of a prompt as PromptReading.weights says.

    Raises ValueError for what the grammar's origin reads and this does not, and for a weight that is no finite number.
    """
    reads = weights is True or (weights is None and _EXPLICIT.search(prompt) is not None)
    for pattern, why in (*(_FILES if weights is not False else ()), *(_STEPS if reads else ())):
        if found := pattern.search(prompt):
            raise ValueError(f"{found[0]!r} in the prompt {why}; prompt_weights=False draws it as words")
    return _weighted(prompt) if reads else [(prompt, 1.0)]


def _weighted(prompt: str) -> list[tuple[str, float]]:
    texts: list[str] = []
    factors: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # how many texts there were before each

    def close(bracket: str, factor: float) -> None:
        for i in range(opened[bracket].pop(), len(texts)):
            factors[i] *= factor

    for match in _PIECES.finditer(prompt):
        bracket, weight = match["bracket"], match["weight"]
        if bracket in ("(", "["):
            opened[bracket].append(len(texts))
        elif weight is not None and opened["("]:
            close("(", _finite(weight))
        elif bracket == ")" and opened["("]:
            close("(", FACTOR)
        elif bracket == "]" and opened["["]:
            close("[", 1 / FACTOR)
        else:
            texts.append(match["literal"] or match[0])
            factors.append(1.0)
    for bracket, factor in (("(", FACTOR), ("[", 1 / FACTOR)):
        while opened[bracket]:
            close(bracket, factor)
    return _joined(texts, factors)


def _joined(texts: list[str], factors: list[float]) -> list[tuple[str, float]]:
    """Neighbours of one weight become one text."""
    found: list[tuple[str, float]] = []
    for text, factor in zip(texts, factors, strict=True):
        if found and found[-1][1] == factor:
            found[-1] = (found[-1][0] + text, factor)
        else:
            found.append((text, factor))
    return found or [("", 1.0)]


def _finite(text: str) -> float:
    weight = float(text)
    if not math.isfinite(weight):
        raise ValueError(f"the weight {text} in the prompt is no finite number")
    return weight
