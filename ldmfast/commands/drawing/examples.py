"""`ldmfast sample --example NAME DIR`: inputs to try, made for the model that will take them."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageDraw

from ldmfast import files, shipped
from ldmfast.commands.drawing import palette
from ldmfast.commands.drawing.described import conditioners, described, folder_of
from ldmfast.pictures import writing

NAMES = ("boxes", "map", "mask", "picture")
GROUND, SHAPE = (255, 228, 112), (222, 76, 74)


def write(name: str, folder: str, model: str | None) -> list[str]:
    """Write the example's files into the folder, which is made; returns their names and the commands to try.

    Raises ValueError for another name, or a model that does not take it.
    """
    if name not in NAMES:
        raise ValueError(f"--example {name} is none of {', '.join(NAMES)}")
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    return {"boxes": _boxes, "map": _map, "mask": _mask, "picture": _picture}[name](home, model)


def _boxes(home, model):
    names = _settings(model, "BoxEncoder", "LayoutEncoder")["classes"]
    pair = [("cat", [0.05, 0.3, 0.5, 0.8]), ("rocket", [0.55, 0.1, 0.95, 0.6])]
    objects = [{"object": n if n in names else names[i], "box": box} for i, (n, box) in enumerate(pair)]
    path = home / "boxes.json"
    files.write_text(path, json.dumps(objects, indent=1) + "\n")
    return [str(path), f"try: ldmfast sample{_option(model)} --boxes {path} -o boxes.png"]


def _map(home, model):
    """A class on a ground, the ground being the first class, as in scenes; and the palette, one colour a line."""
    settings = _settings(model, "MapEncoder")
    names, colours = settings["classes"], settings.get("palette")
    if not colours:
        raise ValueError("this model's maps have no palette; in Python they are tensors of class numbers")
    shape = next((i for i, n in enumerate(names) if n == "pizza"), len(names) - 1)
    width, height = _size(model or shipped.SCENES)
    picture = Image.new("RGB", (width, height), tuple(colours[0]))
    ImageDraw.Draw(picture).ellipse((width // 4, height // 4, 3 * width // 4, 3 * height // 4), tuple(colours[shape]))
    path, listed = home / "map.png", home / "palette.txt"
    with writing(path) as save:
        save(picture)
    lines = [f"{palette.hex_of(colour)} {name}" for name, colour in zip(names, colours, strict=True)]
    files.write_text(listed, "\n".join(lines) + "\n")
    return [str(path), str(listed), f"try: ldmfast sample{_option(model)} --map {path} -o drawn.png"]


def _mask(home, model):
    """White where to repaint: a disc in the middle; and a picture to repaint."""
    width, height = _size(model)
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).ellipse((width // 4, height // 4, 3 * width // 4, 3 * height // 4), 255)
    path = home / "mask.png"
    with writing(path) as save:
        save(mask)
    (picture, _) = _picture(home, model)
    prompt = '"a cat on a yellow background"'
    return [
        str(path),
        picture,
        f"try: ldmfast sample{_option(model)} {prompt} --image {picture} --mask {path} -o a.png",
    ]


def _picture(home, model):
    """A small picture to begin at, or to enlarge: a disc on a ground."""
    width, height = _size(model)
    picture = Image.new("RGB", (4 * width, 4 * height), GROUND)
    ImageDraw.Draw(picture).ellipse((width // 2, height // 2, 7 * width // 2, 7 * height // 2), SHAPE)
    path = home / "picture.png"
    with writing(path) as save:
        save(picture.resize((width, height), Image.LANCZOS))
    prompt = '"a tomato on a yellow background"'
    return [str(path), f"try: ldmfast sample{_option(model)} {prompt} --image {path} --strength 0.7 -o drawn.png"]


def _settings(model, *kinds):
    """The settings of the first conditioner of one of these classes, of `model` or else of the scenes that ship."""
    model = model or shipped.SCENES
    for settings in conditioners(model).values():
        if settings.get("_class_name") in kinds and isinstance(settings.get("classes"), list):
            return settings
    what = "boxes" if "BoxEncoder" in kinds else "maps"
    raise ValueError(f"--model {model} takes no {what}, or has no names for what is in them")


def _size(model):
    found = described(model)
    if found is None:
        raise ValueError(
            f"--model {model}: an example is made for a model's folder"
            if not folder_of(model)
            else f"--model {model} does not say what size it draws"
        )
    return found.trained


def _option(model):
    return f" --model {model}" if model else ""
