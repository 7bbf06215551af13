"""The two ends of Ray's object store in `paramserver bench remote --peers`, a raylet in each.

    near: driver, raylet  <--- cable --->  far: raylet, Ray's head; actor with the parameters

Each end is the first process of a process namespace and has a ``/dev/shm`` of its own, where Ray
keeps all its files: when the end ends, the kernel ends what Ray has started and drops the files.
The driver starts ``python -m deploy.bench.remote_raylets far NUMEL``, waits for a line, does the
same with ``near``, and then writes lines of how many exchanges to do; ``near`` answers each.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from deploy.bench.namespaces import ADDRESSES
from deploy.bench.processes import STARTUP_S, timed
from deploy.bench.work import synthetic_gradient

_SHARED_MEMORY = "/dev/shm"  # noqa: S108
_PORT = 6379  # nobody else is in the network
_FAR = "far"  # a resource that only the far raylet has
_WARM_UP = 5
_LOGS_BYTES = 2**30  # more than are written: the kernel gives memory only to what is


class SgdServer:
    """Parameters in one flat vector, and plain SGD on each gradient."""

    def __init__(self, numel: int, lr: float = 0.01) -> None:
        torch.set_num_threads(1)
        self._params, self._lr = torch.zeros(numel), lr

    def push_pull(self, gradient: NDArray[np.float32]) -> NDArray[np.float32]:
        """Step, and return the parameters."""
        with warnings.catch_warnings():  # Ray's arrays are read-only, and are only read
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            self._params.sub_(torch.from_numpy(gradient), alpha=self._lr)
        params: NDArray[np.float32] = self._params.numpy()
        return params


def store_bytes(numel: int) -> int:
    """Return how large an object store has to be: Ray frees some of it a second after its use."""
    return min(max(32 * 4 * numel, 2**28), 2**31)


def far(numel: int) -> None:
    """Be Ray's head, until standard input ends."""
    _asked()
    resources = json.dumps({_FAR: 1})
    _start_raylet(_FAR, numel, ["--head", f"--port={_PORT}", f"--resources={resources}"])
    print("ready", flush=True)
    threading.Event().wait()


def near(numel: int) -> None:
    """Join the far end's Ray, and exchange as often as standard input asks for."""
    asked = _asked()
    torch.set_num_threads(1)
    head = f"{ADDRESSES[_FAR]}:{_PORT}"
    _start_raylet("near", numel, [f"--address={head}"])
    ray.init(
        address=head,
        _node_ip_address=ADDRESSES["near"],
        logging_level=logging.WARNING,
        log_to_driver=False,
    )
    actor_class: Any = ray.remote(max_restarts=0, max_task_retries=0)(SgdServer)
    server = actor_class.options(num_cpus=0, resources={_FAR: 1}).remote(numel)
    gradient = synthetic_gradient((numel,)).numpy()

    def exchange() -> None:
        ray.get(server.push_pull.remote(ray.put(gradient)), timeout=STARTUP_S)

    timed(exchange, _WARM_UP)  # the stores' memory, the raylets' connections
    print("ready", flush=True)
    while True:
        print(json.dumps(timed(exchange, json.loads(asked.get()))), flush=True)


def _start_raylet(side: str, numel: int, words: Sequence[str]) -> None:
    """Start Ray's processes and wait until they have found each other."""
    size = store_bytes(numel)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size + _LOGS_BYTES}", "tmpfs", _SHARED_MEMORY]
    subprocess.run(mount, check=True)  # noqa: S603  # words of our own
    command = [
        *[sys.executable, "-m", "ray.scripts.scripts", "start", *words],
        f"--node-ip-address={ADDRESSES[side]}",
        "--num-cpus=1",
        f"--object-store-memory={size}",
        *(["--include-dashboard=false"] if "--head" in words else []),
        "--disable-usage-stats",
    ]
    with tempfile.TemporaryFile("w+") as said:  # not a pipe: Ray's processes might keep it open
        done = subprocess.run(  # noqa: S603
            command,
            check=False,
            timeout=STARTUP_S,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
        )
        if done.returncode:
            said.seek(0)
            raise RuntimeError(f"ray start failed in the {side} network:\n{said.read()}")


def _asked() -> SimpleQueue[str]:
    """Return the lines of standard input as they come; this process ends where they end."""
    lines: SimpleQueue[str] = SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)  # whatever the others do: nobody waits for it any more

    threading.Thread(target=read, name="standard input", daemon=True).start()
    return lines


def main(argv: Sequence[str]) -> None:
    """Be one of the two ends."""
    if os.getpid() != 1:  # else it would hide this machine's /dev/shm
        raise RuntimeError("an end has namespaces of its own; paramserver bench makes them")
    try:
        match argv:
            case ["far", numel]:
                far(int(numel))
            case ["near", numel]:
                near(int(numel))
            case _:
                raise ValueError(f"an end is near or far, got {argv}")
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # the thread that reads would keep the interpreter from ending


if __name__ == "__main__":
    main(sys.argv[1:])
