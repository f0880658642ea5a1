"""What would be trained on: a collection counted, its broken files named, a sheet of its pictures."""

from collections import Counter
from pathlib import Path

from PIL import Image

from ldmfast.data import listing
from ldmfast.data.collection import read_picture

SHOWN = 32  # pictures on the sheet
SIDE = 64


def inspect(folder):
    """(sentences, PIL pictures of SIDE x SIDE spread evenly over what is trained on, whether anything is broken).

    Every picture is read. Raises FileNotFoundError for a missing folder.
    """
    rows, problems, unread = listing.find(folder)
    whole, small = [], []
    for row in rows:
        try:
            pixels = read_picture(Path(folder, row["file_name"]), SIDE)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        whole.append(row)
        if row["split"] == "train":
            small.append(pixels)
    if not whole and not problems:
        return [f"{folder} holds no pictures"], [], True
    trained = [row for row in whole if row["split"] == "train"]
    splits = Counter(row["split"] for row in whole)
    said = [", ".join(f"{count} of split {split}" for split, count in sorted(splits.items())) or "no pictures"]
    bare = [row["file_name"] for row in trained if not row["texts"]]
    distinct = len({text for row in trained for text in row["texts"]})
    said.append(f"trained on: {len(trained)}, {len(bare)} of them without a caption; {distinct} different captions")
    if labels := Counter(row["label"] for row in trained if "label" in row):
        said.append("classes: " + ", ".join(f"{name} {count}" for name, count in sorted(labels.items())))
    if unread:
        said.append(f"of a kind that is not read: {', '.join(unread)}")
    said += [f"broken: {problem}" for problem in problems]
    step = max(1, -(-len(small) // SHOWN))
    return said, [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in small[::step]], bool(problems)
