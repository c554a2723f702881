"""What both scripts of this folder share: sizes, child processes with a time limit, rounds taken in turns, ratios.

The peer is a process that stays for all rounds, so that compiling and loading are paid once; it answers one line of JSON
to each line of JSON that it is sent. Ours is a new process each round.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading

# Compiled code and model files that are kept from one run to the next; git ignores it.
CACHE = pathlib.Path(__file__).resolve().parents[2] / "target" / "peers"

# Those of runtime/estimate/src/named.rs; demo without its prediction module.
SMALL = dict(
    vocab_size=4096, hidden_size=256, intermediate_size=704, moe_intermediate_size=128, num_hidden_layers=6,
    first_k_dense_replace=1, num_attention_heads=8, num_key_value_heads=8, q_lora_rank=96, kv_lora_rank=64,
    qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=16, n_shared_experts=1,
    num_experts_per_tok=4, n_group=4, topk_group=2, routed_scaling_factor=2.5, max_position_embeddings=2048,
    initializer_range=0.02,
)  # fmt: skip
MEDIUM = dict(
    SMALL, vocab_size=16384, hidden_size=512, intermediate_size=1408, moe_intermediate_size=192, num_hidden_layers=12,
    q_lora_rank=192, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, n_routed_experts=32,
)  # fmt: skip
DEMO = dict(
    SMALL, vocab_size=704, hidden_size=128, intermediate_size=256, moe_intermediate_size=32, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=4, qk_nope_head_dim=16, qk_rope_head_dim=32, initializer_range=0.06,
)  # fmt: skip
LARGE = dict(MEDIUM, hidden_size=1024, moe_intermediate_size=512, num_hidden_layers=16, n_routed_experts=64)
SIZES = {"demo": DEMO, "S": SMALL, "M": MEDIUM, "L": LARGE}


class DoesNotRun(Exception):
    """A child failed or went over its time."""


def say(text):
    print(text, file=sys.stderr, flush=True)


def environment(threads, **more):
    env = dict(os.environ, OMP_NUM_THREADS=str(threads), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", **more)
    env.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE / "inductor"))
    return env


class Peer:
    """A child in a process group of its own; ends with the `with` block."""

    def __init__(self, command, env):
        self.errors = tempfile.TemporaryFile(mode="w+")
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            start_new_session=True,
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()

    def ask(self, question, timeout_secs=None):
        """The answer to one question. Over its time the whole group is killed, compilers included."""
        expired = threading.Event()
        timer = threading.Timer(timeout_secs, lambda: (expired.set(), self.end())) if timeout_secs else None
        try:
            if timer:
                timer.start()
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        finally:
            if timer:
                timer.cancel()
        if expired.is_set():
            raise DoesNotRun(f"no answer in {timeout_secs} s")
        if not line:
            self.end()
            self.errors.seek(0)
            raise DoesNotRun(self.errors.read()[-2000:])
        return json.loads(line)

    def end(self):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


def answers(answer):
    """The loop of a peer: `answer` maps a question to an answer."""
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


def ours(args, work, config, *more):
    """One `dsv3-pipeline bench` in a process of its own."""
    command = [args.binary, "bench", work, "--config", config, "--threads", str(args.threads)]
    command += [*map(str, more), "--json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def in_turns(rounds, own, other):
    """Pairs of both sides' results. Whoever goes first alternates: a machine that slows down then favours neither."""
    pairs = []
    for number in range(rounds):
        if number % 2 == 0:
            first = own()
            pairs.append((first, other()))
        else:
            first = other()
            pairs.append((own(), first))
    return pairs


def median(pairs, value):
    return statistics.median(value(own, other) for own, other in pairs)


def ratio(pairs, own_value, other_value):
    """Median of the rounds' own ratios, with the least and the greatest."""
    ratios = [own_value(own) / other_value(other) for own, other in pairs]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def status_bytes(field):
    """A field of /proc/self/status that is given in kB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(field + ":"))


def reset_peak():
    """Lets VmHWM start again from what is resident now."""
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")


def machine():
    """Processor, and the versions that a result depends on."""
    with open("/proc/cpuinfo") as info:
        names = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
    processor = names[0] if names else "unknown processor"
    return f"{processor}, {os.cpu_count()} cores; Linux {platform.release()}, Python {platform.python_version()}"


def versions(*packages):
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
