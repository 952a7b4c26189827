"""What the golden-vector checker calls: numpy arrays in and out of evaluate.py and tasks.py."""
import functools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate
import tasks

torch.set_grad_enabled(False)


vggish = functools.cache(evaluate.VGGish)          # 72 million parameters: once is enough


def _load(net, weights):
    net.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    return net.eval()


def vggish_logmel(mono16k):
    return vggish().patches(torch.from_numpy(mono16k).float()[None])[0].numpy()


def vggish_embed(weights, patches):
    return _load(vggish(), weights)(torch.from_numpy(patches).float()).numpy()


def passt_mel(mono32k):
    net = tasks.PaSST(tasks.PASST_PRESETS["tiny"])
    return net.mel(torch.from_numpy(mono32k).float()[None])[0].numpy()


def passt_forward(weights, mel):
    net = _load(tasks.PaSST(tasks.PASST_PRESETS["paper"]), weights)
    logits, embedding = net(torch.from_numpy(mel)[None])
    return logits[0].numpy(), embedding[0].numpy()


def frechet(*statistics):
    return evaluate.frechet_distance(*map(torch.from_numpy, statistics))


def gaussian_stats(chunks):
    mean, covariance = evaluate.gaussian(torch.cat(list(map(torch.from_numpy, chunks))))
    return mean.numpy(), covariance.numpy()


def _posteriors(*logits):
    return [torch.from_numpy(each).double().softmax(-1) for each in logits]


def kld_paired(logits_ref, logits_gen):
    return evaluate.kl_divergence(*_posteriors(logits_ref, logits_gen)).mean().item()


def kld_set(logits_ref, logits_gen):
    return evaluate.kl_divergence(*(p.mean(0) for p in _posteriors(logits_ref, logits_gen))).item()


def mel_distance(x, y, sample_rate):
    return evaluate.mel_distance(torch.from_numpy(x), torch.from_numpy(y), sample_rate).item()


def realism(ref, gen, k, prune):
    return evaluate.realism(torch.from_numpy(ref), torch.from_numpy(gen), k, prune).numpy()


def resample(x, sr_in, sr_out):
    return tasks.resample(torch.from_numpy(x), sr_in, sr_out).numpy()
