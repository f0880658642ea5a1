"""How figures are shown in a table: a column's head, the format of its values, what a perfect copy would score."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """perfect  the figure of pictures that are the originals themselves; None where it has no end"""

    head: str
    form: str
    perfect: float | None = None

    def show(self, value):
        return "-" if value is None else format(value, self.form)


COLUMNS = {
    "psnr": Column("PSNR dB", ".2f"),
    "ssim": Column("SSIM", ".3f", perfect=1.0),
    "used": Column("codes used", ".0%"),
    "perplexity": Column("perplexity", ".0f"),
    "kid": Column("KID", ".4f", perfect=0.0),
    "R@1": Column("R@1", ".0%"),
}
CODEBOOK = ("used", "perplexity")


def column(name):
    """Of a figure by its name; a name that is none of COLUMNS is a perceptual distance's."""
    return COLUMNS.get(name) or Column(f"{name} distance", ".4f", perfect=0.0)
