"""Training (App. C.2, Sect. 4.2): from a folder of music to the checkpoint that sample.py takes.

    python train.py --model latent                             # no data given: built-in synthetic music
    python train.py --model latent --data path/to/music        # wav flac ogg mp3, at any depth; or --model vae ...

All that is random about clip k of a run (where it is cut, t, noise, patchout) is a function of (seed, k) alone, and the
step says which clips it takes. So a resumed run needs no state of random numbers, and the numbers of threads and of
processes do not change what is trained (but for the VAE's feature matching, a ratio of means over a process's clips).
"""
import argparse
import copy
import hashlib
import math
import os
import shlex
import signal
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
import torch.distributed as dist
from torch import nn

import dit
import vae as autoencoder
from diffusion import alpha_sigma, v_error
from examples import synthetic
from guidance import frozen
from sample import (NETS, RANK, SAMPLE_RATE, WORLD, Checkpoint, UserError, barrier, join_processes, load_state,
                    open_checkpoint, pick_device, progress, random_numbers, read_audio, reason, run, save_atomic, say,
                    survey, to_stereo_44k, within, write_atomic)
from tasks import PASST_RATE, full_precision, resample, to_resample
from vae import VAE


MIN_SECONDS = 0.16                      # in a clip; PaSST needs 0.15
TRAIN, VALID = range(2)                 # streams of random numbers
MEASURED, VALIDATED = 1000, 32          # clips that statistics are taken of, and those of a validation
@dataclass(frozen=True)
class Recipe:
    """How one size of a model is trained. Steps, batch and warm-up of the two diffusion models in the paper's size are
    App. C.2's; learning rates, the averages of the weights and all other sizes are ours."""
    steps: int
    batch: int
    lr: float
    warmup: int                         # steps; never more than a tenth of them
    ema: float                          # decay of the moving average of the weights
    finetune_steps: int = 0             # VAE: decoder against discriminator, after `steps`
    windows: tuple = ()                 # samples in a clip, of one step after the other; (): the model's own window
    cooldown: float = 0.35              # share of the steps over which the rate falls to zero
    muon: bool = False                  # see make_optimizers
    own_error: bool = False             # see Denoising
    beta2: float = 0.999                # of AdamW


RECIPES = {
    "vae": {"tiny": Recipe(100, 4, 1e-3, 10, 0.95, 10, windows=(2**14,), muon=True),
            "small": Recipe(20_000, 8, 2e-3, 500, 0.999, 4_000, windows=(2**15,), muon=True),
            "paper": Recipe(400_000, 32, 2e-4, 5000, 0.9999, 50_000, windows=(2**16,))},
    "latent": {"tiny": Recipe(300, 8, 2e-3, 20, 0.98, muon=True, own_error=True),
               "small": Recipe(20_000, 2, 2e-3, 200, 0.999, windows=(2**16, 2**17, 2**18), muon=True, own_error=True),
               "paper": Recipe(300_000, 96, 1e-4, 5000, 0.9999)},
    "waveform": {"tiny": Recipe(300, 8, 2e-3, 20, 0.98, beta2=0.99),
                 "small": Recipe(20_000, 8, 1e-3, 200, 0.999, beta2=0.99),
                 "paper": Recipe(600_000, 384, 1e-4, 5000, 0.9999)},
    "classifier": {"tiny": Recipe(200, 8, 1e-3, 20, 0.98, windows=(2**16,)),
                   "small": Recipe(4_000, 16, 1e-3, 100, 0.99, windows=(3 * SAMPLE_RATE,), muon=True),
                   "paper": Recipe(100_000, 96, 1e-4, 5000, 0.999, windows=(10 * SAMPLE_RATE,))},
}


# ---- clips ----------------------------------------------------------------------------------------------------------


class AudioFiles:
    """Clips of audio files, read by seeking. facts: {path: [frames, rate, channels]}."""
    unit = 1                                    # samples at 44.1 kHz in a frame of `lengths`, and of a clip

    def __init__(self, facts):
        self.paths, self.rates = list(facts), [rate for _, rate, _ in facts.values()]
        self.lengths = np.array([frames * SAMPLE_RATE // rate for frames, rate, _ in facts.values()], dtype=np.int64)
        self.names = [Path(os.path.abspath(path)).parent.name for path in facts]
        self.broken = {}                        # what could be opened when indexed, but not read

    def crop(self, place, window):
        """(clip (C, window / unit) float32, track number). place: where in all the music, 0 <= place < 1."""
        n, ends = window // self.unit, np.cumsum(self.lengths)
        for _ in range(10):
            track = int(np.searchsorted(ends, place * ends[-1], side="right"))
            into = 1 - (ends[track] - place * ends[-1]) / self.lengths[track]
            start = int(into * max(self.lengths[track] - n + 1, 1))
            try:
                clip = self.read(track, start, n)
                if not clip.size:
                    raise ValueError("nothing is left of it")
                return np.pad(clip, ((0, 0), (0, n - clip.shape[1])), mode="wrap"), track     # a short file: in a loop
            except (OSError, RuntimeError, ValueError) as error:
                self.broken[self.paths[track]], place = reason(error), (place + 0.618) % 1
        raise UserError(f"ten clips in a row could not be read, the last in {self.paths[track]}", status=1)

    def read(self, track, start, n):
        rate = self.rates[track]
        begin, end = (max(edge, 0) for edge in to_resample(rate, SAMPLE_RATE, start, start + n))
        with sf.SoundFile(self.paths[track]) as file:
            file.seek(min(begin, file.frames))
            audio = file.read(end - begin, dtype="float32", always_2d=True)
        audio = to_stereo_44k(torch.from_numpy(audio.T.copy()), rate).numpy()
        return audio[:, start - begin * SAMPLE_RATE // rate:][:, :n]


class Latents(AudioFiles):
    """Clips of tracks that a VAE has encoded, each whole, and kept as rows (frames, C) of a file in the folder."""
    unit = VAE.hop

    def __init__(self, tracks, folder, vae):
        self.paths, self.names = tracks.paths, tracks.names
        key = hashlib.sha256(b"".join(w.cpu().numpy().tobytes() for w in vae.state_dict().values())).hexdigest()
        versions = [f"{key} {path} {os.stat(path).st_mtime_ns}" for path in self.paths]
        self.files = [folder / f"{hashlib.sha256(os.fsencode(version)).hexdigest()[:32]}.npy" for version in versions]
        folder.mkdir(parents=True, exist_ok=True)
        for path, file in progress(list(zip(self.paths, self.files))[RANK::WORLD], "cache", unit="track"):
            if not file.exists():
                try:
                    audio = to_stereo_44k(*read_audio(path))
                except UserError:
                    continue                    # damaged in its middle, where `probe` did not look
                rows = np.ascontiguousarray(vae.encode(audio[None].to(vae.latent_mean.device))[0].T.cpu())
                write_atomic(file, lambda out: np.save(out, rows))
        barrier()
        self.broken = {path: "damaged" for path, file in zip(self.paths, self.files) if not file.exists()}
        self.lengths = np.array([len(np.load(file, mmap_mode="r")) if file.exists() else 0 for file in self.files])
        if not self.lengths.any():
            raise UserError(f"none of the {len(self.files)} files of --data can be decoded: give others")

    def read(self, track, start, n):
        return np.load(self.files[track], mmap_mode="r")[start:start + n].T


@dataclass
class Synthetic:
    """Clips of endless music made by a program."""
    seed: int
    names, broken = list(synthetic.STYLES), {}

    def crop(self, place, window):
        return synthetic.clip(self.seed, int(place * 2**40), window / SAMPLE_RATE)


class Clips:
    """clips(ks) -> batch of tensors: clip k and all that is random about it, a function of (seed, stream, k). Step i of
    training takes clips of windows[i % len(windows)] samples: `batch` of the longest, and n times as many of one that
    fits into it n times. With a count, that many clips spread evenly over the music; else endlessly many."""

    def __init__(self, source, windows, draw, classes, seed, stream=TRAIN, count=None, batch=1):
        self.source, self.windows, self.draw, self.batch = source, windows, draw, batch
        self.seed, self.stream, self.count = seed, stream, count
        self.labels = [classes.index(name) if name in classes else -1 for name in source.names]
        self.most = batch * (max(windows) // min(windows))      # clips that a step may have

    def of_step(self, step):
        """The numbers of the clips of that step."""
        first, window = step * self.most, self.windows[step % len(self.windows)]
        return range(first, first + self.batch * (max(self.windows) // window))

    def clip(self, k):
        rng, window = random_numbers(self.seed, self.stream, k), self.windows[k // self.most % len(self.windows)]
        x, track = self.source.crop((k + 0.5) / self.count if self.count else rng.random(), window)
        return {"k": np.int64(k), "x": x, "label": np.int64(self.labels[track]), **self.draw(rng, window)}

    def __call__(self, ks):
        clips = [self.clip(k) for k in ks]
        return {name: torch.from_numpy(np.stack([clip[name] for clip in clips])) for name in clips[0]}


def prefetch(load, schedule, workers):
    """load(ks) for each ks of the schedule, in order, prepared by threads (libsndfile and numpy let others run)."""
    waiting = deque()
    with ThreadPoolExecutor(workers) as pool:
        for ks in schedule:
            waiting.append(pool.submit(load, ks))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        yield from (batch.result() for batch in waiting)


# ---- objectives: forward(**batch) -> {"loss": what to minimise, and what else a validation shows} --------------------

class Autoencoding(nn.Module):
    """Reconstruction; then (`adversarial`) the decoder against a discriminator, with the encoder frozen (App. C.1). The
    decoder then meets latents with white noise in 60% of the clips (ours): those that a diffusion makes have errors."""

    def __init__(self, net):
        super().__init__()
        self.net, self.critic, self.adversarial = net, autoencoder.Discriminator(net.config), False

    def draw(self, rng, window):
        noise = rng.standard_normal((self.net.config.latent_channels, -(-window // VAE.hop)), dtype=np.float32)
        return {"noise": noise, "share": np.float32(max(0.0, rng.uniform(-0.2, 0.3)))}

    def forward(self, x, noise, share, **_):
        noise, share = noise if self.training else None, share if self.adversarial else None
        reconstruction, mean, logvar = self.net(x, noise, share)
        loss = autoencoder.reconstruction_loss(reconstruction, x)
        if self.training:
            loss = loss + (self.second_stage(reconstruction, x) if self.adversarial
                           else autoencoder.KL_WEIGHT * autoencoder.kl(mean, logvar))
        return {"loss": loss}

    def second_stage(self, reconstruction, x):
        """Both sides of a contest: a critic judges a constant, the decoder meets a frozen one."""
        real, fake = self.critic(x), self.critic(reconstruction.detach())
        with frozen(self.critic):
            judged = self.critic(reconstruction)
        return (autoencoder.discriminator_loss(real, fake)
                + autoencoder.ADVERSARIAL_WEIGHT * autoencoder.adversarial_loss(judged)
                + autoencoder.FEATURE_WEIGHT * autoencoder.feature_matching(real, judged))


class Denoising(nn.Module):
    """The v-objective of App. B.1, on latents (the VAE is frozen) or on waveforms; or that of with_own_error."""

    def __init__(self, net, vae=None, own_error=False):
        super().__init__()
        self.net, self.own_error = net, own_error
        self.space = Checkpoint("latent" if vae else "waveform", net, vae)      # a plain object: the VAE is not trained

    def draw(self, rng, window):
        n = window // self.space.hop
        normal = lambda: rng.standard_normal((self.space.channels, n), dtype=np.float32)
        drawn = {"t": np.float64(1 - rng.random()), "noise": normal()}          # t in (0, 1]
        if self.space.kind == "latent":                                         # a U-Net has no positions
            drawn["start"] = np.int64(rng.integers(self.space.window - n + 1))
        if self.own_error:                                                      # in a stretch of every other clip
            at, (first, last) = np.arange(n, dtype=np.float32) / n, np.sort(rng.uniform(-0.3, 1.3, 2))
            own = max(0, rng.uniform(-1, 1)) * ((first < at) & (at < last))
            drawn |= {"fresh": normal(), "own": own.astype(np.float32)[None]}
        return drawn

    def forward(self, x, t, noise, fresh=None, own=None, start=None, **_):
        with full_precision(x):
            x_0 = self.space.encode(x) if x.shape[1] == 2 else x                # latents, from the cache
        net = partial(self.net, start=start) if isinstance(self.net, dit.DiT) else self.net
        if self.training and own is not None and own.any():
            noise = self.with_own_error(net, x_0, t, noise, fresh, own)
        error = v_error(net, x_0, t, noise)
        if self.space.kind == "waveform":                                       # the U-Net weighs
            error = self.net.weigh(error, t.to(error))
        return {"loss": error.square().flatten(1).mean(1).mean()}

    def with_own_error(self, model, x_0, t, eps, fresh, share):
        """Noise such that x_t is built from x_0 moved by `share` towards the model's own estimate.

        With it, x_t = alpha_t (x_0 + share (x0_hat - x_0)) + sigma_t fresh, where x0_hat is the
        estimate from x_0 noised by eps. The target stays x_0. Sampling continues from such
        estimates, and training on them prepares for that (ours). x_0, eps, fresh (B, C, n);
        t (B,) in (0, 1], on the CPU; share broadcasts over x_0.
        """
        with torch.no_grad():
            error = v_error(model, x_0, t, eps)                             # (x0_hat - x_0) / sigma_t
        alpha_t = alpha_sigma(t)[0].to(x_0)[:, None, None]
        return fresh + share * alpha_t * error


class Classifying(nn.Module):
    """Binary cross-entropy of each class, with structured patchout [30]."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def draw(self, rng, window):
        return {"patchout": np.int64(rng.integers(2**62))}

    def forward(self, x, label, patchout, **_):
        mel = self.net.mel(resample(x.mean(1), SAMPLE_RATE, PASST_RATE))                    # (B, 128, frames)
        generators = [torch.Generator().manual_seed(int(seed)) for seed in patchout]
        dropped = (mel.shape[-1] // self.net.config.stride // 4, 2) if self.training else (0, 0)
        logits, label = self.net(mel, generators, dropped)[0].float(), label.to(x.device)
        truth = (label[:, None] == torch.arange(logits.shape[1], device=label.device)).float()     # label -1: no class
        return {"loss": nn.functional.binary_cross_entropy_with_logits(logits, truth),
                "accuracy": (logits.argmax(1) == label).float().mean()}


# ---- the loop -------------------------------------------------------------------------------------------------------

def make_optimizers(objective, o, muon):
    """AdamW (App. C.2). With `muon`, the weight matrices of transformer blocks and of the VAE get Muon (Jordan et al.,
    2024) instead, with steps of the size of AdamW's: our small models learn in two thirds of the time, or less."""
    wanted = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in wanted.items() if muon and p.dim() == 2 and name.endswith("weight")
                and any(part in name for part in ("blocks", "encoder", "decoder"))}
    rest = [p for name, p in wanted.items() if name not in matrices]
    optimizers = [torch.optim.AdamW(rest, o.lr, betas=(0.9, o.beta2), weight_decay=0.0, fused=True)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices.values(), o.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return optimizers


class Trainer:
    """Trains an objective. header: what a checkpoint holds beside training state; state: a resumed run's, or None."""

    def __init__(self, options, objective, clips, held_out, header, state=None):
        self.options, self.objective, self.clips, self.held_out = options, objective, clips, held_out
        self.header, self.out, self.total = header, Path(options.out), options.steps + options.finetune_steps
        self.averaged = copy.deepcopy(objective).requires_grad_(False).eval()
        self.ema, self.bad_in_a_row, self.stop, self.found = self.averaged.net, 0, False, {}
        self.step, self.spent = (state["step"], state["core_hours"]) if state else (0, 0.0)
        self.core_hours = self.spent
        if state:
            self.objective.load_state_dict(state["objective"])
            self.ema.load_state_dict(state["ema"])
        self.begin_stage(adversarial=bool(state) and state["adversarial"])
        for optimizer, known in zip(self.optimizers, state["optimizers"] if state else ()):
            optimizer.load_state_dict(known)

    def begin_stage(self, adversarial):
        """Freeze what this stage does not train, and make an optimizer for the rest."""
        o, objective, self.adversarial = self.options, self.objective, adversarial
        if o.model == "vae":
            objective.adversarial = adversarial
            objective.net.encoder.requires_grad_(not adversarial)
            objective.critic.requires_grad_(adversarial)
        self.optimizers = make_optimizers(objective, o, o.muon and not adversarial)
        self.model = nn.parallel.DistributedDataParallel(objective) if WORLD > 1 else objective

    def learning_rate(self):
        """Warm-up, a constant, then linearly to zero over the last --cooldown share; in a VAE's second stage, lower."""
        o = self.options
        done, steps = (self.step - o.steps, o.finetune_steps) if self.adversarial else (self.step, o.steps)
        warmup = max(1, min(o.warmup, steps // 10))
        return o.lr * (0.15 if self.adversarial else 1) * min(1, (done + 1) / warmup, (1 - done / steps) / o.cooldown)

    def values(self, model, batch):
        """What the objective says of a batch. Float32 alone moves to the device: not times (float64), seeds, labels."""
        o = self.options
        with torch.autocast(o.device.type, torch.bfloat16, enabled=o.precision == "bf16"):
            return model(**{name: x.to(o.device) if x.dtype == torch.float32 else x for name, x in batch.items()})

    def gradients(self, stream):
        """Gradient of the mean loss over the step's clips, all processes together. Returns the loss of this one's."""
        loss = self.values(self.model, next(stream))["loss"]
        loss.backward()
        return loss.item()

    def update(self, stream):
        """One step; returns its row of the log."""
        loss, lr = self.gradients(stream), self.learning_rate()
        norms = [nn.utils.clip_grad_norm_(part.parameters(), 1.0).item() for part in self.objective.children()]
        norm = math.hypot(*norms)               # of a VAE and its discriminator, which do not weaken each other
        usable = math.isfinite(norm)            # which is the same in all processes
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            if usable:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if usable:
            decay = min(self.options.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.ema.parameters()), list(self.objective.net.parameters()), 1 - decay)
        self.bad_in_a_row = 0 if usable else self.bad_in_a_row + 1
        if self.bad_in_a_row == 10:
            raise UserError(f"ten steps up to {self.step} were not finite: lower --lr, or use --precision fp32", 1)
        self.step += 1
        self.core_hours = round(self.spent + WORLD * time.process_time() / 3600, 4)     # of all, each as busy as this
        return {"step": self.step, "core_hours": self.core_hours, "loss": loss, "lr": lr, "gradient_norm": norm}

    def fit(self):
        """Train to the end, or a signal; save, and say how it went."""
        o, first = self.options, self.step
        mine = (self.clips.of_step(step)[RANK::WORLD] for step in range(first, self.total))
        stream = prefetch(self.clips, mine, o.workers)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)
        bar = progress(total=self.total, initial=first, desc=o.model, unit="step")
        with bar, open(os.devnull if RANK else self.out / "log.csv", "a" if first else "w", buffering=1) as log:
            while self.step < self.total and not self.stopping():
                if self.step >= o.steps and not self.adversarial:
                    self.objective.net.load_state_dict(self.ema.state_dict())       # whose encoder is final
                    self.begin_stage(adversarial=True)
                row = self.update(stream)
                due, last = self.step % o.save_every == 0, self.step == self.total
                row["validation"] = self.validate() if (due or last) and RANK == 0 else ""
                if self.step == 1:
                    print(*row, sep=",", file=log)
                print(*row.values(), sep=",", file=log)
                if due and not last:
                    self.save()
                bar.set_postfix_str(f"loss {row['loss']:.4f}, lr {row['lr']:.1e}", False)
                bar.update()
        stream.close()
        self.save()
        barrier()                           # rank 0 validates and saves; what comes next may read that
        self.farewell()

    def on_signal(self, *_):
        """Ctrl-C and SIGTERM end the run after the current step; a second Ctrl-C, at once."""
        self.stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def stopping(self):
        """Whether to end now, because of a signal; all processes agree."""
        stop = torch.tensor(float(self.stop), device=self.options.device)
        if WORLD > 1:
            dist.all_reduce(stop)
        return stop.item() > 0

    @torch.no_grad()
    def validate(self):
        """Loss (more in `found`) on held-out clips, by the averaged weights; always the same clips, noise and times."""
        t = torch.arange(0.5, self.held_out.count, dtype=torch.float64) / self.held_out.count  # evenly spaced: steadier
        found = [self.values(self.averaged, {**self.held_out([i]), "t": t[[i]]}) for i in range(len(t))]
        self.found = {name: torch.stack([values[name] for values in found]).mean().item() for name in found[0]}
        return self.found["loss"]

    def save(self):
        """state.pt, for --resume; and model.pt, for all else: averaged weights in half precision, no optimizer."""
        o, vae = self.options, self.header["vae"]
        halve = lambda weights: {name: w.half() if w.dim() > 1 else w for name, w in weights.items()}
        if RANK == 0:
            save_atomic(self.out / "state.pt", {
                **self.header, "step": self.step, "core_hours": self.core_hours, "adversarial": self.adversarial,
                "ema": self.ema.state_dict(), "objective": self.objective.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "settings": {name: value for name, value in vars(o).items() if name not in PER_CALL}})
            save_atomic(self.out / "model.pt", {
                **self.header, "step": o.before + self.step, "ema": halve(self.ema.state_dict()),
                "vae": vae and {**vae, "weights": halve(vae["weights"])}})

    def farewell(self):
        o, found = self.options, "".join(f"; validation {name} {value:.4g}" for name, value in self.found.items())
        file = shlex.quote(str(self.out / "model.pt"))
        say(f"{o.model}: step {self.step} of {self.total} in {file}{found}")
        for path, why in self.clips.source.broken.items():
            say(f"  could not be read: {path} ({why})")
        if self.step < self.total:
            say(f"stopped; to go on: python train.py --model {o.model} --out {shlex.quote(o.out)} --resume")
        elif o.model in ("latent", "waveform"):
            say(f"to use it: python sample.py --model {o.model} --checkpoint {file} --task infill --input clip.wav")


@torch.no_grad()
def measure(o, objective, source):
    """What a new network keeps of the training set: a latent model its latents' mean, deviation and cross-spectra, a
    waveform model the deviations of its coefficients."""
    net, vae, seen = objective.net, objective.space.vae, []
    for i in progress(range(MEASURED), "statistics", unit="clip", leave=False):
        x = torch.from_numpy(source.crop((i + 0.5) / MEASURED, 2**15)[0])[None].to(o.device)
        seen.append(vae.posterior(x)[0].cpu() if vae else net.coefficients(x).square().mean((0, 2)).cpu())
    seen = torch.cat(seen) if vae else torch.stack(seen)        # (MEASURED, C, n), (MEASURED, coefficients)
    if o.model == "waveform":
        return net.set_spectrum(seen.mean(0).sqrt())            # the mean of music is zero
    mean, std = seen.mean((0, 2)), seen.std((0, 2)).clamp(min=1e-4)
    vae.latent_mean.copy_(mean), vae.latent_std.copy_(std)
    if net.config.hops:
        net.set_spectrum([(seen - mean[:, None]) / std[:, None]])


# ---- command line ---------------------------------------------------------------------------------------------------

ONLY = {"vae": "latent", "cache": "latent", "compile": "latent", "finetune_steps": "vae"}      # flags of one model
PER_CALL = ("resume", "save_every", "device", "workers", "out")     # options that say not what a run is


def parse(argv):
    """All options; None where nothing was given, for `settle` to fill."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add, flag = parser.add_argument, {"action": "store_true", "default": None}
    add("--model", choices=NETS, default="latent", help="what to train (latent)")
    add("--size", choices=("tiny", "small", "paper"), help="default: small, or that of --init")
    count, steps, file = within(1, 10**9, int), within(0, 10**9, int), {"metavar": "FILE", "type": os.path.abspath}
    folders = file | {"nargs": "+", "metavar": "FOLDER"}
    add("--data", **folders, help="music to train on; without it, synthetic music")
    add("--valid", **folders, help="held-out music; without it, one file in twenty is held out")
    add("--out", help="folder of the run; default: runs/MODEL")
    add("--vae", **file, help="latent: a checkpoint with a VAE; beside --init, another one than it has")
    add("--init", **file, help="begin with the weights, and the VAE, of this checkpoint")
    add("--windows", nargs="+", type=within(MIN_SECONDS, 3600), metavar="SECONDS", help="lengths of clips, in turns")
    add("--steps", type=steps, help="by default, as --batch, --lr and --windows: those of the --size")
    add("--finetune-steps", type=steps, help="vae: steps of the second stage")
    add("--batch", type=count, help="clips of the longest window in a step, all processes together")
    add("--lr", type=within(1e-9, 1))
    add("--cooldown", type=within(0.01, 1), help="share of the steps, at the end, over which the rate falls to zero")
    add("--seed", type=within(0, 2**63, int))
    add("--precision", choices=("fp32", "bf16"), help="default: bf16 on CUDA, else fp32")
    add("--compile", **flag, help="compile the transformer's blocks: faster after a minute or two")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--workers", type=count, default=max(1, min(8, (os.cpu_count() or 2) // 2)), help="threads that prepare clips")
    add("--cache", **flag, help="latent: encode all music once, into the run's folder")
    add("--save-every", type=count, metavar="STEPS", help="save, and validate, every so many steps")
    add("--resume", **flag, help="go on with the run in --out, with its own settings; --steps may prolong it")
    return parser.parse_args(argv)


def settle(o):
    """Fill the options that were not given, with those of the run to go on with, else the recipe's. Returns that run's
    state, or None; and the Checkpoint that the network is taken from, the run's own or that of --init, or None."""
    o.out = o.out or f"runs/{o.model}"
    o.windows = o.windows and [round(seconds * SAMPLE_RATE / VAE.hop) * VAE.hop for seconds in o.windows]    # samples
    file = Path(o.out) / "state.pt"
    state = load_state(file) if o.resume and file.exists() else None
    if not state and any(file.parent.glob("*.pt")):
        raise UserError(f"{o.out} holds a model: choose another --out; or --resume goes on, if state.pt is there")
    path = file if state else o.init
    known = open_checkpoint(o.model, path) if path else None
    fixed = state["settings"] if state else {"size": known.size} if known else {}
    longer = ("finetune_steps",) if state and state["adversarial"] else ("steps", "finetune_steps")
    for name, value in fixed.items():
        if name not in longer and getattr(o, name, None) not in (None, value):
            raise UserError(f"{path} has another --{name}: leave it out, or begin another run")
    idle = [name for name, model in ONLY.items() if o.model != model] + ["valid", "cache"] * (not o.data)
    for name in [] if state else idle:
        if getattr(o, name):
            raise UserError(f"--{name.replace('_', '-')} does nothing with this model, or without --data: leave it out")
    recipe = asdict(RECIPES[o.model][o.size or fixed.get("size", "small")])
    if o.steps is not None:
        recipe["finetune_steps"] = o.steps * recipe["finetune_steps"] // recipe["steps"]
    for name, value in {"size": "small", "seed": 0, "before": known and known.step or 0, **recipe, **fixed}.items():
        if getattr(o, name, None) is None:
            setattr(o, name, value)
    o.save_every = o.save_every or max(50, min(1000, (o.steps + o.finetune_steps) // 10))
    o.device = pick_device(o.device)
    o.precision = o.precision or ("bf16" if o.device.type == "cuda" else "fp32")
    if o.batch % WORLD:
        raise UserError(f"--batch {o.batch} is no multiple of the {WORLD} processes")
    return state, known


def music(o):
    """Where clips come from, for training and for validation: the files of --valid, else one file in twenty of --data,
    which training leaves out if there are four or more."""
    if not o.data:
        return Synthetic(o.seed), Synthetic(o.seed + 1)
    files = survey(o.data, max(o.windows), "--data")
    if o.valid:
        return AudioFiles(files), AudioFiles(survey(o.valid, max(o.windows), "--valid"))
    digest = lambda path: hashlib.sha256(os.fsencode("/".join(Path(path).parts[-2:]))).digest()
    valid = sorted(files, key=digest)[:max(1, round(len(files) / 20))]
    train = sorted(files.keys() - valid) if len(files) >= 4 else files
    return tuple(AudioFiles({path: files[path] for path in paths}) for paths in (train, valid))


def vae_for(o, state, known):
    """The VAE of a latent run, and whether its latents have yet to be measured: that of the run to go on with, else of
    --vae (a latent model's will do), else of --init, else the shipped one."""
    if state or known and not o.vae:
        return known.vae, False
    found = open_checkpoint("vae", o.vae)
    if not o.vae and found.size != o.size:
        raise UserError(f"the shipped VAE is not of size {o.size}: first train one, with --model vae, then give --vae")
    if known and found.net.config.latent_channels != known.channels:
        raise UserError(f"--vae: {o.init} has latents of {known.channels} channels, not this VAE's: leave out --init")
    meaning = lambda vae: [vae.latent_mean, vae.latent_std, *vae.encoder.parameters()]      # of the latents
    return found.net, not known or not all(map(torch.equal, meaning(found.net), meaning(known.vae)))


def main(argv=None):
    o = parse(argv)
    state, known = settle(o)
    join_processes(o.device)
    make, _, presets = NETS[o.model]
    config = known.net.config if known else presets[o.size]
    longest = getattr(config, "samples", 0) or getattr(config, "frames", 0) * VAE.hop
    longest = 10 * SAMPLE_RATE if o.model == "classifier" else longest          # see PaSST
    o.windows = o.windows or [longest]
    if longest and max(o.windows) > longest:
        raise UserError(f"--windows: a clip of this model has at most {longest / SAMPLE_RATE:.2f} s")
    Path(o.out).mkdir(parents=True, exist_ok=True)
    vae, unmeasured, classes = None, not known and o.model == "waveform", []
    if o.model == "latent":
        vae, unmeasured = vae_for(o, state, known)
        vae, config = vae.to(o.device), replace(config, channels=vae.config.latent_channels)
    source, held_out = music(o)
    if o.model == "classifier":
        classes = known.classes if known else sorted(set(source.names))
        if not set(classes) & set(source.names):
            raise UserError(f"--init: no folder has the name of one of its classes, {', '.join(classes)}: rename one")
        config = replace(config, classes=len(classes))
    torch.manual_seed(o.seed)
    denoising = partial(Denoising, vae=vae, own_error=o.own_error)
    objective = {"vae": Autoencoding, "classifier": Classifying}.get(o.model, denoising)(make(config)).to(o.device)
    if known:
        objective.net.load_state_dict(known.net.state_dict())
    if unmeasured:
        measure(o, objective, source)
    if o.cache and vae and o.data:
        source = Latents(source, Path(o.out) / "cache", vae)
    if o.compile:
        torch._dynamo.config.recompile_limit = 64           # one for each window, and each kind of block
        blocks = (dit.Block, dit.SpectralBlock)
        objective.net.apply(lambda module: isinstance(module, blocks) and module.compile(dynamic=False))
    clips = Clips(source, o.windows, objective.draw, classes, o.seed, batch=o.batch)
    validation = Clips(held_out, [max(o.windows)], objective.draw, classes, o.seed, VALID, VALIDATED)
    header = {"format": 1, "kind": o.model, "size": o.size, "config": asdict(config), "classes": classes or None,
              "vae": {"config": asdict(vae.config), "weights": vae.state_dict()} if vae else None}
    Trainer(o, objective, clips, validation, header, state).fit()


if __name__ == "__main__":
    run(main)
