"""Pictures on terminals: which are known, and that what is sent is the picture."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from ldmfast.commands.drawing import terminal


class Stream(io.StringIO):
    def __init__(self, tty=True):
        super().__init__()
        self.tty = tty

    def isatty(self):
        return self.tty


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "xterm-256color"}, None),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux"}, None),
        ({"TERM": "screen-256color", "TERM_PROGRAM": "iTerm.app"}, None),
        ({}, None),
    ],
)
def test_a_terminal_names_itself(environment, kind):
    assert terminal.protocol(environment, Stream()) == kind
    assert terminal.protocol(environment, Stream(tty=False)) is None


@pytest.fixture
def picture():
    values = np.random.default_rng(0).integers(0, 4, (13, 21, 3), dtype=np.uint8) * 85
    return Image.fromarray(np.kron(values[:, :7], np.ones((1, 3, 1), np.uint8)))


def sent(picture, kind):
    stream = Stream()
    terminal.show(picture, kind, stream)
    return stream.getvalue()


def decoded(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def test_kitty_and_iterm_are_sent_a_png(picture):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for each in (picture, noise):
        found = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", sent(each, "kitty"))
        assert all(len(part) <= terminal.CHUNK for _, part in found)
        assert [keys[-1] for keys, _ in found] == ["1"] * (len(found) - 1) + ["0"]
        assert (decoded("".join(part for _, part in found)) == np.asarray(each)).all()
    found = re.fullmatch(r"\x1b\]1337;File=inline=1;width=21px;height=13px:(.*)\a\n", sent(picture, "iterm"))
    assert (decoded(found[1]) == np.asarray(picture)).all()


def read_sixels(text):
    """The picture that a terminal would draw."""
    head, body = re.fullmatch(r'\x1bPq"1;1;([\d;]+?)(#.*)\x1b\\\n', text, re.DOTALL).groups()
    width, height = map(int, head.split(";"))
    canvas, colours, x, top, now = np.zeros((height + 6, width, 3)), {}, 0, 0, None
    for token in re.findall(r"#\d+(?:;\d+){4}|#\d+|!\d+.|[$\-]|[?-~]", body):
        if token.startswith("#"):
            now, *rest = map(int, token[1:].split(";"))
            if rest:
                colours[now] = np.array(rest[1:]) * 2.55
        elif token == "$":
            x = 0
        elif token == "-":
            x, top = 0, top + 6
        else:
            count, bits = (int(token[1:-1]), ord(token[-1])) if token[0] == "!" else (1, ord(token))
            for row in range(6):
                if (bits - 63) >> row & 1:
                    canvas[top + row, x : x + count] = colours[now]
            x += count
    return canvas[:height]


def test_sixels_draw_the_picture(picture):
    assert np.abs(read_sixels(sent(picture, "sixel")) - np.asarray(picture)).max() < 4


def test_a_large_picture_is_shown_smaller():
    large = Image.new("RGB", (3 * terminal.LARGEST, 30), "red")
    found = re.search(r"width=(\d+)px", sent(large, "iterm"))
    assert int(found[1]) == terminal.LARGEST and large.width == 3 * terminal.LARGEST


def test_nothing_is_shown_where_nobody_looks(tmp_path, capsys):
    from ldmfast.commands import cli

    out = tmp_path / "a.png"
    asked = ["sample", "a cat", "-o", str(out), "--steps", "1", "--quiet"]
    assert cli.main(asked) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert cli.main([*asked, "--show"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{out}\n" and "does not say that it can show pictures" in said.err
