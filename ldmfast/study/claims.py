"""What Rombach et al. 2022 claim of latents in sections 4.1 and 4.2, held against the study's rows."""


def claims(rows) -> list[dict]:
    """What the table says to each claim: {"claim", "held", "figures"}."""
    by_f = {row["f"]: row for row in sorted(rows, key=lambda row: row["f"])}
    gflop, ms, batch = ({f: row[key] for f, row in by_f.items()} for key in ("gflop", "ms", "largest_batch"))
    kid = {f: row["points"][-1]["kid"] for f, row in by_f.items()}
    psnr = {f: row["reconstruction"]["psnr"] for f, row in by_f.items() if f > 1}
    found = [
        _claim("A latent saves operations: GFLOP a sample and step fall with f", _falls(gflop), gflop),
        _claim("A latent saves time: ms a step fall with f", _falls(ms), ms),
        _claim("A latent saves memory: the largest batch grows with f", _grows(batch), batch),
        _claim(
            "f = 4 or 8 is the sweet spot: the lowest KID after the same time", min(kid, key=kid.get) in (4, 8), kid
        ),
    ]
    if 1 in by_f and psnr:
        held = all(kid[f] < kid[1] for f in psnr if f in (4, 8))
        found.append(_claim("f = 4 and 8 beat pixels after the same time (KID)", held, kid))
    caps = "The autoencoder caps the detail: PSNR of reconstructions falls with f"
    return [*found, _claim(caps, _falls(psnr), psnr)]


def _claim(text, held, values):
    figures = ", ".join(f"f = {f}: {value:.4g}" for f, value in values.items())
    return {"claim": text, "held": bool(held), "figures": figures}


def _falls(values):
    """Whether the values, in the order of their f, fall from each to the next."""
    ordered = list(values.values())
    return all(a > b for a, b in zip(ordered, ordered[1:], strict=False))


def _grows(values):
    return _falls({f: -value for f, value in values.items()})
