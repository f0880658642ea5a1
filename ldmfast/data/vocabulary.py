"""What a text model was trained to draw, in words: words.json in its folder. Nothing here imports torch.

    {"objects": {"red apple": ["apple"], ...}, "grounds": ["red", ...], "sizes": [...], "places": [...],
     "words": ["background", "picture", ...]}

Each object has its other names beside it; the words are those of its captions that are in no name. What a collection
says of its rows (object or objects, their names, colour or ground, size, place, text) is read from there; a folder
without the file belongs to a model of which nothing is known.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ldmfast import files

FILE = "words.json"
MOST_WORDS = 5000  # of captions, the most frequent
COMMON = set(  # say how things stand, and are understood or left out without harm
    "a an the of on in at to by with and or is are has its it this that some one two over under next beside near"
    " left right above below top bottom middle centre center behind front picture photo image drawing please draw show"
    " me there".split()
)


@dataclass(frozen=True)
class Vocabulary:
    """objects: {name: its other names}; the others: words, or phrases of them, in the order to list them in."""

    objects: dict[str, list[str]] = field(default_factory=dict)
    grounds: list[str] = field(default_factory=list)
    sizes: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    def known(self) -> set[str]:
        """Every word, in small letters."""
        names = [word for name, others in self.objects.items() for word in (name, *others)]
        return COMMON.union(*map(split, [*names, *self.grounds, *self.sizes, *self.places, *self.words]))

    def strange(self, prompt: str) -> list[str]:
        """The words of a prompt that stand nowhere, as they were written; each once."""
        known = self.known()
        return list(dict.fromkeys(word for word in _as_written(prompt) if not _knows(known, word.lower())))


def split(text: str) -> list[str]:
    """ "Jack-o-Lantern, lit" -> ["jack", "o", "lantern", "lit"]."""
    return [word.lower() for word in _as_written(text)]


def _as_written(text):
    return re.findall(r"[^\W_]+(?:['’][^\W\d_]+)?", text)


def _knows(known, word):
    """Whether a word is known, or is another form of one that is: cats, cherries, boxes, cat's."""
    word = re.sub(r"['’]s?$", "", word)
    forms = (word, word + "s", word.removesuffix("s"), word.removesuffix("es"), re.sub("ies$", "y", word))
    return any(form in known for form in forms)


def read(folder: str | Path) -> Vocabulary | None:
    """Of the model in `folder`; None where it has none. Raises ValueError naming a file that is damaged."""
    path = Path(folder, FILE)
    if not path.is_file():
        return None
    try:
        found = Vocabulary(**files.read_json(path))
        found.known()
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no list of words: {files.first_line(error)}") from error
    return found


def write(folder: str | Path, vocabulary: Vocabulary) -> None:
    """Write words.json, if there is anything to say."""
    if any(asdict(vocabulary).values()):
        files.write_text(Path(folder, FILE), json.dumps(asdict(vocabulary), ensure_ascii=False, indent=1) + "\n")


def of_rows(rows: Iterable[dict]) -> Vocabulary:
    """Of a collection, from the rows of its metadata."""
    objects, lists, words = {}, {"grounds": {}, "sizes": {}, "places": {}}, Counter()
    for row in rows:
        for each in (row, *(each for each in row.get("objects") or () if isinstance(each, dict))):
            if isinstance(each.get("object"), str):
                objects[each["object"]] = each.get("names") or []
            for kind, keys in (("grounds", ("colour", "ground")), ("sizes", ("size",)), ("places", ("place",))):
                lists[kind].update({each[k]: None for k in keys if isinstance(each.get(k), str) and each[k]})
        texts = row.get("texts") or [row.get("text")]
        words.update(word for text in texts if isinstance(text, str) for word in split(text))
    lists = {kind: list(found) for kind, found in lists.items()}
    named = Vocabulary(dict(sorted(objects.items())), **lists)
    rest = [word for word, _ in words.most_common(MOST_WORDS) if not _knows(named.known(), word)]
    return Vocabulary(named.objects, **lists, words=rest)
