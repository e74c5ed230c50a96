"""All phases across two hosts: network namespaces with a link between them, and a folder that both see.

What they make must be what one process makes. Then the link is cut during phases 3 and 4 and comes back, and the same
command must go on to the same result. A killed worker comes back by itself.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, tiny_modernbert, tiny_sentence_transformer
from test_processes import NO_GPU, PHASE_1, PHASE_3, PHASE_4, PHASE_5, jobs, write_corpus, write_sources

HOSTS = ("10.213.7.1", "10.213.7.2")
SECONDS_TO_NOTICE = 90  # a minute, and torchrun's own time to end


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True)


def namespace(host):
    return f"modernbert{host}"


def remove_hosts():
    for host in range(2):
        ip("netns", "del", namespace(host))


@pytest.fixture(scope="module")
def hosts():
    """Two network namespaces that reach each other."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("network namespaces need root on Linux")
    remove_hosts()
    if ip("netns", "add", namespace(0)).returncode or ip("netns", "add", namespace(1)).returncode:
        pytest.skip("this system makes no network namespaces")
    ip("link", "add", "veth0", "netns", namespace(0), "type", "veth", "peer", "name", "veth1", "netns", namespace(1))
    for host in range(2):
        ip("-n", namespace(host), "addr", "add", f"{HOSTS[host]}/24", "dev", f"veth{host}")
        for device in ("lo", f"veth{host}"):
            ip("-n", namespace(host), "link", "set", device, "up")
    yield
    remove_hosts()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sources, a corpus, a student and a teacher, all tiny."""
    folder = tmp_path_factory.mktemp("hosts")
    write_sources(folder)
    teacher = tiny_sentence_transformer(folder / "small", "bert", width=24)
    tiny_modernbert(folder / "init", teacher.tokenizer)
    teacher.tokenizer.save_pretrained(folder / "init")
    write_corpus(folder)
    return folder


def start(folder, host, script, flags, *launcher):
    """One host's torchrun, with one process; its output goes to a file."""
    command = ["ip", "netns", "exec", namespace(host), sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    command += ["--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "soak", "--local_addr", HOSTS[host]]
    # It looks for its own address in the host's name, which both namespaces share.
    command += [
        "--rdzv_endpoint",
        f"{HOSTS[0]}:29511",
        "--rdzv_conf",
        f"is_host={host == 0}",
        *launcher,
        str(ROOT / script),
        *flags,
    ]
    environment = {**os.environ, **NO_GPU, "GLOO_SOCKET_IFNAME": f"veth{host}", "OMP_NUM_THREADS": "1"}
    # Else torchrun's store outlives its workers, and the next ones find in it the addresses of the dead.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with (folder / f"host{host}.log").open("w") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)


def start_both(folder, script, flags, *launcher):
    return [start(folder, host, script, flags, *launcher) for host in range(2)]


def said(folder):
    return "".join((folder / f"host{host}.log").read_text() for host in range(2))


def run_both(folder, script, flags):
    statuses = [run.wait(timeout=600) for run in start_both(folder, script, flags)]
    assert statuses == [0, 0], said(folder)


def run_one(folder, script, flags):
    command = [sys.executable, str(ROOT / script), *flags]
    environment = {**os.environ, **NO_GPU, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def phase_1(out):
    flags = ["--sources", "own=own", "again=again.parquet", "--tokenizer_name_or_path", "tokenizer"]
    flags += ["--max_seq_length", "64", "--validation_rows", "20", "--eval_datasets", "evaluation"]
    return [*flags, "--output_dir", f"{out}/made"]


def flags_of(script, out):
    if script == PHASE_1:
        return phase_1(out)
    return next(flags for phase, _, flags in jobs(out, 256, "alone") if phase == script)


def same_files(one, two, pattern):
    files = sorted(path.relative_to(one) for path in one.rglob(pattern))
    assert files
    for file in files:
        assert (one / file).read_bytes() == (two / file).read_bytes(), file


def same_losses(one, two):
    curves = [
        [entry["loss"] for entry in json.loads((out / "run.json").read_text())["history"] if "loss" in entry]
        for out in (one, two)
    ]
    np.testing.assert_allclose(*curves, rtol=1e-4)


OUTPUTS = {PHASE_1: "made", PHASE_3: "mlm", PHASE_4: "distil", PHASE_5: "model"}


@pytest.fixture(scope="module", autouse=True)
def alone(hosts, folder):
    """Makes what one process makes of everything, once for each phase that is asked for."""

    def make(script):
        if script == PHASE_5:
            make(PHASE_4)  # whose labels it reads
        if not (folder / "alone" / OUTPUTS[script]).exists():
            run_one(folder, script, flags_of(script, "alone"))
        return folder / "alone"

    return make


def compare(alone, both, script):
    if script in (PHASE_1, PHASE_4):
        same_files(alone / OUTPUTS[script], both / OUTPUTS[script], "*.parquet")
    else:
        same_losses(alone / OUTPUTS[script], both / OUTPUTS[script])
    if script == PHASE_4:
        same_files(alone / "teacher", both / "teacher", "*.safetensors")


@pytest.mark.parametrize("script", [PHASE_1, PHASE_4, PHASE_3, PHASE_5])
def test_two_hosts_make_what_one_process_makes(folder, alone, script):
    one = alone(script)
    run_both(folder, script, flags_of(script, "both"))
    compare(one, folder / "both", script)


def longer(script, out):
    """A phase's flags, for a run that is long enough to be attacked."""
    return [*flags_of(script, out), *(["--num_train_epochs", "60"] if script == PHASE_3 else [])]


def wait_until_at_work(folder, script, out, runs):
    partial = folder / out / f"{OUTPUTS[script]}.partial"
    pattern = "checkpoint-*/manifest.json" if script == PHASE_3 else "run.json"
    while not list(partial.glob(pattern)):
        assert all(run.poll() is None for run in runs), said(folder)
        time.sleep(0.05)


def stop(runs):
    for run in runs:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()


@pytest.mark.parametrize("script", [PHASE_3, PHASE_4])
def test_a_cut_link_ends_both_within_a_minute_and_nothing_is_lost(folder, script):
    run_one(folder, script, longer(script, "long"))
    runs = start_both(folder, script, longer(script, "cut"))
    wait_until_at_work(folder, script, "cut", runs)
    ip("-n", namespace(1), "link", "set", "veth1", "down")
    try:
        began = time.monotonic()
        lines = dict.fromkeys(range(2), "")
        while not all("another process of this run has ended" in line for line in lines.values()):
            assert time.monotonic() - began < SECONDS_TO_NOTICE, said(folder)
            time.sleep(1)
            lines = {host: (folder / f"host{host}.log").read_text() for host in lines}
    finally:
        stop(runs)
        ip("-n", namespace(1), "link", "set", "veth1", "up")
    run_both(folder, script, longer(script, "cut"))
    compare(folder / "long", folder / "cut", script)


def workers_of(launcher):
    """The processes that a torchrun has started. `ip netns exec` becomes the command that it runs."""
    found = subprocess.run(["pgrep", "-P", str(launcher)], capture_output=True, text=True).stdout.split()
    return [int(one) for one in found if "pre_train" in Path("/proc", one, "cmdline").read_text()]


@pytest.mark.parametrize("host", [0, 1])
def test_a_killed_worker_comes_back_by_itself(folder, host):
    out = f"killed-{host}"
    runs = start_both(folder, PHASE_3, longer(PHASE_3, out), "--max_restarts", "1")
    wait_until_at_work(folder, PHASE_3, out, runs)
    (worker,) = workers_of(runs[host].pid)
    os.kill(worker, signal.SIGKILL)
    assert [run.wait(timeout=600) for run in runs] == [0, 0], said(folder)
    if not (folder / "long" / "mlm").exists():
        run_one(folder, PHASE_3, longer(PHASE_3, "long"))
    same_losses(folder / "long" / "mlm", folder / out / "mlm")
