"""Training speed beside Hugging Face transformers' DeepseekV3ForCausalLM on PyTorch CPU: the same sizes, f32, whole steps.

First every form of the peer is tried once (`eager`, grouped experts, `torch.compile` of either) and the fastest is kept.
Then our `bench train` and that form run in turn, a process each, so that both see the same machine; the ratio is the
median over the rounds' own ratios. Parameter counts are compared before anything is timed. Prints a Markdown table.

    pip install -r benches/peers/requirements.txt
    python benches/peers/train.py --binary target/release/dsv3-pipeline --configs demo S M --threads 2
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

SMALL = dict(
    vocab_size=4096, hidden_size=256, intermediate_size=704, moe_intermediate_size=128, num_hidden_layers=6,
    first_k_dense_replace=1, num_attention_heads=8, num_key_value_heads=8, q_lora_rank=96, kv_lora_rank=64,
    qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=16, n_shared_experts=1,
    num_experts_per_tok=4, n_group=4, topk_group=2, routed_scaling_factor=2.5, max_position_embeddings=2048,
    initializer_range=0.02, num_mtp_layers=0, tie_word_embeddings=False,
)  # fmt: skip
SIZES = {
    "demo": dict(
        SMALL, vocab_size=704, hidden_size=128, intermediate_size=256, moe_intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, qk_nope_head_dim=16, qk_rope_head_dim=32, initializer_range=0.06,
    ),  # fmt: skip
    "S": SMALL,
    "M": dict(
        SMALL, vocab_size=16384, hidden_size=512, intermediate_size=1408, moe_intermediate_size=192,
        num_hidden_layers=12, q_lora_rank=192, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32,
        v_head_dim=64, n_routed_experts=32,
    ),  # fmt: skip
}
BATCHES = {"demo": (8, 128), "S": (16, 256), "M": (4, 512)}
# Implementation of the experts, and whether torch.compile goes over the model.
FORMS = {
    "eager": ("eager", False),
    "grouped": ("grouped_mm", False),
    "compile": ("eager", True),
    "compile-grouped": ("grouped_mm", True),
}


def peer_model(name, form):
    """The peer's model with random weights."""
    import torch
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    experts, compiled = FORMS[form]
    torch.manual_seed(1)
    config = DeepseekV3Config(**SIZES[name], use_cache=False)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="sdpa", experts_implementation=experts
    )
    model.train()
    return (torch.compile(model) if compiled else model), model


def worker(args):
    """One form of the peer in this process: prints one JSON object."""
    import torch

    torch.set_num_threads(args.threads)
    step_model, model = peer_model(args.worker[0], args.worker[1])
    sequences, tokens = BATCHES[args.worker[0]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    vocabulary = model.config.vocab_size
    seconds = []
    for step in range(args.warmup + args.steps):
        rows = torch.randint(vocabulary, (sequences, tokens + 1))
        started = time.perf_counter()
        logits = step_model(rows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, vocabulary), rows[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # The loss is read, as ours is.
        assert loss.item() == loss.item(), "a measured step is not finite"
        if step >= args.warmup:
            seconds.append(time.perf_counter() - started)
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
    a, best = torch.rand(2048, 2048) - 0.5, float("inf")
    for _ in range(6):
        started = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - started)
    print(json.dumps({
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens_per_second": sequences * tokens / statistics.median(seconds),
        "ceiling_gflops": 2 * 2048**3 / best * 1e-9,
        "peak_bytes": peak,
    }))  # fmt: skip


def child(command, threads):
    """Runs a command that prints one JSON object as its last line."""
    env = dict(os.environ, OMP_NUM_THREADS=str(threads), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def ours(args, name):
    sequences, tokens = BATCHES[name]
    command = [args.binary, "bench", "train", "--config", name, "--no-mtp", "--precision", args.precision]
    command += ["--batch", str(sequences), "--context", str(tokens), "--threads", str(args.threads)]
    return child(command + ["--steps", str(args.steps), "--warmup", str(args.warmup), "--json"], args.threads)


def peer(args, name, form):
    command = [sys.executable, __file__, "--worker", name, form, "--threads", str(args.threads)]
    return child(command + ["--steps", str(args.steps), "--warmup", str(args.warmup)], args.threads)


def say(text):
    print(text, file=sys.stderr, flush=True)


def check_parameters(name, own, other):
    """Ours counts router biases, which the peer keeps as buffers."""
    sizes = SIZES[name]
    biases = (sizes["num_hidden_layers"] - sizes["first_k_dense_replace"]) * sizes["n_routed_experts"]
    if own["parameters"] - biases != other["parameters"]:
        raise SystemExit(f"{name}: {own['parameters']} - {biases} parameters here, {other['parameters']} in the peer")
    say(f"{name}: {other['parameters']:,} parameters on both sides, without {biases} router biases")


def measure(args, name):
    """Rows of both sides over all rounds, and the peer's form."""
    tried = {}
    for form in args.forms:
        try:
            tried[form] = peer(args, name, form)
            say(f"{name}: peer, {form}: {tried[form]['tokens_per_second']:.0f} tokens/s")
        except RuntimeError as error:
            say(f"{name}: peer, {form}: does not run\n{error}")
    if not tried:
        raise SystemExit(f"{name}: no form of the peer runs")
    form = max(tried, key=lambda key: tried[key]["tokens_per_second"])
    check_parameters(name, ours(args, name), tried[form])
    rounds = []
    for number in range(args.rounds):
        # Whoever goes first alternates: a machine that slows down then favours neither.
        if number % 2 == 0:
            own, other = ours(args, name), peer(args, name, form)
        else:
            other, own = peer(args, name, form), ours(args, name)
        rounds.append((own, other))
        say(f"{name}: round {number + 1}: {own['tokens_per_second']:.0f}, {other['tokens_per_second']:.0f} tokens/s")
    return form, rounds


def table_row(name, form, rounds):
    def middle(value):
        return statistics.median(value(own, other) for own, other in rounds)

    own_rate = middle(lambda own, _: own["tokens_per_second"])
    other_rate = middle(lambda _, other: other["tokens_per_second"])
    ratios = [own["tokens_per_second"] / other["tokens_per_second"] for own, other in rounds]
    # The higher of the two sides' ceilings, so that neither is flattered by a slow product of its own.
    ceiling = middle(lambda own, other: max(own["ceiling_gflops"], other["ceiling_gflops"]))
    flops = rounds[0][0]["model_flops_per_token"]
    share = [100 * rate * flops * 1e-9 / ceiling for rate in (own_rate, other_rate)]
    peaks = [middle(lambda own, _: own["peak_bytes"]) / 2**20, middle(lambda _, other: other["peak_bytes"]) / 2**20]
    return (
        f"| {name} | {own_rate:,.0f} | {other_rate:,.0f} ({form}) | {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}) | {flops / 1e6:.2f} | {ceiling:.0f} | {share[0]:.0f}%, {share[1]:.0f}% "
        f"| {peaks[0]:,.0f}, {peaks[1]:,.0f} |"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--binary", default="target/release/dsv3-pipeline")
    parser.add_argument("--configs", nargs="+", choices=sorted(SIZES), default=["demo", "S", "M"])
    parser.add_argument("--forms", nargs="+", choices=sorted(FORMS), default=list(FORMS))
    parser.add_argument("--precision", choices=["f32", "bf16", "fp8"], default="f32", help="of our side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each run")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--worker", nargs=2, metavar=("CONFIG", "FORM"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    results = [(name, *measure(args, name)) for name in args.configs]
    isa = results[0][2][0][0]["isa"]
    say("")
    print(f"{args.rounds} paired rounds of {args.steps} steps, {args.threads} threads, {isa}, ours in {args.precision}:\n")
    print("| | ours, tokens/s | transformers, tokens/s | ratio | MFLOP a token | ceiling, GFLOP/s | of it | peak, MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for name, form, rounds in results:
        print(table_row(name, form, rounds))


if __name__ == "__main__":
    main()
