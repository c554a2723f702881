"""Training speed beside Hugging Face transformers' DeepseekV3ForCausalLM on PyTorch CPU: the same sizes, f32, whole steps.

First every form of the peer is tried (`eager`, grouped experts, `torch.compile` of either) and the fastest is kept, in the
process that compiled it. Then our `bench train` and a few steps of that process run in turn, so that both see the same
machine; the ratio is the median over the rounds' own ratios. Parameter counts are compared before anything is timed.
Prints a Markdown table.

    pip install -r benches/peers/requirements.txt
    python benches/peers/train.py --binary target/release/dsv3-pipeline --configs demo S M --threads 2
"""

import argparse
import json
import math
import statistics
import sys
import time

import common
from common import say

BATCHES = {"demo": (8, 128), "S": (16, 256), "M": (4, 512)}
# Implementation of the experts, and whether torch.compile goes over model and loss.
FORMS = {
    "eager": ("eager", False),
    "grouped": ("grouped_mm", False),
    "compile": ("eager", True),
    "compile-grouped": ("grouped_mm", True),
}


def peer_model(name, experts):
    """The peer's model with random weights."""
    import torch
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    torch.manual_seed(1)
    config = DeepseekV3Config(**common.SIZES[name], num_mtp_layers=0, tie_word_embeddings=False, use_cache=False)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="sdpa", experts_implementation=experts
    )
    return model.train()


def worker(name, form, threads):
    """One form of the peer in this process: to `{"steps": n}` it answers with the speed of n steps."""
    import torch

    torch.set_num_threads(threads)
    experts, compiled = FORMS[form]
    model = peer_model(name, experts)
    (sequences, tokens), vocabulary = BATCHES[name], model.config.vocab_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def loss_of(rows):
        logits = model(rows[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.reshape(-1, vocabulary), rows[:, 1:].reshape(-1))

    # A loop over the experts breaks the graph; what lies between the breaks is compiled all the same.
    loss_function = torch.compile(loss_of) if compiled else loss_of

    def step():
        rows = torch.randint(vocabulary, (sequences, tokens + 1))
        started = time.perf_counter()
        loss = loss_function(rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # The loss is read, as ours is.
        assert math.isfinite(loss.item()), "a measured step is not finite"
        return time.perf_counter() - started

    def answer(question):
        common.reset_peak()
        seconds = [step() for _ in range(question["steps"])]
        peak = common.status_bytes("VmHWM")
        return {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "tokens_per_second": sequences * tokens / statistics.median(seconds),
            "ceiling_gflops": product_gflops(torch),
            "peak_bytes": peak,
        }

    common.answers(answer)


def product_gflops(torch):
    """Best of a few products of 2048 x 2048 x 2048."""
    a, best = torch.rand(2048, 2048) - 0.5, float("inf")
    for _ in range(6):
        started = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - started)
    return 2 * 2048**3 / best * 1e-9


def start(args, name, form):
    command = [sys.executable, __file__, "--worker", name, form, "--threads", str(args.threads)]
    return common.Peer(command, common.environment(args.threads))


def fastest(args, name):
    """Tries the forms; gives the fastest one's name and process, still running, and the speed of each."""
    best, tried = None, {}
    for form in args.forms:
        peer, started = start(args, name, form), time.monotonic()
        try:
            peer.ask({"steps": args.warmup}, args.form_timeout)
            left = max(args.form_timeout - (time.monotonic() - started), 1)
            tried[form] = peer.ask({"steps": 2}, left)["tokens_per_second"]
        except common.DoesNotRun as error:
            say(f"{name}: peer, {form}: left out: {error}")
            tried[form] = None
            peer.end()
            continue
        except BaseException:
            peer.end()
            raise
        say(f"{name}: peer, {form}: {tried[form]:.0f} tokens/s, ready after {time.monotonic() - started:.0f} s")
        if best is None or tried[form] > tried[best[0]]:
            best, peer = (form, peer), best and best[1]
        if peer:
            peer.end()
    if best is None:
        raise SystemExit(f"{name}: no form of the peer runs")
    return (*best, tried)


def check_parameters(name, own, other):
    """Ours counts router biases, which the peer keeps as buffers."""
    sizes = common.SIZES[name]
    biases = (sizes["num_hidden_layers"] - sizes["first_k_dense_replace"]) * sizes["n_routed_experts"]
    if own["parameters"] - biases != other["parameters"]:
        raise SystemExit(f"{name}: {own['parameters']} - {biases} parameters here, {other['parameters']} in the peer")
    say(f"{name}: {other['parameters']:,} parameters on both sides, without {biases} router biases")


def measure(args, name):
    """Speeds of the peer's forms, the one that was compared, and both sides' results of all rounds."""
    sequences, tokens = BATCHES[name]
    form, peer, tried = fastest(args, name)

    def own():
        options = ["--no-mtp", "--precision", args.precision, "--batch", sequences, "--context", tokens]
        result = common.ours(args, "train", name, *options, "--steps", args.steps, "--warmup", args.warmup)
        say(f"{name}: ours {result['tokens_per_second']:.0f} tokens/s")
        return result

    def other():
        result = peer.ask({"steps": args.steps}, args.form_timeout)
        say(f"{name}: peer {result['tokens_per_second']:.0f} tokens/s")
        return result

    with peer:
        pairs = common.in_turns(args.rounds, own, other)
    check_parameters(name, *pairs[0])
    return {"config": name, "form": form, "forms": tried, "rounds": pairs}


def table_row(result):
    pairs = result["rounds"]
    rates = [common.median(pairs, lambda *both, side=side: both[side]["tokens_per_second"]) for side in (0, 1)]
    peaks = [common.median(pairs, lambda *both, side=side: both[side]["peak_bytes"]) / 2**20 for side in (0, 1)]
    ratio = common.ratio(pairs, lambda own: own["tokens_per_second"], lambda other: other["tokens_per_second"])
    # The higher of the two sides' ceilings, so that neither is flattered by a slow product of its own.
    ceiling = common.median(pairs, lambda own, other: max(own["ceiling_gflops"], other["ceiling_gflops"]))
    flops = pairs[0][0]["model_flops_per_token"]
    share = [100 * rate * flops * 1e-9 / ceiling for rate in rates]
    return (
        f"| {result['config']} | {rates[0]:,.0f} | {rates[1]:,.0f} ({result['form']}) | {ratio} | {flops / 1e6:.2f} "
        f"| {ceiling:.0f} | {share[0]:.0f}%, {share[1]:.0f}% | {peaks[0]:,.0f}, {peaks[1]:,.0f} |"
    )


def show(args, results):
    isa = results[0]["rounds"][0][0]["isa"]
    print(f"{common.machine()}; {common.versions('torch', 'transformers')}\n")
    print(
        f"{args.rounds} paired rounds of {args.steps} steps, {args.threads} threads, {isa}, ours in {args.precision}:\n"
    )
    print(
        "| | ours, tokens/s | transformers, tokens/s | ratio | MFLOP a token | ceiling, GFLOP/s | of it | peak, MiB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for result in results:
        print(table_row(result))
    print()
    for result in results:
        forms = (f"{form} {f'{rate:,.0f}' if rate else 'left out'}" for form, rate in result["forms"].items())
        print(f"Forms of the peer at {result['config']}, one try each, tokens/s: {', '.join(forms)}.")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--binary", default="target/release/dsv3-pipeline")
    parser.add_argument("--configs", nargs="+", choices=sorted(BATCHES), default=list(BATCHES))
    parser.add_argument("--forms", nargs="+", choices=sorted(FORMS), default=list(FORMS))
    parser.add_argument("--form-timeout", type=float, default=900, help="seconds for a form to be ready and tried")
    parser.add_argument("--precision", choices=["f32", "bf16", "fp8"], default="f32", help="of our side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="measured steps of each side and round")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the measured ones; the peer's once")
    parser.add_argument("--json", action="store_true", help="print one object instead of the table")
    parser.add_argument("--worker", nargs=2, metavar=("CONFIG", "FORM"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(*args.worker, args.threads)
    results = [measure(args, name) for name in args.configs]
    if args.json:
        versions = common.versions("torch", "transformers")
        print(json.dumps({"machine": common.machine(), "versions": versions, "results": results}))
    else:
        show(args, results)


if __name__ == "__main__":
    main()
