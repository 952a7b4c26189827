"""examples/stable_audio_open.py with a tiny random pipeline; skipped where diffusers is missing."""
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
from conftest import noise, save_checkpoint
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
    """A StableAudioPipeline with random weights and a tokenizer of four words, saved."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipeline")
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=2 * CHANNELS, channel_multiples=[1, 1, 1, 1, 1],
        decoder_channels=CHANNELS, decoder_input_channels=CHANNELS)
    dit = diffusers.StableAudioDiTModel(
        sample_size=FRAMES, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=2,
        attention_head_dim=8, num_attention_heads=4, num_key_value_attention_heads=2,
        cross_attention_dim=WIDTH, cross_attention_input_dim=WIDTH, time_proj_dim=16,
        global_states_input_dim=2 * WIDTH)
    timer = diffusers.StableAudioProjectionModel(WIDTH, WIDTH, 0, 512)
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "warm": 3, "pads": 4}
    text = transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=len(words), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    scheduler = diffusers.EDMDPMSolverMultistepScheduler()
    pipe = diffusers.StableAudioPipeline(vae, text, timer, tokenizer(words), dit, scheduler)
    pipe.save_pretrained(folder)
    return folder


def tokenizer(words):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = [(word, -1.0) for word in words]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=2))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.T5TokenizerFast(tokenizer_object=made, extra_ids=0, model_max_length=12)


def options(folder, **given):
    """The flags that open_pretrained reads."""
    defaults = {"checkpoint": None, "weak": None, "away": None, "model": "latent", "prompt": None,
                "scale": None, "timing": None, "recompute": False}
    return SimpleNamespace(pretrained=str(folder), **defaults | given)


def open_tiny(folder, **given):
    return stable_audio_open.open_pretrained(options(folder, **given), torch.device("cpu"))


def edit(folder, tmp_path, track, *arguments):
    """Three steps of the example's command on audio (n, channels) at 44.1 kHz: what it wrote."""
    sf.write(tmp_path / "in.wav", track, 44100, subtype="FLOAT")
    with pytest.MonkeyPatch.context() as patch:
        # By the command line, whose words the .json repeats.
        patch.setattr(sys, "argv", [
            "examples/stable_audio_open.py", "--pretrained", str(folder), "--steps", "3", "--force",
            "--input", str(tmp_path / "in.wav"), "--output", str(tmp_path / "out.wav"), *arguments])
        stable_audio_open.main()
    return sf.read(tmp_path / "out.wav", always_2d=True)[0]


INFILL = ("--task", "infill", "--start", "3.2", "--end", "4", *PROMPT)
CONTINUATION = ("--task", "continuation", "--start", "5", "--length", "4")


@pytest.mark.parametrize("flags, start, end, length", [
    (INFILL, 3.2, 4, 8), (CONTINUATION, 5, 9, 9)], ids=["infill", "continuation"])
def test_an_edit_is_new_inside_and_the_inputs_own_outside(
        folder, tmp_path, capsys, flags, start, end, length):
    """All bits outside the region (whole frames) and its fades are the input's; nothing leaks."""
    track = sf.read(ROOT / "examples" / "clip.wav", always_2d=True)[0]
    after = edit(folder, tmp_path, track, *flags)
    a, b, fade = round(start * 44100), round(end * 44100), math.ceil(0.03 * 44100)
    assert after.shape == (length * 44100, 2) and np.isfinite(after).all()
    assert np.array_equal(after[:a - fade], track[:a - fade])
    rest = slice(b + HOP + fade, None)                                  # empty in a continuation
    assert length == 9 or np.array_equal(after[rest], track[rest])
    old = track[a:b]
    assert np.isclose(after[a:a + len(old)], old).mean() < 0.05

    # The licence is said once; the json has the example's command.
    printed = capsys.readouterr().out
    assert printed.count("Stability AI Community License") == 1 and "trained for" not in printed
    stored = json.loads((tmp_path / "out.json").read_text())
    assert stored["command"].startswith("python examples/stable_audio_open.py --pretrained")

    # Noise in the place of the region changes nothing.
    track[a:b] = 0.5 * np.random.default_rng(1).uniform(-1, 1, old.shape)
    assert np.array_equal(edit(folder, tmp_path, track, *flags), after)


@pytest.mark.parametrize("sigma", [0.3, 2.0, 80.0])
def test_x0_hat_is_that_of_the_pipeline(folder, sigma):
    """One step of the whole pipeline, from sigma to 0 with a prompt, ends at our x0_hat."""
    pytest.importorskip("torchsde")                     # the scheduler wants it
    pipe = diffusers.StableAudioPipeline.from_pretrained(folder, scheduler=None)
    pipe.register_modules(scheduler=diffusers.CosineDPMSolverMultistepScheduler(sigma_min=sigma))
    pipe.set_progress_bar_config(disable=True)
    x = (1 + sigma**2) ** 0.5 * noise(1, CHANNELS, FRAMES, dtype=torch.float32)
    wanted = pipe(
        prompt="warm pads", guidance_scale=3.0, audio_start_in_s=1.0, audio_end_in_s=2.5,
        num_inference_steps=1, latents=x / pipe.scheduler.init_noise_sigma,
        output_type="latent").audios
    net = open_tiny(folder, prompt="warm pads", scale=3.0, timing=(1.0, 2.5)).net
    t = torch.tensor(sigma, dtype=torch.float64).atan() * 2 / math.pi
    x0_hat, _ = guidance.guided_estimate(net, x / (1 + sigma**2) ** 0.5, t, ())
    torch.testing.assert_close(x0_hat, wanted, atol=2e-5, rtol=1e-4)


def test_without_a_prompt_the_model_is_the_unconditional_half_of_its_guidance(folder):
    """One zero token says what zeros for a whole prompt say; an empty prompt, something else."""
    x_t, t = noise(2, CHANNELS, FRAMES, dtype=torch.float32), torch.tensor([0.3, 0.8])
    null = open_tiny(folder).net(x_t, t)
    half = open_tiny(folder, prompt="warm pads", scale=0.0).net(x_t, t)
    empty = open_tiny(folder, prompt="", scale=1.0).net(x_t, t)
    torch.testing.assert_close(null, half, atol=1e-5, rtol=1e-5)
    assert (null - empty).abs().max() > 1e-3


def test_behind_a_short_window_lies_silence(folder):
    """A window of n frames is a full one that goes on with silence, and lasts as long as n."""
    checkpoint, n, t = open_tiny(folder), 40, torch.tensor([0.4])
    silence = checkpoint.encode(torch.zeros(1, 2, FRAMES * HOP))[..., 30:31].expand(-1, -1, FRAMES)
    x_t, _ = add_noise(silence, noise(1, CHANNELS, FRAMES, dtype=torch.float32), t)
    x_t[..., :n] = noise(1, CHANNELS, n, seed=1, dtype=torch.float32)
    full = open_tiny(folder, timing=(0.0, n * HOP / 44100)).net(x_t, t)[..., :n]
    torch.testing.assert_close(checkpoint.net(x_t[..., :n], t), full, atol=1e-5, rtol=1e-5)


def test_chunks_change_neither_the_audio_nor_a_gradient(folder):
    """Computed again for a gradient, too, they give what the whole autoencoder gives."""
    vae = open_tiny(folder).vae
    audio = noise(1, 2, 90 * HOP, dtype=torch.float32)
    whole = vae.vae.encode(audio).latent_dist.mode()
    torch.testing.assert_close(vae.encode(audio), whole, atol=1e-5, rtol=1e-5)
    assert vae.encode(audio[..., :HOP + 1]).shape[-1] == 2
    x = noise(1, CHANNELS, 90, dtype=torch.float32).requires_grad_()

    def with_gradient(decoded):
        return decoded, torch.autograd.grad((decoded * audio).sum(), x)[0]
    in_chunks = with_gradient(vae.decode(x))
    torch.testing.assert_close(in_chunks, with_gradient(vae.vae.decode(x).sample),
                               atol=1e-5, rtol=1e-4)


def test_the_autoencoder_reaches_no_further_than_is_said(folder):
    """What is not a number at either end leaves all frames beyond the stated reach finite."""
    vae = open_tiny(folder).vae
    reach = math.ceil(vae.encoder_field / HOP)
    audio, x = torch.zeros(1, 2, 30 * HOP), torch.zeros(1, CHANNELS, 30)
    for ends in (audio[..., :HOP], audio[..., -HOP:], x[..., 0], x[..., -1]):
        ends.fill_(math.nan)
    assert vae.vae.encode(audio).latent_dist.mode()[..., reach + 1:29 - reach].isfinite().all()
    reach = vae.decoder_field
    assert vae.vae.decode(x).sample[..., (reach + 1) * HOP:(29 - reach) * HOP].isfinite().all()


SHORT = ("--task", "infill", "--start", "1", "--end", "1.5")


def short_track():
    return sf.read(ROOT / "examples" / "clip.wav", always_2d=True)[0][:3 * 44100]


def test_guidance_by_example_joins_an_edit(folder, tmp_path):
    """--reference, with a classifier of train.py, changes what is new."""
    save_checkpoint(tmp_path / "classifier.pt", "classifier",
                    tasks.PaSST(tasks.PASST_PRESETS["tiny"]), classes=["a"])
    plain = edit(folder, tmp_path, short_track(), *SHORT)
    guided = edit(folder, tmp_path, short_track(), *SHORT,
                  "--reference", str(ROOT / "examples" / "other.flac"),
                  "--classifier", str(tmp_path / "classifier.pt"))
    assert np.isfinite(guided).all() and not np.array_equal(guided, plain)


def test_recompute_runs_each_block_twice_and_changes_nothing(folder, tmp_path):
    """Once forward, once on the way back; the edit is the same."""
    plain = edit(folder, tmp_path, short_track(), *SHORT)
    assert np.abs(edit(folder, tmp_path, short_track(), *SHORT, "--recompute") - plain).max() < 1e-4
    calls = []
    net = open_tiny(folder, recompute=True).net
    net.dit.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    x_t = noise(1, CHANNELS, FRAMES, dtype=torch.float32).requires_grad_()
    net(x_t, torch.tensor([0.5])).sum().backward()
    assert len(calls) == 2


def test_half_precision_leaves_time_alone(folder):
    """Under bf16 autocast the time features, whose phases are large, are those of float32."""
    time, t = open_tiny(folder).net.dit.time_proj, torch.tensor([0.123])
    with torch.autocast("cpu", torch.bfloat16):
        half = time(t)
    assert torch.equal(half, time(t))


@pytest.mark.parametrize("name", ["", "missing"])
@pytest.mark.parametrize("flags, wanted", [
    ((), f"accept the licence at {stable_audio_open.PAGE}"), (("--scale", "3"), "--prompt"),
    (("--checkpoint", "model.pt"), "--checkpoint")])
def test_without_the_weights_one_sentence_says_where_they_are(
        tmp_path, capsys, name, flags, wanted):
    """Exit status 2, no traceback; and flags that would do nothing are refused."""
    arguments = ["--task", "unconditional", "--output", str(tmp_path / "out.wav"),
                 "--pretrained", str(tmp_path / name), *flags]
    with pytest.raises(SystemExit) as end:
        run(lambda: stable_audio_open.main(arguments))
    message = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and wanted in message[-1] and message[-1].startswith("error: ")
    assert not any("Traceback" in line for line in message)
