"""A forward pass of an exported folder in NumPy, written from the equations: nothing of ours is used, nor any framework.

    python tests/clients/numpy_forward.py FOLDER IDS.json > LOGP.json

IDS.json holds lists of token ids; the answer holds, for each list, `logp` (the log-probability of every token but the
first) and `next` (the largest log-probability of the token that would follow). A bare NumPy is enough; the safetensors
files are read here, byte by byte. `--mtp` adds `mtp`, if the files hold a prediction module: its log-probabilities of every
token but the first two. Everything is computed in float64 from the stored values, so what differs from ours is our rounding.

Equations (DeepSeek-V3 report 2.1, 2.2): latent attention in its expanded form, YaRN frequencies with both mscales, sigmoid
router with bias and groups, shared expert, RMSNorm, FP8 blocks W = code * weight_scale_inv, ragged ones too.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

BLOCK = 128


def e4m3_values():
    """The 256 values of E4M3: sign, 4 bits of exponent with bias 7, 3 bits of mantissa; S.1111.111 is NaN, no infinity."""
    values = np.empty(256)
    for code in range(256):
        sign, exponent, mantissa = -1.0 if code >> 7 else 1.0, code >> 3 & 15, code & 7
        small, large = mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        values[code] = sign * (small if exponent == 0 else large)
        if code & 127 == 127:
            values[code] = math.nan
    return values


def decode(dtype, data, shape):
    if dtype == "F32":
        values = np.frombuffer(data, "<f4")
    elif dtype == "BF16":
        values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    elif dtype == "F8_E4M3":
        values = e4m3_values()[np.frombuffer(data, "u1")]
    else:
        raise ValueError(f"a tensor of type {dtype}")
    return values.astype(np.float64).reshape(shape)


def read_folder(folder):
    """All tensors of a folder as float64; FP8 codes are multiplied by the scale of their block."""
    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        if path.name == "oracle.safetensors":
            continue
        blob = path.read_bytes()
        size = int.from_bytes(blob[:8], "little")
        for name, entry in json.loads(blob[8 : 8 + size]).items():
            if name != "__metadata__":
                begin, end = (8 + size + offset for offset in entry["data_offsets"])
                tensors[name] = decode(entry["dtype"], blob[begin:end], entry["shape"])
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        scale, weight = tensors.pop(name), tensors[name.removesuffix("_scale_inv")]
        rows, cols = np.arange(weight.shape[0]) // BLOCK, np.arange(weight.shape[1]) // BLOCK
        weight *= scale[np.ix_(rows, cols)]
    return tensors


def rope_of(config):
    """Frequencies of the rotation, the factor of its sine and cosine, and what attention scores are multiplied by."""
    width = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = scaling.get("rope_theta") or config.get("rope_theta", 10000.0)
    dim = config["qk_rope_head_dim"]
    plain = 1.0 / base ** (np.arange(0, dim, 2) / dim)
    if scaling.get("rope_type", scaling.get("type", "default")) == "default":
        return plain, 1.0, width**-0.5
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]

    def turns_at(rotations):
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(turns_at(scaling.get("beta_fast", 32))), 0)
    high = min(math.ceil(turns_at(scaling.get("beta_slow", 1))), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)

    def magnitude(mscale):
        return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0

    mscale, everywhere = scaling.get("mscale", 1), scaling.get("mscale_all_dim", 0)
    rotation = magnitude(mscale) / magnitude(everywhere) if mscale and everywhere else magnitude(1)
    score = magnitude(everywhere) ** 2 if everywhere else 1.0
    return plain / factor * ramp + plain * (1 - ramp), rotation, width**-0.5 * score


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


class Model:
    def __init__(self, folder):
        self.config = json.loads((Path(folder) / "config.json").read_text())
        self.tensors = read_folder(folder)
        self.frequencies, self.rotation, self.score = rope_of(self.config)

    def linear(self, x, name):
        return x @ self.tensors[name + ".weight"].T

    def norm(self, x, name):
        eps = self.config.get("rms_norm_eps", 1e-6)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * self.tensors[name + ".weight"]

    def rotate(self, x):
        """`x` [T, .., rope]; neighbours (2i, 2i + 1) are a pair."""
        angles = np.arange(len(x))[:, None] * self.frequencies
        angles = angles.reshape(len(x), *[1] * (x.ndim - 2), -1)
        cos, sin = np.cos(angles) * self.rotation, np.sin(angles) * self.rotation
        even, odd = x[..., 0::2], x[..., 1::2]
        return np.concatenate([even * cos - odd * sin, odd * cos + even * sin], -1)

    def attention(self, x, at):
        c = self.config
        heads, nope, rope, rank = (
            c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["kv_lora_rank"])
        if c.get("q_lora_rank"):
            q = self.linear(self.norm(self.linear(x, f"{at}.q_a_proj"), f"{at}.q_a_layernorm"), f"{at}.q_b_proj")
        else:
            q = self.linear(x, f"{at}.q_proj")
        q = q.reshape(len(x), heads, nope + rope)
        q = np.concatenate([q[..., :nope], self.rotate(q[..., nope:])], -1)
        latent = self.linear(x, f"{at}.kv_a_proj_with_mqa")
        kv = self.linear(self.norm(latent[:, :rank], f"{at}.kv_a_layernorm"), f"{at}.kv_b_proj")
        kv = kv.reshape(len(x), heads, nope + c["v_head_dim"])
        shared = np.broadcast_to(self.rotate(latent[:, rank:])[:, None], (len(x), heads, rope))
        k, v = np.concatenate([kv[..., :nope], shared], -1), kv[..., nope:]
        scores = np.einsum("qhd,khd->hqk", q, k) * self.score
        scores[:, np.triu(np.ones((len(x), len(x)), bool), 1)] = -np.inf
        out = np.einsum("hqk,khd->qhd", np.exp(log_softmax(scores)), v)
        return self.linear(out.reshape(len(x), -1), f"{at}.o_proj")

    def mlp(self, x, at):
        return self.linear(silu(self.linear(x, f"{at}.gate_proj")) * self.linear(x, f"{at}.up_proj"), f"{at}.down_proj")

    def experts(self, x, at):
        """Each token goes to the best experts of its best groups; biases choose, unbiased scores weigh."""
        c = self.config
        scores = sigmoid(self.linear(x, f"{at}.gate"))
        biased = scores + self.tensors[f"{at}.gate.e_score_correction_bias"]
        out = np.zeros_like(x)
        for token, (gates, choice) in enumerate(zip(scores, biased)):
            groups = choice.reshape(c["n_group"], -1)
            worth = np.sort(groups, -1)[:, -2:].sum(-1)
            closed = np.argsort(-worth, kind="stable")[c["topk_group"] :]
            groups = groups.copy()
            groups[closed] = -np.inf
            chosen = np.argsort(-groups.reshape(-1), kind="stable")[: c["num_experts_per_tok"]]
            weights = gates[chosen]
            if c.get("norm_topk_prob", True):
                weights = weights / (weights.sum() + 1e-20)
            for expert, weight in zip(chosen, weights * c["routed_scaling_factor"]):
                out[token] += weight * self.mlp(x[token : token + 1], f"{at}.experts.{expert}")[0]
        return out + self.mlp(x, f"{at}.shared_experts") if c.get("n_shared_experts") else out

    def layer(self, x, index):
        at = f"model.layers.{index}"
        x = x + self.attention(self.norm(x, f"{at}.input_layernorm"), f"{at}.self_attn")
        h = self.norm(x, f"{at}.post_attention_layernorm")
        has_experts = f"{at}.mlp.gate.weight" in self.tensors
        return x + (self.experts(h, f"{at}.mlp") if has_experts else self.mlp(h, f"{at}.mlp"))

    def hidden(self, ids):
        x = self.tensors["model.embed_tokens.weight"][ids]
        for index in range(self.config["num_hidden_layers"]):
            x = self.layer(x, index)
        return self.norm(x, "model.norm")

    def module(self, ids, hidden):
        """First prediction module: from position i and token i + 1, the distribution of token i + 2."""
        layer = self.config["num_hidden_layers"]
        at = f"model.layers.{layer}"
        embedded = self.norm(self.tensors["model.embed_tokens.weight"][ids[1:]], f"{at}.enorm")
        both = np.concatenate([embedded, self.norm(hidden[:-1], f"{at}.hnorm")], -1)
        x = self.layer(self.linear(both, f"{at}.eh_proj"), layer)
        return log_softmax(self.linear(self.norm(x, f"{at}.shared_head.norm"), "lm_head"))

    def answer(self, ids, with_module):
        hidden = self.hidden(ids)
        logp = log_softmax(self.linear(hidden, "lm_head"))
        out = {"logp": [row[after] for row, after in zip(logp, ids[1:])], "next": logp[-1].max()}
        module = f"model.layers.{self.config['num_hidden_layers']}.enorm.weight"
        if with_module and module in self.tensors and len(ids) > 2:
            out["mtp"] = [row[after] for row, after in zip(self.module(ids, hidden), ids[2:])]
        return out


def main():
    arguments = [argument for argument in sys.argv[1:] if argument != "--mtp"]
    folder, ids = arguments
    model = Model(folder)
    json.dump([model.answer(row, "--mtp" in sys.argv) for row in json.loads(Path(ids).read_text())], sys.stdout)


if __name__ == "__main__":
    main()
