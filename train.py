"""Training (App. C.2, Sect. 4.2): from a folder of music to the checkpoint that sample.py takes.

    python train.py --model latent                              # built-in synthetic music
    python train.py --model latent --data path/to/music         # wav flac ogg mp3, at any depth
    python train.py --model vae --data path/to/music            # an autoencoder of your own, then:
    python train.py --model decoder --vae runs/vae/model.pt --data path/to/music
    python train.py --model latent --vae runs/decoder/model.pt --data path/to/music

All that is random about clip k of a run (where it is cut, t, noise, patchout) is a function of
(seed, k) alone, and a step's number says which clips it takes. So a resumed run needs no state of
random numbers, and the numbers of threads, processes and micro-batches do not change what is
trained. Two quantities of a VAE and its decoder do depend on them, as they are no averages over
clips: the deviation of a channel, which scales the noise in latents, and feature matching, a ratio.
Each is taken over one micro-batch of one process.
"""
import argparse
import copy
import csv
import hashlib
import io
import math
import os
import re
import secrets
import shlex
import signal
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
import torch.distributed as dist
from torch import nn

try:
    import fcntl
except ImportError:                     # Windows
    fcntl = None

import dit
import sample
import vae as autoencoder
from diffusion import add_noise, alpha_sigma, v_error, v_loss, x0_from_v
from guidance import frozen
from sample import (NETS, RANK, SAMPLE_RATE, WORLD, Checkpoint, Parser, UserError, barrier,
                    flag_of, gathered, join_processes, load_checkpoint, load_state, open_audio,
                    open_checkpoint, pick_device, prepare_folder, progress, random_numbers,
                    read_audio, reason, refuse_idle, run, save_atomic, say, survey, to_stereo_44k,
                    within, write_atomic)
from tasks import PASST_RATE, full_precision, resample, to_resample
from vae import VAE

MODELS = (*NETS, "decoder")             # a decoder's checkpoint is a whole VAE, of kind "vae"
MIN_SECONDS = 0.16                      # in a clip; PaSST needs 0.15
MEASURED = {"tiny": 50, "small": 250, "paper": 1000}        # clips, for statistics
VALIDATED = 32                          # clips in one validation
LOOK = {"cpu": 1, "cuda": 20, "mps": 20}    # steps between looks at the numbers
HELD_OUT_HOURS = 80                     # at most, as in the paper
TRAIN, VALID, ENCODED = 0, 1, 2         # streams of random numbers
VERSIONS = 4                            # of a track in the cache of latents
# No sample is so far beyond full scale, not even 16-bit numbers that were written as floats; and
# its square, summed over a clip, is still finite in float32.
LOUDEST = 1e6
LOG = ("step", "seconds", "loss", "lr", "gradient_norm", "validation")      # columns of log.csv
# What a run shows when all is well.
FALLS = "the loss jumps with the times that are drawn; its mean falls, fast at first, then slowly"
HEALTHY = {
    "latent": FALLS,
    "waveform": FALLS,
    "vae": "the loss falls, and listen-*.wav comes to resemble the music",
    "decoder": "the loss goes up and down, as in a contest; the validation stays low",
    "classifier": "the loss is near 0.7 at first and falls; the accuracy of the validation rises",
}
PLAYED, PLAY_STEPS = 2.0, 20            # seconds of context, and as many new ones; of sampling


# ---- recipes -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Recipe:
    """How one size of a model is trained.

    Steps, batch and warm-up of the two diffusion models in the paper's size are those of App. C.2;
    learning rates, the averages of the weights and all other sizes are ours.
    """
    steps: int
    batch: int                          # clips of the longest window in a step
    lr: float
    warmup: int                         # steps; never more than a tenth of them
    ema: float                          # decay of the moving average of the weights
    windows: tuple = ()                 # samples in a clip, in turns; (): the model's own window
    cooldown: float = 0.35              # share of the steps over which the rate falls to zero
    muon: bool = False                  # see make_optimizers
    own_error: bool = False             # see Denoising
    beta2: float = 0.999                # of AdamW


RECIPES = {
    "vae": {
        "tiny": Recipe(100, 4, 1e-3, 10, 0.95, (2**14,), muon=True),
        "small": Recipe(20_000, 8, 2e-3, 500, 0.999, (2**15,), muon=True),
        "paper": Recipe(400_000, 32, 2e-4, 5000, 0.9999, (2**16,)),
    },
    "decoder": {
        "tiny": Recipe(10, 4, 1.5e-4, 10, 0.95, (2**14,)),
        "small": Recipe(4_000, 8, 3e-4, 500, 0.999, (2**15,)),
        "paper": Recipe(50_000, 32, 3e-5, 5000, 0.9999, (2**16,)),
    },
    "latent": {
        "tiny": Recipe(300, 8, 2e-3, 20, 0.98, muon=True, own_error=True),
        "small": Recipe(20_000, 2, 2e-3, 200, 0.999, (2**16, 2**17, 2**18),
                        muon=True, own_error=True),
        "paper": Recipe(300_000, 96, 1e-4, 5000, 0.9999),
    },
    "waveform": {
        "tiny": Recipe(300, 8, 2e-3, 20, 0.98, beta2=0.99),
        "small": Recipe(20_000, 8, 1e-3, 200, 0.999, beta2=0.99),
        "paper": Recipe(600_000, 384, 1e-4, 5000, 0.9999),
    },
    "classifier": {
        "tiny": Recipe(200, 8, 1e-3, 20, 0.98, (2**16,)),
        "small": Recipe(4_000, 16, 1e-3, 100, 0.99, (3 * SAMPLE_RATE,), muon=True),
        "paper": Recipe(100_000, 96, 1e-4, 5000, 0.999, (10 * SAMPLE_RATE,)),
    },
}


# ---- objectives ----------------------------------------------------------------------------------
#
# draw(rng, window) -> what is random about one clip of `window` samples, numpy numbers and arrays
# forward(**batch)  -> {"loss": what training minimises, and what else a validation shows}

class Denoising(nn.Module):
    """The v-objective of App. B.1, on latents of a frozen VAE or, weighted, on waveforms.

    With own_error (ours), a stretch of half of the clips is moved towards the model's own estimate,
    so that training meets the errors that sampling makes.
    """

    def __init__(self, net, vae=None, own_error=False):
        super().__init__()
        self.net = net
        self.own_error = own_error
        # A plain object, no module: the VAE in it is neither trained nor saved with the weights.
        self.space = Checkpoint("latent" if vae else "waveform", net, vae)

    def draw(self, rng, window):
        n = window // self.space.hop
        shape = (self.space.channels, n)
        drawn = {"t": np.float64(1 - rng.random())}                         # in (0, 1]
        drawn["eps"] = rng.standard_normal(shape, dtype=np.float32)
        # A clip shorter than the window may stand anywhere in it; what has no positions ignores it.
        if self.space.kind == "latent":
            drawn["start"] = np.int64(rng.integers(self.space.window - n + 1))
        if self.own_error:
            position = np.arange(n, dtype=np.float32) / n
            first, last = np.sort(rng.uniform(-0.3, 1.3, 2))
            share = max(0, rng.uniform(-1, 1)) * ((first < position) & (position < last))
            drawn["first_eps"] = rng.standard_normal(shape, dtype=np.float32)
            drawn["share"] = share.astype(np.float32)[None]                 # (1, n)
            drawn["moved"] = np.bool_(share.any())
        return drawn

    def forward(self, x, t, eps, start=None, first_eps=None, share=None, moved=None, encoded=None,
                **_):
        # Into model space, where the clips are not yet latents from the cache.
        x_0 = x
        if encoded is None or not encoded[0]:
            with full_precision(x):
                x_0 = self.space.encode(x)                                  # (B, C, n)
        model = self.net
        if isinstance(self.net, dit.DiT):
            model = partial(self.net, start=start)
        if self.training and self.own_error and moved.any():
            eps = self.with_own_error(model, x_0, t, eps, first_eps, share)
        weigh = self.net.weigh if self.space.kind == "waveform" else None
        return {"loss": v_loss(model, x_0, t, eps, weigh).mean()}

    def with_own_error(self, model, x_0, t, eps, first_eps, share):
        """Noise such that x_t is built from x_0 moved by `share` towards the model's own estimate.

        With it, x_t = alpha_t (x_0 + share (x0_hat - x_0)) + sigma_t eps, where x0_hat is the
        estimate from x_0 noised by first_eps. The target stays x_0. x_0, eps, first_eps (B, C, n);
        t (B,) in (0, 1], on the CPU; share (B, 1, n), 0 where nothing is moved.
        """
        with torch.no_grad():
            error = v_error(model, x_0, t, first_eps)                   # (x0_hat - x_0) / sigma_t
        # Before torch 2.11, autocast would reuse these copies of the weights, without a gradient.
        torch.clear_autocast_cache()
        alpha_t = alpha_sigma(t)[0].to(x_0, non_blocking=x_0.is_cuda)[:, None, None]
        return eps + share * alpha_t * error


class Autoencoding(nn.Module):
    """A VAE learns to reconstruct (App. C.1).

    In 70% of the clips its latents carry white noise besides the posterior's (ours): latents that a
    diffusion model makes have errors.
    """

    def __init__(self, net):
        super().__init__()
        self.net = net

    def draw(self, rng, window):
        return noise_in_latents(rng, self.net.config.latent_channels, window)

    def forward(self, x, noise, share, **_):
        if not self.training:
            return {"loss": autoencoder.reconstruction_loss(self.net(x)[0], x)}
        reconstruction, mean, logvar = self.net(x, noise, share)
        loss = autoencoder.reconstruction_loss(reconstruction, x)
        return {"loss": loss + autoencoder.KL_WEIGHT * autoencoder.kl(mean, logvar)}


class Decoding(nn.Module):
    """A VAE's decoder learns against a discriminator; the encoder is frozen (App. C.1).

    The decoder meets white noise as in Autoencoding, but not the posterior's.
    """

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.net.encoder.requires_grad_(False)
        self.discriminator = autoencoder.Discriminator(net.config)

    def draw(self, rng, window):
        return noise_in_latents(rng, self.net.config.latent_channels, window)

    def forward(self, x, noise, share, **_):
        if not self.training:
            return {"loss": autoencoder.reconstruction_loss(self.net(x)[0], x)}
        reconstruction = self.net(x, noise, share, posterior=False)[0]

        # The discriminator's side of the contest: the reconstruction is a constant.
        real = self.discriminator(x)
        fake = self.discriminator(reconstruction.detach())
        loss = autoencoder.discriminator_loss(real, fake)

        # The decoder's side: the discriminator is frozen.
        with frozen(self.discriminator):
            fake = self.discriminator(reconstruction)
        loss = loss + autoencoder.ADVERSARIAL_WEIGHT * autoencoder.adversarial_loss(fake)
        loss = loss + autoencoder.FEATURE_WEIGHT * autoencoder.feature_matching(real, fake)
        return {"loss": loss + autoencoder.reconstruction_loss(reconstruction, x)}


def noise_in_latents(rng, channels, window):
    """White noise for the latents of `window` samples, and its share: 0 in 30% of the clips."""
    noise = rng.standard_normal((channels, math.ceil(window / VAE.hop)), dtype=np.float32)
    return {"noise": noise, "share": np.float32(max(0.0, rng.uniform(-0.15, 0.35)))}


class Classifying(nn.Module):
    """Binary cross-entropy of each class, with structured patchout [30]; label -1 is no class.

    With a denoiser, a latent diffusion model, two thirds of the clips are its estimates of noised
    ones (ours): guidance shows the classifier such estimates, at all times t, not music.
    """

    def __init__(self, net, denoiser=None):
        super().__init__()
        self.net = net
        self.denoiser = denoiser            # a Checkpoint, no module: neither trained nor saved

    def draw(self, rng, window):
        drawn = {"patchout": np.int64(rng.integers(2**62))}
        if self.denoiser:
            shape = (self.denoiser.channels, math.ceil(window / self.denoiser.hop))
            drawn["t"] = np.float64(max(0.0, 1 - 1.5 * rng.random()))       # 0: not noised
            drawn["eps"] = rng.standard_normal(shape, dtype=np.float32)
        return drawn

    @torch.no_grad()
    def estimated(self, x, t, eps):
        """The denoiser's x0_hat, decoded, of clips x (B, 2, n) noised to t (B,); at t = 0, x."""
        noised = t > 0
        if not noised.any():
            return x
        t = t[noised]
        with full_precision(x):
            x_0 = self.denoiser.encode(x[noised])                           # (noised, C, frames)
        x_t, _ = add_noise(x_0, eps[noised], t)
        v = self.denoiser.net(x_t, t.to(x_t)).float()
        with full_precision(x):
            audio = self.denoiser.decode(x0_from_v(x_t, v, t))
        x = x.clone()
        x[noised] = audio[..., :x.shape[-1]]
        return x

    def forward(self, x, label, patchout, t=None, eps=None, **_):
        if self.denoiser:
            x = self.estimated(x, t, eps)
        mel = self.net.mel(resample(x.mean(1), SAMPLE_RATE, PASST_RATE))    # (B, 128, frames)
        # Training drops a quarter of the columns of patches, and two rows, of each clip's own.
        dropped = (0, 0)
        if self.training:
            dropped = (mel.shape[-1] // self.net.config.stride // 4, 2)
        generators = [torch.Generator().manual_seed(int(seed)) for seed in patchout]
        logits = self.net(mel, generators, dropped)[0].float()              # (B, classes)
        label = label.to(x.device, non_blocking=x.is_cuda)
        classes = torch.arange(logits.shape[1], device=label.device)
        truth = (label[:, None] == classes).float()
        loss = nn.functional.binary_cross_entropy_with_logits(logits, truth)
        return {"loss": loss, "accuracy": (logits.argmax(1) == label).float().mean()}


def make_objective(o, net, vae, denoiser):
    """The objective of --model around a network, with a latent model's VAE, or a denoiser."""
    if o.model == "vae":
        objective = Autoencoding(net)
    elif o.model == "decoder":
        objective = Decoding(net)
    elif o.model == "classifier":
        objective = Classifying(net, denoiser)
    else:
        objective = Denoising(net, vae, o.own_error)
    return objective.to(o.device)


# ---- the loop ------------------------------------------------------------------------------------

def train(o, objective, averaged, clips, held_out, header, state=None):
    """Train to the last step, or to a signal; save, and say how it went.

    o           the options, complete
    objective   what the network minimises
    averaged    the same of a copy of the network, which becomes the average of its weights
    clips       Clips to train on; held_out: to validate on
    header      what checkpoints hold besides weights and the state of training
    state       of the run to resume, or None
    """
    net, ema, out = objective.net, averaged.net, Path(o.out)
    optimizers = make_optimizers(objective, o)
    step = 0
    seconds = 0.0
    if state:
        step = state["run_step"]
        seconds = state["seconds"]
        objective.load_state_dict(state["objective"])
        ema.load_state_dict(state["ema"])
        for optimizer, kept in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(kept)
    first, before = step, seconds
    began = time.monotonic() - seconds

    # Several processes share a step's clips; threads prepare the clips of later steps. bf16 needs
    # no scaled loss, as the paper's fp16 does.
    model = in_processes(objective)
    autocast = torch.autocast(o.device.type, torch.bfloat16, enabled=o.precision == "bf16")
    schedule = (ks for i in range(step, o.steps) for ks in clips.parts(i, o.micro_batch))
    batches = prefetch(lambda ks: pinned(clips(ks), o.device), schedule, o.workers)
    bar = progress(total=o.steps, initial=step, desc=o.model, unit="step")
    look_every = LOOK[o.device.type]
    if RANK == 0:
        begin_log(out, step)

    validation = {}                     # the last one
    entries = []                        # of log.csv, not written yet
    bad_in_a_row = 0                    # gradients that were not finite
    ending = step >= o.steps
    with bar, Stop(o.device) as stop:
        while not ending:
            # The mean loss over this step's clips, and its gradient, micro-batch after micro-batch.
            # The last one's backward() averages the gradients of all processes.
            parts = clips.parts(step, o.micro_batch)
            count = sum(map(len, parts))
            loss = torch.zeros((), device=o.device)
            for i, ks in enumerate(parts):
                batch = to_device(next(batches), o.device)
                with averaging(model, now=i + 1 == len(parts)):
                    with autocast:
                        share = model(**batch)["loss"] * (len(ks) / count)
                    share.backward()
                loss += share.detach()

            # Clip the gradient's norm at 1 (ours): a decoder's and its discriminator's each by
            # itself. What is not finite counts as zero.
            norms = [nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                     for network in objective.children()]
            norm = torch.stack(norms).norm()            # the same in all processes
            for p in objective.parameters():
                if p.grad is not None:
                    p.grad.nan_to_num_(0.0, 0.0, 0.0)

            # Set the rate and take the step.
            lr = learning_rate(o, step)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            # Move the average of the weights: by much at first, then by less and less.
            decay = min(o.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)

            # Note what there is to log. To look at it is to wait for the GPU, which then waits for
            # the next step; so most of the steps go on at once.
            step += 1
            bar.update()
            seconds = time.monotonic() - began
            entries.append({"step": step, "seconds": round(seconds, 3), "loss": loss, "lr": lr,
                            "gradient_norm": norm})
            due = step % o.save_every == 0
            ending = step >= o.steps
            if not (due or ending or step % look_every == 0):
                continue
            looked_at(entries)

            # Log every step; validate, save and play the model every so many.
            ending = stop() or ending
            if RANK == 0:
                if due or ending:
                    validation = validate(averaged, held_out, autocast, o.device)
                    entries[-1]["validation"] = validation["loss"]
                write_log(out, entries)
            if due and not ending:
                save(o, header, step, seconds, objective, ema, optimizers)
                play(o, ema, averaged, held_out, step)
            bar.set_postfix_str(f"loss {entries[-1]['loss']:.4f}, lr {lr:.1e}", refresh=False)

            # Ten bad gradients in a row will not be followed by a good one.
            bad_in_a_row = count_bad(entries, bad_in_a_row)
            entries = []

        if step > first:
            say(pace(clips, first, step, seconds - before))

        # The end: a signal does not interrupt this last save. A run without a step is validated
        # here.
        batches.close()
        if RANK == 0 and not validation:
            validation = validate(averaged, held_out, autocast, o.device)
        save(o, header, step, seconds, objective, ema, optimizers)
        play(o, ema, averaged, held_out, step)

    # All processes say what they could not read. This also lets them leave together, once the first
    # one has saved.
    broken = {}
    for met in gathered(clips.source.broken | held_out.source.broken):
        broken.update(met)
    farewell(o, step, validation, broken)


def learning_rate(o, step):
    """Warm-up, a constant, then linearly to zero over the last --cooldown share of the steps.

    App. C.2 has a cosine instead.
    """
    warmup, _ = turning_points(o)
    return o.lr * min(1, (step + 1) / warmup, (1 - step / o.steps) / o.cooldown)


def turning_points(o):
    """The steps at which the learning rate has come up, and begins to fall."""
    return max(1, min(o.warmup, o.steps // 10)), round(o.steps * (1 - o.cooldown))


def make_optimizers(objective, o):
    """AdamW (App. C.2), and for recipes with muon, Muon (Jordan et al., 2024) for some weights.

    Muon takes the weight matrices of transformer blocks and of a VAE, with steps of the size of
    AdamW's: our small models learn in two thirds of the time, or less.
    """
    matrices, rest = [], []
    for name, p in objective.named_parameters():
        if not p.requires_grad:
            continue                                    # a frozen encoder's
        inside = any(part in name for part in ("blocks", "encoder", "decoder"))
        if o.muon and inside and p.dim() == 2 and name.endswith("weight"):
            matrices.append(p)
        else:
            rest.append(p)
    optimizers = [torch.optim.AdamW(rest, o.lr, betas=(0.9, o.beta2), weight_decay=0.0, fused=True)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, o.lr, weight_decay=0.0,
                                           adjust_lr_fn="match_rms_adamw"))
    return optimizers


def in_processes(objective):
    """The same, but several processes share each step's clips: see averaging."""
    if WORLD == 1:
        return objective
    # Buffers are constants of the training set. Newer versions of torch (2.13) call the option
    # forward_sync_buffers, which older ones do not know, and warn.
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return nn.parallel.DistributedDataParallel(objective, broadcast_buffers=False,
                                                   gradient_as_bucket_view=True)


def averaging(model, now):
    """In it, backward() averages the gradients of all processes; if not now, it only adds them."""
    if WORLD == 1 or now:
        return nullcontext()
    return model.no_sync()


def pinned(batch, device):
    """The batch in memory that a GPU can copy from while it computes."""
    if device.type != "cuda":
        return batch
    return {name: x.pin_memory() for name, x in batch.items()}


def to_device(batch, device):
    """Moves what is float32. Times (float64), seeds and labels stay on the CPU."""
    on_gpu = device.type == "cuda"      # where the batch is pinned
    return {name: x.to(device, non_blocking=on_gpu) if x.dtype == torch.float32 else x
            for name, x in batch.items()}


class Stop:
    """While entered, Ctrl-C and SIGTERM end the run when it next looks at its numbers (LOOK).

    A Ctrl-C after that ends it at once, unsaved. Afterwards they do what they did before.
    """

    def __init__(self, device):
        self.asked, self.device = False, device
        self.before = {}                # {number of a signal: its handler outside}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self.ask)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, *_):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __call__(self):
        """Whether to end now; all processes agree."""
        asked = torch.tensor(float(self.asked), device=self.device)
        if WORLD > 1:
            dist.all_reduce(asked)
        return asked.item() > 0


@torch.no_grad()
def validate(averaged, held_out, autocast, device):
    """What the objective shows of the held-out clips, on average: {"loss": float, ...}.

    Always the same clips and noise. Times are spread evenly over (0, 1), steadier than random ones;
    they rise from clip to clip, in the order of the files.
    """
    shown = []
    for k in range(held_out.count):
        batch = to_device(held_out([k]), device)
        batch["t"] = torch.tensor([(k + 0.5) / held_out.count], dtype=torch.float64)
        with autocast:
            shown.append(averaged(**batch))
    return {name: torch.stack([values[name] for values in shown]).mean().item()
            for name in shown[0]}


def begin_log(folder, step):
    """log.csv with the names of its columns, and the lines of the run to resume up to that step.

    What a crashed run did after its last save is done again, and logged again. UserError if a
    log.csv of another program is there.
    """
    kept = []
    if (folder / "log.csv").exists():
        with open(folder / "log.csv", newline="", errors="replace") as file:
            entries = csv.DictReader(file)
            if not set(LOG) <= set(entries.fieldnames or ()):
                raise UserError(f"{folder}/log.csv lacks columns, as if another program had "
                                "saved it: move it elsewhere")
            for entry in entries:
                number = entry["step"] or ""
                if number.isdecimal() and int(number) <= step:
                    kept.append(entry)
    text = io.StringIO()
    log = log_writer(text)
    log.writeheader()
    log.writerows(kept)
    write_atomic(folder / "log.csv", lambda file: file.write(text.getvalue().encode()))


def write_log(folder, entries):
    """Append lines to log.csv. UserError if there is no room for them."""
    try:
        with open(folder / "log.csv", "a", newline="") as file:
            log_writer(file).writerows(entries)
    except OSError as error:
        raise UserError(f"{folder}/log.csv cannot be written ({reason(error)}): make room, then "
                        "--resume goes on from the last save", status=1) from None


def log_writer(file):
    return csv.DictWriter(file, LOG, restval="", extrasaction="ignore", lineterminator="\n")


def looked_at(entries):
    """Turn what is on the device, in the entries of the log, into numbers, with one wait for all.

    The loss becomes the mean over the processes, which have as many clips each.
    """
    losses = torch.stack([entry["loss"] for entry in entries])
    if WORLD > 1:
        dist.all_reduce(losses)
    norms = torch.stack([entry["gradient_norm"] for entry in entries])
    both = torch.stack([losses / WORLD, norms]).tolist()
    for entry, loss, norm in zip(entries, *both):
        entry["loss"], entry["gradient_norm"] = loss, norm


def count_bad(entries, count):
    """The number of gradients that were not finite, up to the last of the entries; `count` before.

    UserError at ten of them.
    """
    for entry in entries:
        count = 0 if math.isfinite(entry["gradient_norm"]) else count + 1
        if count == 10:
            raise UserError(f"ten steps up to {entry['step']} were not finite: "
                            "lower --lr, or use --precision fp32", status=1)
    return count


def save(o, header, step, seconds, objective, ema, optimizers):
    """state.pt, for --resume; and model.pt, for all else: averaged weights in half precision."""
    if RANK > 0:
        return

    # Settings are saved with the state, so that --resume needs no other option. The steps of a
    # model are all that its weights have had, in earlier runs too.
    save_atomic(Path(o.out) / "state.pt", {
        **header, "step": o.before + step, "run_step": step, "seconds": seconds,
        "ema": ema.state_dict(),
        "objective": objective.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "settings": {name: value for name, value in vars(o).items() if name not in PER_CALL}})

    model = {**header, "step": o.before + step, "ema": halved(ema.state_dict())}
    if header["vae"]:
        model["vae"] = {**header["vae"], "weights": halved(header["vae"]["weights"])}
    save_atomic(Path(o.out) / "model.pt", model)


def halved(weights):
    """The state of a network with its matrices and kernels in half precision."""
    return {name: w.half() if w.dim() > 1 else w for name, w in weights.items()}


def play(o, ema, averaged, held_out, step):
    """Write runs/MODEL/listen-STEP.wav: what the model makes of the same held-out clip each time.

    A diffusion model continues the clip; a VAE decodes what it encodes of it. The random numbers of
    training are not touched.
    """
    if RANK > 0 or o.model == "classifier":
        return
    n = in_samples(PLAYED)
    if o.model in ("latent", "waveform"):
        # Half of the model's window, at most, is context; the rest is made.
        checkpoint = Checkpoint(o.model, ema, averaged.space.vae, size=o.size)
        n = min(n, checkpoint.window * checkpoint.hop // (2 * VAE.hop) * VAE.hop)
        audio = continued(checkpoint, held_out.excerpt(2 * n).to(o.device), n // checkpoint.hop)
    else:
        audio = ema.decode(ema.encode(held_out.excerpt(2 * n).to(o.device)))
    samples = audio[0].T.float().cpu().numpy()                              # (2 n, 2)
    write_atomic(Path(o.out) / f"listen-{step:06d}.wav", lambda file: sf.write(
        file, samples, SAMPLE_RATE, "PCM_16", format="WAV"))


def continued(checkpoint, audio, C_L):
    """Audio (1, 2, n), of which all that follows the first C_L frames is made by the model.

    From noise alone, which shows what the model can do by itself.
    """
    options = argparse.Namespace(steps=PLAY_STEPS, as_printed=False, k=1.0)
    settings = sample.Settings.of(options, checkpoint)
    generator = torch.Generator().manual_seed(0)
    return sample.fill(checkpoint, "continuation", audio, C_L, 0, settings, generator)


def introduction(o, net, clips, held_out):
    """What is about to be trained, on what, and how: five lines."""
    parameters = sum(p.numel() for p in net.parameters() if p.requires_grad) / 1e6
    model = (f"{o.model}, size {o.size}: {parameters:.3g} million parameters, on {o.device} in "
             f"{o.precision}, {WORLD} process(es)")

    data = "synthetic music"
    if o.data:
        data = f"{contents(clips.source)}; held out: {contents(held_out.source)}"

    shapes = [f"{len(clips.of_step(i))} clips of {window / SAMPLE_RATE:.2f} s"
              for i, window in enumerate(o.windows)]
    step = ", then ".join(shapes)
    if o.micro_batch:
        step = f"{step}; at once {o.micro_batch} of the longest"

    warmup, falling = turning_points(o)
    rate = f"up to {o.lr:g} in step {warmup}, towards zero from step {falling} to {o.steps}"
    return (f"{model}\n  data: {data}\n  a step: {step}\n  learning rate: {rate}\n"
            f"  a healthy run: {HEALTHY[o.model]}")


def contents(source):
    """How much music there is in audio files, or in their latents, in words."""
    hours = source.lengths.sum() * source.unit / SAMPLE_RATE / 3600
    kind = "files" if source.unit == 1 else "versions of files"
    return f"{len(source.paths)} {kind}, {hours:.3g} hours"


def pace(clips, first, last, seconds):
    """How fast the steps from `first` to `last` were, saves and validations included, in words."""
    taken = sum(len(clips.of_step(i)) for i in range(first, last))
    return f"{seconds / (last - first):.3g} seconds a step, {taken / seconds:.3g} clips a second"


def farewell(o, step, validation, broken):
    """Say what could not be read, where the model is, and the command that comes next.

    UserError if the validation is not finite: such a model is of no use.
    """
    file = shlex.quote(f"{o.out}/model.pt")
    for path, why in broken.items():
        say(f"  could not be read: {path} ({why})")
    if not all(map(math.isfinite, validation.values())):
        raise UserError(f"the validation of step {step} is not finite: begin again with a lower "
                        "--lr, or with --precision fp32", status=1)
    shown = "".join(f"; validation {name} {value:.4g}" for name, value in validation.items())
    say(f"{o.model}: step {step} of {o.steps} in {file}{shown}")
    if step < o.steps:
        again = f"python train.py --out {shlex.quote(o.out)} --resume"
        if WORLD > 1:
            again = "the same command with --resume"
        say(f"stopped; to go on: {again}")
    elif o.model in ("latent", "waveform"):
        use = f"python sample.py --model {o.model} --checkpoint {file}"
        say(f"to use it: {use} --task infill --input clip.wav")
    elif o.model in ("vae", "decoder"):
        following = "decoder" if o.model == "vae" else "latent"
        data = f" --data {shlex.join(o.data)}" if o.data else ""
        say(f"what comes next: python train.py --model {following} --vae {file}{data}")


# ---- clips ---------------------------------------------------------------------------------------

class AudioFiles:
    """Clips of audio files, read by seeking. files: {path: [frames, rate, channels]}."""
    unit = 1                            # samples at 44.1 kHz in a frame of `lengths`, and of a clip

    def __init__(self, files):
        self.paths = list(files)
        self.rates = [rate for _, rate, _ in files.values()]
        lengths = [frames * SAMPLE_RATE // rate for frames, rate, _ in files.values()]
        self.set_lengths(np.array(lengths, dtype=np.int64))
        self.names = [os.path.basename(os.path.dirname(os.path.abspath(path))) for path in files]
        self.broken = {}                # {path: why} of what could be opened before, but not read

    def set_lengths(self, lengths):
        """lengths: of all files, in frames. `ends` is where each ends in all the music."""
        self.lengths = lengths
        self.ends = np.cumsum(lengths)

    def crop(self, place, window):
        """(clip (C, window / unit) float32, number of its file); UserError if ten in a row fail.

        place: where in all the music, 0 <= place < 1. A file shorter than the clip is repeated.
        """
        n = window // self.unit
        ends = self.ends
        for _ in range(10):
            i = int(np.searchsorted(ends, place * ends[-1], side="right"))
            into = 1 - (ends[i] - place * ends[-1]) / self.lengths[i]       # a share of the file
            start = int(into * max(self.lengths[i] - n + 1, 1))
            try:
                clip = self.read(i, start, n)
                if not clip.size:
                    raise ValueError("nothing is left of it")
                check_samples(clip)
                return np.pad(clip, ((0, 0), (0, n - clip.shape[1])), mode="wrap"), i
            except (OSError, RuntimeError, ValueError) as error:
                # Damaged, gone, or with bad samples: note it, and look elsewhere.
                self.broken[self.paths[i]] = reason(error)
                place = (place + 0.618) % 1
        raise UserError(f"ten clips in a row could not be read, the last in {self.paths[i]}",
                        status=1)

    def read(self, i, start, n):
        """Samples [start, start + n) of file i, at 44.1 kHz: (2, n), or fewer at its end."""
        # Read what the resampler needs for them, its margins included, from a place where both
        # rates have a sample; then cut the margins off.
        rate = self.rates[i]
        begin, end = to_resample(rate, SAMPLE_RATE, start, start + n)
        begin = max(begin, 0)
        with open_audio(self.paths[i]) as file:
            file.seek(min(begin, file.frames))
            audio = file.read(max(end, 0) - begin, dtype="float32", always_2d=True)
        audio = to_stereo_44k(torch.from_numpy(audio.T.copy()), rate).numpy()
        return audio[:, start - begin * SAMPLE_RATE // rate:][:, :n]


def check_samples(audio):
    """ValueError if samples are not finite, or beyond any scale: one spoils all that it is in."""
    if not np.abs(audio).max() <= LOUDEST:                  # true of NaN too
        raise ValueError("samples that are not finite, or far beyond full scale")


class Latents(AudioFiles):
    """Clips of what a VAE makes of audio files, each encoded whole, as float16.

    Each track is there in several versions, which count as tracks of their own: see encoded_as.
    UserError if none of the audio files can be decoded.

    In `folder`, each process that encodes writes one large file, name.f16, of rows (C,), and an
    index, name.txt, with lines "key first frames". The key of a version is a hash of all that it
    depends on: the VAE's weights, the audio's path and time of change, and seed and number of a
    version that is varied. Whatever has a line is whole: a stopped run goes on where it was. What a
    copied folder lacks is encoded again.
    """
    unit = VAE.hop

    def __init__(self, tracks, folder, vae, seed, workers=1, versions=VERSIONS):
        self.vae, self.seed = vae, seed
        self.folder, self.versions = folder, versions
        self.paths = [path for path in tracks.paths for _ in range(versions)]
        self.names = [name for name in tracks.names for _ in range(versions)]
        self.keys = list(self.make_keys(tracks.paths))
        self.broken = {}

        # The processes that have this folder on their disk encode what it lacks, each its share.
        folder.mkdir(parents=True, exist_ok=True)
        known, team = self.index(), sharing(folder)
        lacking = {}                                    # {number of a track: [version, ...]}
        for i, key in enumerate(self.keys):
            if key not in known:
                lacking.setdefault(i // versions, []).append(i % versions)
        mine = list(lacking.items())[team.index(RANK)::len(team)]
        if mine:
            self.encode(mine, workers)
        barrier()

        # A file that could not be decoded has no length, so no clip is taken from it.
        known = self.index()
        self.files, self.file, self.first, lengths = [], [], [], []
        opened = {}
        for path, key in zip(self.paths, self.keys):
            name, first, frames = known.get(key, (None, 0, 0))
            if name is None:
                self.broken[path] = "damaged"
            elif name not in opened:
                opened[name] = len(opened)
                shape = self.rows(folder / name), vae.config.latent_channels
                self.files.append(np.memmap(folder / name, np.float16, "r", shape=shape))
            self.file.append(opened.get(name))
            self.first.append(first)
            lengths.append(frames)
        self.set_lengths(np.array(lengths, dtype=np.int64))
        if not self.files:
            raise UserError(f"none of the {len(tracks.paths)} files of --data can be decoded: "
                            "give others")
        if len(set(gathered(hashlib.sha256(self.lengths).hexdigest()))) > 1:
            raise UserError("--cache: the machines do not have the same files: "
                            "give each all of --data")

    def make_keys(self, paths):
        """The keys of all versions of all tracks, in order."""
        weights = b"".join(w.cpu().numpy().tobytes() for w in self.vae.state_dict().values())
        vae = hashlib.sha256(weights).hexdigest()
        for path in paths:
            unvaried = f"{vae} {path} {os.stat(path).st_mtime_ns}"
            for version in range(self.versions):
                name = unvaried if version == 0 else f"{unvaried} {self.seed} {version}"
                yield hashlib.sha256(os.fsencode(name)).hexdigest()[:32]

    def index(self):
        """{key: (name of a file, first row, frames)} of all that is in the folder."""
        known = {}
        for index in sorted(self.folder.glob("*.txt")):
            file = index.with_suffix(".f16")
            rows = self.rows(file)
            for line in index.read_text().splitlines(keepends=True):
                if line.endswith("\n"):                 # else the process was killed as it wrote it
                    key, first, frames = line.split()
                    if int(first) + int(frames) <= rows:
                        known[key] = file.name, int(first), int(frames)
        return known

    def rows(self, file):
        """Whole rows in a file, 0 if it is not there: a copied folder may lack some."""
        if not file.exists():
            return 0
        return file.stat().st_size // (2 * self.vae.config.latent_channels)

    def encode(self, lacking, workers):
        """Add what is lacking, [(number of a track, [version, ...])], to the folder.

        Threads decode ahead. A track is left out if it is damaged where no probe looked, or has bad
        samples.
        """
        def load(track):
            number, wanted = track
            path = self.paths[number * self.versions]
            try:
                audio = to_stereo_44k(*read_audio(path))                    # (2, n)
                check_samples(audio.numpy())
            except (UserError, ValueError):
                return []
            return [encoded_as(audio, path, self.seed, version) for version in wanted]

        device = self.vae.latent_mean.device
        name = self.folder / f"{RANK}-{secrets.token_hex(4)}"
        first = 0
        with open(f"{name}.f16", "xb") as rows, open(f"{name}.txt", "x") as index:
            audios = prefetch(load, lacking, workers)
            for number, wanted in progress(lacking, "cache", unit="track"):
                lines = []
                for version, audio in zip(wanted, next(audios)):
                    latents = self.vae.encode(audio[None].to(device))[0]
                    latents = latents.T.half().cpu().numpy()                # (frames, C)
                    rows.write(latents.tobytes())
                    key = self.keys[number * self.versions + version]
                    lines.append(f"{key} {first} {len(latents)}\n")
                    first += len(latents)
                # The index must never promise what is not on the disk.
                rows.flush()
                os.fsync(rows.fileno())
                index.writelines(lines)
                index.flush()

    def read(self, i, start, n):
        """Frames [start, start + n) of track i: (C, n), or fewer at its end."""
        first = self.first[i] + start
        last = self.first[i] + min(start + n, self.lengths[i])
        return self.files[self.file[i]][first:last].T.astype(np.float32)


def sharing(folder):
    """The processes that see what this one writes in `folder`; not those on another disk.

    All processes call this together.
    """
    mark = folder / f"{secrets.token_hex(8)}.mark"
    mark.touch()
    team = [rank for rank, name in enumerate(gathered(mark.name)) if (folder / name).exists()]
    barrier()                           # all have looked
    mark.unlink()
    return team


def encoded_as(audio, path, seed, version):
    """The audio (2, n) of a track as it is, for version 0; else at another speed, and `varied`.

    All of it is a function of (seed, path, version). The speed is 5/6 to 6/5, in steps of 1/147:
    the audio is resampled from a rate that is a multiple of 300 Hz, as 44.1 kHz is, so that the
    resampler has few phases.
    """
    if version == 0:
        return audio
    number = int.from_bytes(hashlib.sha256(os.fsencode(path)).digest()[:8])
    rng = random_numbers(seed, ENCODED, number, version)
    rate = 300 * int(rng.integers(123, 177))
    audio = resample(audio, rate, SAMPLE_RATE)
    return torch.from_numpy(varied(audio.numpy(), rng))


class Synthetic:
    """Clips of endless music made by a program."""
    unit = 1

    def __init__(self, seed):
        from examples import synthetic      # here: the examples import this module's neighbours
        self.seed, self.music = seed, synthetic
        self.names, self.broken = list(synthetic.STYLES), {}

    def crop(self, place, window):
        """(clip (2, window) float32, number of its style)."""
        return self.music.clip(self.seed, int(place * 2**40), window / SAMPLE_RATE)


class Clips:
    """clips(ks) -> batch of tensors: clip k and all that is random about it, by (seed, stream, k).

    Step i of training takes clips of windows[i % len(windows)] samples: `batch` of the longest;
    shorter windows get proportionally more clips. With a count, there are that many clips, spread
    evenly over the music; else endlessly many.
    """

    def __init__(self, source, windows, draw, classes, seed, stream=TRAIN, count=None, batch=1):
        self.source, self.windows, self.draw = source, windows, draw
        self.seed, self.stream, self.count, self.batch = seed, stream, count, batch
        self.labels = [classes.index(name) if name in classes else -1 for name in source.names]
        self.most = batch * (max(windows) // min(windows))          # clips that a step may have

    def of_step(self, step):
        """The numbers of the clips of that step."""
        window = self.windows[step % len(self.windows)]
        first = step * self.most
        return range(first, first + self.batch * (max(self.windows) // window))

    def parts(self, step, micro_batch=None):
        """The clips that this process takes of that step, in micro-batches: a list of ranges.

        A micro-batch, as a batch, is counted in clips of the longest window; None: all at once.
        """
        ks = self.of_step(step)
        share = ks[RANK::WORLD]
        size = len(share)
        if micro_batch:
            size = micro_batch * len(ks) // self.batch
        return [share[i:i + size] for i in range(0, len(share), size)]

    def clip(self, k):
        """One clip: {name: number or array}."""
        # Where it is cut, and then what the objective draws: always in this order.
        rng = random_numbers(self.seed, self.stream, k)
        window = self.windows[k // self.most % len(self.windows)]
        place = (k + 0.5) / self.count if self.count else rng.random()
        x, i = self.source.crop(place, window)
        label = np.int64(self.labels[i])
        # Audio is varied for training. Latents cannot be: their cache holds versions of each track.
        if self.stream == TRAIN and self.source.unit == 1:
            x = varied(x, rng)
        encoded = np.bool_(self.source.unit > 1)
        return {"x": x, "label": label, "encoded": encoded, **self.draw(rng, window)}

    def excerpt(self, n):
        """n samples of the music where the first of `count` clips is, (1, 2, n)."""
        return torch.from_numpy(self.source.crop(0.5 / self.count, n)[0])[None]

    def __call__(self, ks):
        clips = [self.clip(k) for k in ks]
        return {name: torch.from_numpy(np.stack([clip[name] for clip in clips]))
                for name in clips[0]}


def varied(audio, rng):
    """Audio (2, n) as another recording might have it (ours).

    In half of the cases the sides are swapped, and in half it is quieter, by up to 10 dB.
    """
    if rng.random() < 0.5:
        audio = audio[::-1]
    if rng.random() < 0.5:
        audio = audio * np.float32(10 ** (-rng.uniform(0, 10) / 20))
    return np.ascontiguousarray(audio)


def prefetch(load, schedule, workers):
    """load(ks) for each ks of the schedule, in order, prepared by threads.

    Threads are enough: libsndfile and numpy let others run. Each computes alone: else the resampler
    would start a team of threads in each of them.
    """
    waiting = deque()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for ks in schedule:
            waiting.append(pool.submit(load, ks))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        for batch in waiting:
            yield batch.result()


def music(o, origin=None):
    """Where clips come from, for training and for validation.

    origin: the folders that were --data when the run began, if they were others. A moved file takes
    the place that it had, among the clips and among those held out.

    Held out are the files of --valid, else one file in twenty of --data, but no more than 80 hours.
    These are the first in an order that depends on the names of file and folder alone. Training
    leaves them out; but all are trained on where there are fewer than four and no --valid, or where
    --valid has them all.
    """
    if not o.data:
        return Synthetic(o.seed), Synthetic(o.seed + 1)

    # Files that are too short, or damaged, are named and left out.
    index = Path(o.out) / "files.json"
    files = survey(o.data, max(o.windows), "--data", index=index)
    files = {path: header for path, header in files.items() if not played(path)}
    if not files:
        raise UserError("--data has nothing but what runs have played: give music")

    def former(path):
        """The path that a file had when the run began."""
        for folder, first in zip(o.data, origin or o.data):
            if path == folder:
                return first
            if path.startswith(os.path.join(folder, "")):
                return os.path.join(first, os.path.relpath(path, folder))

    files = {path: files[path] for path in sorted(files, key=former)}
    if o.valid:
        held_out = survey(o.valid, max(o.windows), "--valid", index=index)
        # --valid may be a folder within --data.
        valid = set(map(os.path.realpath, held_out))
        trained = {path: header for path, header in files.items()
                   if os.path.realpath(path) not in valid}
        if not trained:
            say("--valid has all files of --data: they are trained on, too")
        return AudioFiles(trained or files), AudioFiles(held_out)

    def digest(path):
        return hashlib.sha256(os.fsencode("/".join(former(path).split(os.sep)[-2:]))).digest()

    # A class must keep a file to train on.
    by_digest = sorted(files, key=digest)
    spared = set()
    if o.model == "classifier":
        last = {os.path.dirname(path): path for path in by_digest}          # of each folder
        spared = set(last.values())
    drawn = [path for path in by_digest if path not in spared]

    count = max(1, round(len(files) / 20))
    held_out = readable(files, drawn or by_digest, count, max(o.windows))
    hours = np.cumsum([files[path][0] / files[path][1] / 3600 for path in held_out])
    held_out = held_out[:max(1, (hours <= HELD_OUT_HOURS).sum())]

    # Few files are all trained on, also the one that is validated on.
    trained = files
    if len(files) >= 4 and drawn:
        trained = sorted(files.keys() - held_out, key=former)
    return (AudioFiles({path: files[path] for path in trained}),
            AudioFiles({path: files[path] for path in held_out}))


def played(path):
    """Whether a file is what `play` has written: a run's folder may lie within --data."""
    folder, name = os.path.split(path)
    return bool(re.fullmatch(r"listen-\d+\.wav", name)) and os.path.exists(f"{folder}/log.csv")


def readable(files, paths, count, window):
    """The first `count` of the paths whose clips can be read; files: {path: [frames, ...]}.

    A bad file would be most of a small validation. In a large one, crop finds another, and nothing
    is looked at here.
    """
    looks = VALIDATED // count                              # clips of a file in a validation
    if not looks:
        return paths[:count]
    chosen = []
    for path in paths:
        one = AudioFiles({path: files[path]})
        for i in range(looks):
            try:
                one.crop((i + 0.5) / looks, window)
            except UserError:
                break                                       # nothing of it can be read
        if one.broken:
            say(f"  not held out: {path} ({one.broken[path]})")
        else:
            chosen.append(path)
        if len(chosen) == count:
            break
    # With no good one at all, crop takes what can be read of the first.
    return chosen or paths[:count]


def refuse_silence(o, source):
    """UserError if clips from all over the music of --data hold no sound.

    There would be nothing to learn, and no scale to learn it in.
    """
    count = MEASURED[o.size]
    for i in range(count):
        if source.crop((i + 0.5) / count, 2**15)[0].any():
            return
    raise UserError("--data: all clips are digital silence: give music")


@torch.no_grad()
def measure(o, net, vae, source):
    """Set what a new network keeps of the training set.

    For a latent model these are the mean, deviation and spectra of its latents, for a waveform
    model the deviations of its coefficients.
    """
    # Each process looks at its share of clips spread evenly over the music, each as long as whole
    # spectra need.
    count = MEASURED[o.size]
    share = range(RANK, count, WORLD)
    parts = [share[i:i + 4] for i in range(0, len(share), 4)]

    def load(part):
        return torch.from_numpy(np.stack([source.crop((k + 0.5) / count, 2**15)[0] for k in part]))

    seen = {}
    audio = prefetch(load, parts, o.workers)
    for part in progress(parts, "statistics", unit="batch", leave=False):
        x = next(audio).to(o.device)                                        # (4, 2, n)
        if vae:
            found = vae.posterior(x)[0]                                     # (4, C, n / hop)
        else:
            found = net.coefficients(x).square().mean(2)                    # (4, coefficients)
        seen.update(zip(part, found.cpu()))

    # All of them, in the same order whatever the number of processes.
    for others in gathered(seen):
        seen.update(others)
    seen = torch.stack([seen[k] for k in range(count)])
    # Of waveforms: powers, since the mean of music is zero.
    if not vae:
        net.set_spectrum(seen.mean(0).sqrt())
        return

    # Of latents: what makes them mean 0 and variance 1, and then their spectra.
    mean = seen.mean((0, 2))
    std = seen.std((0, 2)).clamp(min=1e-4)
    vae.latent_mean.copy_(mean)
    vae.latent_std.copy_(std)
    if net.config.hops:
        net.set_spectrum([(seen - mean[:, None]) / std[:, None]])


# ---- command line --------------------------------------------------------------------------------

# Options that some models do not take, and those that do.
TAKEN_BY = {
    "vae": ("latent", "decoder"),
    "denoiser": ("classifier",),
    "init": tuple(NETS),
    "cache": ("latent",),
    "compile": ("latent",),
}
# Options that do something with --data only.
OF_FILES = ("valid", "cache")
DEFAULTS = {"model": "latent", "size": "small", "seed": 0}      # of options that no recipe has
# Options of one call. All others are saved with the run, and --resume takes new values of some of
# them. FILES can move, but they cannot come where there were none.
PER_CALL = ("resume", "device", "workers", "out")
ANEW = ("steps", "data", "valid", "denoiser", "cache", "compile", "precision", "save_every",
        "micro_batch")
FILES = ("data", "valid", "denoiser")


def parse(argv):
    """All options; None where nothing was given, for `settle` to fill."""
    parser = Parser(
        description=__doc__.split("\n\n")[0], epilog=recipes_in_words(),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    count, steps = within(1, 10**9, int), within(0, 10**9, int)
    workers = max(1, min(8, (os.cpu_count() or 2) // 2))

    what = parser.add_argument_group("what to train").add_argument
    what("--model", choices=MODELS, help="default: latent, or the resumed run's")
    what("--size", choices=tuple(RECIPES["vae"]), help="default: small, or the starting model's")
    what("--vae", type=absolute, metavar="FILE", help="latent, decoder: a checkpoint with "
         "a VAE, instead of the shipped one, or of the one that --init has")
    what("--denoiser", type=absolute, metavar="FILE",
         help="classifier: the latent model that it is to guide; most clips are replaced by that "
         "model's estimates of noised ones")
    what("--init", type=absolute, metavar="FILE",
         help="begin with the weights, and the VAE, of this checkpoint")

    data = parser.add_argument_group("data").add_argument
    data("--data", nargs="+", type=absolute, metavar="FOLDER",
         help="music to train on; without it, synthetic music")
    data("--valid", nargs="+", type=absolute, metavar="FOLDER",
         help="held-out music; without it, one file in twenty is held out")
    data("--windows", nargs="+", type=within(MIN_SECONDS, 3600), metavar="SECONDS",
         help="lengths of clips, in turns; default: the recipe's, below")
    data("--cache", action=argparse.BooleanOptionalAction,
         help=f"latent: encode all music once, in {VERSIONS} versions, into the run's folder")
    data("--workers", type=count, default=workers,
         help="threads that prepare clips; here: %(default)s")

    how = parser.add_argument_group("how (by default as in the recipe, below)").add_argument
    how("--steps", type=steps)
    how("--batch", type=count, help="clips of the longest window in a step, of all processes")
    how("--micro-batch", type=count, metavar="CLIPS",
        help="of the longest window that a process takes at once, to fit into memory; the step "
        "stays the same")
    how("--lr", type=within(1e-9, 1))
    how("--cooldown", type=within(0.01, 1),
        help="share of the steps, at the end, over which the rate falls to zero")
    how("--seed", type=within(0, 2**63, int), help=f"default: {DEFAULTS['seed']}")
    how("--precision", choices=("fp32", "bf16"), help="default: bf16 on CUDA, else fp32")
    how("--compile", action=argparse.BooleanOptionalAction,
        help="latent: compile the transformer's blocks, faster after a minute or two")
    how("--device", default="auto", help="auto, cpu, cuda, mps; default: %(default)s")

    output = parser.add_argument_group("output").add_argument
    output("--out", metavar="FOLDER", help="of the run; default: runs/MODEL")
    output("--save-every", type=count, metavar="STEPS",
           help="save, validate and play the model; default: a tenth of the steps, 50 to 1000")
    output("--resume", action="store_true", default=None,
           help="go on with the run in --out, with its own settings; --steps may prolong it, and "
           "--data, --valid, --denoiser, --cache, --compile, --precision, --save-every and "
           "--micro-batch may be given anew")
    return parser.parse_args(argv)


def absolute(text):
    """A type for argparse: an absolute path. Of an empty text, that would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path: give another, or leave the flag out")
    return os.path.abspath(text)


def recipes_in_words():
    """The table of recipes, for --help."""
    lines = ["recipes:", "  model      size     steps  batch       lr  seconds in a clip"]
    for model, sizes in RECIPES.items():
        for size, r in sizes.items():
            windows = " ".join(f"{window / SAMPLE_RATE:.2f}" for window in r.windows)
            lines.append(f"  {model:10} {size:6} {r.steps:7} {r.batch:6} {r.lr:8.2g}  "
                         f"{windows or 'what the model holds'}")
    return "\n".join(lines)


def settle(o):
    """Fill in the options that were not given.

    Defaults come from the resumed run, then from the recipe. Returns (resumed state, starting
    checkpoint); either may be None. UserError for options that contradict each other.
    """
    o.out = o.out or f"runs/{o.model or DEFAULTS['model']}"
    state_file = Path(o.out) / "state.pt"

    # The state of the run to resume; a new run never goes where a model is.
    state = None
    if o.resume:
        if not state_file.exists():
            raise UserError(f"--resume: there is no {state_file} to go on with: check --out; "
                            "every machine of a run needs a copy")
        state = load_state(state_file)
        if "run_step" not in state:
            raise UserError(f"{state_file} is of another version of this program: "
                            "begin another run, with --init and its model.pt")
    elif any(Path(o.out).glob("*.pt")):
        raise UserError(f"{o.out} holds a model: choose another --out; "
                        "or --resume goes on, if state.pt is there")

    # Options that would do nothing.
    settled = state["settings"] if state else {}
    o.model = o.model or settled.get("model", DEFAULTS["model"])
    refuse_idle(o, TAKEN_BY, o.model, f"--model {o.model}")
    if not o.data and not settled.get("data"):
        refuse_idle(o, dict.fromkeys(OF_FILES, ()), None, "synthetic music")

    # The checkpoint to start from. What it, or the resumed run, has settled cannot be changed.
    start = None
    if state:
        start = open_checkpoint(kind_of(o), state_file)
    elif o.init or o.model == "decoder":
        start = open_checkpoint(kind_of(o), o.init or o.vae)
        settled = {"size": start.size}
    o.windows = o.windows and tuple(in_samples(window) for window in o.windows)
    for name, value in settled.items():
        given = getattr(o, name, None)
        may_change = name in ANEW and (value is not None or name not in FILES)
        if given not in (None, value) and not may_change:
            raise UserError(f"{start.path} has another {flag_of(name)}: leave it out, "
                            "or begin another run")

    # Defaults.
    size = o.size or settled.get("size", DEFAULTS["size"])
    before = (start.step or 0) if start else 0              # steps that the weights have had
    defaults = {**DEFAULTS, "before": before, "origin": o.data, **asdict(RECIPES[o.model][size]),
                **settled}
    for name, value in defaults.items():
        if getattr(o, name, None) is None:
            setattr(o, name, value)
    if o.data and len(o.data) != len(o.origin):
        raise UserError(f"--data: the music of this run was in {len(o.origin)} folder(s): "
                        "give as many, in the same order")
    if state and o.steps < state["run_step"]:
        raise UserError(f"--steps {o.steps}: this run has made {state['run_step']} steps already")
    o.save_every = o.save_every or max(50, min(1000, o.steps // 10))
    o.device = pick_device(o.device)
    if o.precision is None:
        o.precision = "bf16" if o.device.type == "cuda" else "fp32"
    if o.batch % WORLD:
        raise UserError(f"--batch {o.batch} is no multiple of the {WORLD} processes")
    return state, start


def in_all(work, *given):
    """work(*given), in all processes; what one of them refuses, all refuse."""
    result, refused = None, None
    try:
        result = work(*given)
    except UserError as error:
        refused = error.args[0]
    for sentence in gathered(refused):
        if sentence:
            raise UserError(sentence)
    return result


def facts(o, state):
    """{name: value} of what must be the same in all processes."""
    found = {"step": state["run_step"] if state else 0}
    for name, value in vars(o).items():
        if name not in (*PER_CALL, "vae", "init"):          # of these, the contents count
            found[flag_of(name)] = value
    return found


def files_here(source, held_out):
    """The same of files: how many of those that process 0 has found are on this one's disk."""
    return {f"files of {name}": sum(map(os.path.isfile, tracks.paths))
            for name, tracks in (("--data", source), ("validation", held_out))}


def agree(found):
    """UserError in all processes if one has another of the facts than the first."""
    first, *others = gathered(found)
    for rank, other in enumerate(others, 1):
        for name, value in first.items():
            if other.get(name) != value:
                raise UserError(f"the processes differ in {name}: {value} in process 0, "
                                f"{other.get(name)} in process {rank}: let them have the same")


def kind_of(o):
    """The kind of checkpoint that --model makes."""
    return "vae" if o.model == "decoder" else o.model


def in_samples(seconds):
    """Seconds -> samples at 44.1 kHz, a whole number of latent frames."""
    return round(seconds * SAMPLE_RATE / VAE.hop) * VAE.hop


def fit_windows(o, config):
    """Let a clip be as long as the model's window if no recipe says otherwise, and never longer."""
    longest = None                                          # samples; a VAE takes any number
    if o.model == "waveform":
        longest = config.samples
    elif o.model == "latent":
        longest = config.frames * VAE.hop
    elif o.model == "classifier":
        longest = 10 * SAMPLE_RATE                          # see PaSST
    o.windows = o.windows or (longest,)
    if longest and max(o.windows) > longest:
        raise UserError("--windows: a clip of this model has at most "
                        f"{longest / SAMPLE_RATE:.2f} s")


def vae_for(o, state, start):
    """The VAE of a latent run, and whether its latents have been measured.

    It is that of the run to resume, else of --vae (a latent model's will do), else of --init, else
    the shipped one. With --init and --vae, latents that differ are measured anew.
    """
    if state or (start and not o.vae):
        return start.vae, True
    chosen = open_checkpoint("vae", o.vae)
    if not o.vae and chosen.size != o.size:
        raise UserError(f"the shipped VAE is not of size {o.size}: first train one, with "
                        "--model vae, then give --vae")
    if not start:
        return chosen.net, False
    if chosen.net.config.latent_channels != start.channels:
        raise UserError(f"--vae: {o.init} has latents of {start.channels} channels, not this "
                        "VAE's: leave out --init")
    return chosen.net, same_latents(chosen.net, start.vae)


def same_latents(one, two):
    """Whether two VAEs encode alike. Their decoders may differ."""
    a = [one.latent_mean, one.latent_std, *one.encoder.parameters()]
    b = [two.latent_mean, two.latent_std, *two.encoder.parameters()]
    return all(map(torch.equal, a, b))


def main(argv=None):
    # Options: those given, then those of the run to resume, then the recipe's.
    # What one process cannot use ends them all.
    o = parse(argv)
    join_processes(pick_device(o.device))
    state, start = in_all(settle, o)
    presets = NETS[kind_of(o)][2]
    config = start.net.config if start else presets[o.size]
    fit_windows(o, config)
    in_all(prepare_folder, o.out, f"--out {o.out}")
    lock = in_all(lock_folder, o.out)
    try:
        make_and_train(o, state, start, config)
    finally:
        if lock is not None:
            os.close(lock)


def lock_folder(folder):
    """Keep other trainings out of a folder, as long as the file descriptor returned is open.

    Two would mix their logs, and overwrite each other's state. UserError if one is at work there.
    Where there are no locks, on Windows and some network drives, nothing is checked.
    """
    if RANK > 0 or fcntl is None:
        return None
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"--out {folder} is in use by another training: wait until it ends, or "
                        "choose another folder") from None
    except OSError:
        pass
    return descriptor


def make_and_train(o, state, start, config):
    """From the settled options to a trained model.

    state, start    what --resume and --init read, see settle
    config          the network's configuration, but what depends on its VAE or classes
    """
    kind = kind_of(o)
    make = NETS[kind][0]

    # A latent model diffuses the latents of a VAE, which stays as it is.
    vae, measured = None, bool(start)
    if o.model == "latent":
        vae, measured = vae_for(o, state, start)
        vae = vae.to(o.device)
        config = replace(config, channels=vae.config.latent_channels)

    # A classifier may be trained for guidance of a latent model: see Classifying.
    denoiser = None
    if o.denoiser:
        denoiser = load_checkpoint(o.denoiser, o.device, ("latent",))
        longest = denoiser.window * denoiser.hop
        if max(o.windows) > longest:
            raise UserError(f"--windows: {o.denoiser} takes clips of at most "
                            f"{longest / SAMPLE_RATE:.2f} s")

    # Music, and the classes that it is labelled with: the names of its folders.
    agree(facts(o, state))
    source, held_out = music(o, o.origin)
    if o.data:
        agree(files_here(source, held_out))
    classes = []
    if o.model == "classifier":
        classes = start.classes if start else sorted(set(source.names))
        if len(classes) < 2:
            raise UserError(f"--data has the single class {classes[0]}: labels are the names of "
                            "the folders that hold the files, so give two or more")
        strange = sorted(set(source.names) - set(classes))
        if state and strange:
            raise UserError(f"--data: {strange[0]} is no class of this run: its folders must keep "
                            "their names")
        if not set(classes) & set(source.names):
            raise UserError("--init: no folder has the name of one of its classes, "
                            f"{', '.join(classes)}: rename one")
        config = replace(config, classes=len(classes))

    # Before anything is made of it: there is sound, and the clips of a validation can be read.
    if o.data:
        refuse_silence(o, source)
        for i in range(VALIDATED):
            held_out.crop((i + 0.5) / VALIDATED, max(o.windows))

    # The network: a new one, or the starting checkpoint's.
    torch.manual_seed(o.seed)
    net = make(config).to(o.device)
    if start:
        net.load_state_dict(start.net.state_dict())
    if o.model in ("latent", "waveform") and not measured:
        measure(o, net, vae, source)

    # What is minimised, once for the network and once for the average of its weights.
    ema = copy.deepcopy(net)
    objective = make_objective(o, net, vae, denoiser)
    averaged = make_objective(o, ema, vae, denoiser).requires_grad_(False).eval()
    if o.compile:
        torch._dynamo.config.recompile_limit = 64       # one for each window and kind of block
        for module in net.modules():
            if isinstance(module, (dit.Block, dit.SpectralBlock)):
                module.compile(dynamic=False)

    # Clips to train on, and the few that are always validated on.
    if o.cache:
        source = Latents(source, Path(o.out) / "cache", vae, o.seed, o.workers)
    clips = Clips(source, o.windows, objective.draw, classes, o.seed, batch=o.batch)
    validation = Clips(held_out, [max(o.windows)], objective.draw, classes, o.seed, VALID,
                       VALIDATED)

    # What a checkpoint says of its model; from here on the loop has all it needs.
    header = {"format": 1, "kind": kind, "size": o.size, "config": asdict(config),
              "classes": classes or None, "vae": None}
    if vae:
        header["vae"] = {"config": asdict(vae.config), "weights": vae.state_dict()}
    say(introduction(o, net, clips, validation))
    train(o, objective, averaged, clips, validation, header, state)


if __name__ == "__main__":
    run(main)
