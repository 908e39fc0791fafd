"""Independent evaluations on the workers of a Ray cluster.

Calibration is a list of independent tasks: a function that holds the model gives plain JSON for a plain task. In one
process :func:`kvcli.calibration.stages.in_turn` runs it on one task after another; :meth:`RayPool.run` does the same on
many, and yields numbers and results as they come. Where a task runs does not change its result as long
as each worker computes with the same number of threads, on the same kind of processor and with the same library
versions: torch splits sums among threads, and rounding follows the split. So every worker gets this process's number.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from kvcli.errors import InputError, KvcliError, UsageError

ATTEMPTS = 3  # how often one task may lose its worker before the whole run is given up
REACH_SECONDS = 5.0  # within which a cluster's address has to answer; Ray itself would try for minutes
LOADING = -1  # in place of a task's number: the worker loads its model
LONGEST_BASE = 24  # characters; Ray adds 75 for the names of its sockets, and the system allows 107
OBJECT_STORE = 256 * 2**20  # bytes, of a cluster started here: token ids and means are a few MiB

Work = Callable[[Any], Any]


@dataclass(frozen=True)
class ModelSource:
    """What a worker loads: the arguments of :func:`kvcli.models.loading.load`."""

    source: str
    dtype: str = "auto"
    trust_remote_code: bool = False
    device_map: str | None = None


class RayPool:
    """Runs tasks on the workers of a Ray cluster, each of which loads the model once and keeps it.

    The function goes to each worker once, with all that it holds, except the model: there each worker's own stands in
    for it. A worker that is lost is replaced, and its task is given to another. Used as a context: leaving it stops the
    workers, and the cluster if it was started here.

    Parameters
    ----------
    address
        ``auto``: the cluster that runs on this machine or that ``RAY_ADDRESS`` names, else one is started here;
        or a cluster's ``HOST:PORT``.
    model
        This process's model, for which the workers' own stand in.
    source
        What the workers load; a path has to hold the same files on every machine.
    sha256
        Of the weights that a worker must find there.
    threads
        Threads, and so CPUs, of each worker.
    workers
        How many; 0: as many as the cluster has CPUs for.

    Raises
    ------
    UsageError
        If Ray is not installed, or no machine of the cluster has that many CPUs.
    KvcliError
        If the cluster cannot be reached.
    """

    def __init__(
        self, address: str, model: Any, source: ModelSource, sha256: str, *, threads: int, workers: int = 0
    ) -> None:
        self.ray = _import_ray()
        self.model, self.sha256, self.threads = model, sha256, threads
        path = Path(source.source).expanduser()
        self.source = ModelSource(**{**vars(source), "source": str(path.resolve())}) if path.exists() else source
        self._all: set[Any] = set()
        self._idle: list[Any] = []
        self._running: dict[Any, tuple[Any, int]] = {}  # by the reference of the result: a worker and its task
        self._folder: str | None = None
        self._ours = not self.ray.is_initialized()
        self._in_main = self._ours and threading.current_thread() is threading.main_thread()
        self._on_term = signal.getsignal(signal.SIGTERM)
        try:
            if self._ours:
                self._connect(address, threads * max(1, workers))
            if self._in_main:  # told to end, leave as by Ctrl-C: Ray would abort, and its processes would linger
                signal.signal(signal.SIGTERM, signal.default_int_handler)
            room = self._room()
            self.workers = workers or room
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> RayPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def run(self, work: Work, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Yield the number and the result of every task, in the order in which they finish.

        Raises
        ------
        KvcliError
            If a task loses its worker too often, or a worker cannot load the same model; and whatever a task raises.
        """
        ray = self.ray
        payload = [ray.put(_dump(work, self.model))]  # in a list Ray passes the reference, not what it refers to
        waiting = deque(range(len(tasks)))
        losses: Counter[int] = Counter()
        left = len(tasks)
        try:
            while left:
                starting = len(self._all) - len(self._idle) - (left - len(waiting))
                for _ in range(min(self.workers - len(self._all), len(waiting) - len(self._idle) - starting)):
                    self._start()
                while waiting and self._idle:
                    worker, task = self._idle.pop(), waiting.popleft()
                    self._running[worker.evaluate.remote(payload, tasks[task])] = (worker, task)
                ready, _ = ray.wait(list(self._running))
                for reference in ready:
                    worker, task = self._running.pop(reference)
                    try:
                        result = ray.get(reference)
                    except ray.exceptions.RayTaskError as error:
                        self._forget(worker)
                        raise error.cause from None
                    except ray.exceptions.RayError as error:
                        self._forget(worker)
                        losses[task] += 1
                        if losses[task] == ATTEMPTS:
                            raise KvcliError(_lost(task, error)) from error
                        if task != LOADING:
                            waiting.appendleft(task)
                        continue
                    self._idle.append(worker)
                    if task != LOADING:
                        left -= 1
                        yield task, result
        finally:
            for reference, (worker, task) in list(self._running.items()):
                if task != LOADING:  # nobody waits for it any more
                    del self._running[reference]
                    self._forget(worker)

    def _start(self) -> None:
        gpus = self._most("GPU") if self.source.device_map else 0  # a device map spreads over all that a machine has
        remote = self.ray.remote(Worker).options(num_cpus=self.threads, num_gpus=gpus, max_restarts=0)
        worker = remote.remote(self.threads)
        self._all.add(worker)
        self._running[worker.load.remote(self.source, self.sha256)] = (worker, LOADING)

    def _forget(self, worker: Any) -> None:
        self._all.discard(worker)
        with suppress(Exception):  # it is lost already, or will be
            self.ray.kill(worker)

    def _most(self, resource: str) -> int:
        return max((int(x["Resources"].get(resource, 0)) for x in self.ray.nodes() if x["Alive"]), default=0)

    def _room(self) -> int:
        room = sum(int(x["Resources"].get("CPU", 0)) // self.threads for x in self.ray.nodes() if x["Alive"])
        if not room:
            raise UsageError(
                f"no machine of the Ray cluster has {self.threads} CPUs for a worker of as many threads: "
                f"the largest has {self._most('CPU')}; lower --threads."
            )
        return room

    def _connect(self, address: str, cpus: int) -> None:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        named = os.environ.get("RAY_ADDRESS") if address == "auto" else address
        try:
            if named:
                _reach(named)
            self.ray.init(address=named or "auto", **quiet)
        except KvcliError:
            raise
        except ConnectionError as error:
            if named:
                raise KvcliError(f"the Ray cluster at {named} does not answer.") from error
            self._start_cluster(cpus, quiet)
        except Exception as error:  # Ray raises whatever it likes
            raise KvcliError(f"the Ray cluster at {named or 'auto'} cannot be used: {_sentence(error)}.") from error

    def _start_cluster(self, cpus: int, quiet: dict[str, Any]) -> None:
        base = tempfile.gettempdir()
        self._folder = tempfile.mkdtemp(prefix="kvray-", dir=base if len(base) <= LONGEST_BASE else "/tmp")
        try:
            self.ray.init(
                address="local",
                num_cpus=max(cpus, os.cpu_count() or 1),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE,
                _temp_dir=self._folder,
                **quiet,
            )
        except Exception as error:
            raise KvcliError(f"a Ray cluster cannot be started here: {_sentence(error)}.") from error

    def _close(self) -> None:
        for worker in list(self._all):
            self._forget(worker)
        self._idle.clear()
        self._running.clear()
        if self._ours:
            self.ray.shutdown()
        if self._in_main:
            signal.signal(signal.SIGTERM, self._on_term)
        for _ in range(100):  # Ray's processes write last lines after they were told to end
            if self._folder is None or not os.path.exists(self._folder):
                break
            shutil.rmtree(self._folder, ignore_errors=True)
            time.sleep(0.05)


class Worker:
    """What runs on the cluster: a model, and the function it was last given.

    Parameters
    ----------
    threads
        That torch computes with.
    """

    def __init__(self, threads: int) -> None:
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        import torch

        torch.set_num_threads(threads)
        self.model: Any = None
        self.work: tuple[Any, Work] | None = None

    def load(self, source: ModelSource, sha256: str) -> None:
        """Load the model; raise :class:`InputError` if its weights are others than expected."""
        from kvcli.models.loading import load
        from kvcli.runtime.packed_cache import ATTENTION

        loaded = load(**vars(source))
        if loaded.sha256 != sha256:
            raise InputError(f"{source.source} holds other weights on {socket.gethostname()}, a worker's machine.")
        loaded.model.set_attn_implementation(ATTENTION)
        self.model = loaded.model

    def evaluate(self, payload: list[Any], task: Any) -> Any:
        """Return what the function in the object store, read once, gives for a task."""
        import ray
        import torch

        (reference,) = payload
        if self.work is None or self.work[0] != reference:
            self.work = None
            self.work = (reference, _Unpickler(io.BytesIO(ray.get(reference)), self.model).load())
        with torch.no_grad():
            return self.work[1](task)


def _dump(work: Work, model: Any) -> bytes:
    """Pickle a function with all that it holds, and names in place of the model and its modules."""
    from ray import cloudpickle

    names = {id(module): name for name, module in model.named_modules()}

    class Pickler(cloudpickle.Pickler):
        def persistent_id(self, obj: Any) -> str | None:
            return names.get(id(obj))

    buffer = io.BytesIO()
    pickler: Any = Pickler
    pickler(buffer).dump(work)
    return buffer.getvalue()


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, model: Any) -> None:
        super().__init__(file)
        self.model = model

    def persistent_load(self, pid: Any) -> Any:
        return self.model.get_submodule(pid)


def check_ray(address: str) -> None:
    """Check what can be checked in a moment: that Ray is installed, and that a named cluster answers.

    Raises
    ------
    UsageError
        If Ray is not installed, or the address is none.
    KvcliError
        If nothing answers there.
    """
    _import_ray()
    if address != "auto":
        _reach(address)


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no reports to its makers
    # Ray tells of lost workers on stdout, which is for data; read when it is imported
    os.environ.update(RAY_DEDUP_LOGS="1", RAY_DEDUP_LOGS_SKIP_REGEX=".")
    try:
        import ray
    except ImportError:
        raise UsageError("Ray is not installed: pip install 'kvcli[ray]'.") from None
    return ray


def _reach(address: str) -> None:
    """Raise :class:`KvcliError` unless something listens at ``HOST:PORT`` or ``SCHEME://HOST:PORT``."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise UsageError(f"{address!r} is no address of a Ray cluster: give auto or HOST:PORT.")
    try:
        socket.create_connection((host, port), REACH_SECONDS).close()
    except OSError as error:
        raise KvcliError(f"the Ray cluster at {address} cannot be reached: {error.strerror or error}.") from None


def _lost(task: int, error: Exception) -> str:
    what = "loading the model" if task == LOADING else f"task {task + 1}"
    return f"{what} lost its Ray worker {ATTEMPTS} times: {_sentence(error)}."


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split()).split(". ")[0].rstrip(".") or type(error).__name__
