"""What a picture is read as: by training, in a call and from a file, whatever its mode."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageCms

from ldmfast import pictures
from ldmfast.data.collection import read_picture

RAMP = np.linspace(0, 65535, 256).round().reshape(16, 16)


def by_every_way(picture, tmp_path, suffix="png"):
    """A picture as training reads it, as a call takes it, and as a file of `ldmfast sample`, uint8 [H, W, 3] each."""
    path = tmp_path / f"a.{suffix}"
    picture.save(path)
    with Image.open(path) as opened:
        given = ((pictures.picture_tensor(opened) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    trained = read_picture(path, picture.size[0]).permute(1, 2, 0).numpy()
    assert (trained == given).all() and (np.asarray(pictures.read(path)) == given).all()
    return given


def test_16_bit_grey_keeps_its_values(tmp_path):
    wanted = np.rint(RAMP / 257)
    for suffix in ("png", "tiff", "pgm"):
        found = by_every_way(Image.fromarray(RAMP.astype(np.uint16)), tmp_path, suffix)
        assert (found == wanted[..., None]).all(), suffix
    dark = Image.fromarray((RAMP / 300).astype(np.uint16))  # at most 218 of 65535
    assert by_every_way(dark, tmp_path).max() == 1 and by_every_way(dark, tmp_path, "pgm").max() == 1
    big_endian = by_every_way(Image.fromarray(RAMP.astype(">u2")), tmp_path, "tiff")
    assert (big_endian == wanted[..., None]).all()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@pytest.mark.parametrize("full", [1, 255, 65535])
def test_numbers_without_a_range_of_their_own(tmp_path, dtype, full):
    values = (RAMP / 65535 * full).astype(dtype)
    if dtype is np.int32 and full == 1:
        assert np.asarray(pictures.rgb(Image.fromarray(values))).max() == 1  # 1 of 255
        return
    wanted = np.rint(values * (255 / full))
    assert np.abs(by_every_way(Image.fromarray(values), tmp_path, "tiff") - wanted[..., None]).max() <= (full < 255)


@pytest.mark.parametrize("wrong", [-1, 65536, np.nan])
def test_numbers_beyond_every_range_are_refused_by_name(tmp_path, wrong):
    values = RAMP.astype(np.float32)
    values[3, 3] = wrong
    with pytest.raises(ValueError, match=r"image: its values run from .* \(mode F\), expected 0 to 1 or 255 or 65535"):
        pictures.picture_tensor(Image.fromarray(values))


def test_masks_of_16_bits_and_with_transparency():
    half = np.zeros((4, 4), np.uint16)
    half[:2], half[2] = 65535, 20000
    wanted = [1, 1, 0, 0]
    for mask in (half, half.astype(np.int32), (half / 65535).astype(np.float32), half > 30000):
        assert pictures.mask_tensor(Image.fromarray(mask))[0, :, 0].tolist() == wanted
    strokes = Image.new("RGBA", (4, 4), (255, 255, 255, 0))  # nothing, hiding white
    strokes.paste((255, 255, 255, 255), (0, 0, 4, 2))
    assert pictures.mask_tensor(strokes)[0, :, 0].tolist() == wanted


def see_through(mode):
    """A picture of a mode with transparency: left half of a hidden colour, right half an opaque (20, 20, 20)."""
    shown = np.full((8, 8, 4), (200, 200, 200, 0), np.uint8)
    shown[:, 4:] = (20, 20, 20, 255)
    picture = Image.fromarray(shown)
    if mode in ("P index", "P bytes"):
        picture = Image.fromarray((np.arange(8) >= 4).astype(np.uint8)[None].repeat(8, 0)).convert("P")
        picture.putpalette([200, 200, 200, 20, 20, 20])
        picture.info["transparency"] = 0 if mode == "P index" else b"\0\xff"
    elif mode in ("L", "RGB"):
        picture = picture.convert(mode)
        picture.info["transparency"] = 200 if mode == "L" else (200, 200, 200)
    elif mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
        picture.info["transparency"] = 200 * 257
    else:
        picture = picture.convert(mode) if mode != "La" else picture.convert("LA").convert("La")
    return picture


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P index", "P bytes", "L", "RGB", "I;16", "RGBa", "La"])
def test_what_is_transparent_is_white_everywhere(tmp_path, mode):
    picture = see_through(mode)
    if mode in ("RGBa", "La"):
        found = np.asarray(pictures.rgb(picture))
    else:
        found = by_every_way(picture, tmp_path)
    assert (found[:, :4] == 255).all() and (found[:, 4:] == 20).all()


def test_half_transparent_pixels_are_mixed(tmp_path):
    found = by_every_way(Image.new("RGBA", (8, 8), (0, 100, 200, 128)), tmp_path)
    assert np.abs(found[0, 0].astype(int) - (127, 177, 227)).max() <= 1


def test_the_first_of_several_pictures_and_a_see_through_gif(tmp_path):
    first = see_through("P index")
    first.save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("P", (8, 8))], transparency=0)
    found = np.asarray(pictures.read(tmp_path / "a.gif"))
    assert (found[:, :4] == 255).all() and (found[:, 4:] == 20).all()


def _in_mode(picture, mode):
    if mode != "LAB":
        return picture.convert(mode)
    return ImageCms.profileToProfile(
        picture, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_modes_keep_their_colours(mode):
    drawn = Image.new("RGB", (8, 8), "white")
    drawn.paste("black", (0, 0, 4, 8))
    found = np.asarray(pictures.rgb(_in_mode(drawn, mode)))
    assert (found[:, :4] <= 1).all() and (found[:, 4:] >= 254).all()


def test_a_cmyk_file(tmp_path):
    Image.new("RGB", (8, 8), (200, 40, 90)).convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    assert np.abs(read_picture(tmp_path / "a.jpg", 8).float().mean((1, 2)).numpy() - (200, 40, 90)).max() < 3


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16", "1"])
def test_pictures_stand_upright_everywhere(tmp_path, mode):
    """Orientation 6: the camera was turned left, the sky lies on the left."""
    values = np.zeros((4, 6), np.uint8)
    values[:, :3] = 255
    if mode == "I;16":
        picture = Image.fromarray(values.astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(values).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        given = pictures.picture_tensor(opened)
        mask = pictures.mask_tensor(opened)
    assert given.shape == (3, 6, 4) and (given[:, :3] == 1).all() and (given[:, 3:] == -1).all()
    assert mask.shape == (1, 6, 4) and (mask[:, :3] == 1).all() and not mask[:, 3:].any()
    assert read_picture(tmp_path / "a.png", 4).float().mean((0, 2)).tolist() == [255, 255, 0, 0]
