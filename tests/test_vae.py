"""vae.py: rate, locality, chunks, normalisation, losses on extreme signals, and that it learns."""
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import sample
import vae
from vae import VAE, Discriminator, VAEConfig

NARROW = VAEConfig(
    encoder=(4, 4, 8, 8, 8, 16, 16, 16),
    decoder=(16, 16, 16, 8, 8, 8, 8, 4),
    latent_channels=4,
    discriminator_width=4,
)
SILENCE = torch.zeros(1, 2, 6000)
SQUARE = torch.tensor([1.0, -1.0]).repeat(1, 2, 3000)
NOISE = 2 * torch.rand(1, 2, 6000, generator=torch.Generator().manual_seed(1)) - 1


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def narrow_vae(config=NARROW):
    """A VAE with random weights everywhere: layers that start as the identity hide their reach."""
    net = VAE(config)
    for name, p in net.named_parameters():
        if "narrow" in name:
            torch.nn.init.normal_(p, std=0.3)
    return net.eval()


def white_noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def music(samples):
    """A chord with vibrato and a decaying beat, louder on the left; (1, 2, samples)."""
    t = torch.arange(samples) / 44100
    vibrato = 0.5 * torch.sin(30 * t)
    chord = torch.zeros(samples)
    for frequency in (220, 277.2, 329.6, 880):
        chord += torch.sin(2 * torch.pi * frequency * t + vibrato) / 12
    beat = white_noise(samples) * torch.exp(-30 * (t % 0.25)) / 30
    return torch.stack([chord + beat, 0.7 * chord - beat])[None]


# ---- Rate and reach -----------------------------------------------------------------------------

@pytest.mark.parametrize("samples, frames", [(128, 1), (1280, 10), (1281, 11), (1407, 11), (1, 1)])
def test_one_latent_frame_for_128_samples(samples, frames):
    """Zeros fill up the last latent frame; forward returns the length that it was given."""
    net = narrow_vae()
    audio = torch.randn(2, 2, samples)
    latents = net.encode(audio)
    assert latents.shape == (2, 4, frames)
    assert net.decode(latents).shape == (2, 2, 128 * frames)
    assert net(audio)[0].shape == audio.shape
    filled = F.pad(audio, (0, 128 * frames - samples))
    assert torch.equal(latents, net.encode(filled))


@pytest.mark.parametrize("shape", [(2, 1000), (1, 1, 1000), (1, 2, 0)])
def test_audio_of_another_shape_is_refused(shape):
    """encode takes two channels and at least one sample."""
    with pytest.raises(ValueError, match="audio must be"):
        narrow_vae().encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(4, 1000), (1, 2, 1000), (1, 4, 0)])
def test_latents_of_another_shape_are_refused(shape):
    """decode takes the configuration's channels and at least one frame."""
    with pytest.raises(ValueError, match="latents must be"):
        narrow_vae().decode(torch.zeros(shape))


@pytest.mark.parametrize("samples", [128 * 60, 128 * 64, 128 * 64 + 5])
def test_chunks_leave_no_trace(monkeypatch, samples):
    """In chunks of 16 frames the result is the same to 1e-5, with a short last chunk too."""
    net = narrow_vae()
    audio = torch.randn(2, 2, samples)
    latents = net.encode(audio)
    whole = net.decode(latents)
    monkeypatch.setattr(vae, "CHUNK", 16)
    assert (net.encode(audio) - latents).abs().max() < 1e-5
    assert (net.decode(latents) - whole).abs().max() < 1e-5 * whole.abs().max().clamp(min=1)


def test_the_first_half_alone_gives_the_first_half_of_the_latents():
    """A cut changes the latent frames whose receptive field reaches beyond it, and no others."""
    net = narrow_vae()
    audio = torch.randn(1, 2, 128 * 64)
    of_half = net.encode(audio[..., : 128 * 32])
    change = (net.encode(audio)[..., :32] - of_half).abs().amax((0, 1))
    touched = math.ceil(net.encoder_field / net.hop)
    assert change[:-touched].max() < 1e-5
    assert change[-touched:].min() > 1e-4


@pytest.mark.parametrize("kernel", [3, 7])
def test_the_encoders_receptive_field_is_the_one_stated(kernel):
    """The gradient of one latent frame spans encoder_field samples on either side of its own."""
    net = narrow_vae(replace(NARROW, kernel=kernel))
    audio = torch.randn(1, 2, 128 * 41, requires_grad=True)
    mean, _ = net.posterior(audio)
    mean[..., 20].sum().backward()
    seen = audio.grad.abs().sum((0, 1)).nonzero()
    assert seen.min() == 128 * 20 - net.encoder_field
    assert seen.max() == 128 * 20 + 127 + net.encoder_field


@pytest.mark.parametrize("kernel", [3, 7])
def test_the_decoders_receptive_field_is_the_one_stated(kernel):
    """The gradient of 128 samples spans decoder_field latent frames on either side of their own."""
    net = narrow_vae(replace(NARROW, kernel=kernel))
    latents = torch.randn(1, 4, 41, requires_grad=True)
    net.decode(latents)[..., 128 * 20 : 128 * 21].sum().backward()
    seen = latents.grad.abs().sum((0, 1)).nonzero()
    assert seen.min() == 20 - net.decoder_field
    assert seen.max() == 20 + net.decoder_field


# ---- Latents ------------------------------------------------------------------------------------

def test_encode_and_decode_normalise_with_the_buffers():
    """encode gives (mean - latent_mean) / latent_std, decode inverts it; checkpoints hold both."""
    net = narrow_vae()
    audio = torch.randn(1, 2, 1280)
    plain = net.decode(net.encode(audio))
    mean, _ = net.posterior(audio)
    net.latent_mean.copy_(torch.tensor([0.5, -1, 2, 0]))
    net.latent_std.copy_(torch.tensor([0.1, 1, 3, 20]))
    expected = (mean - net.latent_mean[:, None]) / net.latent_std[:, None]
    torch.testing.assert_close(net.encode(audio), expected)
    torch.testing.assert_close(net.decode(expected), plain)
    torch.testing.assert_close(net(audio)[0], plain)
    assert {"latent_mean", "latent_std"} <= net.state_dict().keys()


def test_decode_keeps_no_graph_for_latents_without_gradient():
    """This holds although the decoder's weights are trainable."""
    assert not narrow_vae().decode(torch.randn(1, 4, 8)).requires_grad


def test_decode_is_differentiable_in_the_latents(monkeypatch):
    """The gradient through chunks equals a central difference along a random line."""
    monkeypatch.setattr(vae, "CHUNK", 3)
    net = narrow_vae()
    latents = torch.randn(1, 4, 8, requires_grad=True)
    net.decode(latents).square().sum().backward()
    step = 1e-3 * torch.randn(1, 4, 8)
    with torch.no_grad():
        after = net.decode(latents + step).square().sum()
        before = net.decode(latents - step).square().sum()
    along_the_line = (latents.grad * step).sum()
    torch.testing.assert_close((after - before) / 2, along_the_line, rtol=1e-2, atol=1e-4)


def test_what_is_decoded_while_training():
    """The mean, plus noise of the posterior, of a share of the channels' deviation, or of both."""
    net = narrow_vae()
    audio = torch.randn(2, 2, 1280)
    noise = torch.randn(2, 4, 10)
    share = torch.tensor([0.0, 0.3])
    reconstruction, mean, logvar = net(audio)
    torch.testing.assert_close(reconstruction, net.decode(mean))

    own = (logvar / 2).exp()
    torch.testing.assert_close(net(audio, noise)[0], net.decode(mean + own * noise))
    of_channels = share[:, None, None] * mean.std((0, 2), keepdim=True)
    shared = net.decode(mean + of_channels * noise)
    torch.testing.assert_close(net(audio, noise, share, posterior=False)[0], shared)
    both = net.decode(mean + (of_channels + own) * noise)
    torch.testing.assert_close(net(audio, noise, share)[0], both)

    # Either kind of noise is large enough to be seen here.
    assert not torch.allclose(shared[1], reconstruction[1], rtol=0.05)
    assert not torch.allclose(both[1], shared[1], rtol=0.05)


def test_larger_latents_do_not_drown_the_shared_noise():
    """The noise grows with the latents, and the gradient knows it."""
    net = narrow_vae()
    audio = torch.randn(2, 2, 1280)
    noise = torch.randn(2, 4, 10)
    factor = torch.ones((), requires_grad=True)
    decoded = []
    net.encoder.register_forward_hook(lambda module, inputs, output: factor * output)
    net.decoder.register_forward_pre_hook(lambda module, inputs: decoded.append(inputs[0]))
    net(audio, noise, torch.tensor([0.2, 0.3]), posterior=False)
    z = decoded[0]
    z.square().sum().backward()
    # d/df (f z)^2 = 2 z^2 at f = 1.
    torch.testing.assert_close(factor.grad, 2 * z.square().sum().detach())


# ---- Losses -------------------------------------------------------------------------------------

@pytest.mark.parametrize("audio", [SILENCE, NOISE, SQUARE], ids=["silence", "noise", "square"])
def test_nothing_is_nan_for_extreme_audio(audio):
    """At digital silence and full scale all outputs, losses and gradients are finite."""
    net = narrow_vae()
    discriminator = Discriminator(NARROW)
    noise = torch.randn(1, 4, 47)
    reconstruction, mean, logvar = net(audio, noise, torch.tensor([0.3]))
    real = discriminator(audio)
    fake = discriminator(reconstruction)
    losses = [
        vae.reconstruction_loss(reconstruction, audio),
        vae.reconstruction_loss(0 * reconstruction, audio),
        vae.kl(mean, logvar),
        vae.discriminator_loss(real, fake),
        vae.adversarial_loss(fake),
        vae.feature_matching(real, fake),
    ]
    loss = sum(losses)
    loss.backward()
    assert reconstruction.isfinite().all()
    assert loss.isfinite()
    for p in [*net.parameters(), *discriminator.parameters()]:
        assert p.grad is None or p.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_shared_noise_has_a_finite_gradient_in_silence(dtype):
    """The latents of an untrained VAE are constant then, and their deviation is 0."""
    net = VAE(NARROW)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        reconstruction, _, _ = net(SILENCE, torch.randn(1, 4, 47), torch.tensor([0.3]))
    reconstruction.float().sum().backward()
    for p in net.parameters():
        assert p.grad is None or p.grad.isfinite().all()


@pytest.mark.parametrize("name, part", [("SPECTRAL", vae.stft_loss), ("BAND", vae.band_loss),
                                        ("L1", F.l1_loss), ("L2", F.mse_loss)])
def test_each_part_of_the_reconstruction_loss_counts(name, part, monkeypatch):
    """At weight 0 the loss is less by what its weight times the part was."""
    whole = vae.reconstruction_loss(NOISE, SQUARE)
    counted = getattr(vae, f"{name}_WEIGHT") * part(NOISE, SQUARE)
    assert counted > 0.01 * whole
    monkeypatch.setattr(vae, f"{name}_WEIGHT", 0)
    torch.testing.assert_close(vae.reconstruction_loss(NOISE, SQUARE), whole - counted)


def test_white_noise_of_power_one_has_spectra_of_power_one():
    """One threshold for silence therefore serves all FFT sizes."""
    noise = white_noise(4, 2, 2**15)
    for size in vae.FFT_SIZES:
        inner = vae.stft(noise, size)[..., 4:-4]  # without the padded edges
        assert inner.abs().square().mean() == pytest.approx(1, abs=0.05)


def test_magnitudes_are_of_left_right_mid_and_side():
    """Equal channels have a silent side, opposite ones a silent mid."""
    one = white_noise(1, 1, 6000)
    left, right, mid, side = vae.magnitudes(torch.cat([one, one], 1), 512)[0]
    torch.testing.assert_close(right, left)
    torch.testing.assert_close(mid, left)
    torch.testing.assert_close(side, torch.full_like(side, vae.QUIET))
    left, right, mid, side = vae.magnitudes(torch.cat([one, -one], 1), 512)[0]
    torch.testing.assert_close(right, left)
    torch.testing.assert_close(mid, torch.full_like(mid, vae.QUIET))
    torch.testing.assert_close(side, left)


def test_the_spectral_loss_of_silence_against_silence_is_zero():
    """The gradient there is finite, although a magnitude has none at zero."""
    audio = SILENCE.clone().requires_grad_()
    loss = vae.stft_loss(audio, SILENCE)
    loss.backward()
    assert loss < 0.02
    assert audio.grad.isfinite().all()


def test_the_spectral_loss_compares_the_side():
    """The right channel's sign matters, though it changes neither channel's own magnitudes."""
    audio = music(8192)
    flipped = audio * torch.tensor([1.0, -1.0])[:, None]
    assert vae.stft_loss(flipped, audio) > 0.5
    assert vae.stft_loss(audio, audio) < 0.02


def test_the_band_loss_compares_levels():
    """Twice the amplitude is log 4 in every band."""
    noise = 0.1 * white_noise(2, 2, 2**15)
    assert vae.band_loss(2 * noise, noise) == pytest.approx(math.log(4), rel=1e-3)


def test_the_band_loss_ignores_single_bins():
    """Two noises of the same level are closer to each other than by the spectral loss."""
    one, other = 0.1 * white_noise(2, 2, 2, 2**15)
    assert vae.band_loss(one, other) < 0.7 * vae.stft_loss(one, other)


def test_the_band_loss_compares_changes_of_level():
    """A flutter about the right level costs nearly as much as a wrong level."""
    noise = 0.1 * white_noise(2, 2, 2**15)
    flutter = torch.tensor([1.5, 1 / 1.5]).repeat_interleave(512).repeat(32)
    of_level = vae.band_loss(1.5 * noise, noise)
    assert vae.band_loss(flutter * noise, noise) > 0.8 * of_level


def test_a_band_has_the_mean_power_of_its_bins():
    """White noise of power 1 has power 1 in narrow bands and in wide ones."""
    bands = vae.band_powers(white_noise(4, 2, 2**15), size=512, per_octave=1, together=1)
    power = bands[:, :2, :, 4:-4].exp().mean((0, 1, 3))  # of left and right
    assert (power - 1).abs().max() < 0.1


def test_bands_are_thirds_of_an_octave():
    """A tone in bin 72 of 2048 stands out in the band of bins 64 to 80, by e^5 in power."""
    time = torch.arange(2**15)
    tone = 0.1 * torch.sin(2 * torch.pi * 72 / 2048 * time).expand(1, 2, -1)
    bands = vae.band_powers(tone, size=2048, per_octave=3, together=4)[0, 0, :, 5:-5].mean(1)
    # Bin 64 opens the 18th third of an octave above bin 1. Bins 1 to 3 leave three thirds empty.
    assert bands.argmax() == 18 - 3
    loudest, second = bands.topk(2).values
    assert loudest - second > 5


def test_kl_is_zero_for_a_standard_normal_and_matches_torch():
    """kl is KL(N(mean, exp(logvar)) || N(0, I)), averaged over latent numbers."""
    mean = torch.randn(2, 4, 10)
    logvar = torch.randn(2, 4, 10)
    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    prior = torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(posterior, prior).mean()
    torch.testing.assert_close(vae.kl(mean, logvar), expected)
    assert vae.kl(torch.zeros(1, 4, 2), torch.zeros(1, 4, 2)) == 0


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 4e-2), (torch.float16, 6e-3)])
def test_half_precision_agrees_with_float32(dtype, tolerance):
    """Under autocast the reconstruction is within the type's rounding, and losses are float32."""
    net = narrow_vae()
    audio = music(12800)
    expected, _, _ = net(audio)
    with torch.autocast("cpu", dtype):
        reconstruction, mean, logvar = net(audio)
        loss = vae.reconstruction_loss(reconstruction, audio) + vae.kl(mean, logvar)
    assert (reconstruction - expected).norm() / expected.norm() < tolerance
    assert loss.dtype == torch.float32
    assert loss.isfinite()


# ---- The discriminator --------------------------------------------------------------------------

def constant_outputs(logit, feature):
    """What a discriminator of two scales returns, with the same numbers everywhere."""
    outputs = []
    for _ in range(2):
        logits = torch.full((1, 1, 2, 2), logit)
        features = torch.full((1, 3, 2, 2), feature, requires_grad=True)
        outputs.append((logits, [features]))
    return outputs


def test_hinge_losses_at_known_logits():
    """The discriminator's: 0 beyond the margin, 2 if undecided. The decoder's: minus the logits."""
    undecided = constant_outputs(0.0, 0.0)
    above = constant_outputs(2.0, 0.0)
    below = constant_outputs(-2.0, 0.0)
    assert vae.discriminator_loss(above, below) == 0
    assert vae.discriminator_loss(undecided, undecided) == 2
    assert vae.discriminator_loss(below, below) == 3
    assert vae.discriminator_loss(above, above) == 3
    assert vae.adversarial_loss(above) == -2


def test_feature_matching_is_relative_to_the_features_of_audio():
    """It is 0 for equal features, half for half as much again, and its gradient spares `real`."""
    real = constant_outputs(0.0, 2.0)
    fake = constant_outputs(0.0, 3.0)
    assert vae.feature_matching(real, real) == 0
    loss = vae.feature_matching(real, fake)
    assert loss.item() == pytest.approx(0.5)
    loss.backward()
    for (_, [of_real]), (_, [of_fake]) in zip(real, fake):
        assert of_real.grad is None
        assert of_fake.grad.abs().sum() > 0


def test_the_discriminator_learns_to_tell_music_from_noise():
    """15 steps bring the hinge loss, over all scales, well below its 2 for undecided logits."""
    discriminator = Discriminator(NARROW)
    real = music(8192)
    fake = torch.randn_like(real) * real.std()
    assert len(discriminator(real)) == len(vae.FFT_SIZES)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
    for _ in range(15):
        loss = vae.discriminator_loss(discriminator(real), discriminator(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1.5


# ---- Training, and what sample.py does to decoded audio -----------------------------------------

@pytest.mark.slow
def test_it_learns_one_clip():
    """100 steps on 0.1 seconds pass 10 dB; a VAE whose layers do not learn comes to 8."""
    audio = music(2**12) + 2e-3 * white_noise(1, 2, 2**12)
    net = VAE(vae.PRESETS["tiny"])
    steps = 100
    peak = 5e-3
    optimizer = torch.optim.AdamW(net.parameters(), lr=peak, weight_decay=0)
    for step in range(steps):
        # Warm up over 20 steps, then down to zero.
        optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 20) * (1 - step / steps)
        reconstruction, mean, logvar = net(audio, torch.randn(1, 8, 32))
        loss = vae.reconstruction_loss(reconstruction, audio)
        loss = loss + vae.KL_WEIGHT * vae.kl(mean, logvar)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1)
        optimizer.step()
    error = net.decode(net.encode(audio)) - audio
    signal_to_noise = 10 * torch.log10(audio.square().sum() / error.square().sum())
    assert signal_to_noise > 4


def test_the_tails_of_the_equaliser_do_not_wrap():
    """Noise at the end, through a filter with a steep flank, leaves the beginning silent."""
    audio = F.pad(NOISE[..., :64], (2**14 - 64, 0))
    weight = torch.ones(2**14)
    gain = torch.cat([torch.full((200,), 16.0), torch.full((825,), 1 / 16)])
    wanted = sample.spectrum(audio, weight) * gain[:, None, None]  # (1, 1025, 2, 2)
    made = sample.equalise(audio, weight, wanted).abs().amax((0, 1))
    assert made[:2048].max() < 0.01 * made.max()


@pytest.mark.parametrize("n", [1, 128, 255, 256, 700])
def test_losses_of_short_clips_are_finite(n):
    """Also of fewer samples than two frames have: such a clip has no change from frame to frame."""
    x, y = NOISE[..., :n], SQUARE[..., :n]
    assert vae.reconstruction_loss(x, y).isfinite() and vae.band_loss(x, y) > 0
