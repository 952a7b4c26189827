"""How large the networks are, and how fast, as ratios between things timed in the same run.

    python tests/benchmark.py                   # all rows that this machine can do, a few minutes
    python tests/benchmark.py --only presets    # or: attention, dit, vae, unet, gpu; with commas
    OMP_NUM_THREADS=1 python tests/benchmark.py --cpu-time      # processor time: on a busy machine

The presets: parameters of each network, and the FLOPs of one forward over its window (PaSST 10 s;
the VAE, which takes any length, 5.94 s there and back). Every other row gives a measured value and,
if it has one, its bound. What is compared takes turns, after one warm-up each; the medians over all
rounds are divided. A model is compared with the rate of a large matrix product (GEMM), in turns
with it. FLOPs are those of matrix products and convolutions, a multiply-add counted as two. Peak
memory is what one call adds at its fullest: on CUDA from the allocator, on the CPU as the running
sum of torch.profiler's allocation events.
"""
import argparse
import contextlib
import platform
import statistics
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dit
import unet1d
import vae
from diffusion import v_loss
from guidance import Term, frozen, guided_estimate
from tasks import PASST_PRESETS, KeepEnds, PaSST, l1

MiB = 2**20
clock = time.perf_counter


def medians(runs, rounds, device):
    """{name: function} -> {name: seconds}.

    They take turns, so that whatever else the machine does slows all of them alike.
    """
    seconds = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            start = now(device)
            run()
            if i > 0:                                               # the first round warms up
                seconds[name].append(now(device) - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock()


def flops(run):
    """({operation: FLOPs}, the sum) of run(), on the meta device too."""
    # torch.autocast does not know the meta device
    autocast = contextlib.nullcontext()
    if torch.empty(0).is_meta:
        autocast = patch("torch.autocast", lambda *_, **__: contextlib.nullcontext())
    with autocast, FlopCounterMode(display=False) as counter:
        run()
    return counter.get_flop_counts().get("Global", {}), counter.get_total_flops()


def peak_memory(run, device):
    """MiB that run() needs at its fullest, beyond what is allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / MiB
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        run()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":              # one per allocation (+) and release (-)
            held += event.nbytes()
            peak = max(peak, held)
    return peak / MiB


def gemm(device, dtype=torch.float32):
    """(a function, its FLOPs): the product of two square matrices that models are compared with.

    On the CPU as a 1 x 1 convolution, which oneDNN computes; F.linear may take a slower library.
    """
    size = 8192 if device.type == "cuda" else 1536
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    if device.type == "cuda":
        return lambda: a @ b, 2 * size**3
    x, w = a.reshape(1, size, size), b[:, :, None]
    return lambda: F.conv1d(x, w), 2 * size**3


def row(what, reached, bound, at_most=True, unit=""):
    """Print a line: what was reached, and its bound if there is one."""
    target = verdict = ""
    if bound is not None:
        sign = "<=" if at_most else ">="
        met = reached <= bound if at_most else reached >= bound
        target = f"{sign} {bound:.3g}{unit}"
        verdict = "reached" if met else "MISSED"
    print(f"{what:58}{reached:9.2f}{unit:5}{target:>12}  {verdict}", flush=True)


def at_random(model, device):
    """The model with its zero-initialised layers random too, as after training."""
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    return model.to(device)


@torch.no_grad()
def presets(rounds, device):
    """Parameters, and FLOPs of one forward over each preset's window."""
    def there_and_back(net):
        return net.decode(net.encode(torch.empty(1, 2, 2**18)))

    def over_frames(net):
        return net(torch.empty(1, net.config.channels, net.config.frames), torch.empty(1))

    def over_samples(net):
        return net(torch.empty(1, 2, net.config.samples), torch.empty(1))

    def over_mel(net):
        return net(torch.empty(1, 128, 1000))

    networks = ((vae.VAE, vae.PRESETS, there_and_back), (dit.build, dit.PRESETS, over_frames),
                (unet1d.UNet1D, unet1d.PRESETS, over_samples), (PaSST, PASST_PRESETS, over_mel))
    for network, configs, forward in networks:
        for size, config in configs.items():
            # On the meta device large ones take no memory; but the times of spectra are computed.
            spectral = getattr(config, "hops", ())
            with torch.device("cpu" if spectral else "meta"):
                net = network(config)
                millions = sum(p.numel() for p in net.parameters()) / 1e6
                _, work = flops(lambda: forward(net))
            name = f"{type(net).__name__} {size}"
            print(f"    {name:16}{millions:9.2f} M parameters{work / 1e9:10.1f} GF a forward")


def attention(rounds, device):
    """L 2048, 6 heads of 64, distances up to 64, against the same attention without positions."""
    q, k, v = (torch.randn(1, 6, 2048, 64, device=device, requires_grad=True) for _ in range(3))
    r = torch.randn(129, 64, device=device, requires_grad=True)
    forms = {"plain": lambda: plain_attention(q, k, v, r),
             "relative": lambda: dit.relative_attention(q, k, v, r)}

    def forward(form):
        with torch.no_grad():
            forms[form]()

    def both(form):
        inputs = (q, k, v, r) if form == "relative" else (q, k, v)
        torch.autograd.grad(forms[form]().sum(), inputs)

    for what, run, bound in (("forward", forward, 1.35), ("forward + backward", both, 1.25)):
        s = medians({form: lambda form=form: run(form) for form in forms}, 3 * rounds, device)
        row(f"relative attention / plain, {what}", s["relative"] / s["plain"], bound, unit=" x")
        for form, limit in (("plain", None), ("relative", 100)):
            memory = peak_memory(lambda: run(form), device)
            row(f"{form} attention, {what}, peak memory", memory, limit, unit=" MiB")


def transformer(rounds, device):
    """A DiT's forward over 2048 frames as a share of the GEMM rate; guided steps."""
    config = dit.DiTConfig(channels=16, frames=2048, width=192, depth=6, heads=3)
    model = at_random(dit.build(config), device)
    spectral = at_random(dit.build(dit.PRESETS["small"]), device)
    x_t = torch.randn(1, config.channels, config.frames, device=device)
    t = torch.full((1,), 0.5, device=device)
    share_of_gemm("DiT 6 x 192, forward", lambda: no_grad(model, x_t, t), 0.7, rounds, device)
    shape = config.channels, config.frames
    # Attention's backward pass has five products of matrices for the forward's two, so that a step
    # takes over three forwards. The same network with torch's own attention shows how many.
    with patch("dit.relative_attention", plain_attention):
        plain = guided("DiT 6 x 192, plain attention", model, *shape, None, rounds, device)
    guided("DiT 6 x 192", model, *shape, plain, rounds, device)
    guided("SpectralDiT small", spectral, *shape, 2.2, rounds, device)


def plain_attention(q, k, v, r):
    """Without positions."""
    return F.scaled_dot_product_attention(q, k, v)


@torch.no_grad()
def no_grad(model, *inputs):
    return model(*inputs)


def share_of_gemm(what, run, bound, rounds, device, dtype=torch.float32, work=None):
    """The rate of run(), of so much work (default: all its FLOPs), as a share of the GEMM rate."""
    product, product_flops = gemm(device, dtype)
    work = work or flops(run)[1]
    s = medians({"run": run, "product": product}, rounds, device)
    rate, gemm_rate = work / s["run"], product_flops / s["product"]
    name = f"{what} ({rate / 1e9:.0f} of {gemm_rate / 1e9:.0f} GF/s)"
    row(name, rate / gemm_rate, bound, at_most=False)


def guided(what, model, C, n, bound, rounds, device):
    """A guided step (x0_hat, gradient of L1 on kept ends) against the unguided one.

    As guidance.sample takes them. Returns the ratio of their times.
    """
    x_t = torch.randn(1, C, n, device=device)
    A = KeepEnds(n, n // 4, n // 4)
    term = Term(A, l1, A(torch.randn_like(x_t)))
    t = torch.tensor(0.5, dtype=torch.float64)
    with frozen(model), torch.no_grad():
        run = {"guided": lambda: guided_estimate(model, x_t, t, [term]),
               "forward": lambda: guided_estimate(model, x_t, t, [])}
        s = medians(run, rounds, device)
        memory = peak_memory(run["guided"], device)
    assert all(p.grad is None for p in model.parameters()), \
        "a guided step must leave no parameter gradient"
    ratio = s["guided"] / s["forward"]
    row(f"{what}, guided step / forward ({s['forward']:.3f} s)", ratio, bound, unit=" x")
    row(f"{what}, guided step, peak memory", memory, None, unit=" MiB")
    return ratio


def unet(rounds, device):
    """A guided step of the U-Net; its forward as a share of the GEMM rate, without a bound."""
    config = unet1d.PRESETS["small"]
    model, n = at_random(unet1d.UNet1D(config), device), config.samples
    guided("U-Net small", model, 2, n, 2.2, rounds, device)
    x_t, t = torch.randn(1, 2, n, device=device), torch.full((1,), 0.5, device=device)
    share_of_gemm("U-Net small, forward", lambda: no_grad(model, x_t, t), None, rounds, device)


def autoencoder(rounds, device):
    """At least 60% of the GEMM rate times the matrix products' share of the FLOPs.

    The rest is depthwise.
    """
    config = vae.PRESETS["paper"]
    model, n = at_random(vae.VAE(config), device), 2**17
    audio = 0.1 * torch.randn(1, 2, n, device=device)
    latents = model.encode(audio)

    def train():
        reconstruction, mean, logvar = model(audio)
        loss = vae.reconstruction_loss(reconstruction, audio) + vae.KL_WEIGHT * vae.kl(mean, logvar)
        torch.autograd.grad(loss, list(model.parameters()))

    runs = {"encode": lambda: model.encode(audio), "decode": lambda: no_grad(model.decode, latents),
            "training step": train}
    for what, run in runs.items():
        by_kind, total = flops(run)
        products = sum(work for kind, work in by_kind.items() if "conv" not in str(kind))
        share = products / total
        share_of_gemm(f"VAE paper, {what}, x{share:.2f}", run, 0.6 * share, rounds, device,
                      work=products)


def gpu(rounds, device):
    """Guided and training steps of the paper presets in bf16, as shares of the bf16 GEMM rate."""
    if device.type != "cuda":
        print("no CUDA device here: paper presets in bf16 not measured")
        return
    models = (("DiT", dit.DiT, dit.PRESETS["paper"], 32, 2048),
              ("U-Net", unet1d.UNet1D, unet1d.PRESETS["paper"], 2, 2**19))
    for name, net, config, C, n in models:
        model = at_random(net(config), device)
        x_0 = torch.randn(1, C, n, device=device)
        eps = torch.randn(1, C, n, device=device)
        t = torch.tensor([0.5])
        A = KeepEnds(n, n // 4, n // 4)
        term = Term(A, l1, A(x_0))

        def train():
            with torch.autocast("cuda", torch.bfloat16):
                loss = v_loss(model, x_0, t.double(), eps).mean()
            torch.autograd.grad(loss, list(model.parameters()))

        def guide():
            with torch.autocast("cuda", torch.bfloat16), frozen(model):
                guided_estimate(model, eps, t[0].double(), [term])

        # A backward pass counts as one forward, or two with the weights' gradients; what is
        # recomputed does not count.
        _, forward = flops(lambda: no_grad(model, x_0, t.to(device)))
        for what, run, forwards in (("guided step", guide, 2), ("training step", train, 3)):
            share_of_gemm(f"{name} paper, {what}", run, 0.5, rounds, device, torch.bfloat16,
                          work=forwards * forward)
        del model


BENCHMARKS = {
    "presets": presets,
    "attention": attention,
    "dit": transformer,
    "vae": autoencoder,
    "unet": unet,
    "gpu": gpu,
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    every = ",".join(BENCHMARKS)
    add("--only", default=every, help="with commas (%(default)s)")
    add("--rounds", type=int, default=7, help="timed rounds; the median is taken (%(default)s)")
    add("--cpu-time", action="store_true",
        help="processor time instead of the clock; one thread only")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    args = parser.parse_args(argv)
    names = args.only.split(",")
    unknown = sorted(set(names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"--only has no benchmark {', '.join(unknown)}: choose among {every}")
    if args.cpu_time:
        if torch.get_num_threads() > 1:
            parser.error("--cpu-time adds up the time of all threads: set OMP_NUM_THREADS=1")
        global clock
        clock = time.process_time
    device = torch.device(args.device)
    torch.manual_seed(0)
    where = f"{platform.machine()} CPU"
    if device.type == "cuda":
        where = torch.cuda.get_device_name()
    print(f"{where}, {torch.backends.cpu.get_cpu_capability()}, "
          f"{torch.get_num_threads()} thread(s), torch {torch.__version__}")
    if names == ["presets"]:
        return presets(args.rounds, device)
    for dtype in (torch.float32, torch.bfloat16):
        product, work = gemm(device, dtype)
        rate = work / medians({"product": product}, args.rounds, device)["product"]
        print(f"GEMM rate, {str(dtype).removeprefix('torch.')}: {rate / 1e9:.0f} GF/s")
    print(f"\n{'measured':58}{'result':>14}{'bound':>12}")
    for name in names:
        BENCHMARKS[name](args.rounds, device)


if __name__ == "__main__":
    main()
