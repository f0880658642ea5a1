"""What a folder of pictures holds: their rows, as metadata files, folder names and .txt files describe them.

Hugging Face's "imagefolder", with captions in .txt files besides:
    metadata.jsonl   one object a line: `file_name`, `text` (the caption), optionally `texts` (more ways to say it),
                     `split`, and any labels (`object`, `colour`); metadata.csv: the same as columns. It speaks for the
                     pictures in its folder and below, file_name is relative to that, and what it does not name is left
                     out. The nearest one counts, where several do.
    train/ test/     or training, validation, valid, val, dev, testing, eval, evaluation, at any depth: the split
    cat/ dog/        without metadata: the class, as the row's `label` and, where no .txt is, its caption. As in
                     imagefolder, only where there are several such folders, all at one depth
    a.txt            beside a.png: its caption
Hidden files and folders (.git, a Mac's ._a.png, __MACOSX) are passed over. Texts are UTF-8, or UTF-16 with its mark.
"""

import codecs
import csv
import io
import json
from pathlib import Path, PurePosixPath

READ = ".png .apng .jpg .jpeg .jpe .jfif .webp .avif .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm .tga .jp2"
NOT_READ = ".heic .heif .jxl .svg .psd .xcf .exr .hdr .ico .eps .cr2 .cr3 .nef .arw .dng .orf .rw2 .raf .raw"
SUFFIXES, UNREAD = set(READ.split()), set(NOT_READ.split())
SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
LISTINGS = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
LINES = 20  # of one metadata file that are named, where more are wrong


def visible_files(folder):
    """The files below a folder, sorted, without hidden ones and what is in hidden folders."""
    hidden = lambda part: part.startswith(".") or part == "__MACOSX" or part.endswith(".partial")  # noqa: E731
    found = (path for path in Path(folder).rglob("*") if not any(map(hidden, path.relative_to(folder).parts)))
    return sorted(path for path in found if path.is_file())


def find(folder):
    """(rows sorted by file name, sentences on what is broken, pictures of a kind that is not read) of a collection.

    A row has file_name, relative to `folder`; text; texts, a list; split; and its labels.
    Raises FileNotFoundError for a missing folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder of pictures")
    files = visible_files(folder)
    listings, problems = {}, []
    for path in files:
        if path.name in LISTINGS:
            listings.setdefault(path.parent, []).append(path)
    rows = []
    for home, paths in listings.items():
        rows += _listed(paths, home.relative_to(folder), problems)
    bare = [path for path in files if not any(parent in listings for parent in path.parents)]
    rows += _unlisted([path for path in bare if path.suffix.lower() in SUFFIXES], folder, problems)
    unread = [path.relative_to(folder).as_posix() for path in bare if path.suffix.lower() in UNREAD]
    return sorted(rows, key=lambda row: row["file_name"]), problems, unread


def read_text(path):
    """A text file without its byte order mark, lines ending in \\n. Raises ValueError naming one that is no text."""
    data = Path(path).read_bytes()
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def split_of(parts):
    """The split that the outermost of the folder names `parts` stands for, else "train"."""
    return next((SPLITS[part.lower()] for part in parts if part.lower() in SPLITS), "train")


def _listed(paths, home, problems):
    """The rows of the metadata files of one folder, `home` below the collection."""
    if len(paths) > 1 or paths[0].suffix == ".parquet":
        names = " and ".join(path.name for path in paths)
        problems.append(f"{paths[0].parent} has {names}: one file is read, metadata.jsonl or metadata.csv")
        return []
    rows, wrong = [], []
    try:
        for where, found in (_json_lines if paths[0].suffix == ".jsonl" else _csv_lines)(paths[0]):
            try:
                rows.append(_row(found, home))
            except ValueError as error:
                wrong.append(f"{where}: {error}")
    except (ValueError, OSError) as error:
        wrong.append(str(error))
    more = len(wrong) - LINES
    problems += [*wrong[:LINES], *([f"{paths[0]}: {more} more lines"] if more > 0 else [])]
    return rows


def _json_lines(path):
    # only \n ends a line: U+2028, U+2029 and U+0085 may stand in a string as they are
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                found = None
            yield f"{path}, line {number}", found


def _csv_lines(path):
    lines = csv.DictReader(io.StringIO(read_text(path), newline=""), restkey="", strict=True)
    try:
        if "file_name" not in (lines.fieldnames or ()):
            raise ValueError(f"{path}, line 1: no column is named file_name")
        for found in lines:
            where = f"{path}, line {lines.line_num}"
            given = {name: value for name, value in found.items() if value}
            yield where, None if "" in found else {"file_name": None, **given}
    except csv.Error as error:
        raise ValueError(f"{path}, line {lines.reader.line_num}: {error}") from error


def _row(found, home):
    """One line of metadata, checked and completed. Raises ValueError saying what is wrong."""
    if not isinstance(found, dict) or "file_name" not in found:
        raise ValueError("expected an object with file_name and text")
    for key in ("file_name", "text", "split"):
        if found.get(key) is not None or key == "file_name":
            _check_string(key, found[key])
    texts = found.get("texts") or []
    if not isinstance(texts, list):
        raise ValueError(f"texts is {texts!r:.60}, expected a list of strings")
    for each in texts:
        _check_string("an entry of texts", each)
    name = PurePosixPath(home.as_posix(), found["file_name"])
    split = found.get("split") or split_of(name.parts[:-1])
    texts = texts or ([found["text"]] if found.get("text") else [])
    text = found.get("text") or "".join(texts[:1])
    return {**found, "file_name": str(name), "text": text, "texts": texts, "split": SPLITS.get(split.lower(), split)}


def _check_string(key, value):
    if not isinstance(value, str) or not value and key == "file_name":
        raise ValueError(f"{key} is {value!r:.60}, expected a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key} is {value!a:.60}, which has half of a pair of surrogates") from None


def _unlisted(paths, folder, problems):
    """The rows of pictures that no metadata speaks for."""
    rows, folders = [], [path.relative_to(folder).parts[:-1] for path in paths]
    classes = [[part for part in parts if part.lower() not in SPLITS] for parts in folders]
    several = len({each[-1] for each in classes if each}) > 1 and len(set(map(len, classes))) == 1
    for path, parts, names in zip(paths, folders, classes, strict=True):
        label, beside = {"label": names[-1]} if several else {}, path.with_suffix(".txt")
        text = names[-1].replace("_", " ") if several else ""
        if beside.is_file():
            try:
                text = read_text(beside).strip()
            except (ValueError, OSError) as error:
                problems.append(str(error))
                continue
        texts, name = [text] if text else [], path.relative_to(folder).as_posix()
        rows.append({"file_name": name, "text": text, "texts": texts, "split": split_of(parts), **label})
    return rows
