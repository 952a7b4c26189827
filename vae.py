"""The autoencoder of the latent model: stereo audio to latents 128 times slower, and back (App. C.1).

Eight ConvNeXt-1D layers [41] a side, with a factor of 2 in time after every layer but the first; trained on spectra,
L1, L2, levels in bands and a small KL. Then the decoder is fine-tuned against a discriminator of complex spectra, the
encoder frozen, and on latents with white noise. The bands and that noise are ours.

    vae = VAE(PRESETS["small"])
    latents = vae.encode(audio)        # (B, 2, samples) -> (B, C, ceil(samples / 128))
    audio = vae.decode(latents)        # (B, C, frames) -> (B, 2, 128 * frames)

`python tests/benchmark.py --only presets` prints sizes and cost of the presets.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

# What training minimises. Choose the weights here: train.py takes them from this file.
FFT_SIZES = (512, 1024, 2048, 4096)      # samples at 44.1 kHz: 12 to 93 ms
SPECTRAL_WEIGHT, BAND_WEIGHT, L1_WEIGHT, L2_WEIGHT = 1.0, 4.0, 20.0, 50.0
KL_WEIGHT = 0.1                          # leaves noise in the latents, so that the decoder bears small errors in them
ADVERSARIAL_WEIGHT, FEATURE_WEIGHT = 1.0, 5.0
# STFT magnitude (white noise of power 1 has 1) below which all counts as silence. With a lower one
# fainter hiss counts too, but then the empty bins of clean synthetic music dominate the loss.
QUIET = 3e-4
CHUNK = 1024                             # latent frames, at most, that encode and decode work on at a time


@dataclass(frozen=True)
class VAEConfig:
    """Channels of the eight layers, in the order in which they run."""
    encoder: tuple[int, ...]             # at 1, 1, 1/2, 1/4 ... 1/64 of the sample rate
    decoder: tuple[int, ...]             # at 1/128, 1/128, 1/64 ... 1/2 of the sample rate
    latent_channels: int
    kernel: int = 7                      # of every depthwise convolution; odd
    discriminator_width: int = 32


PRESETS = {
    "tiny": VAEConfig((8, 8, 16, 24, 32, 48, 64, 64), (64, 64, 64, 48, 32, 24, 16, 16), 8, discriminator_width=8),
    "small": VAEConfig((8, 8, 24, 48, 96, 160, 224, 288), (384, 384, 384, 256, 192, 128, 80, 56), 16,
                       discriminator_width=16),
    "paper": VAEConfig((64, 64, 64, 128, 128, 256, 256, 512), (512, 512, 512, 512, 256, 256, 128, 128), 32),
}


# ---------------------------------------------------------------------------------------------------------------------
# Networks: data are (B, n, C), so that LayerNorm and the matrix products act on the last, contiguous axis
# ---------------------------------------------------------------------------------------------------------------------

class DepthwiseConv(nn.Conv2d):
    """A filter of its own for each channel, zero padded. As conv2d over (B, C, 1, n) because its channels-last kernel
    is 5 to 7 times faster on a CPU than conv1d."""

    def __init__(self, channels, kernel):
        super().__init__(channels, channels, (1, kernel), padding=(0, kernel // 2), groups=channels)

    def forward(self, x):                                           # (B, n, C)
        return super().forward(x.transpose(1, 2).unsqueeze(2)).squeeze(2).transpose(1, 2)


class Layer(nn.Module):
    """ConvNeXt [41]: depthwise convolution, LayerNorm over channels, pointwise MLP, around a residual path."""

    def __init__(self, channels, kernel):
        super().__init__()
        self.conv = DepthwiseConv(channels, kernel)
        self.norm = nn.LayerNorm(channels)
        self.widen = nn.Linear(channels, 4 * channels)
        self.narrow = nn.Linear(4 * channels, channels)
        nn.init.normal_(self.widen.weight, std=channels**-0.5)
        nn.init.zeros_(self.widen.bias)
        nn.init.zeros_(self.narrow.weight)                          # every layer starts as the identity
        nn.init.zeros_(self.narrow.bias)

    def forward(self, x):                                           # (B, n, C)
        return x + self.narrow(F.gelu(self.widen(self.norm(self.conv(x)))))


class Isometry(nn.Linear):
    """A linear map that starts orthogonal and without bias. Nothing normalises the residual path, so that loudness
    survives; with zeroed layers around them these maps let audio through at its own level from the first step."""

    def reset_parameters(self):
        nn.init.orthogonal_(self.weight)
        nn.init.zeros_(self.bias)


class Down(Isometry):
    """Half the rate: each pair of frames becomes one."""

    def __init__(self, channels, channels_out):
        super().__init__(2 * channels, channels_out)

    def forward(self, x):                                           # (B, n, C) -> (B, n / 2, C_out)
        return super().forward(x.unflatten(1, (-1, 2)).flatten(2))


class Up(Isometry):
    """Twice the rate: each frame becomes a pair. As a transposed convolution this has kernel = stride: no frame gets
    more contributions than its neighbour, the usual cause of checkerboards, and the kernel of the next layer reaches
    over the joints. Starting both halves equal, a plain repetition, removes the first images too, but learns the
    high frequencies late (spectral loss after 65 steps on one clip: 3.1 instead of 2.4)."""

    def __init__(self, channels, channels_out):
        super().__init__(channels, 2 * channels_out)

    def forward(self, x):                                           # (B, n, C) -> (B, 2 n, C_out)
        return super().forward(x).unflatten(2, (2, -1)).flatten(1, 2)


class VAE(nn.Module):
    """Gaussian posterior over C channels at 1/128 of the sample rate. The buffers latent_mean and latent_std (C,) are
    the training set's, 0 and 1 until a latent model's training sets them: encode's latents have mean 0, variance 1."""
    hop = 128                                                       # samples per latent frame

    def __init__(self, config):
        super().__init__()
        self.config = config
        down, up, C = config.encoder, config.decoder, config.latent_channels
        assert len(down) == len(up) == 8, "App. C.1 has eight layers a side"
        self.encoder = nn.Sequential(Isometry(2, down[0]), Layer(down[0], config.kernel))
        for width, next_width in zip(down[1:], down[2:] + (down[-1],)):
            self.encoder.extend([Layer(width, config.kernel), Down(width, next_width)])
        self.encoder.append(Isometry(down[-1], 2 * C))              # mean and log-variance
        nn.init.constant_(self.encoder[-1].bias[C:], -4)            # little noise until there is something to hide
        self.decoder = nn.Sequential(Isometry(C, up[0]), Layer(up[0], config.kernel))
        for width, next_width in zip(up[1:], up[2:] + (2,)):        # the last Up ends at left and right
            self.decoder.extend([Layer(width, config.kernel), Up(width, next_width)])
        self.register_buffer("latent_mean", torch.zeros(C))
        self.register_buffer("latent_std", torch.ones(C))
        margin = config.kernel // 2
        self.encoder_field = margin * self.hop                              # samples: 1 + 1 + 2 + 4 ... + 64 margins
        self.decoder_field = field_of_decoder(margin)                       # latent frames

    def posterior(self, audio):
        """(B, 2, samples) -> mean and log-variance of the latents, (B, C, frames) each, not normalised."""
        audio = F.pad(audio, (0, -audio.shape[-1] % self.hop))
        mean, logvar = self.encoder(audio.transpose(1, 2)).transpose(1, 2).chunk(2, dim=1)
        return mean, logvar.clamp(-20, 10)                          # exp() stays finite in half precision

    def forward(self, audio, noise=None, share=None, posterior=True):
        """For training: reconstruction (B, 2, samples), mean and log-variance (B, C, frames).

        noise       (B, C, frames), standard normal, is added to the mean times a deviation, which
                    is the sum of the two below; without it the mean itself is decoded
        share       (B,), a share of the deviation that a channel's mean has over batch and time. It
                    counts in the gradient: latents that are merely larger do not drown this noise
        posterior   whether the posterior's own deviation is added
        """
        mean, logvar = self.posterior(audio)
        z = mean
        if noise is not None and posterior:
            z = z + (logvar / 2).exp() * noise
        if noise is not None and share is not None:
            # The gradient of a plain std would be NaN in digital silence.
            std = (mean.var((0, 2), keepdim=True) + 1e-8).sqrt()                # (1, C, 1)
            z = z + share[:, None, None] * std * noise
        return self.decoder(z.transpose(1, 2)).transpose(1, 2)[..., :audio.shape[-1]], mean, logvar

    @torch.no_grad()
    def encode(self, audio):
        """(B, 2, samples) -> normalised posterior mean (B, C, ceil(samples / 128)); zeros fill up the last frame.
        Any length, in fixed memory; no gradient. ValueError unless there are two channels and at least one sample."""
        if audio.dim() != 3 or audio.shape[1] != 2 or audio.shape[2] == 0:
            raise ValueError(f"audio must be (B, 2, samples) with samples > 0, not {tuple(audio.shape)}")
        audio = F.pad(audio, (0, -audio.shape[-1] % self.hop))
        reach = -(-self.encoder_field // self.hop)                  # latent frames
        # Wide layers at the full sample rate are slow on a CPU unless a chunk of them fits into its cache.
        size = min(CHUNK, 2**13 // self.config.encoder[0]) if audio.device.type == "cpu" else CHUNK
        parts = [self.posterior(audio[..., lo * self.hop:hi * self.hop])[0][..., keep]
                 for lo, hi, keep in chunks(audio.shape[-1] // self.hop, reach, size)]
        return (torch.cat(parts, dim=-1) - self.latent_mean[:, None]) / self.latent_std[:, None]

    def decode(self, latents):
        """Normalised latents (B, C, frames) -> audio (B, 2, 128 * frames), any length. Differentiable in the latents;
        where they ask for no gradient no graph is kept, so that memory stays fixed. ValueError for another shape."""
        if latents.dim() != 3 or latents.shape[1] != self.config.latent_channels or latents.shape[2] == 0:
            raise ValueError(f"latents must be (B, {self.config.latent_channels}, frames) with frames > 0, "
                             f"not {tuple(latents.shape)}")
        z = (latents * self.latent_std[:, None] + self.latent_mean[:, None]).transpose(1, 2)    # (B, frames, C)
        parts = []
        with torch.set_grad_enabled(torch.is_grad_enabled() and latents.requires_grad):
            for lo, hi, keep in chunks(z.shape[1], self.decoder_field, CHUNK):
                samples = slice(keep.start * self.hop, keep.stop * self.hop)
                parts.append(self.decoder(z[:, lo:hi])[:, samples])
        return torch.cat(parts, dim=1).transpose(1, 2)


def field_of_decoder(margin):
    """Latent frames on each side that the samples of one frame can see: walk back from audio to latents."""
    first, last = 0, 127                                            # the samples of latent frame 0
    for _ in range(7):
        first, last = first // 2 - margin, last // 2 + margin       # undo an Up, then the Layer before it
    return max(-(first - margin), last + margin)                    # the first Layer, which has no Up


def chunks(frames, reach, size):
    """Cut a long sequence: yields (lo, hi, keep), a chunk of `size` frames with `reach` frames of surroundings, and the
    slice of it, counted from lo, that those surroundings make independent of where the cuts fall."""
    for start in range(0, frames, size):
        stop = min(start + size, frames)
        lo, hi = max(start - reach, 0), min(stop + reach, frames)
        yield lo, hi, slice(start - lo, stop - lo)


# ---------------------------------------------------------------------------------------------------------------------
# Losses: float32 whatever the autocast, means over clips, finite for silence
# ---------------------------------------------------------------------------------------------------------------------

def stft(audio, size):
    """(..., n) -> complex (..., bins, frames), hop size / 4; scaled so that white noise of power 1 has power 1."""
    window = torch.hann_window(size, device=audio.device)
    return torch.stft(audio.float().flatten(0, -2), size, size // 4, window=window / window.norm(), pad_mode="constant",
                      return_complex=True).unflatten(0, audio.shape[:-1])


def magnitudes(audio, size):
    """Magnitude spectra of left, right, mid and side: (B, 2, n) -> (B, 4, bins, frames)."""
    left, right = stft(audio, size).unbind(1)
    X = torch.stack([left, right, (left + right) / 2, (left - right) / 2], dim=1)
    return (X.real**2 + X.imag**2 + QUIET**2).sqrt()                # the gradient of |X| at 0 would be NaN


def stft_loss(reconstruction, audio):
    """Spectral convergence plus L1 of log magnitudes, averaged over FFT sizes. (B, 2, n) twice -> scalar."""
    loss = 0
    for size in FFT_SIZES:
        Y = magnitudes(reconstruction, size)
        X = magnitudes(audio, size)
        # One ratio for the four signals of a clip: a mono clip's side is silent. At least 1e-3, 60 dB below full scale.
        scale = X.square().mean((1, 2, 3)).sqrt().clamp(min=1e-3)
        convergence = ((Y - X).square().mean((1, 2, 3)) + 1e-12).sqrt() / scale
        loss = loss + convergence.mean() + (Y.log() - X.log()).abs().mean()
    return loss / len(FFT_SIZES)


def band_loss(reconstruction, audio):
    """L1 of the log power in bands, and in octaves of its change from frame to frame; (B, 2, n) twice -> scalar.
    As loud as the original at every moment, where single bins are out of the decoder's reach."""
    resolutions = [(512, 1, 1), (1024, 1, 1), (512, 3, 4), (2048, 3, 4), (2048, 3, 32)]
    errors = []
    for size, per_octave, together in resolutions:
        made = band_powers(reconstruction, size, per_octave, together)
        errors.append(made - band_powers(audio, size, per_octave, together))
    # The change of whole octaves from frame to frame: attacks, and whether hiss is steady.
    errors += [error.diff(dim=-1) for error in errors[:2]]
    return sum(error.abs().mean() for error in errors) / len(resolutions)


def band_powers(audio, size, per_octave, together):
    """Log power of left, right, mid and side: (B, 2, n) -> (B, 4, bands, frames). A frame is the mean of `together` of
    the STFT's, and overlaps the next by half."""
    bins = torch.arange(1, size // 2 + 1)                           # without 0 Hz
    _, band = (per_octave * bins.log2()).long().unique(return_inverse=True)
    band, power = band.to(audio.device), magnitudes(audio, size)[:, :, 1:].square()
    total = power.new_zeros(*power.shape[:2], int(band.max()) + 1, power.shape[-1]).index_add(2, band, power)
    width = min(together, power.shape[-1])                          # all there are, in a short clip
    return F.avg_pool2d(total / band.bincount()[:, None], (1, width), stride=(1, max(1, width // 2))).log()


def reconstruction_loss(reconstruction, audio):
    """What the autoencoder minimises besides the KL: spectra, bands, L1 and L2.

    (B, 2, n) twice -> scalar.
    """
    error = reconstruction.float() - audio.float()
    return (SPECTRAL_WEIGHT * stft_loss(reconstruction, audio) + BAND_WEIGHT * band_loss(reconstruction, audio)
            + L1_WEIGHT * error.abs().mean() + L2_WEIGHT * error.square().mean())


def kl(mean, logvar):
    """KL divergence of the posterior from N(0, I), nats per latent number. (B, C, frames) twice -> scalar."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Discriminator
# ---------------------------------------------------------------------------------------------------------------------

class SpectrumCritic(nn.Module):
    """Classifies patches of one complex STFT: audio (B, 2, n) -> logits (B, 1, bins', frames), list of features."""

    def __init__(self, size, width):
        super().__init__()
        self.size = size
        def conv(channels, channels_out, kernel, stride=1):         # kernel and stride along (bins, frames)
            padding = (kernel[0] // 2, kernel[1] // 2)
            return weight_norm(nn.Conv2d(channels, channels_out, kernel, stride, padding))
        self.layers = nn.ModuleList([conv(4, width, (9, 3))]
                                    + [conv(width, width, (9, 3), stride=(2, 1)) for _ in range(3)]
                                    + [conv(width, width, (3, 3))])
        self.logits = conv(width, 1, (3, 3))

    def forward(self, audio):
        x = torch.view_as_real(stft(audio, self.size))              # (B, 2, bins, frames, 2)
        x = x.permute(0, 1, 4, 2, 3).flatten(1, 2)                  # (B, 4, bins, frames)
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return self.logits(x), features


class Discriminator(nn.Module):
    """Multi-scale complex-STFT discriminator, as in [43]: audio (B, 2, n) -> [(logits, features)], one per scale."""

    def __init__(self, config):
        super().__init__()
        self.critics = nn.ModuleList([SpectrumCritic(size, config.discriminator_width) for size in FFT_SIZES])

    def forward(self, audio):
        return [critic(audio) for critic in self.critics]


def discriminator_loss(real, fake):
    """Hinge: logits of real audio above 1, of reconstructions below -1. Two outputs of a Discriminator -> scalar."""
    losses = [F.relu(1 - r.float()).mean() + F.relu(1 + f.float()).mean() for (r, _), (f, _) in zip(real, fake)]
    return sum(losses) / len(losses)


def adversarial_loss(fake):
    """Hinge, the decoder's side: logits of reconstructions up."""
    return -sum(logits.float().mean() for logits, _ in fake) / len(fake)


def feature_matching(real, fake):
    """L1 between the discriminator's features, relative to those of the real audio."""
    losses = [(f.float() - r.detach().float()).abs().mean() / r.detach().float().abs().mean().clamp(min=1e-3)
              for (_, rs), (_, fs) in zip(real, fake) for r, f in zip(rs, fs)]
    return sum(losses) / len(losses)
