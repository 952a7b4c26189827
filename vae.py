"""The latent model's autoencoder (App. C.1): stereo audio to latents 128 times slower, and back.

Encoder and decoder have eight ConvNeXt-1D layers [41] each, with a factor of 2 in time after every
layer but the first. The loss compares spectra and samples (L1, L2) [42], plus a KL, which keeps
some noise in the latents. Later the encoder is frozen, and the decoder fine-tuned against a
discriminator of complex spectra, after [43].

The paper does not give the losses in detail. The loss on levels in bands, and the noise that
training adds to the latents, are ours.

    vae = VAE(PRESETS["small"])
    latents = vae.encode(audio)        # (B, 2, samples) -> (B, C, ceil(samples / 128))
    audio = vae.decode(latents)        # (B, C, frames) -> (B, 2, 128 * frames)

`python tests/benchmark.py --only presets` prints sizes and cost of the presets.
"""
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

# The losses. train.py takes the weights from here.
FFT_SIZES = (512, 1024, 2048, 4096)  # samples: 12 to 93 ms at 44.1 kHz
SPECTRAL_WEIGHT = 1.0
BAND_WEIGHT = 4.0
L1_WEIGHT = 20.0
L2_WEIGHT = 50.0
# Large enough to leave noise in the latents: the decoder learns to bear small errors in them.
KL_WEIGHT = 0.1
ADVERSARIAL_WEIGHT = 1.0
FEATURE_WEIGHT = 5.0
# STFT magnitude (white noise of power 1 has 1) below which all counts as silence. With a lower one
# fainter hiss counts too, but then the empty bins of clean synthetic music dominate the loss.
QUIET = 3e-4

# Latent frames that encode and decode work on at a time, at most.
CHUNK = 1024


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of a VAE: the channels of its layers, in the order in which they run."""
    encoder: tuple[int, ...]  # at 1, 1, 1/2, 1/4 ... 1/64 of the sample rate
    decoder: tuple[int, ...]  # at 1/128, 1/128, 1/64 ... 1/2 of the sample rate
    latent_channels: int
    kernel: int = 7  # of every depthwise convolution; odd
    discriminator_width: int = 32


PRESETS = {
    "tiny": VAEConfig(
        encoder=(8, 8, 16, 24, 32, 48, 64, 64),
        decoder=(64, 64, 64, 48, 32, 24, 16, 16),
        latent_channels=8,
        discriminator_width=8,
    ),
    "small": VAEConfig(
        encoder=(8, 8, 24, 48, 96, 160, 224, 288),
        decoder=(384, 384, 384, 256, 192, 128, 80, 56),
        latent_channels=16,
        discriminator_width=16,
    ),
    "paper": VAEConfig(
        encoder=(64, 64, 64, 128, 128, 256, 256, 512),
        decoder=(512, 512, 512, 512, 256, 256, 128, 128),
        latent_channels=32,
    ),
}


# ---- Layers -------------------------------------------------------------------------------------
# Inside the networks data are (B, n, C): LayerNorm and the matrix products act on the last axis,
# which is contiguous.

class DepthwiseConv(nn.Conv2d):
    """A convolution with one filter for each channel, zero padded: (B, n, C) -> (B, n, C).

    It runs as conv2d over (B, C, 1, n): on a CPU the channels-last kernel of conv2d is 5 to 7 times
    faster than conv1d.
    """

    def __init__(self, channels, kernel):
        padding = (0, kernel // 2)
        super().__init__(channels, channels, (1, kernel), padding=padding, groups=channels)

    def forward(self, x):
        x = x.transpose(1, 2).unsqueeze(2)  # (B, C, 1, n)
        return super().forward(x).squeeze(2).transpose(1, 2)


class Layer(nn.Module):
    """ConvNeXt [41]: depthwise convolution, LayerNorm over channels and MLP, as a residual branch.

    (B, n, C) -> (B, n, C). Every layer starts as the identity.
    """

    def __init__(self, channels, kernel):
        super().__init__()
        self.conv = DepthwiseConv(channels, kernel)
        self.norm = nn.LayerNorm(channels)
        self.widen = nn.Linear(channels, 4 * channels)
        self.narrow = nn.Linear(4 * channels, channels)
        nn.init.normal_(self.widen.weight, std=channels**-0.5)
        nn.init.zeros_(self.widen.bias)
        nn.init.zeros_(self.narrow.weight)
        nn.init.zeros_(self.narrow.bias)

    def forward(self, x):
        h = self.norm(self.conv(x))
        h = F.gelu(self.widen(h))  # (B, n, 4 C)
        return x + self.narrow(h)


class Isometry(nn.Linear):
    """A linear map that starts orthogonal, with bias 0.

    Nothing normalises the residual path, so that loudness survives. These maps start by amplifying
    nothing, and lose only what does not fit into fewer channels.
    """

    def reset_parameters(self):
        nn.init.orthogonal_(self.weight)
        nn.init.zeros_(self.bias)


class Down(Isometry):
    """Half the rate, each pair of frames becomes one: (B, n, C) -> (B, n / 2, C_out)."""

    def __init__(self, channels, channels_out):
        super().__init__(2 * channels, channels_out)

    def forward(self, x):
        pairs = x.unflatten(1, (-1, 2)).flatten(2)  # (B, n / 2, 2 C)
        return super().forward(pairs)


class Up(Isometry):
    """Twice the rate, each frame becomes a pair: (B, n, C) -> (B, 2 n, C_out).

    This is a transposed convolution with kernel = stride. Uneven overlaps, the usual cause of
    checkerboards, cannot occur, and the kernel of the next layer reaches over the joints. The two
    halves do not start equal. Equal ones, which repeat the frame, would remove the first spectral
    images too, but learn high frequencies later: after 65 steps on one clip the spectral loss was
    3.1 instead of 2.4.
    """

    def __init__(self, channels, channels_out):
        super().__init__(channels, 2 * channels_out)

    def forward(self, x):
        pairs = super().forward(x)  # (B, n, 2 C_out)
        return pairs.unflatten(2, (2, -1)).flatten(1, 2)


# ---- The autoencoder ----------------------------------------------------------------------------

class VAE(nn.Module):
    """The VAE of App. C.1: a Gaussian posterior over C channels at 1/128 of the sample rate.

    Two buffers travel with the weights: latent_mean and latent_std (C,), mean and standard
    deviation of the training set's latents. They are 0 and 1 until the training of a latent model
    sets them. From then on what encode returns has mean 0 and variance 1, as diffusion assumes.
    """
    hop = 128  # samples in a latent frame

    def __init__(self, config):
        super().__init__()
        self.config = config
        down = config.encoder
        up = config.decoder
        C = config.latent_channels
        assert len(down) == len(up) == 8, "App. C.1 has eight layers in encoder and decoder"

        # From left and right to the mean and the log-variance of the latents.
        self.encoder = nn.Sequential(Isometry(2, down[0]), Layer(down[0], config.kernel))
        for width, next_width in zip(down[1:], down[2:] + (down[-1],)):
            self.encoder.append(Layer(width, config.kernel))
            self.encoder.append(Down(width, next_width))
        self.encoder.append(Isometry(down[-1], 2 * C))
        # Little noise at first: the latents do not hold anything yet.
        nn.init.constant_(self.encoder[-1].bias[C:], -4)

        # Back to left and right: these are the channels of the last Up.
        self.decoder = nn.Sequential(Isometry(C, up[0]), Layer(up[0], config.kernel))
        for width, next_width in zip(up[1:], up[2:] + (2,)):
            self.decoder.append(Layer(width, config.kernel))
            self.decoder.append(Up(width, next_width))

        self.register_buffer("latent_mean", torch.zeros(C))
        self.register_buffer("latent_std", torch.ones(C))

        # How far one latent frame sees beyond its own samples, in samples. Each layer adds a margin
        # at its own rate: 1 + 1 + 2 + 4 ... + 64 margins.
        margin = config.kernel // 2
        self.encoder_field = margin * self.hop
        # How far the samples of one latent frame see beyond it, in latent frames.
        self.decoder_field = field_of_decoder(margin)

    def posterior(self, audio):
        """Mean and log-variance of the latents, (B, C, frames) each, not normalised.

        audio: (B, 2, samples). Zeros fill up the last frame.
        """
        audio = F.pad(audio, (0, -audio.shape[-1] % self.hop))
        moments = self.encoder(audio.transpose(1, 2)).transpose(1, 2)  # (B, 2 C, frames)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-20, 10)  # exp() stays finite in half precision

    def forward(self, audio, noise=None, share=None, posterior=True):
        """For training: reconstruction (B, 2, samples), mean and log-variance (B, C, frames).

        noise       (B, C, frames), standard normal. It is multiplied by the sum of the two
                    deviations below and added to the mean. None: the mean itself is decoded
        share       (B,), a share of the deviation that each channel's mean has over batch and
                    time. The gradient goes through it: larger latents do not drown this noise
        posterior   whether the posterior's own deviation is added
        """
        mean, logvar = self.posterior(audio)
        z = mean
        if noise is not None and posterior:
            z = z + (logvar / 2).exp() * noise
        if noise is not None and share is not None:
            std = mean.std((0, 2), keepdim=True)  # (1, C, 1)
            z = z + share[:, None, None] * std * noise
        reconstruction = self.decoder(z.transpose(1, 2)).transpose(1, 2)
        return reconstruction[..., : audio.shape[-1]], mean, logvar

    @torch.no_grad()
    def encode(self, audio):
        """Audio (B, 2, samples) -> normalised posterior mean (B, C, ceil(samples / 128)).

        Any length, in fixed memory, without gradient; zeros fill up the last frame. ValueError
        unless there are two channels and at least one sample.
        """
        if audio.dim() != 3 or audio.shape[1] != 2 or audio.shape[2] == 0:
            shape = tuple(audio.shape)
            raise ValueError(f"audio must be (B, 2, samples) with samples > 0, not {shape}")
        audio = F.pad(audio, (0, -audio.shape[-1] % self.hop))
        frames = audio.shape[-1] // self.hop

        # On a CPU, wide layers at the full sample rate are slow unless a chunk of them fits into
        # the cache.
        size = CHUNK
        if audio.device.type == "cpu":
            size = min(size, 2**13 // self.config.encoder[0])

        parts = []
        for lo, hi, keep in chunks(frames, math.ceil(self.encoder_field / self.hop), size):
            mean, _ = self.posterior(audio[..., lo * self.hop : hi * self.hop])
            parts.append(mean[..., keep])
        mean = torch.cat(parts, dim=-1)  # (B, C, frames)
        return (mean - self.latent_mean[:, None]) / self.latent_std[:, None]

    def decode(self, latents):
        """Normalised latents (B, C, frames) -> audio (B, 2, 128 * frames), of any length.

        Differentiable in the latents. If they do not require a gradient no graph is kept, and
        memory is fixed. ValueError for another shape, or no frames.
        """
        C = self.config.latent_channels
        if latents.dim() != 3 or latents.shape[1] != C or latents.shape[2] == 0:
            shape = tuple(latents.shape)
            raise ValueError(f"latents must be (B, {C}, frames) with frames > 0, not {shape}")
        z = latents * self.latent_std[:, None] + self.latent_mean[:, None]
        z = z.transpose(1, 2)  # (B, frames, C)
        wants_gradient = torch.is_grad_enabled() and latents.requires_grad
        parts = []
        with torch.set_grad_enabled(wants_gradient):
            for lo, hi, keep in chunks(z.shape[1], self.decoder_field, CHUNK):
                audio = self.decoder(z[:, lo:hi])  # (B, samples, 2)
                parts.append(audio[:, keep.start * self.hop : keep.stop * self.hop])
        return torch.cat(parts, dim=1).transpose(1, 2)


def field_of_decoder(margin):
    """How many latent frames on either side reach the samples of one latent frame.

    margin: of a layer, in frames at the layer's own rate.
    """
    # Walk back from the samples of latent frame 0 to the latent frames that they depend on.
    first, last = 0, VAE.hop - 1
    for _ in range(7):
        # Undo an Up, then the Layer before it.
        first = first // 2 - margin
        last = last // 2 + margin
    # The first Layer has no Up.
    first -= margin
    last += margin
    return max(-first, last)


def chunks(frames, reach, size):
    """Cut a long sequence into chunks of `size` frames, each with its surroundings.

    Yields (lo, hi, keep): lo and hi include up to `reach` frames on either side, so that the result
    does not depend on where the cuts fall. `keep` is the slice without them, counted from lo.
    """
    for start in range(0, frames, size):
        stop = min(start + size, frames)
        lo = max(start - reach, 0)
        hi = min(stop + reach, frames)
        yield lo, hi, slice(start - lo, stop - lo)


# ---- Losses -------------------------------------------------------------------------------------
# In float32 under any autocast, and finite for silence. Each returns a scalar, a mean over clips.

def stft(audio, size):
    """Spectra (..., bins, frames), complex, of audio (..., n); the hop is a quarter of `size`.

    White noise of power 1 has power 1 in them.
    """
    window = torch.hann_window(size, device=audio.device)
    window = window / window.norm()
    signals = audio.float().flatten(0, -2)
    X = torch.stft(signals, size, size // 4, window=window, pad_mode="constant",
                   return_complex=True)
    return X.unflatten(0, audio.shape[:-1])


def magnitudes(audio, size):
    """Magnitude spectra of left, right, mid and side: (B, 2, n) -> (B, 4, bins, frames)."""
    left, right = stft(audio, size).unbind(1)
    mid = (left + right) / 2
    side = (left - right) / 2
    X = torch.stack([left, right, mid, side], dim=1)
    return (X.real**2 + X.imag**2 + QUIET**2).sqrt()  # the gradient of |X| at 0 would be NaN


def stft_loss(reconstruction, audio):
    """Spectral convergence plus L1 of log magnitudes, averaged over FFT_SIZES.

    reconstruction, audio: (B, 2, n).
    """
    loss = 0
    for size in FFT_SIZES:
        Y = magnitudes(reconstruction, size)
        X = magnitudes(audio, size)
        # One ratio for the four signals of a clip: the side of a mono clip is silent. The scale is
        # at least 1e-3, 60 dB below full scale.
        scale = X.square().mean((1, 2, 3)).sqrt().clamp(min=1e-3)
        convergence = ((Y - X).square().mean((1, 2, 3)) + 1e-12).sqrt() / scale
        loss = loss + convergence.mean() + (Y.log() - X.log()).abs().mean()
    return loss / len(FFT_SIZES)


def band_loss(reconstruction, audio):
    """L1 of the log power in bands, and of its change from frame to frame in octaves.

    The decoder cannot place every single bin of noise. But it can be as loud as the original in
    each band at each moment. reconstruction, audio: (B, 2, n).
    """
    # FFT size, bands per octave, STFT frames averaged.
    resolutions = [(512, 1, 1), (1024, 1, 1), (512, 3, 4), (2048, 3, 4), (2048, 3, 32)]
    errors = []
    for size, per_octave, together in resolutions:
        made = band_powers(reconstruction, size, per_octave, together)
        errors.append(made - band_powers(audio, size, per_octave, together))
    # The change of whole octaves from frame to frame: attacks, and whether hiss is steady.
    # (Of 256 samples and more: fewer have a single frame.)
    errors += [error.diff(dim=-1) for error in errors[:2] if error.shape[-1] > 1]
    return sum(error.abs().mean() for error in errors) / len(resolutions)


def band_powers(audio, size, per_octave, together):
    """Log power of left, right, mid and side in bands: (B, 2, n) -> (B, 4, bands, frames).

    A frame is the mean of `together` STFT frames, or of all if a clip has fewer, and overlaps the
    next by half. 0 Hz is left out.
    """
    # The band of each bin. Narrow bands at low frequencies may hold no bin: they are skipped.
    octaves = torch.arange(1, size // 2 + 1).log2()
    numbers, band = (per_octave * octaves).long().unique(return_inverse=True)
    band = band.to(audio.device)

    # The mean power of each band's bins.
    power = magnitudes(audio, size)[:, :, 1:].square()
    B, signals, _, frames = power.shape
    total = power.new_zeros(B, signals, len(numbers), frames).index_add(2, band, power)
    power = total / band.bincount(minlength=len(numbers))[:, None]

    # The mean of adjacent frames.
    width = min(together, frames)
    hop = max(1, width // 2)
    return F.avg_pool2d(power, (1, width), stride=(1, hop)).log()


def reconstruction_loss(reconstruction, audio):
    """What the autoencoder minimises besides the KL: spectra, bands, L1 and L2.

    reconstruction, audio: (B, 2, n).
    """
    error = reconstruction.float() - audio.float()
    loss = SPECTRAL_WEIGHT * stft_loss(reconstruction, audio)
    loss = loss + BAND_WEIGHT * band_loss(reconstruction, audio)
    loss = loss + L1_WEIGHT * error.abs().mean()
    loss = loss + L2_WEIGHT * error.square().mean()
    return loss


def kl(mean, logvar):
    """KL divergence of the posterior from N(0, I), in nats per latent number.

    mean, logvar: (B, C, frames), from VAE.posterior.
    """
    mean = mean.float()
    logvar = logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


# ---- The discriminator --------------------------------------------------------------------------

class Discriminator(nn.Module):
    """A multi-scale discriminator of complex spectra, after [43]: a SpectrumCritic for each size.

    Ours are the sizes, FFT_SIZES, and the generator's loss, which is not clipped; and there is no
    dilation.

    Audio (B, 2, n) -> a list of (logits, features), one for each critic.
    """

    def __init__(self, config):
        super().__init__()
        self.critics = nn.ModuleList()
        for size in FFT_SIZES:
            self.critics.append(SpectrumCritic(size, config.discriminator_width))

    def forward(self, audio):
        return [critic(audio) for critic in self.critics]


class SpectrumCritic(nn.Module):
    """Classifies patches of a complex STFT as real or reconstructed.

    Audio (B, 2, n) -> logits (B, 1, bins', frames), and features, a list of what each layer puts
    out.
    """

    def __init__(self, size, width):
        super().__init__()
        self.size = size
        # Kernels and strides are (bins, frames).
        self.layers = nn.ModuleList([normed_conv(4, width, (9, 3))])
        for _ in range(3):
            self.layers.append(normed_conv(width, width, (9, 3), stride=(2, 1)))
        self.layers.append(normed_conv(width, width, (3, 3)))
        self.logits = normed_conv(width, 1, (3, 3))

    def forward(self, audio):
        # Real and imaginary parts of left and right are the four channels.
        x = torch.view_as_real(stft(audio, self.size))  # (B, 2, bins, frames, 2)
        x = x.permute(0, 1, 4, 2, 3).flatten(1, 2)  # (B, 4, bins, frames)
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            features.append(x)
        return self.logits(x), features


def normed_conv(channels, channels_out, kernel, stride=1):
    """A 2-D convolution with weight normalisation, zero padded."""
    padding = (kernel[0] // 2, kernel[1] // 2)
    return weight_norm(nn.Conv2d(channels, channels_out, kernel, stride, padding))


# In these losses `real` and `fake` are a Discriminator's outputs for audio and reconstruction.

def discriminator_loss(real, fake):
    """The discriminator's hinge loss: logits of audio above 1, of reconstructions below -1."""
    loss = 0
    for (real_logits, _), (fake_logits, _) in zip(real, fake):
        of_real = F.relu(1 - real_logits.float()).mean()
        of_fake = F.relu(1 + fake_logits.float()).mean()
        loss = loss + (of_real + of_fake)
    return loss / len(real)


def adversarial_loss(fake):
    """The decoder's side of the hinge loss: raise the logits of reconstructions."""
    loss = 0
    for logits, _ in fake:
        loss = loss - logits.float().mean()
    return loss / len(fake)


def feature_matching(real, fake):
    """L1 between the discriminator's features, relative to those of audio, averaged over layers.

    The features of audio are constants: they get no gradient.
    """
    losses = []
    for (_, real_features), (_, fake_features) in zip(real, fake):
        for of_real, of_fake in zip(real_features, fake_features):
            of_real = of_real.detach().float()
            distance = (of_fake.float() - of_real).abs().mean()
            losses.append(distance / of_real.abs().mean().clamp(min=1e-3))
    return sum(losses) / len(losses)
