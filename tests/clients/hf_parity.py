"""Loads exported folders in Hugging Face transformers and holds their log-probabilities against those of our server.

    dsv3-pipeline run pipelines/full.yaml                           # the demo
    dsv3-pipeline get latest rl.model demo/
    dsv3-pipeline run tests/clients/export.yaml --set params.model=$PWD/demo
    dsv3-pipeline get latest release.model demo-bf16/
    dsv3-pipeline run tests/clients/wide.yaml                       # a small FP8 model whose widths are multiples of 128
    dsv3-pipeline get latest release.model wide-fp8/
    pip install -r tests/clients/requirements.txt
    python tests/clients/hf_parity.py --binary target/release/dsv3-pipeline demo-bf16/ wide-fp8/

For each folder and each of `--precision f32` and `bf16` a server is started, asked for the log-probability of every token
of a few dozen texts (lists of ids, one token to the longest the model takes) and of the token it would say next, and
stopped. The reference is DeepseekV3ForCausalLM with the stored weights in float32, FP8 blocks dequantised at load (its own
FP8 kernels need a GPU). transformers has no multi-token prediction and ignores those tensors; our server drafts with them,
which changes no number.

At f32 every token must agree within 1e-3. At bf16 not every token agrees within 2e-2: on the demo 12% are farther off, on
average 1.2e-2, and transformers' own bfloat16 more. The choice of experts is the likely cause: two experts whose scores are nearly
equal change places under any rounding, and the token's log-probability jumps, in transformers' own bfloat16 as well (last
row of each folder, which passes no judgement). So three things must hold at bf16:
- against float32, the mean difference is at most 2e-2;
- against the same model with the roundings that our `--precision bf16` documents (weights and inputs of linear layers to
  BF16, sums in float32; router and head take unrounded inputs), every token agrees
  within 2e-2 unless at it or before it, in some layer, the last expert or group chosen and the first one left out are
  closer than 2^-9, the relative size of one BF16 rounding;
- with those tokens too, at most 1% are farther off than 2e-2. Most of the texts are drawn ids, which a trained model gives
  log-probabilities of -10 to -20, where an equal relative error is a larger difference.

These three were chosen after the differences were seen, the width of a tie and the 1% too; the rows with ties taken out
cover a tenth of the demo's tokens and a sixth of the other model's. They show that the server does the roundings it
documents, not that two bfloat16 implementations agree token by token.

As a control every judged comparison is made again with one element of one weight of the reference changed, and must fail.
Exit code 1 when a limit is passed or a control is not. The committed result is hf_parity.txt.
"""

import argparse
import contextlib
import importlib.metadata
import json
import math
import random
import subprocess
import sys
import urllib.request
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open

LIMIT_F32, LIMIT_BF16 = 1e-3, 2e-2
# Scores closer than this may be ordered either way: one rounding to BF16 moves them as far.
TIE = 2.0**-9
BLOCK = 128
TEXTS = [
    "Sam has 6 shells. Buys 6 shells. Gives 4 shells. Wins 3 shells. Total?",
    "Nora has 9 books. Loses 8 books. Gets 9 books. Finds 4 books. Total?",
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer",
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.",
    "Ünïcode, 漢字 and 🦀: what no training text held.",
    "\n\n    indented\tand tabbed\n",
    "9 + 8 - 7 = 10 #### 10",
]


class Server:
    """Our server on one folder, stopped when the block ends."""

    def __init__(self, binary, folder, precision):
        command = [binary, "serve", "--model", str(folder), "--port", "0", "--precision", precision]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        if "http://" not in line:
            sys.exit(f"no server: {line!r}")
        self.url = "http://" + line.strip().rsplit("http://", 1)[1]

    def __enter__(self):
        return self.url

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(timeout=10)


def texts(tokenizer, vocab, positions):
    """Lists of ids of every length: written ones, then drawn ones, which also reach ids that no text uses."""
    rng = random.Random(4)
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    lengths = [1, 1, 1, 2, 2, 3, 5, 8, 13, 21, 31, 32, 33, 55, 64, 89, 97, 127, 128, positions - 1, positions, positions]
    rows += [[rng.randrange(vocab) for _ in range(min(length, positions))] for length in lengths]
    # Long texts of real words, repeated in another order.
    for seed in range(4):
        words = " ".join(TEXTS).split()
        random.Random(seed).shuffle(words)
        ids = tokenizer.encode(" ".join(words * 8), add_special_tokens=False)
        rows.append(ids[:positions])
    return [row[:positions] for row in rows if row]


def of_server(url, ids, positions):
    """Log-probability of every token but the first, and of the likeliest next one where the context has room for it."""
    room = len(ids) < positions
    body = {"prompt": ids, "max_tokens": int(room), "echo": True, "logprobs": 0, "temperature": 0, "ignore_eos": True}
    data = json.dumps(body).encode()
    request = urllib.request.Request(url + "/v1/completions", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        values = json.load(reply)["choices"][0]["logprobs"]["token_logprobs"]
    assert values[0] is None and len(values) == len(ids) + room, (len(values), len(ids))
    return values[1:]


def of_reference(model, ids, positions):
    """The same numbers from the outside implementation."""
    with torch.no_grad():
        logp = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    values = logp[torch.arange(len(ids) - 1), torch.tensor(ids[1:], dtype=torch.long)].tolist()
    return values + ([logp[-1].max().item()] if len(ids) < positions else [])


def dequantised(folder):
    """All tensors of an FP8 folder in float32: each block of 128 x 128 codes times its entry of `weight_scale_inv`."""
    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name).float() for name in file.keys()}
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        scale = tensors.pop(name)
        weight = tensors[name.removesuffix("_scale_inv")]
        rows, cols = weight.shape
        wide = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :cols]
        weight *= wide
    return tensors


def load(folder, dtype=torch.float32):
    """The folder as transformers reads it; an FP8 one through plain float32 tensors, since its FP8 kernels need a GPU."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config._experts_implementation = "eager"  # plain loops over F.linear, which `rounded_like_ours` replaces
    options = {"dtype": dtype, "attn_implementation": "eager"}
    if getattr(config, "quantization_config", None) is None:
        model = transformers.DeepseekV3ForCausalLM.from_pretrained(folder, config=config, **options)
        return model.eval(), "BF16" if str(config.dtype) == "torch.bfloat16" else "F32"
    del config.quantization_config
    state = dequantised(folder)
    model = transformers.DeepseekV3ForCausalLM.from_pretrained(None, config=config, state_dict=state, **options)
    return model.eval(), "FP8"


def exact_linear(x, w, b=None, plain=F.linear):
    return plain(x, w, b)


@contextlib.contextmanager
def rounded_like_ours(model):
    """Linear layers take weights and inputs rounded to BF16 and add in float32, as `--precision bf16` does."""
    layers = model.model.layers
    routers = {layer.mlp.gate.weight.data_ptr() for layer in layers if hasattr(layer.mlp, "gate")}
    unrounded = {model.lm_head.weight.data_ptr()} | routers

    def linear(x, w, b=None):
        if w.data_ptr() in unrounded:
            return exact_linear(x, w, b)
        return exact_linear(x.bfloat16().float(), w.bfloat16().float(), b)

    F.linear = linear
    try:
        yield
    finally:
        F.linear = exact_linear


def margins(model, ids):
    """For each position, the smallest gap so far between what the routers chose and the first they left out."""
    gaps = []

    def watch(gate, inputs, _):
        hidden = inputs[0].reshape(-1, gate.hidden_dim).float()
        scores = exact_linear(hidden, gate.weight.float()).sigmoid() + gate.e_score_correction_bias
        groups = scores.view(-1, gate.num_group, gate.num_experts // gate.num_group)
        best = groups.topk(2, -1)[0].sum(-1)
        order, chosen = best.sort(-1, descending=True)
        if gate.topk_group < gate.num_group:
            gaps.append(order[:, gate.topk_group - 1] - order[:, gate.topk_group])
        mask = torch.zeros_like(best).scatter_(1, chosen[:, : gate.topk_group], 1)[..., None].expand_as(groups)
        open_scores = scores.masked_fill(mask.reshape_as(scores) == 0, float("-inf")).sort(-1, descending=True)[0]
        gaps.append(open_scores[:, gate.top_k - 1] - open_scores[:, gate.top_k])

    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    hooks = [gate.register_forward_hook(watch) for gate in gates]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return torch.stack(gaps).min(0)[0].cummin(0)[0].tolist()


def gaps(ours, reference, wanted=None):
    """Differences of all numbers, or of those whose position has a margin of at least a tie in `wanted`."""
    out = []
    for index, (row, other) in enumerate(zip(ours, reference, strict=True)):
        for position, (a, b) in enumerate(zip(row, other, strict=True)):
            if wanted is None or wanted[index][position] >= TIE:
                out.append(abs(a - b))
    assert out and all(math.isfinite(gap) for gap in out)
    return out


def perturb(model):
    """Changes one element of one weight, that of the last norm."""
    with torch.no_grad():
        model.model.norm.weight[0] *= -8


def references(folder):
    """Texts of a folder and everything that the outside implementation says of them."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    model, stored = load(folder)
    positions = model.config.max_position_embeddings
    rows = texts(tokenizer, model.config.vocab_size, positions)
    out = {"stored": stored, "rows": rows, "positions": positions}

    def all_rows(model):
        return [of_reference(model, row, positions) for row in rows]

    out["float32"] = all_rows(model)
    with rounded_like_ours(model):
        out["rounded"], out["margins"] = all_rows(model), [margins(model, row) for row in rows]
    out["bfloat16"] = all_rows(load(folder)[0].bfloat16())
    perturb(model)
    out["float32, changed"] = all_rows(model)
    with rounded_like_ours(model):
        out["rounded, changed"] = all_rows(model)
    return out


HEAD = f"{'folder':<12} {'stored':>6} {'server':>8} {'reference':>10} {'texts':>5} {'tokens':>15} {'max':>8} {'mean':>8} " \
    f"{'> 2e-2':>8} {'limit':>13} {'verdict':>7}  with one weight changed"


FIGURES = {
    "max": max,
    "mean": lambda gaps: sum(gaps) / len(gaps),
    "beyond": lambda gaps: sum(gap > LIMIT_BF16 for gap in gaps) / len(gaps),
}


def line(folder, out, server, reference, differences, tokens, judged=None, control=None):
    """Prints one comparison; whether it is as it should be."""
    worst, mean, beyond = (figure(differences) for figure in FIGURES.values())
    limit, verdict, seen, good = "", "", "", True
    if judged:
        name, bound = judged
        figure = FIGURES[name]
        passed, caught = figure(differences) <= bound, figure(control) > bound
        limit, verdict = f"{name} {bound:.0e}", "ok" if passed else "FAILED"
        seen, good = f"{name} {figure(control):.1e}: {'seen' if caught else 'NOT SEEN'}", passed and caught
    print(f"{folder.name:<12} {out['stored']:>6} {server:>8} {reference:>10} {len(out['rows']):>5} {tokens:>15} {worst:>8.1e} "
          f"{mean:>8.1e} {beyond:>8.2%} {limit:>13} {verdict:>7}  {seen}".rstrip())
    return good


def judge(folder, binary):
    out = references(folder)
    ours = {}
    for precision in ("f32", "bf16"):
        with Server(binary, folder, precision) as url:
            ours[precision] = [of_server(url, row, out["positions"]) for row in out["rows"]]

    def row(server, numbers, reference, free=False, judged=None):
        wanted = out["margins"] if free else None
        found = gaps(numbers, out[reference], wanted)
        control = gaps(numbers, out[f"{reference}, changed"], wanted) if judged else None
        tokens = f"{len(found)} without ties" if free else str(len(found))
        return line(folder, out, server, reference, found, tokens, judged, control)

    return all([
        row("f32", ours["f32"], "float32", judged=("max", LIMIT_F32)),
        row("bf16", ours["bf16"], "float32", judged=("mean", LIMIT_BF16)),
        row("bf16", ours["bf16"], "rounded", free=True, judged=("max", LIMIT_BF16)),
        row("bf16", ours["bf16"], "rounded", judged=("beyond", 0.01)),
        row("(theirs)", out["bfloat16"], "float32"),
    ])


def main():
    parser = argparse.ArgumentParser(description="see the head of this file")
    parser.add_argument("--binary", required=True, help="dsv3-pipeline")
    parser.add_argument("folders", nargs="+", type=Path)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    names = ["torch", "transformers", "tokenizers", "safetensors", "numpy"]
    print("python", sys.version.split()[0], *(f"{name} {importlib.metadata.version(name)}" for name in names))
    print(HEAD)
    good = [judge(folder, args.binary) for folder in args.folders]
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
