"""Prompts as people type them, what a model can draw, and the words that it does not know."""

from __future__ import annotations

import difflib
import shutil
import textwrap

from ldmfast import shipped
from ldmfast.commands.drawing import palette
from ldmfast.commands.drawing.described import folder_of, named
from ldmfast.data import vocabulary

JOINING = set("a an the of on in at to with and or under over".split())  # no picture is asked for by one of these
SHOWN = 60  # characters of a prompt in a message
NAMED = 8  # unknown words in one


def joined(prompts: list[str], known: vocabulary.Vocabulary | None) -> tuple[list[str], str]:
    """(prompts, what is to be said): several of one word each are one that was typed without quotation marks.

    Several objects that the model knows are several pictures, as in `ldmfast sample cat dog`.
    """
    if len(prompts) < 2 or any(len(prompt.split()) != 1 for prompt in prompts):
        return prompts, ""
    names = {other.lower() for name, others in known.objects.items() for other in (name, *others)} if known else ()
    apart = all(prompt.lower() in names for prompt in prompts) if known else not JOINING.intersection(prompts)
    if apart:
        return prompts, ""
    one = " ".join(prompts)
    return [one], f"taken as one prompt: {shortened(one)} (a prompt in quotation marks is one; several are several)"


def strange_words(prompts: list[str], known: vocabulary.Vocabulary | None) -> str:
    """A line that names the words of all prompts that the model was not trained on; "" for none."""
    strange = list(dict.fromkeys(word for prompt in prompts for word in known.strange(prompt))) if known else []
    if not strange:
        return ""
    more = f" and {len(strange) - NAMED} more" if len(strange) > NAMED else ""
    near = [f"{word} (near: {found[0]})" if (found := _near(word, known)) else word for word in strange[:NAMED]]
    return f"not among this model's words: {', '.join(near)}{more}; the rest is drawn (ldmfast sample --list)"


def _near(word, known):
    return difflib.get_close_matches(word.lower(), sorted(known.known() - vocabulary.COMMON), n=1, cutoff=0.8)


def shortened(prompt: str) -> str:
    return repr(prompt if len(prompt) <= SHOWN else prompt[: SHOWN - 3] + "...")


def of_model(model) -> vocabulary.Vocabulary | None:
    """The words of a model's folder, or None."""
    folder = folder_of(model)
    return vocabulary.read(folder) if folder else None


def listing(model, word: str = "") -> tuple[list[str], bool]:
    """(lines that say what a model draws, whether there is any such thing).

    word  only what has it in its name, or among its other names; "" for all
    """
    name = model or shipped.TEXT
    known, classes = of_model(model), named(model)
    if classes:
        lines, found = _class_lines(name, classes, word.lower())
    elif known:
        lines, found = _word_lines(name, known, word.lower())
    else:
        return [f"{name} has no list of what it draws: the folder holds no {vocabulary.FILE}"], False
    if not found:
        names = [*classes.get("class", ()), *classes.get("boxes", ())] or sorted(known.known() - vocabulary.COMMON)
        near = difflib.get_close_matches(word.lower(), dict.fromkeys(names), n=5)
        return [f"{name} knows no {word!r}" + (f"; near: {', '.join(near)}" if near else "")], False
    if name == shipped.TEXT and not word:
        lines.append(f"classes, boxes and maps: ldmfast sample --list --model {shipped.SCENES}")
    return lines, True


def _word_lines(name, known, word):
    objects = [n for n, others in known.objects.items() if any(word in each.lower() for each in (n, *others))]
    shown = [n + (f" ({', '.join(known.objects[n])})" if known.objects[n] else "") for n in objects]
    lists = {"objects": shown}
    lists |= {kind: [w for w in getattr(known, kind) if word in w.lower()] for kind in ("grounds", "sizes", "places")}
    lists["other words"] = [w for w in known.words if word in w.lower()] if word or not known.objects else []
    return [f"what {name} draws, from a prompt:", *_wrapped(lists)], any(lists.values())


def _class_lines(name, classes, word):
    lines, found = [], False
    for option, names in classes.items():
        given = [n for n in names if word in n.lower()]
        found = found or bool(given)
        if given and isinstance(names, dict):
            given = [f"{n} {palette.hex_of(names[n])}" for n in given]
        lines += _wrapped({f"--{option}": given})
    return [f"what {name} draws:", *lines], found


def _wrapped(lists):
    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    lines = []
    for kind, words in lists.items():
        if words:
            head = kind if kind.startswith("--") else f"{len(words)} {kind}"
            text = f"{head}: {', '.join(words)}"
            lines += textwrap.wrap(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return lines
