"""Hosts on one machine, each with its own network, processes, file systems, home and sshd.

    laptop 10.77.0.1 ---+
    host1  10.77.0.11 --+-- a bridge in a network namespace of its own, which leads nowhere else
    host2  10.77.0.12 --+

Each host is a few Linux namespaces under one process. When that ends, so does every process of the
host, and the kernel takes back mounts and interfaces. They share a kernel and its processors: this
tests addressing, ssh, files and failures, not speed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from deploy.bench.namespaces import die_with_parent

PROJECT = Path(__file__).resolve().parents[2]

_NETWORK = "10.77.0"
_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
_TOOLS = ("unshare", "nsenter", "ip", "mount", "ssh", "ssh-keygen", "sshd", "rsync")
_USER_DATABASE = (
    "root:x:0:0:root:/home/trainer:/bin/bash",
    "sshd:x:105:65534::/run/sshd:/bin/false",
)

_SET_UP = r"""
set -eu
hostname {name}
mount --make-rprivate /
ip link set lo up
# What lies in folders that are hidden below is kept visible.
mount -t tmpfs tmpfs /mnt
number=0
for folder in {kept}; do
    number=$((number + 1)); mkdir /mnt/$number; mount --bind "$folder" /mnt/$number
done
mkdir /mnt/host; mount --bind {folder} /mnt/host
for hidden in /tmp /dev/shm /run /home /usr/local/bin; do mount -t tmpfs tmpfs $hidden; done
chmod 1777 /tmp /dev/shm
number=0
for folder in {kept}; do
    number=$((number + 1)); mkdir -p "$folder"; mount --bind /mnt/$number "$folder"
    mount -o remount,bind,ro "$folder"
done
mkdir -p /home/trainer /run/sshd
mount --bind /mnt/host/home /home/trainer
for file in passwd hosts resolv.conf; do mount --bind /mnt/host/$file /etc/$file; done
# Not a link: an interpreter looks for its library beside where it was called.
printf '#!/bin/sh\nexec {python} "$@"\n' > /usr/local/bin/python3
chmod +x /usr/local/bin/python3
ln -s {rsync} /usr/local/bin/rsync
touch /mnt/host/ready
while ! ip addr show eth0 2>/dev/null | grep -q {address}; do sleep 0.05; done
touch /mnt/host/connected
{serve}
"""


def why_not() -> str | None:
    """Say what keeps hosts from being made here; None if nothing does."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "namespaces with networks of their own need Linux and root"
    if importlib.util.find_spec("hatchling") is None:
        return "hatchling not installed: hosts build this project without a package index"
    missing = [tool for tool in _TOOLS if shutil.which(tool, path=_search_path()) is None]
    if missing:
        return f"{', '.join(missing)} not installed (sshd is openssh-server's, ip is iproute2's)"
    command = ["unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "true"]
    tried = subprocess.run(command, check=False, capture_output=True, text=True)
    if tried.returncode != 0:
        return f"namespaces are not allowed here: {tried.stderr.strip()}"
    return None


def _search_path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _tool(name: str) -> str:
    path = shutil.which(name, path=_search_path())
    assert path is not None, "why_not() has looked"
    return path


def packages() -> list[str]:
    """Return the folders that Python packages come from here, this project's left out."""
    there = [Path(entry).resolve() for entry in sys.path if entry]
    standard = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")]
    environment = Path(sys.prefix).resolve()  # often the project's own .venv
    others = [
        entry
        for entry in there
        if entry.is_dir()
        and (not entry.is_relative_to(PROJECT) or entry.is_relative_to(environment))
        and entry not in standard
        and entry.name != "lib-dynload"
    ]
    return [str(entry) for entry in dict.fromkeys(others)]


class Host:
    """One host; `Hosts` makes it."""

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name, self.address = name, address
        self.folder = folder
        self.home = folder / "home"
        self.process: subprocess.Popen[bytes] | None = None
        self.pid = 0
        """Of the host's first process, seen from outside."""

    def run(
        self, command: str, *, timeout_s: float = 120, check: bool = False, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run ``command`` on the host in a shell; return how it went, stderr with stdout."""
        done = subprocess.run(
            self._entered(command, environment),
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{self.name}$ {command}\n{done.stdout}")
        return done

    def begin(self, command: str, log: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Start ``command`` on the host; what it prints goes to ``log``."""
        with log.open("wb") as file:
            return subprocess.Popen(
                self._entered(command, environment),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def pids(self, pattern: str) -> list[int]:
        """Return the host's own ids of processes whose command line holds ``pattern``."""
        found = self.run(f"pgrep -f -- {shlex.quote(pattern)}").stdout.split()
        return [int(pid) for pid in found]

    def stop(self) -> None:
        """End the host, as by pulling its plug."""
        if self.process is not None:
            if self.pid:
                _kill(self.pid)
            self.process.kill()
            self.process.wait()
            self.process = None

    def _entered(self, command: str, environment: Mapping[str, str]) -> list[str]:
        words = {
            "HOME": "/home/trainer",
            "PATH": f"/home/trainer/.paramserver/venv/bin:{_PATH}",
            "TERM": "dumb",
            "LANG": "C.UTF-8",
            "USER": "root",
            **environment,
        }
        assignments = [f"{name}={value}" for name, value in words.items()]
        return [
            "nsenter", "--target", str(self.pid), "--net", "--mount", "--pid", "--uts", "--ipc",
            "env", "-i", "-C", "/home/trainer", *assignments, "bash", "-c", command,
        ]  # fmt: skip


@contextmanager
def hosts(count: int) -> Iterator[tuple[Host, list[Host]]]:
    """Make a laptop and ``count`` hosts that let it in by ssh; remove all of it at the end."""
    with tempfile.TemporaryDirectory(prefix="hosts-", ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        laptop = Host("laptop", f"{_NETWORK}.1", root / "laptop")
        others = [
            Host(f"host{i}", f"{_NETWORK}.{10 + i}", root / f"host{i}") for i in range(1, count + 1)
        ]
        switch = _unshared(["--net"], "sleep infinity")
        try:
            bridge = _child_of(switch.pid)
            _inside(bridge, "ip link add bridge type bridge && ip link set bridge up")
            key = _key(root)
            for host in (laptop, *others):
                _prepare(host, [laptop, *others], key)
                _start(host, bridge, with_sshd=host is not laptop)
            yield laptop, others
        finally:
            for host in (laptop, *others):
                host.stop()
            switch.kill()
            switch.wait()


def processes_in(network: str) -> list[int]:
    """Return the processes whose network namespace is ``network``, such as ``net:[4026531840]``."""
    found = []
    for link in Path("/proc").glob("[0-9]*/ns/net"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if os.readlink(link) == network:
                found.append(int(link.parts[2]))
    return found


def _key(root: Path) -> Path:
    """Make the key that lets the laptop in."""
    key = root / "key"
    command = [_tool("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(key)]
    subprocess.run(command, check=True)
    return key


def _prepare(host: Host, all_hosts: Sequence[Host], key: Path) -> None:
    """Lay the files a host starts with: its home, its users, its names, a Python environment."""
    ssh = host.home / ".ssh"
    ssh.mkdir(parents=True)
    ssh.chmod(0o700)
    shutil.copy(f"{key}.pub", ssh / "authorized_keys")
    shutil.copy(key, ssh / "id_ed25519")
    (host.home / ".bashrc").touch()
    names = [f"{other.address} {other.name}" for other in all_hosts]
    files = {
        "passwd": _USER_DATABASE,
        "hosts": ("127.0.0.1 localhost", *names),
        "resolv.conf": ("options timeout:1 attempts:1",),
    }
    for name, lines in files.items():
        (host.folder / name).write_text("\n".join(lines) + "\n")
    # A package index is not reachable from here: packages are this environment's own.
    config = host.home / ".config" / "pip" / "pip.conf"
    config.parent.mkdir(parents=True)
    # (To pip, "no-build-isolation = false" is what `--no-build-isolation` says.)
    config.write_text("[install]\nno-index = true\nno-deps = true\nno-build-isolation = false\n")
    venv = host.home / ".paramserver" / "venv"
    base = Path(sys.executable).resolve()
    subprocess.run([str(base), "-m", "venv", str(venv)], check=True)
    site = next((venv / "lib").glob("python*")) / "site-packages"
    (site / "borrowed.pth").write_text("\n".join(packages()) + "\n")
    _repoint(venv, host.home)
    _, _, ray = (Path(sys.executable).parent / "ray").read_text().partition("\n")
    (venv / "bin" / "ray").write_text(f"#!/home/trainer/.paramserver/venv/bin/python\n{ray}")
    (venv / "bin" / "ray").chmod(0o755)


def _repoint(venv: Path, home: Path) -> None:
    """Let the environment's scripts name it as the host does."""
    for script in (venv / "bin").iterdir():
        if script.is_file() and not script.is_symlink():
            script.write_text(script.read_text().replace(str(home), "/home/trainer"))


def _start(host: Host, bridge: int, *, with_sshd: bool) -> None:
    options = "-o UsePAM=no -o PermitRootLogin=yes -o StrictModes=no -o UseDNS=no"
    key = host.folder / "host_key"
    command = [_tool("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(key)]
    subprocess.run(command, check=True)
    sshd = f"exec {_tool('sshd')} -D -e -f /dev/null -h /mnt/host/host_key {options}"
    script = _SET_UP.format(
        name=host.name,
        folder=host.folder,
        kept=" ".join(shlex.quote(folder) for folder in _kept()),
        python=Path(sys.executable).resolve(),
        rsync=_tool("rsync"),
        address=host.address,
        serve=f"{sshd} 2>/mnt/host/sshd.log" if with_sshd else "exec sleep infinity",
    )
    spaces = ["--net", "--mount", "--pid", "--uts", "--ipc", "--mount-proc"]
    host.process = _unshared(spaces, script, host.folder / "setup.log")
    host.pid = _child_of(host.process.pid)
    _wait_for(host, "ready")
    end = f"to-{host.name}"
    _inside(
        bridge,
        f"ip link add {end} type veth peer name eth0 netns {host.pid} && "
        f"ip link set {end} master bridge up",
    )
    _inside(host.pid, f"ip addr add {host.address}/24 dev eth0 && ip link set eth0 up")
    _wait_for(host, "connected")


def _kept() -> list[str]:
    """Return folders that a host needs of this machine, and that it would hide."""
    needed = [
        *packages(),
        str(PROJECT),
        *(str(Path(_tool(name)).resolve().parent) for name in ("sshd", "rsync")),
        *os.environ.get("PARAMSERVER_TEST_KEEP", "").split(":"),
    ]
    hidden = ("/tmp/", "/run/", "/home/", "/mnt/")
    return list(dict.fromkeys(f for f in needed if f.startswith(hidden)))


def _unshared(
    spaces: Sequence[str], script: str, log: Path | None = None
) -> subprocess.Popen[bytes]:
    """Run ``script`` in new namespaces; it ends when this process does, however that ends."""
    out = subprocess.DEVNULL if log is None else log.open("wb")
    try:
        return subprocess.Popen(
            ["unshare", *spaces, "--fork", "--kill-child", "bash", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            preexec_fn=die_with_parent,  # noqa: PLW1509  # one thread
        )
    finally:
        if not isinstance(out, int):
            out.close()


def _child_of(pid: int, timeout_s: float = 10) -> int:
    """Return the id of the one child of ``pid``, the first process of new namespaces."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                except OSError:  # it has ended meanwhile
                    continue
                if int(parent) == pid:
                    return int(folder.name)
        time.sleep(0.02)
    raise TimeoutError(f"unshare ({pid}) has started nothing in {timeout_s:g} s")


def _inside(pid: int, command: str) -> None:
    """Run ``command`` in the network of process ``pid``."""
    entered = ["nsenter", "--target", str(pid), "--net", "bash", "-c", command]
    subprocess.run(entered, check=True)


def _wait_for(host: Host, stage: str, timeout_s: float = 20) -> None:
    assert host.process is not None
    deadline = time.monotonic() + timeout_s
    while not (host.folder / stage).exists():
        if host.process.poll() is not None or time.monotonic() > deadline:
            log = (host.folder / "setup.log").read_text()
            raise RuntimeError(f"{host.name} did not get {stage}: {log}")
        time.sleep(0.02)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
