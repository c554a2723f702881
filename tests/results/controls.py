"""Runs the demo with its controls for several seeds and writes what came out as the Markdown pages beside this file.

    cargo build --release
    python3 tests/results/controls.py                       # all pages; about half an hour on two idle cores
    python3 tests/results/controls.py extension rl          # some of them
    python3 tests/results/controls.py --seeds 7 --store file:///tmp/store --dsv3 target/debug/dsv3-pipeline --out /tmp

Standard library only. Every figure is one of the closing figures of `dsv3-pipeline run --json`; nothing is typed by hand.
Results are content-addressed, so a stage that two runs share is computed once, and a second call computes nothing. The
folder of a page is `tests/results/` unless `--out` names another.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "pipelines/full.yaml"


class Runs:
    """Runs of the recipe, each made once."""

    def __init__(self, program, store, seeds):
        self.program, self.store, self.seeds, self.done = program, store, seeds, {}

    def figures(self, until, sets, seed):
        """Closing figures of one run by name; those of stages found in the store too."""
        key = (until, tuple(sets), seed)
        if key not in self.done:
            args = ["run", RECIPE, "--until", until, "--set", f"seed={seed}", "--set", f"params.store={self.store}"]
            for one in sets:
                args += ["--set", one]
            print("dsv3-pipeline", *args, file=sys.stderr, flush=True)
            ended = subprocess.run([self.program, *args, "--json"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
            if ended.returncode != 0:
                sys.exit(f"the run ended with {ended.returncode}")
            last = json.loads(ended.stdout.splitlines()[-1])
            self.done[key] = {name: figure["value"] for name, figure in last["metrics"].items()}
        return self.done[key]

    def over_seeds(self, until, sets, name):
        """One figure for every seed."""
        return [self.figures(until, sets, seed)[name] for seed in self.seeds]


def mean(values):
    return sum(values) / len(values)


def error(values):
    """Standard error of the mean; nothing to say about one value."""
    if len(values) < 2:
        return math.nan
    centre = mean(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1) / len(values))


def number(value, places=3):
    return "–" if math.isnan(value) else f"{value:.{places}f}"


def spread(values, places=3):
    return f"{number(mean(values), places)} ± {number(error(values), places)}"


def table(head, rows):
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, *rows]]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines)


def by_seed(runs, rows, places=3):
    """A table of figures by seed, with mean and standard error. A row is (label, values)."""
    head = ["figure", *(f"seed {seed}" for seed in runs.seeds), "mean ± s.e."]
    return table(head, [[label, *(number(v, places) for v in values), spread(values, places)] for label, values in rows])


def commands(arms, until):
    """The commands behind a page."""
    lines = []
    for sets in arms:
        more = "".join(f" --set '{one}'" for one in sets)
        lines.append(f"dsv3-pipeline run {RECIPE} --until {until} --set seed=SEED{more}")
    return "\n".join(["```", *lines, "```"])


def differences(one, other):
    return [a - b for a, b in zip(one, other)]


# --- The pages ---------------------------------------------------------------------------------------------------------


def extension(runs):
    """Accuracy by length and depth: base, YaRN untrained, after extension."""
    names = [("base, as it is", "words_base"), ("YaRN, untrained", "words_yarn_untrained"), ("after extension", "words")]
    places = [
        tuple(int(part) for part in name.rsplit(".", 2)[1:])
        for name in runs.figures("extended", [], runs.seeds[0])
        if name.startswith("extended.needle.words.")
    ]
    lengths, depths = sorted({length for length, _ in places}), sorted({depth for _, depth in places})
    parts = [
        "# Context extension: recall by length and depth",
        f"A key of two words is hidden at a depth of unrelated text and asked for at its end. The share of key words that "
        f"the model finds most likely, in per cent, mean of seeds {', '.join(map(str, runs.seeds))} ± its standard error; "
        "every cell is 40 needles a seed. The base was trained on 128 tokens; the needles are in no training text.",
        commands([[]], "extended"),
    ]
    for length in lengths:
        rows = []
        for label, figure in names:
            cells = []
            for depth in depths:
                values = runs.over_seeds("extended", [], f"extended.needle.{figure}.{length}.{depth}")
                cells.append(spread([100 * value for value in values], 0))
            whole = runs.over_seeds("extended", [], f"extended.needle.{length}.{figure}")
            rows.append([label, *cells, spread([100 * value for value in whole], 0)])
        head = [f"{length} tokens", *(f"depth {depth}%" for depth in depths), "all"]
        parts.append(table(head, rows))
    rows = []
    for length in lengths:

        def share(figure):
            return runs.over_seeds("extended", [], f"extended.needle.{length}.{figure}")

        rows += [(f"{length} tokens: {label}", share(figure)) for label, figure in names]
        rows.append((f"{length} tokens: after − base", differences(share("words"), share("words_base"))))
        rows.append((f"{length} tokens: after − untrained", differences(share("words"), share("words_yarn_untrained"))))
        rows.append((f"{length} tokens: base, whole key", share("exact_base")))
        rows.append((f"{length} tokens: after, whole key", share("exact")))
        first = f"{length}.{depths[0]}"
        deep = [
            runs.over_seeds("extended", [], f"extended.needle.{figure}.{first}")
            for figure in ("words", "words_yarn_untrained")
        ]
        rows.append((f"{length} tokens: after − untrained at depth {depths[0]}%", differences(*deep)))
    parts.append("The same by seed, all depths, as shares; `whole key` counts a key only when both words are right:")
    parts.append(by_seed(runs, rows))
    parts.append(
        "The base recalls little beyond its length, and YaRN alone brings most of the gain. What training adds to YaRN is in "
        "the rows `after − untrained`: within the noise over all depths, clear at the longest distance."
    )
    return parts


def rl(runs):
    """What the demo's policy gains from its rewards, and from rewards of other completions."""
    permuted = ["stages.rl.config.policy.control=permuted_rewards"]
    figures = [
        ("T = 1, before", "after_rl.sampled.accuracy_before"),
        ("T = 1, after", "after_rl.sampled.accuracy"),
        ("T = 1, gain", "after_rl.sampled.accuracy_gain"),
        ("greedy, before", "after_rl.greedy.accuracy_before"),
        ("greedy, after", "after_rl.greedy.accuracy"),
        ("greedy, gain", "after_rl.greedy.accuracy_gain"),
        ("tokens of an answer at T = 1, after", "after_rl.sampled.tokens"),
        ("training reward, first step", "rl.reward_mean_first"),
        ("training reward, last step", "rl.reward_mean_last"),
    ]
    rows = []
    for arm, sets in [("own rewards", []), ("permuted", permuted)]:
        have = runs.figures("after_rl", sets, runs.seeds[0])
        for label, name in figures:
            if name in have:
                rows.append((f"{arm}: {label}", runs.over_seeds("after_rl", sets, name)))
    gains = {arm: runs.over_seeds("after_rl", sets, "after_rl.sampled.accuracy_gain") for arm, sets in
             [("own", []), ("permuted", permuted)]}
    worst = max(gains["permuted"])
    return [
        "# Reinforcement learning: rewards of other completions",
        "The demo's `rl` stage, and the same with the rewards of each group exchanged among its completions at random "
        "(`control: permuted_rewards`): same prompts, same hook, same rewards in each group, only not for what earned them. "
        "Accuracy is of problems that no stage has seen: 100 with two answers each at T = 1, 200 greedy.",
        commands([[], permuted], "after_rl"),
        by_seed(runs, rows),
        f"Gain at T = 1: {spread(gains['own'])} with own rewards, {spread(gains['permuted'])} with permuted ones, "
        f"at most {number(worst)} on a seed. Permuted rewards average out to an advantage of zero for every completion, so "
        "what they move is noise: answers get shorter and worse, not better.",
    ]


def distillation(runs):
    """Rejection sampling on and off."""
    system = "system: Think step by step and check your work."
    exact = f"file: heldout-problems.parquet, score: {{kind: exact, tokens_max: 36, {system}"
    tasks = (
        f"stages.after_distillation.config.tasks=[{{name: prompted, {exact}}}}},"
        f" {{name: sampled, {exact}, temperature: 1, samples: 4}}}}]"
    )
    accept_all = "stages.traces.config.samples.accept_reward=null"
    arms = [("rejection", [tasks]), ("no rejection", [accept_all, tasks])]
    figures = [
        ("traces rejected, share of those judged", "traces.rejection_rate"),
        ("mean reward of traces judged", "traces.reward_mean"),
        ("greedy accuracy", "after_distillation.prompted.accuracy"),
        ("accuracy at T = 1", "after_distillation.sampled.accuracy"),
    ]
    rows, parts = [], []
    for arm, sets in arms:
        for label, name in figures:
            rows.append((f"{arm}: {label}", runs.over_seeds("after_distillation", sets, name)))
    for label, name in figures[2:]:
        on, off = (runs.over_seeds("after_distillation", sets, name) for _, sets in arms)
        gain = differences(on, off)
        rows.append((f"rejection − no rejection: {label}", gain))
        clear = mean(gain) > 2 * error(gain)
        parts.append(
            f"{label[0].upper()}{label[1:]}: rejection brings {spread(gain)}, "
            + ("more than two standard errors." if clear else "which is not clear of two standard errors.")
        )
    return [
        "# Distillation: rejection on and off",
        "30% of the teacher's traces carry a planted slip and end in a wrong answer. With rejection, up to four traces of a "
        "problem are judged by the reward and the first right one is kept; without, the first one is kept as it is "
        "(`accept_reward: null`). Both models then learn from as many samples in the same way. Accuracy is of 200 problems "
        "that no stage has seen, with the system prompt that asks for a trace; at T = 1 four answers each.",
        commands([sets for _, sets in arms], "after_distillation"),
        by_seed(runs, rows),
        "\n\n".join(parts),
    ]


def fp8(runs):
    """FP8 against BF16 from the same seeds."""
    precisions = [("FP8", "{fp8: {}}"), ("BF16", "bf16")]
    arms = {name: [f"stages.base.config.training.precision={value}"] for name, value in precisions}
    first = {arm: runs.over_seeds("base", sets, "base.loss_first") for arm, sets in arms.items()}
    last = {arm: runs.over_seeds("base", sets, "base.val_loss_last") for arm, sets in arms.items()}
    mtp = {arm: runs.over_seeds("base", sets, "base.val_loss_mtp_1_last") for arm, sets in arms.items()}
    assert all(a != b for a, b in zip(first["FP8"], first["BF16"])), "the first step must differ"
    percent = [100 * (a - b) / b for a, b in zip(last["FP8"], last["BF16"])]
    difference = mean(percent)
    limit = 0.25 + 2 * (0 if math.isnan(error(percent)) else error(percent))
    rows = [(f"{arm}: training loss at step 1", first[arm]) for arm in arms]
    rows += [(f"{arm}: final validation loss", last[arm]) for arm in arms]
    rows += [(f"{arm}: final validation loss of the prediction module", mtp[arm]) for arm in arms]
    verdict = "within" if abs(difference) <= limit else "OUTSIDE"
    return [
        "# FP8 against BF16",
        "Pretraining of the demo from the same seeds, the linear layers in FP8 and in BF16. The losses differ from the "
        "first step, so the precision is in use; they end in the same place.",
        commands(arms.values(), "base"),
        by_seed(runs, rows, 4),
        by_seed(runs, [("final validation loss, FP8 over BF16, difference in per cent", percent)]),
        f"Mean difference {number(difference)}%, standard error {number(error(percent))}%: {verdict} the limit of 0.25% plus "
        f"twice the standard error, that is {number(limit)}%.",
    ]


PAGES = {"extension": extension, "rl": rl, "distillation": distillation, "fp8": fp8}
FILES = {"extension": "extension.md", "rl": "rl-control.md", "distillation": "distillation.md", "fp8": "fp8-bf16.md"}


def main():
    parser = argparse.ArgumentParser(description="Runs the demo with its controls and writes the pages of tests/results.")
    parser.add_argument("pages", nargs="*", choices=[[], *PAGES], help="which pages; all when none is named")
    parser.add_argument("--dsv3", default=str(ROOT / "target/release/dsv3-pipeline"), help="the program")
    parser.add_argument("--store", default="file://./runs", help="where results are kept")
    parser.add_argument("--seeds", nargs="+", type=int, default=[7, 11, 23])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    runs = Runs(str(Path(args.dsv3).resolve()), args.store, args.seeds)
    for name in args.pages or PAGES:
        seeds = " ".join(map(str, args.seeds))
        call = f"python3 tests/results/controls.py {name}" + ("" if seeds == "7 11 23" else f" --seeds {seeds}")
        parts = [*PAGES[name](runs), f"Written by `{call}`."]
        (args.out / FILES[name]).write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
