"""Where each percent of a step goes, by op: `perf record` over the measured steps of `dsv3-pipeline bench`.

    cargo build --release
    python3 benches/profile.py train --config M

Arguments after those below go to `bench`. Prints a Markdown table: percent of the processor's time of all threads, by the
function that was running. Functions are grouped by the first pattern of GROUPS that their name holds; a loop that the
compiler moved into its caller counts as its caller. `--symbols` lists the functions of each group. Needs perf 5.9 or
later and leave to use it (kernel.perf_event_paranoid at most 2; below 2, or root, for the kernel's share).
"""

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile

# Group, pattern of a function's demangled name. The first that matches counts.
GROUPS = [
    ("product kernels", r"dsv3_ops::gemm::(kernel|few|narrow|codes|pairs)|gemm::.*(kernel|bf16_dot)"),
    ("packing for products", r"gemm::pack|Right>::|weight::(operand|layout|codes)|transpose_panel|dsv3_ops::panels"),
    ("product driver", r"dsv3_ops::gemm|scratch::"),
    ("optimiser", r"dsv3_train::adamw|dsv3_train::guard|AdamW"),
    ("attention: softmax", r"softmax_tile|score_grads|attention::.*statistics"),
    ("attention: rest", r"dsv3_ops::attention|attention::"),
    ("attention over latents", r"mla_decode"),
    ("output head", r"token_logprob"),
    ("norm", r"rms_norm"),
    ("SwiGLU", r"swiglu"),
    ("permute and combine", r"dsv3_ops::permute"),
    ("router", r"dsv3_ops::router|balance_loss|router_bias"),
    ("rope", r"dsv3_ops::rope"),
    ("codes and scales", r"dsv3_ops::(fp8|activation|bfloat)|half::bfloat"),
    ("linear layers, outside products", r"dsv3_ops::(grouped_linear|linear)"),
    ("encoding weights", r"dsv3_ops::weight|Weight>::"),
    ("columns, rows, sums", r"dsv3_ops::(columns|elementwise|gather_rows|embedding|vector)|embedding::|elementwise::"),
    ("copies and zeroing", r"^(__)?(mem(move|cpy|set|cmp)|bcmp)|^__mem|clear_page"),
    ("allocation", r"^_?_?(libc_)?(malloc|calloc|free|realloc|cfree|sysmalloc)|^_int_|^unlink_chunk|dsv3_ops::memory|memory::"),
    ("scheduling", r"rayon|crossbeam|futex|sched_yield|pthread|std::sync|sys::sync|__lll_|^syscall"),
    ("model and tape", r"dsv3_(ops|model|train|infer|pipeline|core|estimate)::|dsv3_"),
]
PATTERNS = [(name, re.compile(pattern)) for name, pattern in GROUPS]
SWITCHES = re.compile(r"futex|sched|task_switch|yield|dequeue|enqueue|wake")
FAULTS = re.compile(r"fault|clear_page|folio|anon|charge|memcg|zap_|unmap|mmap|vma|alloc_pages|get_page|rmqueue|mas_|pte|lru|swap")


def group(symbol, library):
    if "kernel" in library or library.startswith("[k"):
        if SWITCHES.search(symbol):
            return "scheduling"
        return "page faults" if FAULTS.search(symbol) else "rest of the kernel"
    return next((name for name, pattern in PATTERNS if pattern.search(symbol)), "other")


def record(binary, hertz, bench, data):
    with tempfile.TemporaryDirectory() as folder:
        fifo = os.path.join(folder, "perf")
        os.mkfifo(fifo)
        command = ["perf", "record", "--quiet", f"--freq={hertz}", "--delay=-1", f"--control=fifo:{fifo}"]
        command += [f"--output={data}", "--", binary, "bench", *bench, "--json", "--perf-control", fifo]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not lines:
        sys.exit(f"{' '.join(command)}: status {done.returncode}")
    return json.loads(lines[-1])


def samples(data):
    """Pairs of (symbol, library) with the sum of their periods."""
    script = ["perf", "script", f"--input={data}", "--fields=period,ip,sym,dso"]
    output = subprocess.run(script, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout
    found, count = collections.Counter(), 0
    for line in output.splitlines():
        # period, address, name (which may hold spaces and parentheses), library in parentheses.
        parts = re.match(r"\s*(\d+):?\s+[0-9a-f]+\s+(.*)\s+\(([^()]*|\[[^\]]*\][^()]*)\)\s*$", line)
        if parts:
            found[parts[2], parts[3]] += int(parts[1])
            count += 1
    return found, count


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", default="target/release/dsv3-pipeline")
    parser.add_argument("--hertz", type=int, default=999, help="samples a second and thread")
    parser.add_argument("--symbols", type=int, default=0, metavar="N", help="also list the first N functions of each group")
    parser.add_argument("--data", help="keep perf's file there")
    options, bench = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or os.path.join(folder, "perf.data")
        report = record(options.binary, options.hertz, bench, data)
        found, count = samples(data)
    total = sum(found.values())
    if not total:
        sys.exit("perf took no samples")
    groups = collections.defaultdict(collections.Counter)
    for (symbol, library), period in found.items():
        groups[group(symbol, library)][symbol] += period
    print(
        f"`{report['work']}` of `{report['config']}`, {report['batch']} x {report['context']}, {report['precision']}, "
        f"{report['threads']} threads, {report['isa']}: {report['tokens_per_second']:.0f} tokens/s, "
        f"{report['fraction']:.2f} of the {report['bound']} ceiling; {report['steps']} steps, {count} samples\n"
    )
    print("| What | % |\n|---|---|")
    for name, symbols in sorted(groups.items(), key=lambda item: -item[1].total()):
        print(f"| {name} | {100 * symbols.total() / total:.1f} |")
    for name, symbols in sorted(groups.items(), key=lambda item: -item[1].total()) if options.symbols else []:
        print(f"\n{name}:")
        for symbol, period in symbols.most_common(options.symbols):
            print(f"  {100 * period / total:5.2f}  {symbol[:160]}")


main()
