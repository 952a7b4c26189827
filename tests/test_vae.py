"""The autoencoder: rate, locality, chunking, normalisation, losses on extreme signals, and that it learns."""
import math

import pytest
import torch
import torch.nn.functional as F

import sample
import vae
from vae import VAE, Discriminator, VAEConfig

NARROW = VAEConfig((4, 4, 8, 8, 8, 16, 16, 16), (16, 16, 16, 8, 8, 8, 8, 4), 4, discriminator_width=4)
SILENCE = torch.zeros(1, 2, 6000)
SQUARE = torch.tensor([1.0, -1.0]).repeat(1, 2, 3000)
NOISE = torch.rand(1, 2, 6000, generator=torch.Generator().manual_seed(1)) * 2 - 1


def narrow_vae(config=NARROW):
    """An autoencoder with random weights everywhere: the layers that start as the identity would hide their reach."""
    torch.manual_seed(0)
    net = VAE(config)
    for name, p in net.named_parameters():
        if "narrow" in name:
            torch.nn.init.normal_(p, std=0.3)
    return net.eval()


def music(samples):
    """A chord with vibrato and a decaying beat, louder on the left; (1, 2, samples)."""
    t = torch.arange(samples) / 44100
    chord = sum(torch.sin(2 * torch.pi * f * t + 0.5 * torch.sin(30 * t)) for f in (220, 277.2, 329.6, 880)) / 12
    beat = torch.randn(samples, generator=torch.Generator().manual_seed(0)) * torch.exp(-30 * (t % 0.25)) / 30
    return torch.stack([chord + beat, 0.7 * chord - beat])[None]


def overfit(audio, steps, lr=5e-3):
    """Train on one clip for so many steps; returns the signal-to-noise ratio in dB."""
    torch.manual_seed(0)
    net = VAE(vae.PRESETS["tiny"])
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 20) * (1 - step / steps)
        mean, _ = net.posterior(audio)
        reconstruction, mean, logvar = net(audio, torch.randn_like(mean))
        loss = vae.reconstruction_loss(reconstruction, audio) + vae.KL_WEIGHT * vae.kl(mean, logvar)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1)
        optimizer.step()
    error = net.decode(net.encode(audio))[..., :audio.shape[-1]] - audio
    return 10 * torch.log10(audio.square().sum() / error.square().sum()).item()


@pytest.mark.parametrize("samples, frames", [(128, 1), (1280, 10), (1281, 11), (1407, 11), (1, 1)])
def test_one_latent_frame_for_128_samples(samples, frames):
    """Lengths that are no multiple of 128 are filled up with zeros; forward gives the length that it was given."""
    net, audio = narrow_vae(), torch.randn(2, 2, samples)
    latents = net.encode(audio)
    assert latents.shape == (2, 4, frames)
    assert net.decode(latents).shape == (2, 2, 128 * frames)
    assert net(audio)[0].shape == audio.shape
    filled = F.pad(audio, (0, 128 * frames - samples))
    assert torch.equal(latents, net.encode(filled))


@pytest.mark.parametrize("shape", [(2, 1000), (1, 1, 1000), (1, 2, 0)])
def test_audio_of_another_shape_is_refused(shape):
    """Mono or empty audio ends in a sentence, not in a matrix product's complaint."""
    with pytest.raises(ValueError, match="audio must be"):
        narrow_vae().encode(torch.zeros(shape))
    with pytest.raises(ValueError, match="latents must be"):
        narrow_vae().decode(torch.zeros(shape))


@pytest.mark.parametrize("samples", [128 * 60, 128 * 64, 128 * 64 + 5])
def test_chunks_leave_no_trace(monkeypatch, samples):
    """Encoding and decoding in chunks of 16 frames equals one piece to 1e-5, also where the last chunk is short."""
    net, audio = narrow_vae(), torch.randn(2, 2, samples)
    latents = net.encode(audio)
    whole = net.decode(latents)
    monkeypatch.setattr(vae, "CHUNK", 16)
    assert (net.encode(audio) - latents).abs().max() < 1e-5
    assert (net.decode(latents) - whole).abs().max() < 1e-5 * whole.abs().max().clamp(min=1)


def test_the_first_half_alone_gives_the_first_half_of_the_latents():
    """Except for the frames whose stated receptive field reaches beyond the cut; those do change."""
    net, audio = narrow_vae(), torch.randn(1, 2, 128 * 64)
    difference = (net.encode(audio)[..., :32] - net.encode(audio[..., :128 * 32])).abs().amax((0, 1))
    blind = -(-net.encoder_field // net.hop)
    assert difference[:-blind].max() < 1e-5
    assert difference[-blind:].min() > 1e-4


@pytest.mark.parametrize("kernel", [3, 7])
def test_the_receptive_fields_are_those_stated(kernel):
    """Measured by gradients: how far one latent frame sees in samples, and a frame of samples in latent frames."""
    net = narrow_vae(VAEConfig(NARROW.encoder, NARROW.decoder, 4, kernel))
    audio, at = torch.randn(1, 2, 128 * 41, requires_grad=True), 20
    net.posterior(audio)[0][..., at].sum().backward()
    seen = audio.grad.abs().sum((0, 1)).nonzero()
    assert (at * 128 - seen.min(), seen.max() - at * 128 - 127) == (net.encoder_field, net.encoder_field)
    latents = torch.randn(1, 4, 41, requires_grad=True)
    net.decode(latents)[..., at * 128:(at + 1) * 128].sum().backward()
    seen = latents.grad.abs().sum((0, 1)).nonzero()
    assert (at - seen.min(), seen.max() - at) == (net.decoder_field, net.decoder_field)


def test_encode_and_decode_normalise_with_the_buffers():
    """encode gives (mean - latent_mean) / latent_std, decode takes it back, and a checkpoint carries both."""
    net, audio = narrow_vae(), torch.randn(1, 2, 1280)
    plain = net.decode(net.encode(audio))
    mean, _ = net.posterior(audio)
    net.latent_mean.copy_(torch.tensor([0.5, -1, 2, 0])), net.latent_std.copy_(torch.tensor([0.1, 1, 3, 20]))
    expected = (mean - net.latent_mean[:, None]) / net.latent_std[:, None]
    torch.testing.assert_close(net.encode(audio), expected)
    torch.testing.assert_close(net.decode(expected), plain)
    torch.testing.assert_close(net(audio)[0], plain)
    assert {"latent_mean", "latent_std"} <= net.state_dict().keys()


def test_decode_keeps_a_graph_only_for_latents_that_ask():
    """The gradient reaches the latents through chunks; without one wanted, even trainable weights keep no graph."""
    net, latents = narrow_vae(), torch.randn(1, 4, 8)
    assert not net.decode(latents).requires_grad
    latents.requires_grad_()
    net.decode(latents).square().sum().backward()
    step = torch.randn_like(latents) * 1e-3
    with torch.no_grad():
        change = net.decode(latents + step).square().sum() - net.decode(latents - step).square().sum()
    torch.testing.assert_close(change / 2, (latents.grad * step).sum(), rtol=1e-2, atol=1e-4)


def test_what_is_decoded_while_training():
    """z = mean + deviation * noise: a share of what each channel's mean has over batch and time,
    and the posterior's own, if asked; without noise the mean."""
    net, audio, noise = narrow_vae(), torch.randn(2, 2, 1280), torch.randn(2, 4, 10)
    share = torch.tensor([0.0, 0.3])
    reconstruction, mean, logvar = net(audio)
    torch.testing.assert_close(reconstruction, net.decode(mean))
    white = share[:, None, None] * mean.std((0, 2), keepdim=True)
    z = mean + white * noise
    torch.testing.assert_close(net(audio, noise, share, posterior=False)[0], net.decode(z))
    z = mean + (white + (logvar / 2).exp()) * noise
    torch.testing.assert_close(net(audio, noise, share)[0], net.decode(z))
    assert not torch.allclose(net.decode(z)[1], net.decode(mean)[1], rtol=0.05)


@pytest.mark.parametrize("audio", [SILENCE, NOISE, SQUARE], ids=["silence", "noise", "square"])
def test_nothing_is_nan_for_extreme_audio(audio):
    """Digital silence and full scale: outputs, all losses and every gradient of both networks are finite."""
    net, judge = narrow_vae(), Discriminator(NARROW)
    noise, share = torch.randn(1, 4, 47), torch.full((1,), 0.3)
    reconstruction, mean, logvar = net(audio, noise, share)
    real, fake = judge(audio), judge(reconstruction)
    loss = (vae.reconstruction_loss(reconstruction, audio) + vae.reconstruction_loss(reconstruction * 0, audio)
            + vae.kl(mean, logvar) + vae.discriminator_loss(real, fake) + vae.adversarial_loss(fake)
            + vae.feature_matching(real, fake))
    loss.backward()
    assert reconstruction.isfinite().all() and loss.isfinite()
    for p in [*net.parameters(), *judge.parameters()]:
        assert p.grad is None or p.grad.isfinite().all()


def test_the_band_loss_hears_levels_and_no_phases():
    """Twice the amplitude is log 4 in every band; other noise of the same level is nearer than by stft_loss; a flutter
    about the right level is nearly as far as a wrong level; band_powers can tell thirds of an octave."""
    noise = 0.1 * torch.randn(2, 2, 2, 2**15, generator=torch.Generator().manual_seed(0))
    assert vae.band_loss(2 * noise[0], noise[0]) == pytest.approx(math.log(4), rel=1e-3)
    assert vae.band_loss(*noise) < 0.7 * vae.stft_loss(*noise)
    flutter = torch.tensor([1.5, 1 / 1.5]).repeat_interleave(512).repeat(32)
    assert vae.band_loss(flutter * noise[0], noise[0]) > 0.8 * vae.band_loss(1.5 * noise[0], noise[0])
    tone = 0.1 * torch.sin(2 * torch.pi * 72 / 2048 * torch.arange(2**15)).expand(1, 2, -1)     # bin 72 of 64 to 80
    bands = vae.band_powers(tone, 2048, 3, 4)[0, 0, :, 5:-5].mean(1)
    assert bands.argmax() == 18 - 3 and bands.sort().values[-2] < bands.max() - 5        # bins 1 to 3 leave three empty


@pytest.mark.parametrize("name, part", [("SPECTRAL", vae.stft_loss), ("BAND", vae.band_loss), ("L1", F.l1_loss),
                                        ("L2", F.mse_loss)])
def test_each_part_of_the_reconstruction_loss_counts(name, part, monkeypatch):
    """With its weight: at weight 0 the loss is less by that much."""
    whole, counted = vae.reconstruction_loss(NOISE, SQUARE), getattr(vae, f"{name}_WEIGHT") * part(NOISE, SQUARE)
    monkeypatch.setattr(vae, f"{name}_WEIGHT", 0)
    torch.testing.assert_close(vae.reconstruction_loss(NOISE, SQUARE), whole - counted)
    assert counted > 0.01 * whole


def test_the_tails_of_the_equaliser_do_not_wrap():
    """Noise at the end, through a filter with a steep flank: the beginning stays silent."""
    audio, weight = F.pad(NOISE[..., :64], (2**14 - 64, 0)), torch.ones(2**14)
    wanted = sample.spectrum(audio, weight) * torch.tensor([16, 1 / 16]).repeat_interleave(torch.tensor([200, 825]))
    made = sample.equalise(audio, weight, wanted).abs().amax((0, 1))
    assert made[:2048].max() < 0.01 * made.max()


def test_the_spectral_loss_of_silence_against_silence_is_zero():
    """And the gradient there is finite, although a magnitude has none at zero."""
    audio = SILENCE.clone().requires_grad_()
    loss = vae.stft_loss(audio, SILENCE)
    loss.backward()
    assert loss < 0.02 and audio.grad.isfinite().all()


def test_the_spectral_loss_hears_the_side():
    """Swapping the sign of the right channel changes mid and side only, left and right spectra not at all."""
    audio = music(8192)
    flipped = audio * torch.tensor([1.0, -1.0])[:, None]
    assert vae.stft_loss(flipped, audio) > 0.5
    assert vae.stft_loss(audio, audio) < 0.02


def test_white_noise_of_power_one_has_spectra_of_power_one():
    """So that one threshold for silence serves all FFT sizes."""
    noise = torch.randn(4, 2, 2**15, generator=torch.Generator().manual_seed(0))
    for size in vae.FFT_SIZES:
        inner = vae.stft(noise, size)[..., 4:-4]                        # without the padded edges
        assert inner.abs().square().mean() == pytest.approx(1, abs=0.05)


def test_kl_is_zero_for_a_standard_normal_and_matches_torch():
    """KL(N(mean, exp(logvar)) || N(0, I)), averaged over latent numbers."""
    mean, logvar = torch.randn(2, 4, 10), torch.randn(2, 4, 10)
    reference = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (logvar / 2).exp()),
                                                  torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(vae.kl(mean, logvar), reference)
    assert vae.kl(torch.zeros(1, 4, 2), torch.zeros(1, 4, 2)) == 0


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 4e-2), (torch.float16, 6e-3)])
def test_half_precision_agrees_with_float32(dtype, tolerance):
    """Under autocast the reconstruction stays within the rounding of the type, and losses are float32."""
    net, audio = narrow_vae(), music(12800)
    reference, _, _ = net(audio)
    with torch.autocast("cpu", dtype):
        reconstruction, mean, logvar = net(audio)
        loss = vae.reconstruction_loss(reconstruction, audio) + vae.kl(mean, logvar)
    assert (reconstruction - reference).norm() / reference.norm() < tolerance
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_discriminator_losses_at_known_logits():
    """The hinge is 0 beyond the margin and 2 at logits of 0; features that match cost 0; gradients spare `real`."""
    def outputs(logit, feature):
        return [(torch.full((1, 1, 2, 2), logit), [torch.full((1, 3, 2, 2), feature)]) for _ in range(2)]
    assert vae.discriminator_loss(outputs(2.0, 0.0), outputs(-2.0, 0.0)) == 0
    assert vae.discriminator_loss(outputs(0.0, 0.0), outputs(0.0, 0.0)) == 2
    assert vae.adversarial_loss(outputs(3.0, 0.0)) == -3
    assert vae.feature_matching(outputs(0.0, 2.0), outputs(0.0, 2.0)) == 0
    assert vae.feature_matching(outputs(0.0, 2.0), outputs(0.0, 3.0)) == pytest.approx(0.5)
    real, fake = outputs(0.0, 2.0), outputs(0.0, 3.0)
    for output in real + fake:
        output[1][0].requires_grad_()
    vae.feature_matching(real, fake).backward()
    assert real[0][1][0].grad is None and fake[0][1][0].grad.abs().sum() > 0


def test_the_discriminator_learns_to_tell_music_from_noise():
    """A few steps of the hinge loss bring it below its value for undecided logits, at every scale."""
    torch.manual_seed(0)
    judge, real = Discriminator(NARROW), music(8192)
    fake = torch.randn_like(real) * real.std()
    optimizer = torch.optim.Adam(judge.parameters(), lr=1e-2)
    assert len(judge(real)) == len(vae.FFT_SIZES)
    for _ in range(15):
        loss = vae.discriminator_loss(judge(real), judge(fake))
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert loss < 1.5


def test_it_learns_one_clip():
    """60 steps on a fifth of a second pass 4 dB; silence would give 0, a network without its layers 1."""
    hiss = 2e-3 * torch.randn(1, 2, 2**13, generator=torch.Generator().manual_seed(0))
    assert overfit(music(2**13) + hiss, steps=60) > 4
