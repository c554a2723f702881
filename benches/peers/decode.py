"""Decoding and prefill speed beside llama.cpp: random weights of the same sizes in a GGUF file of architecture `deepseek2`.

llama.cpp is called through llama-cpp-python's low-level interface. The file is written once per number format and kept.
First every form of the peer is tried and the one with most tokens/s at batch 1 is kept; then our `bench decode` and that
process run in turn. `fp8` is compared with Q8_0 (8.5 bits a weight), `bf16` with BF16. Prints a Markdown table.

    CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" pip install --no-binary llama-cpp-python -r benches/peers/requirements.txt
    python benches/peers/decode.py --binary target/release/dsv3-pipeline --precisions bf16 fp8 --batches 1 8 --threads 2
"""

import argparse
import json
import math
import random
import statistics
import sys
import time

import common
import gguf_model
from common import say

KINDS = {"bf16": "BF16", "fp8": "Q8_0"}
# Flash attention, how the file is loaded, and whether its memory asks for large pages.
FORMS = {
    "mapped": ("auto", "MMAP", False),
    "mapped-flash-off": ("DISABLED", "MMAP", False),
    "loaded": ("auto", "NONE", False),
    "loaded-large-pages": ("auto", "NONE", True),
}


class Llama:
    """A model and, for each batch, a context whose sequences have read their prompts."""

    def __init__(self, path, form, context, new, threads):
        import llama_cpp

        self.api, self.context, self.new, self.threads = llama_cpp, context, new, threads
        flash, load, _ = FORMS[form]
        self.flash = getattr(llama_cpp, f"LLAMA_FLASH_ATTN_TYPE_{flash.upper()}")
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        params.load_mode = getattr(llama_cpp, f"LLAMA_LOAD_MODE_{load}")
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise SystemExit(f"{path} does not load")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.random = random.Random(1)
        self.ready = {}

    def open(self, sequences):
        params = self.api.llama_context_default_params()
        params.n_ctx = sequences * -(-(self.context + self.new) // 256) * 256
        params.n_batch = params.n_ubatch = self.context
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type = self.flash
        handle = self.api.llama_init_from_model(self.model, params)
        if not handle:
            raise SystemExit(f"no context for {sequences} sequences")
        return handle

    def run(self, handle, rows):
        """Decodes `rows` of (sequence, position, whether logits are wanted), each a random token; gives the seconds."""
        batch = self.api.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (sequence, position, wanted) in enumerate(rows):
            batch.token[i] = self.random.randrange(self.vocabulary)
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = position, 1, sequence, wanted
        started = time.perf_counter()
        failed = self.api.llama_decode(handle, batch)
        # Waits for the step to end.
        logit = self.api.llama_get_logits_ith(handle, -1)[0]
        seconds = time.perf_counter() - started
        self.api.llama_batch_free(batch)
        if failed or not math.isfinite(logit):
            raise SystemExit(f"llama_decode: {failed}, logit {logit}")
        return seconds

    def prompt(self, handle, sequence):
        last = self.context - 1
        return self.run(handle, [(sequence, position, position == last) for position in range(self.context)])

    def prefill(self):
        """Tokens/s of one prompt; its last token alone gets logits."""
        if "prefill" not in self.ready:
            self.ready["prefill"] = self.open(1)
            self.prompt(self.ready["prefill"], 0)
        handle = self.ready["prefill"]
        seconds = []
        for _ in range(2):
            self.api.llama_memory_clear(self.api.llama_get_memory(handle), True)
            seconds.append(self.prompt(handle, 0))
        return self.context / statistics.median(seconds)

    def decode(self, sequences):
        """Tokens/s of `new` steps after the prompts, which are read once."""
        if sequences not in self.ready:
            handle = self.ready[sequences] = self.open(sequences)
            for sequence in range(sequences):
                self.prompt(handle, sequence)
        handle = self.ready[sequences]
        for sequence in range(sequences):
            self.api.llama_memory_seq_rm(self.api.llama_get_memory(handle), sequence, self.context, -1)
        steps = range(self.context, self.context + self.new)
        seconds = [self.run(handle, [(sequence, at, True) for sequence in range(sequences)]) for at in steps]
        return sequences / statistics.median(seconds)

    def answer(self, question):
        work, sequences = question["work"], question.get("batch")
        return {
            "tokens_per_second": self.prefill() if work == "prefill" else self.decode(sequences),
            "parameters": self.api.llama_model_n_params(self.model),
            "weight_bytes": self.api.llama_model_size(self.model),
            "peak_bytes": common.status_bytes("VmHWM"),
            "build": self.api.llama_print_system_info().decode().strip(" |\n"),
        }


def model_file(args, precision):
    kind = KINDS[precision]
    path = common.CACHE / "gguf" / f"{args.config}-{kind}.gguf"
    if not path.exists():
        say(f"writing {path.name}")
        gguf_model.write(path, common.SIZES[args.config], kind)
    return path


def start(args, precision, form):
    command = [sys.executable, __file__, "--worker", str(model_file(args, precision)), form]
    command += ["--context", str(args.context), "--new", str(args.new), "--threads", str(args.threads)]
    more = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if FORMS[form][2] else {}
    return common.Peer(command, common.environment(args.threads, **more))


def fastest(args, precision):
    """Tries the forms; gives the fastest one's name, and the speed of each."""
    tried = {}
    for form in args.forms:
        with start(args, precision, form) as peer:
            try:
                rate = peer.ask({"work": "decode", "batch": args.batches[0]}, args.form_timeout)["tokens_per_second"]
            except common.DoesNotRun as error:
                say(f"{precision}: peer, {form}: left out: {error}")
                rate = None
        tried[form] = rate
        say(f"{precision}: peer, {form}: {rate or 0:.1f} tokens/s")
    if not any(tried.values()):
        raise SystemExit(f"{precision}: no form of the peer runs")
    return max(tried, key=lambda form: tried[form] or 0), tried


def measure(args, precision):
    """Both sides' results of all rounds and each work, and the speeds of the peer's forms."""
    form, tried = fastest(args, precision)
    works = [("decode", batch) for batch in args.batches] + [("prefill", 1)] * args.prefill
    result = {"precision": precision, "kind": KINDS[precision], "form": form, "forms": tried, "works": []}
    with start(args, precision, form) as peer:
        for work, batch in works:

            def own(work=work, batch=batch):
                options = ["--precision", precision, "--batch", batch, "--context", args.context]
                steps = args.new if work == "decode" else 3
                answer = common.ours(args, work, args.config, *options, "--steps", steps, "--warmup", 1)
                say(f"{precision}: {work}, batch {batch}: ours {answer['tokens_per_second']:.1f} tokens/s")
                return answer

            def other(work=work, batch=batch):
                answer = peer.ask({"work": work, "batch": batch}, args.form_timeout)
                say(f"{precision}: {work}, batch {batch}: peer {answer['tokens_per_second']:.1f} tokens/s")
                return answer

            other()
            pairs = common.in_turns(args.rounds, own, other)
            check(args, precision, *pairs[0])
            result["works"].append({"work": work, "batch": batch, "rounds": pairs})
    return result


def check(args, precision, own, other):
    """The peer's file holds our parameters, at the bytes we say it has."""
    if own["parameters"] != other["parameters"]:
        raise SystemExit(f"{own['parameters']} parameters here, {other['parameters']} in the peer")
    tensors = gguf_model.tensors(common.SIZES[args.config])
    size = sum(gguf_model.bytes_of(name, shape, KINDS[precision]) for name, shape in tensors)
    if size != other["weight_bytes"]:
        raise SystemExit(f"the peer's weights have {other['weight_bytes']} bytes, not {size}")


def table_row(args, result, part):
    pairs, batch = part["rounds"], part["batch"]
    rates = [common.median(pairs, lambda *both, side=side: both[side]["tokens_per_second"]) for side in (0, 1)]
    ratio = common.ratio(pairs, lambda own: own["tokens_per_second"], lambda other: other["tokens_per_second"])
    start = f"| {part['work']}, batch {batch} | {result['precision']}, {result['kind']} "
    start += f"| {rates[0]:,.1f} | {rates[1]:,.1f} | {ratio} "
    if part["work"] == "prefill":
        ceiling = common.median(pairs, lambda own, _: own["ceiling_gflops"])
        flops = pairs[0][0]["model_flops_per_token"]
        share = [100 * rate * flops * 1e-9 / ceiling for rate in rates]
        return start + f"| | {ceiling:.0f} GFLOP/s | {share[0]:.0f}%, {share[1]:.0f}% |"
    theirs = gguf_model.bytes_read(common.SIZES[args.config], result["kind"], batch, args.context)
    steps = [pairs[0][0]["bytes_per_step"], theirs]
    bandwidth = common.median(pairs, lambda own, _: own["bandwidth_gb_per_second"])
    share = [100 * rate / batch * read * 1e-9 / bandwidth for rate, read in zip(rates, steps)]
    mib = [read / batch / 2**20 for read in steps]
    return start + f"| {mib[0]:.1f}, {mib[1]:.1f} | {bandwidth:.1f} GB/s | {share[0]:.0f}%, {share[1]:.0f}% |"


def show(args, results):
    first = results[0]["works"][0]["rounds"][0]
    print(
        f"{common.machine()}; {common.versions('llama-cpp-python', 'gguf')}; llama.cpp built with: {first[1]['build']}\n"
    )
    print(
        f"{args.config}, {first[0]['parameters']:,} parameters on both sides, context {args.context}, {args.rounds} paired "
        f"rounds of {args.new} steps, {args.threads} threads, {first[0]['isa']}:\n"
    )
    print(
        "| | ours, llama.cpp in | ours, tokens/s | llama.cpp, tokens/s | ratio | MiB read a token | ceiling | of it |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for result in results:
        for part in result["works"]:
            print(table_row(args, result, part))
    print()
    for result in results:
        forms = (f"{form} {f'{rate:,.1f}' if rate else 'left out'}" for form, rate in result["forms"].items())
        print(f"Forms of the peer in {result['kind']}, one try each, tokens/s: {', '.join(forms)}.")
        print(f"Compared: {result['form']}.")
    peaks = []
    for result in results:
        both = [max(both[side]["peak_bytes"] for part in result["works"] for both in part["rounds"]) for side in (0, 1)]
        peaks.append(f"{result['precision']} {both[0] / 2**20:,.0f}, {both[1] / 2**20:,.0f}")
    print(f"Peak resident memory, ours and the peer's with file and contexts, MiB: {'; '.join(peaks)}.")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--binary", default="target/release/dsv3-pipeline")
    parser.add_argument("--config", choices=["S", "M", "L"], default="L")
    parser.add_argument("--precisions", nargs="+", choices=sorted(KINDS), default=["bf16", "fp8"], help="of our side")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--forms", nargs="+", choices=sorted(FORMS), default=list(FORMS))
    parser.add_argument("--form-timeout", type=float, default=300, help="seconds for any answer of the peer")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new", type=int, default=64, help="tokens of a sequence after the context")
    parser.add_argument("--no-prefill", dest="prefill", action="store_false", help="leave prefill out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one object instead of the table")
    parser.add_argument("--worker", nargs=2, metavar=("FILE", "FORM"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return common.answers(Llama(*args.worker, args.context, args.new, args.threads).answer)
    results = [measure(args, precision) for precision in args.precisions]
    if args.json:
        versions = common.versions("llama-cpp-python", "gguf")
        print(json.dumps({"machine": common.machine(), "versions": versions, "results": results}))
    else:
        show(args, results)


if __name__ == "__main__":
    main()
