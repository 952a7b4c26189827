"""examples/stable_audio_open.py with a tiny random pipeline of the same make; skipped where
diffusers is missing."""
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile as sf
import torch

import guidance
import tasks
from conftest import save_checkpoint
from diffusion import add_noise
from examples import stable_audio_open
from sample import run

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

WIDTH, CHANNELS, FRAMES, HOP = 16, 8, 64, 2048          # FRAMES: a window of 2.97 s
ROOT = Path(__file__).resolve().parents[1]
PROMPT = ("--prompt", "warm pads", "--scale", "3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A StableAudioPipeline with random weights and a tokenizer of four words, as save_pretrained
    writes it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipeline")
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=2 * CHANNELS, channel_multiples=[1, 1, 1, 1, 1], decoder_channels=CHANNELS,
        decoder_input_channels=CHANNELS)
    dit = diffusers.StableAudioDiTModel(
        sample_size=FRAMES, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, num_key_value_attention_heads=2, cross_attention_dim=WIDTH, time_proj_dim=16,
        cross_attention_input_dim=WIDTH, global_states_input_dim=2 * WIDTH)
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "warm": 3, "pads": 4}
    text = transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=len(words), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    diffusers.StableAudioPipeline(
        vae, text, diffusers.StableAudioProjectionModel(WIDTH, WIDTH, 0, 512), tokenizer(words), dit,
        diffusers.EDMDPMSolverMultistepScheduler()).save_pretrained(folder)
    return folder


def tokenizer(words):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.Unigram([(word, -1.0) for word in words], unk_id=2))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.T5TokenizerFast(tokenizer_object=made, extra_ids=0, model_max_length=12)


def options(folder, **given):
    """The flags that open_pretrained reads."""
    defaults = dict(checkpoint=None, model="latent", prompt=None, scale=None, timing=None, recompute=False)
    return SimpleNamespace(pretrained=str(folder), **defaults | given)


def open_tiny(folder, **given):
    return stable_audio_open.open_pretrained(options(folder, **given), torch.device("cpu"))


def edit(folder, tmp_path, track, *arguments):
    """Three steps of the example's command on audio (n, channels) at 44.1 kHz: what it wrote."""
    sf.write(tmp_path / "in.wav", track, 44100, subtype="FLOAT")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [
            "examples/stable_audio_open.py", "--pretrained", str(folder), "--input", str(tmp_path / "in.wav"),
            "--output", str(tmp_path / "out.wav"), "--steps", "3", "--force", *arguments])
        stable_audio_open.main()
    return sf.read(tmp_path / "out.wav", always_2d=True)[0]


@pytest.mark.parametrize("flags, a, b, length", [
    (("--task", "infill", "--start", "3.2", "--end", "4", *PROMPT), 3.2, 4, 8),
    (("--task", "continuation", "--start", "5", "--length", "4"), 5, 8, 9)], ids=["infill", "continuation"])
def test_an_edit_is_new_inside_and_the_inputs_own_outside(folder, tmp_path, capsys, flags, a, b, length):
    """The length is right; outside the region (in whole frames) and its fades all bits are the
    input's; nothing leaks: noise in the place of the region changes nothing. The licence is said
    once; the json has the example's command.
    """
    track = sf.read(ROOT / "examples" / "clip.wav", always_2d=True)[0]
    after = edit(folder, tmp_path, track, *flags)
    printed, stored = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert printed.count("Stability AI Community License") == 1 and "trained for" not in printed
    assert stored["command"].startswith("python examples/stable_audio_open.py --pretrained")
    a, b, fade = round(a * 44100), round(b * 44100), math.ceil(0.03 * 44100)
    assert after.shape == (length * 44100, 2) and np.isfinite(after).all()
    assert np.array_equal(after[:a - fade], track[:a - fade])
    assert length == 9 or np.array_equal(after[b + HOP + fade:], track[b + HOP + fade:])
    assert np.isclose(after[a:b], track[a:b]).mean() < 0.05
    track[a:b] = 0.5 * np.random.default_rng(1).uniform(-1, 1, (b - a, 2))
    again = edit(folder, tmp_path, track, *flags)
    assert np.array_equal(again, after)


@pytest.mark.parametrize("sigma", [0.3, 2.0, 80.0])
def test_x0_hat_is_that_of_the_pipeline(folder, sigma):
    """One step of the whole pipeline, from sigma to 0 with a prompt, ends at the x0_hat that
    guidance.py computes."""
    pytest.importorskip("torchsde")                     # the scheduler wants it
    pipe = diffusers.StableAudioPipeline.from_pretrained(folder, scheduler=None)
    pipe.register_modules(scheduler=diffusers.CosineDPMSolverMultistepScheduler(sigma_min=sigma))
    pipe.set_progress_bar_config(disable=True)
    x = (1 + sigma**2) ** 0.5 * torch.randn(1, CHANNELS, FRAMES, generator=torch.Generator().manual_seed(0))
    wanted = pipe(prompt="warm pads", guidance_scale=3.0, audio_start_in_s=1.0, audio_end_in_s=2.5,
                  num_inference_steps=1, latents=x / pipe.scheduler.init_noise_sigma, output_type="latent").audios
    net = open_tiny(folder, prompt="warm pads", scale=3.0, timing=(1.0, 2.5)).net
    t = torch.tensor(sigma, dtype=torch.float64).atan() * 2 / math.pi
    x0_hat, _ = guidance.guided_estimate(net, x / (1 + sigma**2) ** 0.5, t, ())
    torch.testing.assert_close(x0_hat, wanted, atol=2e-5, rtol=1e-4)


def test_without_a_prompt_the_model_is_the_unconditional_half_of_its_guidance(folder):
    """One zero token says what zeros in the place of the whole prompt say; an empty prompt says
    something else."""
    x_t, t = torch.randn(2, CHANNELS, FRAMES, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.8])
    null, half, empty = (open_tiny(folder, **given).net(x_t, t) for given in (
        {}, {"prompt": "warm pads", "scale": 0.0}, {"prompt": "", "scale": 1.0}))
    torch.testing.assert_close(null, half, atol=1e-5, rtol=1e-5)
    assert (null - empty).abs().max() > 1e-3


def test_behind_a_short_window_the_model_hears_silence(folder):
    """A window of n frames is a full one that goes on with silence, at the noise level of t, and
    lasts as long as n."""
    checkpoint, n, t = open_tiny(folder), 40, torch.tensor([0.4])
    noise = torch.randn(1, CHANNELS, FRAMES, generator=torch.Generator().manual_seed(0))
    silence = checkpoint.encode(torch.zeros(1, 2, FRAMES * HOP))[..., 30:31].expand(-1, -1, FRAMES)
    x_t = add_noise(silence, noise, t)[0]
    x_t[..., :n] = torch.randn(1, CHANNELS, n, generator=torch.Generator().manual_seed(1))
    full = open_tiny(folder, timing=(0.0, n * HOP / 44100)).net(x_t, t)[..., :n]
    torch.testing.assert_close(checkpoint.net(x_t[..., :n], t), full, atol=1e-5, rtol=1e-5)


def test_chunks_change_neither_the_audio_nor_a_gradient(folder):
    """Encoding and decoding in chunks, computed again for a gradient, give what the whole
    autoencoder gives."""
    vae, g = open_tiny(folder).vae, torch.Generator().manual_seed(0)
    audio = torch.randn(1, 2, 150 * HOP, generator=g)
    torch.testing.assert_close(vae.encode(audio), vae.vae.encode(audio).latent_dist.mode(), atol=1e-5, rtol=1e-5)
    assert vae.encode(audio[..., :HOP + 1]).shape[-1] == 2
    x = torch.randn(1, CHANNELS, 150, generator=g, requires_grad=True)
    gradients = []
    for decode in (vae.decode, lambda x: vae.vae.decode(x).sample):
        gradients.append((decode(x), torch.autograd.grad((decode(x) * audio).sum(), x)[0]))
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_the_autoencoder_reaches_no_further_than_is_said(folder):
    """What is not a number at either end leaves all frames beyond the stated reach finite."""
    vae, reach = open_tiny(folder).vae, math.ceil(stable_audio_open.Autoencoder.encoder_field / HOP)
    audio, x = torch.zeros(1, 2, 30 * HOP), torch.zeros(1, CHANNELS, 30)
    for ends in (audio[..., :HOP], audio[..., -HOP:], x[..., 0], x[..., -1]):
        ends.fill_(math.nan)
    assert vae.vae.encode(audio).latent_dist.mode()[..., reach + 1:29 - reach].isfinite().all()
    reach = vae.decoder_field
    assert vae.vae.decode(x).sample[..., (reach + 1) * HOP:(29 - reach) * HOP].isfinite().all()


def test_guidance_by_example_and_recomputed_blocks(folder, tmp_path):
    """--reference joins an infill; with --recompute each block runs twice, and the edit is the
    same."""
    save_checkpoint(tmp_path / "classifier.pt", "classifier", tasks.PaSST(tasks.PASST_PRESETS["tiny"]), classes=["a"])
    track = sf.read(ROOT / "examples" / "clip.wav", always_2d=True)[0][:3 * 44100]
    flags = ("--task", "infill", "--start", "1", "--end", "1.5")
    plain = edit(folder, tmp_path, track, *flags)
    assert np.abs(edit(folder, tmp_path, track, *flags, "--recompute") - plain).max() < 1e-4
    guided = edit(folder, tmp_path, track, *flags, "--reference", str(ROOT / "examples" / "other.flac"),
                  "--listener", str(tmp_path / "classifier.pt"))
    assert np.isfinite(guided).all() and not np.array_equal(guided, plain)
    calls, net = [], open_tiny(folder, recompute=True).net
    net.dit.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    x_t = torch.randn(1, CHANNELS, FRAMES, requires_grad=True)
    net(x_t, torch.tensor([0.5])).sum().backward()
    assert len(calls) == 2


def test_half_precision_leaves_time_alone(folder):
    """Under bf16 autocast the time features, whose phases are large, are those of float32."""
    time, t = open_tiny(folder).net.dit.time_proj, torch.tensor([0.123])
    with torch.autocast("cpu", torch.bfloat16):
        half = time(t)
    assert torch.equal(half, time(t))


@pytest.mark.parametrize("name", ["", "missing"])
def test_without_the_weights_one_sentence_says_where_they_are(tmp_path, capsys, name):
    """Exit status 2, no traceback; and flags that would do nothing are refused."""
    flags = ["--task", "unconditional", "--output", str(tmp_path / "out.wav"), "--pretrained", str(tmp_path / name)]
    for more, wanted in (([], "accept the licence at https://huggingface.co/stabilityai/stable-audio-open-1.0"),
                         (["--scale", "3"], "--prompt"), (["--checkpoint", "model.pt"], "--checkpoint")):
        with pytest.raises(SystemExit) as end:
            run(lambda: stable_audio_open.main(flags + more))
        message = capsys.readouterr().err.strip().splitlines()
        assert end.value.code == 2 and wanted in message[-1] and message[-1].startswith("error: ")
        assert not any("Traceback" in line for line in message)
