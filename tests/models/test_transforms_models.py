"""Forward-mode AD, torch.func, torch.export and torch.compile on models and schedulers: what the stock ones give."""

from __future__ import annotations

import copy
import functools
import warnings

import diffusers
import pytest
import tiny
import torch
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldmfast.diffusion.ddim import DDIMScheduler
from ldmfast.diffusion.ddpm import DDPMScheduler
from ldmfast.diffusion.pndm import PNDMScheduler
from ldmfast.models import AutoencoderKL, UNet, UNet2D, VQModel

SMALL = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 8,
}
FLAT = {
    "sample_size": 8,
    "block_out_channels": (32, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "layers_per_block": 1,
}


class Function(torch.nn.Module):
    """A model as a function of a few tensors to one."""

    def __init__(self, model, call):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *inputs):
        return self.call(self.model, *inputs)


def denoiser(family):
    stock = tiny.unet(family)
    given = tiny.inputs(stock, size=(8, 8))
    added = given.get("added_cond_kwargs", {})

    def call(model, x, context, *more):
        time = torch.tensor([30, 700])[: x.shape[0]]
        return model(x, time, context, added_cond_kwargs=dict(zip(added, more, strict=True)) or None).sample

    return stock, UNet, call, (given["sample"], given["encoder_hidden_states"], *added.values())


def unconditional():
    inputs = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 7.0])
    return diffusers.UNet2DModel(**FLAT).eval(), UNet2D, lambda model, x, t: model(x, t).sample, inputs


def autoencoder(method):
    call = {"encode": lambda m, x: m.encode(x).latent_dist.parameters, "decode": lambda m, x: m.decode(x).sample}[
        method
    ]
    shape = (2, 3, 16, 16) if method == "encode" else (2, 4, 4, 4)
    return tiny.vae(), AutoencoderKL, call, (torch.randn(shape),)


def codebook(method, **options):
    call = {"encode": lambda m, x: m.encode(x).latents, "decode": lambda m, x: m.decode(x, **options).sample}[method]
    stock = diffusers.VQModel(**SMALL, num_vq_embeddings=16).eval()
    return stock, VQModel, call, (torch.randn((2, 3, 16, 16) if method == "encode" else (2, 3, 4, 4)),)


MODELS = {
    "sd1": lambda: denoiser("sd1"),
    "sdxl": lambda: denoiser("sdxl"),
    "unet2d": unconditional,
    "encode": lambda: autoencoder("encode"),
    "decode": lambda: autoencoder("decode"),
    "vq-encode": lambda: codebook("encode"),
    "vq-decode": lambda: codebook("decode", force_not_quantize=True),
    "vq-quantised": lambda: codebook("decode"),
}


def pair(name):
    """(stock's function, ours, inputs)"""
    torch.manual_seed(0)
    stock, ours, call, inputs = MODELS[name]()
    return Function(stock, call), Function(ours.adopt(copy.deepcopy(stock)), call), inputs


def along(inputs):
    return tuple(torch.cos(x) for x in inputs)


def loss(out):
    return out.square().sum()


def each(f):
    """f of one sample without its dimension."""
    return lambda *inputs: f(*(x[None] for x in inputs))[0]


def parameters(f):
    return {name: value.detach() for name, value in f.named_parameters()}


def flat(tensors):
    return torch.cat([value.flatten() for value in tensors.values()])


def jvp(f, inputs):
    return torch.func.jvp(f, inputs, along(inputs))[1]


def dual(f, inputs):
    with torch.no_grad(), forward_ad.dual_level():
        out = f(*map(forward_ad.make_dual, inputs, along(inputs)))
        return forward_ad.unpack_dual(out).tangent


def jvp_of_parameters(f, inputs):
    values = parameters(f)
    tangents = {name: torch.cos(value) for name, value in values.items()}
    return torch.func.jvp(lambda p: functional_call(f, p, inputs), (values,), (tangents,))[1]


def hessian_vector(f, inputs):
    return torch.func.jvp(torch.func.grad(lambda *x: loss(f(*x))), inputs, along(inputs))[1]


def per_sample(f, inputs):
    grad = torch.func.grad(lambda p, *x: loss(functional_call(f, p, tuple(a[None] for a in x))))
    return flat(torch.func.vmap(grad, in_dims=(None, *[0] * len(inputs)))(parameters(f), *inputs))


def ensemble(f, inputs):
    both = {name: torch.stack([value, 0.9 * value]) for name, value in parameters(f).items()}
    return torch.func.vmap(lambda p: functional_call(f, p, inputs))(both)


def last_dimension(f, inputs):
    x, *others = inputs
    return torch.func.vmap(lambda x: f(x, *others), in_dims=-1)(torch.stack([x, 0.5 * x], -1))


FORWARD = {"jvp": jvp, "dual": dual, "parameters": jvp_of_parameters, "hessian-vector product": hessian_vector}
REVERSE = {
    "grad": lambda f, inputs: torch.func.grad(lambda *x: loss(f(*x)))(*inputs),
    "vjp": lambda f, inputs: torch.func.vjp(f, *inputs)[1](torch.cos(f(*inputs)))[0],
    "vmap": lambda f, inputs: torch.func.vmap(each(f))(*inputs),
    "vmap, no_grad": lambda f, inputs: torch.no_grad()(torch.func.vmap(each(f)))(*inputs),
    "per-sample gradients": per_sample,
}
# the stock models with attention over pixels, whose views forward mode and inner batches do not allow
PIXELS = ("unet2d", "encode", "decode", "vq-encode", "vq-decode", "vq-quantised")


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


def compare(transform, name):
    stock, ours, inputs = pair(name)
    with sdpa_kernel(SDPBackend.MATH):
        wanted = transform(stock, inputs)
    got = transform(ours, inputs)
    assert wanted.abs().sum() > 0
    assert tiny.error(got.detach(), wanted.detach()) < 1e-4


@pytest.mark.parametrize("transform", REVERSE)
@pytest.mark.parametrize("name", MODELS)
def test_reverse_mode_and_vmap(name, transform):
    compare(REVERSE[transform], name)


@pytest.mark.parametrize("transform", [*FORWARD, "ensemble", "vmap, last"])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in PIXELS])
def test_forward_mode_and_inner_batches(name, transform):
    compare({**FORWARD, "ensemble": ensemble, "vmap, last": last_dimension}[transform], name)


@pytest.mark.parametrize("name", [name for name in PIXELS if name != "vq-quantised"])
def test_forward_mode_where_the_stock_model_refuses(name):
    """With regard to the picture, beside differences of the stock model in float64."""
    stock, ours, inputs = pair(name)
    x, *others = inputs
    exact, h = [other.double() for other in others], 1e-5
    with torch.no_grad():
        up, down = (stock.double()(x.double() + s * h * torch.cos(x.double()), *exact) for s in (1, -1))
    for transform in (jvp, dual):
        assert tiny.error(transform(lambda x: ours(x, *others), (x,)), (up - down) / (2 * h)) < 1e-4


def test_a_codebook_has_no_forward_mode_as_in_the_stock_model():
    for f in pair("vq-quantised")[:2]:
        with pytest.raises(NotImplementedError, match="forward AD with _euclidean_dist that does not support it"):
            jvp(f, (torch.randn(2, 3, 4, 4),))


def test_a_float16_picture_is_not_looked_at_under_vmap():
    """Whether it overflowed would be asked of a hidden batch."""
    vae = AutoencoderKL.adopt(tiny.vae()).half()
    z = torch.randn(2, 4, 4, 4).half()
    with torch.no_grad():
        got, wanted = torch.func.vmap(lambda z: vae.decode(z[None]).sample[0])(z), vae.decode(z).sample
    assert got.dtype is torch.float16 and tiny.error(got, wanted) < 0.02


def ddim(scheduler, output, sample, **named):
    return scheduler.step(output, 500, sample, **named).prev_sample


def ddim_noised(scheduler, output, sample):
    return scheduler.step(output, 500, sample, eta=0.5, variance_noise=torch.ones(2, 4, 4, 4)).prev_sample


def ddpm(scheduler, output, sample):
    return scheduler.step(output, 500, sample, generator=torch.Generator().manual_seed(0)).prev_sample


def plms(scheduler, output, sample):
    scheduler.set_timesteps(4)  # forgets the steps before
    for t in scheduler.timesteps:
        sample = scheduler.step(output * sample.sin(), t, sample).prev_sample
    return sample


STEPS = {
    "ddim": (DDIMScheduler, {"clip_sample": False}, ddim),
    "ddim-clipped": (DDIMScheduler, {"clip_sample_range": 2.0}, ddim),
    "ddim-v": (DDIMScheduler, {"prediction_type": "v_prediction", "clip_sample": False}, ddim_noised),
    "ddpm": (DDPMScheduler, {"clip_sample": False}, ddpm),
    "plms": (PNDMScheduler, {"skip_prk_steps": True}, plms),
}


@pytest.mark.parametrize(
    "name, transform",
    [
        (name, transform)
        for name in STEPS
        for transform in ("jvp", "dual", "hessian-vector product", "grad", "vjp", "vmap")
        if not (transform == "vmap" and name in ("ddim-v", "ddpm"))  # their noise is that of a whole batch
    ],
)
def test_schedulers(name, transform):
    kind, options, step = STEPS[name]
    stock = kind.stock(**options)
    torch.manual_seed(0)
    inputs = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    if transform == "vmap":
        inputs = tuple(torch.stack([x, 0.5 * x]) for x in inputs)
    found = []
    for scheduler in (stock, kind.adopt(stock)):
        scheduler.set_timesteps(10)
        f = functools.partial(step, scheduler)
        found.append(
            torch.func.vmap(f)(*inputs) if transform == "vmap" else {**FORWARD, **REVERSE}[transform](f, inputs)
        )
    assert found[0].abs().sum() > 0
    assert tiny.error(found[1].detach(), found[0].detach()) < 1e-4


def test_guidance_has_a_tangent():
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    output, sample = torch.randn(4, 4, 4, 4), torch.randn(2, 4, 4, 4)

    def step(output, sample):
        return scheduler.step(output, 500, sample, guidance=3.0).prev_sample

    def plain(output, sample):
        u, c = output.chunk(2)
        return scheduler.step(u + 3.0 * (c - u), 500, sample).prev_sample

    torch.testing.assert_close(jvp(step, (output, sample)), jvp(plain, (output, sample)))
    assert jvp(step, (output, sample)).abs().sum() > 0


class Positional(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *inputs):
        return self.model(*inputs, return_dict=False)[0]


@pytest.mark.parametrize("name", ["sd1", "unet2d"])
def test_exports_with_a_dynamic_batch(name):
    torch.manual_seed(0)
    stock, kind, _, inputs = MODELS[name]()
    if name == "sd1":
        inputs = inputs[0], torch.tensor([30, 700]), inputs[1]
    batch = torch.export.Dim("batch", min=1, max=9)
    shapes = ({0: batch},) * len(inputs)
    with torch.no_grad():
        module = Positional(kind.adopt(stock))
        exported = torch.export.export(module, inputs, dynamic_shapes=(shapes,)).module()
        for n in (1, 2, 3, 5):
            given = [torch.cat([x] * 3)[:n] for x in inputs]
            assert tiny.error(exported(*given), module(*given)) < 1e-5


def test_as_many_graphs_as_the_stock_model():
    """Six sizes in turn."""
    sizes = ((8, 8), (16, 8), (8, 24), (24, 24), (32, 16), (16, 16))
    torch.manual_seed(0)
    stock = tiny.unet(
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
        layers_per_block=1,
    )
    counts = []
    for model in (stock, UNet.from_unet(copy.deepcopy(stock))):
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter)
        for size in sizes:
            time, context = torch.full((2,), 30), torch.randn(2, 7, 32)
            x = torch.randn(2, 4, *size)
            with torch.no_grad():
                assert tiny.error(compiled(x, time, context).sample, stock(x, time, context).sample) < 1e-5
        counts.append(counter.frame_count)
    assert counts[1] <= counts[0]
