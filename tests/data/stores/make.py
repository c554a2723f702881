#!/usr/bin/env python3
"""Makes one of the stores beside this file with a given build: make.py PROGRAM FOLDER [YAML OVERRIDES ...]

A finished run (`corpus`, `base`) and one that was stopped on its way (`longer`, SIGTERM after its first checkpoint). The run
happens in /tmp/dsv3-stores, under the host name `example`, so that nothing of a machine is in what is committed. After it,
`expected.json` gets what every later build must find: the ids of the runs, the keys, the digests of the outputs, and the
digest that `longer` has when this build finishes it (in a copy, which is thrown away).
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys

PLACE = "/tmp/dsv3-stores"


def command(program, *args):
    named = 'echo example > /proc/sys/kernel/hostname 2>/dev/null; exec "$@"'
    return ["unshare", "--uts", "sh", "-c", named, "sh", program, *args]


def events(program, *args, stop=None):
    """Runs it to its end, or sends SIGTERM when `stop` holds; a pipe of one page keeps it from running ahead."""
    child = subprocess.Popen(command(program, *args, "--json"), stdout=subprocess.PIPE, cwd=PLACE, bufsize=0)
    fcntl.fcntl(child.stdout, fcntl.F_SETPIPE_SZ, 4096)
    seen = []
    for line in child.stdout:
        seen.append(json.loads(line))
        if stop and stop(seen[-1]):
            child.send_signal(signal.SIGTERM)
            stop = None
    return child.wait(), seen


def outputs(seen, stage):
    return {e["port"]: e["artifact"]["digest"] for e in seen if e["event"] == "artifact" and e["stage"] == stage}


def late(event):
    """Whether `longer` has come past its first checkpoint; that one may still be on its way to the store."""
    return event["event"] == "metric" and event["stage"] == "longer" and event["step"] == 17


def keys(seen):
    return {e["stage"]: e["key"] for e in seen if e["event"] == "stage_started"}


def main(program, folder, overrides):
    here = os.path.dirname(os.path.abspath(__file__))
    program, folder = os.path.abspath(program), os.path.abspath(folder)
    shutil.rmtree(PLACE, ignore_errors=True)
    os.makedirs(PLACE)
    for name in ["store.yaml", "documents.jsonl"]:
        shutil.copy(os.path.join(here, name), PLACE)
    sets = [word for override in overrides for word in ("--set", override)]
    run = ["run", "store.yaml", "--store", "file://./runs", "--threads", "1", *sets]
    code, first = events(program, *run, "--until", "base")
    assert code == 0, code
    code, second = events(program, *run, "--only", "longer", stop=late)
    assert code == 75, code
    stored = os.path.join(PLACE, "runs")
    for unneeded in ["tmp", "cache"]:
        shutil.rmtree(os.path.join(stored, unneeded), ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(stored, os.path.join(folder, "store"))
    code, last = events(program, "resume", second[0]["run"], "--store", "file://./runs")
    # A run that was started for one stage resumes all of them; the others are cached.
    assert code == 0, code
    expected = {
        "finished_run": first[0]["run"],
        "stopped_run": second[0]["run"],
        "keys": keys(first) | keys(second),
        "outputs": {stage: outputs(first, stage) for stage in ["corpus", "base"]} | {"longer": outputs(last, "longer")},
    }
    with open(os.path.join(folder, "expected.json"), "w", encoding="utf-8") as file:
        json.dump(expected, file, indent=1, sort_keys=True)
        file.write("\n")
    shutil.rmtree(PLACE)


main(sys.argv[1], sys.argv[2], sys.argv[3:])
