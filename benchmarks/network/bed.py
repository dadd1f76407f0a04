#!/usr/bin/env python3
"""A test network on one machine: hosts are network namespaces, links are shaped; made and removed by this script.

    bed.py up [--hosts 16 --groups 8 --nics 1 --uplink 60 --global 10 ...]   rates in Mbit/s
    bed.py down

Every NIC is a TAP device in its host's namespace, shaped on the way out by tc; past it the frames are forwarded by
fabric.c (compiled here), which models switches, delays, buffers and one tapered link per ordered pair of groups. All
traffic stays inside the namespaces `px0`, `px1`, ... and this machine. Needs root, iproute2 and a C compiler.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = Path(tempfile.gettempdir()) / "pipermoe-bed"
STATE = FOLDER / "bed.json"
FIRST_UID = 2000  # local rank l runs as this user + l, and leaves by the NIC of the user's routing table


@dataclass(frozen=True)
class Bed:
    """Rates in Mbit/s, delays in microseconds, sizes in bytes."""

    hosts: int = 4
    groups: int = 2
    nics: int = 1
    uplink: float = 200.0
    global_: float = 200.0
    delay: float = 200.0
    global_delay: float = 100.0
    buffer: int = 0
    mtu: int = 9000
    inside: float = 0.0  # rate of a host's loopback, 0: not shaped
    rto_min: int = 20  # milliseconds

    @property
    def hosts_per_group(self) -> int:
        return self.hosts // self.groups

    def group(self, port: int) -> int:
        return port // self.nics // self.hosts_per_group


def name_of(host: int) -> str:
    return f"px{host}"


def address(host: int, nic: int) -> str:
    return f"10.77.{nic}.{host + 1}"


def mac(port: int) -> str:
    return f"02:00:00:00:{port // 256:02x}:{port % 256:02x}"


def sh(command: str, *, check: bool = True, text: str | None = None) -> str:
    done = subprocess.run(command.split(), input=text, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise SystemExit(f"{command}: {done.stderr.strip()}")
    return done.stdout


def fabric_config(bed: Bed) -> tuple[str, dict[str, list[int]]]:
    """The configuration of fabric.c and the numbers of its links by kind."""
    ports = bed.hosts * bed.nics
    lines = [f"port {p} pxtap{p}" for p in range(ports)]
    links: list[str] = []

    def link(mbit: float, delay_us: float, buffer: int) -> int:
        links.append(f"link {len(links)} {mbit * 1e6} {round(delay_us * 1000)} {buffer}")
        return len(links) - 1

    up = [link(1e5, bed.delay / 2, 0) for _ in range(ports)]  # the uplink's rate is tc's, at the host
    down = [link(bed.uplink, bed.delay / 2, bed.buffer) for _ in range(ports)]
    between = {
        (g, h): link(bed.global_, bed.global_delay, bed.buffer)
        for g in range(bed.groups)
        for h in range(bed.groups)
        if g != h
    }
    for s in range(ports):
        for d in range(ports):
            if s // bed.nics != d // bed.nics:
                far = between.get((bed.group(s), bed.group(d)))
                lines.append(f"path {s} {d} {up[s]} {'' if far is None else far} {down[d]}")
    return "\n".join(lines + links) + "\n", {"down": down, "global": list(between.values())}


def up(bed: Bed) -> None:
    down()
    FOLDER.mkdir(exist_ok=True)
    program = FOLDER / "fabric"
    sh(f"cc -O2 -Wall -o {program} {HERE / 'fabric.c'}")
    config, links = fabric_config(bed)
    (FOLDER / "fabric.cfg").write_text(config)
    for host in range(bed.hosts):
        make_host(bed, host)
    command = ["chrt", "-f", "30", str(program), str(FOLDER / "fabric.cfg"), str(FOLDER / "counters")]
    fabric = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert fabric.stdout is not None
    if fabric.stdout.readline() != "ready\n":
        raise SystemExit("the fabric did not start")
    STATE.write_text(json.dumps({"bed": asdict(bed), "pid": fabric.pid, "links": links}))
    for host in range(bed.hosts):
        for nic in range(bed.nics):
            attach_nic(bed, host, nic)
        add_neighbours(bed, host)


def make_host(bed: Bed, host: int) -> None:
    namespace = name_of(host)
    sh(f"ip netns add {namespace}")
    sh(f"ip -n {namespace} link set lo up")
    if bed.inside:
        sh(f"tc -n {namespace} qdisc add dev lo root tbf rate {bed.inside}mbit burst 200k limit 64000000")
    folder = Path("/etc/netns") / namespace
    folder.mkdir(parents=True, exist_ok=True)
    names = "".join(f"{address(h, 0)} {name_of(h)}\n" for h in range(bed.hosts))
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    for setting in (
        "net.ipv4.tcp_slow_start_after_idle=0",
        "net.ipv4.tcp_congestion_control=reno",  # a new namespace has bbr on some kernels
        "net.ipv4.tcp_no_metrics_save=1",
        "net.ipv4.conf.all.rp_filter=0",
        "net.ipv4.conf.default.rp_filter=0",
    ):
        sh(f"ip netns exec {namespace} sysctl -q -w {setting}", check=False)


def attach_nic(bed: Bed, host: int, nic: int) -> None:
    namespace, port = name_of(host), host * bed.nics + nic
    sh(f"ip link set pxtap{port} netns {namespace}")
    on = f"ip -n {namespace}"
    sh(f"{on} link set pxtap{port} name nic{nic}")
    sh(f"{on} link set nic{nic} address {mac(port)} mtu {bed.mtu} txqueuelen 4000")
    sh(f"{on} addr add {address(host, nic)}/32 dev nic{nic}")
    sh(f"{on} link set nic{nic} up")
    sh(f"tc -n {namespace} qdisc add dev nic{nic} root tbf rate {bed.uplink}mbit burst 20k limit 64000000")
    route = f"10.77.0.0/16 dev nic{nic} src {address(host, nic)} rto_min {bed.rto_min}ms initcwnd 20"
    if nic == 0:
        sh(f"{on} route add {route}")
    sh(f"{on} route add {route} table {100 + nic}")
    sh(f"{on} rule add uidrange {FIRST_UID + nic}-{FIRST_UID + nic} table {100 + nic} pref {900 + nic}")
    sh(f"{on} rule add from {address(host, nic)} table {100 + nic} pref {1000 + nic}")


def add_neighbours(bed: Bed, host: int) -> None:
    others = [(h, k) for h in range(bed.hosts) if h != host for k in range(bed.nics)]
    lines = [
        f"neigh add {address(h, k)} lladdr {mac(h * bed.nics + k)} nud permanent dev nic{nic}"
        for nic in range(bed.nics)
        for h, k in others
    ]
    sh(f"ip -n {name_of(host)} -batch -", text="\n".join(lines) + "\n")


def down() -> None:
    if STATE.exists():
        with contextlib.suppress(ProcessLookupError):
            os.kill(json.loads(STATE.read_text())["pid"], signal.SIGTERM)
        STATE.unlink()
    for line in sh("ip netns list").splitlines():
        namespace = line.split()[0]
        if namespace.startswith("px") and namespace[2:].isdigit():
            sh(f"ip netns del {namespace}")
            (Path("/etc/netns") / namespace / "hosts").unlink(missing_ok=True)
            folder = Path("/etc/netns") / namespace
            if folder.exists():
                folder.rmdir()


def counters() -> dict[str, list[int]]:
    """What the network itself has counted so far: bytes into every NIC, over every global link, and dropped frames."""
    state, file = json.loads(STATE.read_text()), FOLDER / "counters"
    before = file.read_text().split("\n", 1)[0] if file.exists() else ""
    os.kill(state["pid"], signal.SIGUSR1)
    deadline = time.monotonic() + 5
    while not file.exists() or file.read_text().split("\n", 1)[0] == before:
        if time.monotonic() > deadline:
            raise SystemExit("the fabric does not answer")
        time.sleep(0.001)
    rows = [[int(word) for word in line.split()] for line in file.read_text().splitlines()[1:]]
    return {
        "down": [rows[link][1] for link in state["links"]["down"]],
        "global": [rows[link][1] for link in state["links"]["global"]],
        "drops": [row[3] for row in rows],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("up", "down"))
    for field, default in asdict(Bed()).items():
        parser.add_argument(f"--{field.rstrip('_').replace('_', '-')}", dest=field, type=type(default), default=default)
    arguments = vars(parser.parse_args())
    if os.geteuid():
        sys.exit("bed.py needs root: it makes network namespaces")
    command = arguments.pop("command")
    if command == "down":
        down()
    else:
        up(Bed(**arguments))


if __name__ == "__main__":
    main()
