"""Negative prompts, weights, clip skip, long prompts and callbacks: by our door as by diffusers' own pipelines."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from lora_pipelines import TOKENS, stable_diffusion, stable_diffusion_xl

import ldmfast
from ldmfast.conditioning.text_weights import PromptReading, pieces
from ldmfast.ops import numerics

pytestmark = pytest.mark.filterwarnings("ignore:only the first:UserWarning")
SIZE, STEPS, GUIDANCE = (32, 32), 2, 5.0
FAMILIES = {"sd": stable_diffusion, "sdxl": stable_diffusion_xl}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """(diffusers' pipeline, ours of its folder)"""
    stock, folder = FAMILIES[request.param](), tmp_path_factory.mktemp(request.param)
    stock.save_pretrained(folder)
    if not hasattr(stock.text_encoder, "text_model"):  # diffusers 0.42 looks there, transformers 5 has it not
        object.__setattr__(stock.text_encoder, "text_model", stock.text_encoder)
    return stock, ldmfast.load(folder)


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd")
    stable_diffusion().save_pretrained(folder)
    return ldmfast.load(folder)


def theirs(stock, prompt="a cat", seed=3, **options):
    asked = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "height": SIZE[1], "width": SIZE[0]} | options
    prompt = {} if prompt is None else {"prompt": prompt}
    return pixels(stock(**prompt, **asked, generator=torch.Generator().manual_seed(seed)).images[0])


def drawn(pipe, prompt="a cat", seeds=3, **options):
    return pixels(pipe(prompt, steps=STEPS, guidance=GUIDANCE, seeds=seeds, size=SIZE, **options)[0])


def pixels(picture):
    return np.asarray(picture).astype(int)


def apart(a, b):
    return np.abs(a - b).max()


OPTIONS = {
    "negative": ({"negative": "a dog"}, {"negative_prompt": "a dog"}),
    "empty negative": ({"negative": ""}, {"negative_prompt": ""}),
    "skip 1": ({"clip_skip": 1}, {"clip_skip": 1}),
    "skip 0": ({"clip_skip": 0}, {"clip_skip": 0}),
    "both": ({"clip_skip": 1, "negative": "ugly"}, {"clip_skip": 1, "negative_prompt": "ugly"}),
    "too long": ({"negative": "abcdefghi"}, {"negative_prompt": "abcdefghi"}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_as_diffusers_draws_it(pair, name):
    stock, ours = pair
    here, there = OPTIONS[name]
    assert apart(drawn(ours, **here), theirs(stock, **there)) <= 2
    same = name == "skip 0" or (name == "empty negative" and isinstance(stock, diffusers.StableDiffusionPipeline))
    assert (apart(drawn(ours, **here), drawn(ours)) > 2) != same


def test_zeros_for_no_negative_prompt_as_the_folder_says(tmp_path):
    stock = stable_diffusion_xl()
    stock.register_to_config(force_zeros_for_empty_prompt=False)
    stock.save_pretrained(tmp_path)
    ours = ldmfast.load(tmp_path)
    assert apart(drawn(ours), theirs(stock)) <= 2
    stock.register_to_config(force_zeros_for_empty_prompt=True)
    assert apart(drawn(ours), theirs(stock)) > 2


def test_each_picture_has_its_own_negative_or_none(pair):
    _, ours = pair
    asked = {"steps": STEPS, "guidance": GUIDANCE, "seeds": [3, 4, 5], "size": SIZE}
    negatives = ["a dog", None, "ugly"]
    together = ours(["a cat"] * 3, negative=negatives, batch=2, **asked)
    for i, negative in enumerate(negatives):
        assert apart(pixels(together[i]), drawn(ours, seeds=3 + i, negative=negative)) <= 1


@pytest.mark.parametrize("plain", ["a cat", "cat, dog", ""])
def test_weights_of_one_are_no_weights(pair, plain):
    _, ours = pair
    weighted = " ".join(f"({word}:1.0)" for word in plain.split()) or "(:1.0)"
    got = ours.conditioner.read([weighted], PromptReading(weights=True)).context
    assert torch.equal(got, ours.conditioner.read([plain], PromptReading(weights=False)).context)


def test_weights_scale_the_states_and_keep_their_mean(sd):
    """By diffusers' own pipeline, given states that are weighted here by hand."""
    stock = stable_diffusion()
    states, empty = stock.encode_prompt("a cat", "cpu", 1, True)
    weights = torch.tensor([1, 1, 1.5, 1.5, 1.5, 1, 1])  # beginning, a, c, a, t, end, padding
    found = states * weights[:, None]
    found = found * (states.mean() / found.mean())
    wanted = theirs(stock, None, prompt_embeds=found, negative_prompt_embeds=empty)
    assert apart(drawn(sd, "a (cat:1.5)"), wanted) <= 2
    assert apart(drawn(sd, "a (cat:1.5)", prompt_weights=False), theirs(stock, "a (cat:1.5)")) <= 2
    assert apart(drawn(sd, "a (cat)"), theirs(stock, "a (cat)")) <= 2  # no explicit weight: as diffusers
    assert apart(drawn(sd, "a (cat)", prompt_weights=True), drawn(sd, "a (cat:1.1)")) <= 1
    assert apart(drawn(sd, "a (cat)", prompt_weights=True), drawn(sd, "a (cat)")) > 2


def test_weights_scale_both_towers_of_sdxl(tmp_path):
    stock = stable_diffusion_xl()
    stock.save_pretrained(tmp_path)
    states, _, pooled, _ = stock.encode_prompt("a cat", device="cpu", do_classifier_free_guidance=False)
    weights = torch.tensor([1, 1, 1.5, 1.5, 1.5, 1, 1])
    zeros = {"negative_prompt_embeds": states * 0, "negative_pooled_prompt_embeds": pooled * 0}
    wanted = theirs(stock, None, prompt_embeds=states * weights[:, None], pooled_prompt_embeds=pooled, **zeros)
    assert apart(drawn(ldmfast.load(tmp_path), "a (cat:1.5)"), wanted) <= 2


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("a [b] c", [("a ", 1), ("b", 1 / 1.1), (" c", 1)]),
        ("a: (b :0.5), c)", [("a: ", 1), ("b ", 0.5), (", c)", 1)]),
        ("(a (b:2):3)", [("a ", 3), ("b", 6)]),
        ("(a:-1)", [("a", -1)]),
        ("", [("", 1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1),
                ("house", 1.3 * 1.1**2),
                (" ", 1.1),
                ("on", 1),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.1**4),
                (".", 1.1),
            ],
        ),
    ],
)
def test_the_grammar_of_weights(prompt, wanted):
    found = pieces(prompt, True)
    assert [text for text, _ in found] == [text for text, _ in wanted]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in wanted])


@pytest.mark.parametrize(
    ("prompt", "weights", "read"),
    [
        ("a (cat)", None, False),
        ("a (cat:1.2)", None, True),
        ("a ((cat) dog:1.2)", None, True),
        (r"a \(cat:1.2)", None, False),
        ("a (cat)", True, True),
        ("a (cat:1.2)", False, False),
        ("<lora:x:1>", False, False),
    ],
)
def test_when_the_grammar_is_read(prompt, weights, read):
    assert (pieces(prompt, weights) != [(prompt, 1.0)]) is read


@pytest.mark.parametrize(
    ("prompt", "weights", "message"),
    [
        ("a cat <lora:style:0.8>", None, "'<lora:style:0.8>' in the prompt names a LoRA.*lora=.*--lora"),
        ("a <hypernet:x:1> cat", True, "names a hypernetwork"),
        ("a [cat:dog:0.5]", True, "changes the prompt between steps"),
        ("a (cat:1.2) [in|out]", None, "changes the prompt between steps"),
        (f"(cat:1{'0' * 400})", None, "no finite number"),
    ],
)
def test_what_is_no_weight_is_said(prompt, weights, message):
    with pytest.raises(ValueError, match=message):
        pieces(prompt, weights)


LONG = "cat dog (bird:1.2) fish"  # 14 letters: three chunks of five


def test_a_long_prompt_is_read_in_chunks(pair):
    """The states of the chunks side by side; the masked rest of the other prompt counts for nothing."""
    _, ours = pair
    plain = "abcde fghij kl"
    found = ours.conditioner.read([plain, "ab"], PromptReading(long=True))
    parts = [ours.conditioner.read([part]).context[0] for part in ("abcde", "fghij", "kl")]
    assert found.context.shape[1] == 3 * TOKENS and found.context_mask.sum(1).tolist() == [3 * TOKENS, TOKENS]
    torch.testing.assert_close(found.context[0], torch.cat(parts), rtol=0, atol=2e-5)  # batches of other sizes
    alone = drawn(ours, plain, long_prompts=True)
    beside = ours([plain, "ab"], steps=STEPS, guidance=GUIDANCE, seeds=[3, 3], size=SIZE, long_prompts=True)
    assert apart(pixels(beside[0]), alone) <= 1
    assert apart(pixels(beside[1]), drawn(ours, "ab", long_prompts=True)) <= 1
    assert apart(pixels(beside[1]), drawn(ours, "ab")) <= 1
    assert apart(alone, drawn(ours, plain)) > 2


def test_a_long_prompts_picture_has_the_same_bits_in_company(sd):
    asked = {"steps": STEPS, "guidance": GUIDANCE, "size": SIZE, "long_prompts": True}
    with numerics("exact"):
        together = sd(["ab", LONG], seeds=[3, 4], **asked)
        alone = [sd(prompt, seeds=seed, **asked)[0] for prompt, seed in (("ab", 3), (LONG, 4))]
    assert [picture.tobytes() for picture in together] == [picture.tobytes() for picture in alone]


def test_break_begins_a_chunk(sd):
    found = sd.conditioner.read(["ab BREAK cd"], PromptReading(long=True)).context
    parts = [sd.conditioner.read([part]).context for part in ("ab", "cd")]
    torch.testing.assert_close(found, torch.cat(parts, dim=1), rtol=0, atol=2e-5)


def test_a_prompt_that_is_cut_is_said(sd):
    with pytest.warns(UserWarning, match="only the first 7 tokens count of: abcdef; long_prompts=True reads all of it"):
        drawn(sd, "abcdef")


def test_a_callback_sees_each_step_and_may_change_the_latents(pair):
    stock, ours = pair
    seen = []

    def halve(pipe, step, time, given):
        seen.append((step, int(time), given["latents"].shape))
        return {"latents": given["latents"] * 0.5} if step == 0 else {}

    wanted = theirs(stock, callback_on_step_end=halve)
    got = drawn(ours, callback_on_step_end=halve)
    assert apart(got, wanted) <= 2 and apart(got, drawn(ours)) > 2
    assert seen[:STEPS] == seen[STEPS:] and len(seen) == 2 * STEPS


def test_a_callback_may_stop_the_run(pair):
    stock, ours = pair

    def stop(pipe, step, time, given):
        pipe._interrupt = True
        return {}

    assert apart(drawn(ours, callback_on_step_end=stop), theirs(stock, callback_on_step_end=stop)) <= 2
    assert len(ours(["a"] * 3, batch=2, steps=STEPS, size=SIZE, callback_on_step_end=stop)) == 2
    assert apart(drawn(ours), theirs(stock)) <= 2  # the next call is whole


class WantsMore:
    tensor_inputs = ("latents", "prompt_embeds")

    def __call__(self, *arguments):
        raise AssertionError


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"negative": ["a", "b"]}, ValueError, "2 negative inputs for 1 pictures"),
        ({"negative": "a", "guidance": 1}, ValueError, "negative='a' does nothing without guidance"),
        ({"negative": 3}, ValueError, "a caption must be a string; got 3"),
        ({"clip_skip": 2}, ValueError, "clip_skip=2 must be a whole number from 0 to 1: the tower has 2 layers"),
        ({"clip_skip": -1}, ValueError, "clip_skip=-1 must be"),
        ({"clip_skip": 0.5}, ValueError, "clip_skip=0.5 must be"),
        ({"callback_on_step_end": 3}, TypeError, "callback_on_step_end=3, expected a function"),
        ({"callback_on_step_end": WantsMore()}, ValueError, "WantsMore wants prompt_embeds"),
        ({"callback_on_step_end": lambda *_: 3}, TypeError, "gave a int, expected a dict or None"),
        ({"callback_on_step_end": lambda *_: {"latents": torch.ones(1)}}, ValueError, r"gave latents \[1\], expected"),
        ({"num_inference_steps": 5}, TypeError, "num_inference_steps is called steps here"),
        ({"negative_prompt": "a"}, TypeError, "negative_prompt is called negative here"),
        ({"ip_adapter_image": 1}, TypeError, "ip_adapter_image stays with diffusers: ldmfast.optimize"),
        ({"colour": "red"}, TypeError, "takes no colour; it takes inputs, steps, .*callback_on_step_end"),
    ],
)
def test_what_is_wrong_or_elsewhere_is_said(sd, options, error, message):
    with pytest.raises(error, match=message):
        sd("a cat", **{"steps": STEPS, "size": SIZE, "guidance": GUIDANCE} | options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("enable_model_cpu_offload", "it stays with diffusers: ldmfast.optimize"),
        ("load_ip_adapter", "it stays with diffusers"),
        ("load_lora_weights", r"it is ldmfast.load_lora\(pipe, FILE"),
        ("load_textual_inversion", r"it is ldmfast.load_embedding\(pipe, FILE"),
        ("colour", "has no attribute 'colour'$"),
        ("_colour", "has no attribute '_colour'$"),
    ],
)
def test_a_method_of_diffusers_is_said_where_it_is_looked_for(sd, name, message):
    with pytest.raises(AttributeError, match=message):
        getattr(sd, name)


@pytest.mark.parametrize("load", [ldmfast.load, ldmfast.LatentDiffusionPipeline.from_pretrained])
@pytest.mark.parametrize(
    ("option", "message"),
    [("torch_dtype", "torch_dtype is called dtype here"), ("device_map", "stays with diffusers"), ("x", "takes no x")],
)
def test_an_option_of_diffusers_from_pretrained_is_said(load, option, message):
    with pytest.raises(TypeError, match=message):
        load("emoji320", **{option: 1})


def test_a_model_without_clip_takes_a_negative_prompt_and_nothing_of_clips():
    pipe = ldmfast.load("emoji320")
    plain, away = (pixels(pipe("a cat", steps=STEPS, negative=n)[0]) for n in (None, "a dog"))
    assert apart(plain, away) > 2 and apart(pixels(pipe("a cat", steps=STEPS, negative="")[0]), plain) <= 1
    for option in ({"clip_skip": 1}, {"prompt_weights": True}, {"long_prompts": True}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}=.* is for models whose text encoder is CLIP's"):
            pipe("a cat", steps=STEPS, **option)


def test_a_class_is_guided_away_from():
    pipe = ldmfast.load("scenes64")
    pictures = [pipe({"class": "cat"}, steps=STEPS, seeds=1, negative=n)[0] for n in (None, {"class": "dog"})]
    assert apart(*map(pixels, pictures)) > 2
