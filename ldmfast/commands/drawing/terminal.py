"""A picture on a terminal that can show one: kitty's and iTerm2's protocols, and sixels."""

from __future__ import annotations

import base64
import io
import os
import sys

from PIL import Image

LARGEST = 1024  # pixels a side
CHUNK = 4096  # bytes of base64 in one command of kitty's protocol


def protocol(environment=None, stream=None) -> str | None:
    """ "kitty", "iterm" or "sixel", as the terminal's variables name it; None for any other, or where none is there.

    A multiplexer between (tmux, screen) would swallow the picture, or leave half of it, so none is shown there.
    """
    environment, stream = os.environ if environment is None else environment, stream or sys.stdout
    if not stream.isatty() or environment.get("TMUX") or environment.get("TERM", "").startswith(("screen", "dumb")):
        return None
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if term in ("xterm-kitty", "xterm-ghostty") or environment.get("KITTY_WINDOW_ID") or program == "ghostty":
        return "kitty"
    if program in ("iTerm.app", "WezTerm") or environment.get("LC_TERMINAL") == "iTerm2":
        return "iterm"
    return "sixel" if "sixel" in term or term.startswith(("foot", "mlterm", "contour", "yaft")) else None


def show(picture: Image.Image, kind: str, stream=None) -> None:
    """Write a PIL picture, at most LARGEST pixels a side, to the stream, and a line's end."""
    stream, picture = stream or sys.stdout, picture.convert("RGB")
    if max(picture.size) > LARGEST:
        picture.thumbnail((LARGEST, LARGEST), Image.LANCZOS)
    stream.write({"kitty": _kitty, "iterm": _iterm, "sixel": _sixel}[kind](picture) + "\n")
    stream.flush()


def _png(picture):
    held = io.BytesIO()
    picture.save(held, "PNG")
    return base64.b64encode(held.getvalue()).decode("ascii")


def _kitty(picture):
    """f=100: a PNG; a=T: show it; q=2: answer nothing; m: whether more follows."""
    text = _png(picture)
    parts = [text[i : i + CHUNK] for i in range(0, len(text), CHUNK)]
    keys = ["a=T,f=100,q=2," if i == 0 else "" for i in range(len(parts))]
    return "".join(f"\x1b_G{key}m={int(i + 1 < len(parts))};{parts[i]}\x1b\\" for i, key in enumerate(keys))


def _iterm(picture):
    return f"\x1b]1337;File=inline=1;width={picture.width}px;height={picture.height}px:{_png(picture)}\a"


def _sixel(picture):
    """Bands of six rows; in each, for every colour, a character of 63 + the bits of the rows that have it."""
    small = picture.quantize(255)
    colours, width, height, at = small.getpalette(), *small.size, small.load()
    out = [f'\x1bPq"1;1;{width};{height}']
    for number in range(len(colours) // 3):
        r, g, b = (round(value / 2.55) for value in colours[3 * number : 3 * number + 3])
        out.append(f"#{number};2;{r};{g};{b}")
    for top in range(0, height, 6):
        bits: dict[int, list[int]] = {}
        for y in range(top, min(top + 6, height)):
            for x in range(width):
                bits.setdefault(at[x, y], [0] * width)[x] |= 1 << (y - top)
        out += [f"#{colour}{_run_lengths(row)}$" for colour, row in bits.items()]
        out.append("-")
    return "".join(out) + "\x1b\\"


def _run_lengths(row):
    """ "!5~" for five times "~"."""
    out, start = [], 0
    for x in range(1, len(row) + 1):
        if x == len(row) or row[x] != row[start]:
            out.append(f"!{x - start}{chr(63 + row[start])}" if x - start > 3 else chr(63 + row[start]) * (x - start))
            start = x
    return "".join(out)
