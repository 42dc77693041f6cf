"""Two hosts on one machine: network namespaces that see each other over a virtual cable and nothing
else.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOSTS = {"zeropref-a": "10.213.77.1", "zeropref-b": "10.213.77.2"}
CABLE = "zp0"  # the cable's end, in either
# Stands in for a remote shell between the two: pdsh and DeepSpeed call it as they call the real
# one.
SSH = """#!/bin/sh
while :; do
    case "$1" in
        -o | -p | -l) shift 2 ;;
        -*) shift ;;
        *) break ;;
    esac
done
host=$1
shift
exec ip netns exec "$host" sh -c "$*"
"""


def ip(*words, check=True):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=check)


@pytest.fixture
def hosts():
    """The names of two namespaces whose ends of one cable have the addresses in HOSTS."""
    if (
        not shutil.which("ip")
        or os.getuid() != 0
        or ip("netns", "add", "zeropref-probe", check=False).returncode
    ):
        pytest.skip("network namespaces need iproute2 and the right to make them")
    ip("netns", "del", "zeropref-probe")
    a, b = HOSTS
    try:
        for name in HOSTS:
            ip("netns", "add", name)
        ip("link", "add", CABLE, "netns", a, "type", "veth", "peer", "name", CABLE, "netns", b)
        for name, address in HOSTS.items():
            ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
            for device in (CABLE, "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield a, b
    finally:
        for name in HOSTS:
            ip("netns", "del", name, check=False)


def received(host) -> int:
    """Bytes that have come to `host` over the cable."""
    table = ip("netns", "exec", host, "cat", "/proc/net/dev").stdout
    return int(re.search(rf"{CABLE}:\s*(\d+)", table)[1])


def launchers(way, hosts, folder) -> dict[Path, list]:
    """The commands of a way to start both hosts, by the folder that each is run in."""
    hostfile, meet = folder / "hostfile", ["--master_addr", HOSTS[hosts[0]], "--master_port", 29517]
    hostfile.write_text("".join(f"{name} slots=1\n" for name in hosts))
    if way == "ssh":
        (folder / "bin").mkdir()
        (folder / "bin/ssh").write_text(SSH)
        (folder / "bin/ssh").chmod(0o755)
        return {folder / "start": ["deepspeed", "--hostfile", hostfile, "--master_port", 29517]}
    each = {
        "deepspeed": ["deepspeed", "--hostfile", hostfile, "--no_ssh"],
        "torchrun": ["torchrun", "--nnodes", 2, "--nproc_per_node", 1],
    }[way]
    return {
        folder / host: ["ip", "netns", "exec", host, *each, "--node_rank", number, *meet]
        for number, host in enumerate(hosts)
    }


@pytest.mark.slow
@pytest.mark.parametrize("way", ["deepspeed", "torchrun", "ssh"])
def test_two_hosts_train_over_tcp(hosts, way, model_dir, tmp_path):
    """One launcher a node, each in a working folder of its own, or one command for both; OUTPUT is
    shared.
    """
    if way == "ssh" and not shutil.which("pdsh"):
        pytest.skip("deepspeed reaches other hosts with pdsh, which is not installed")
    out, steps, processes = tmp_path / "shared/run", 4, []
    flags = [
        "--model",
        model_dir,
        "--output",
        out,
        "--max_length",
        512,
        "--max_steps",
        steps,
        "--batch_size",
        8,
        "--micro_tokens",
        512,
        "--lr",
        "1e-3",
        "--ds_config",
        ROOT / "ds_configs/zero2.json",
    ]
    env = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": CABLE,
    }
    for folder, command in launchers(way, hosts, tmp_path).items():
        folder.mkdir()
        env["ZEROPREF_CACHE"] = str(folder / "cache")
        with open(folder / "log", "w") as log:
            words = list(map(str, [*command, ROOT / "launch/train_dpo.py", *flags]))
            processes.append(subprocess.Popen(words, cwd=folder, env=env, stdout=log, stderr=log))
    try:
        codes = [process.wait(400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(codes), "\n".join(path.read_text()[-3000:] for path in tmp_path.glob("*/log"))

    run = json.loads((out / "run.json").read_text())
    assert run["status"] == "finished" and run["hardware"]["world"] == 2
    assert {path.name for path in (out / "logs").iterdir()} >= {"rank-0.log", "rank-1.log"}
    weights = sum(
        path.stat().st_size for path in (out / "model").glob("*.safetensors")
    )  # fp32, as gradients are
    assert all(received(host) > steps * weights / 2 for host in hosts)
    assert list(tmp_path.rglob("run.json")) == [out / "run.json"]
