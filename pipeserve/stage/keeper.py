"""Keeper: the small process that a launcher starts for each rank, and the parent of its stage.

torchrun and its kind end every rank when one dies, so what they see is this process, which loads no
torch and cannot run out of memory. It starts the stage when the driver says so, answers heartbeats,
reports how the stage ended, and ends when the driver says so (exit code 0) or is gone (1). A driver
that will not have it says why, in one line (2).
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
from math import inf

import msgspec

from pipeserve.addresses import split_address
from pipeserve.cpus import cores_of
from pipeserve.machine import boot_id, cpu_quota, fingerprint, native_dtypes
from pipeserve.stage.last_spans import LastSpans
from pipeserve.stage.placement import most_threads, place_of, stage_environment
from pipeserve.stage.vital_signs import VitalSigns, Watched
from pipeserve.wire import connecting, control
from pipeserve.wire.connection import Connection
from pipeserve.wire.control import Heartbeat, NotWanted, Stop
from pipeserve.wire.listener import is_loopback
from pipeserve.wire.sources import Descriptor, Source, Sources
from pipeserve.wire.stage_job import Launch, StartStage, encode_job

_RETRY_S = 0.2
_SAYS_AFTER_S = 10.0
"""That it still looks for its driver: whoever waits shall know what for."""
_STDIN = 0


class Keeper:
    """Starts, watches and ends one stage process."""

    def __init__(
        self,
        address: str,
        rank: int,
        world_size: int,
        join_timeout_s: float,
        secret: bytes,
        host: str = "",
    ) -> None:
        """Of the driver at `address` (HOST:PORT). `host`: of this machine, where its stage is to be
        reached, by default that by which it reaches the driver."""
        self.address = address
        self.rank = rank
        self.world_size = world_size
        self.join_timeout_s = join_timeout_s
        self.deadline = time.monotonic() + join_timeout_s
        self.says_at_s = time.monotonic() + _SAYS_AFTER_S
        self.secret = secret
        self.host = host
        self.sources = Sources(secret)
        self.driver: Connection | None = None
        self.has_joined = False
        self.failure = "nobody listens there"
        """Of the attempt to join before."""
        self.epoch = 0
        """Of the stage that it has started; 0: none yet."""
        self.exit_code: int | None = None
        self.stage: subprocess.Popen | None = None
        self.stage_ended: Descriptor | None = None
        self.stage_pidfd = -1
        self.watched: Watched | None = None
        self.last_spans: LastSpans | None = None
        """Of the stage that there is."""

    def end_with_driver(self) -> None:
        """The parent of this process, that holds the other end of its stdin. Either alone is not
        enough: it may have ended already, and who was forked from it may hold that end, too."""
        Descriptor(_STDIN, self.sources, "driver's end")
        Descriptor(os.pidfd_open(os.getppid()), self.sources, "driver's end")

    def run(self) -> int:
        """Until the driver says stop (0, or 1 for a run that failed), is gone or cannot be reached
        (1), or will not have this keeper (2)."""
        try:
            while self.exit_code is None:
                if not self.has_joined:
                    self._join()
                for source in self.sources.ready(None if self.has_joined else _RETRY_S * 1000):
                    self._take(source)
                if self.has_joined and self.driver.has_ended and self.exit_code is None:
                    self._say_that_it_is_gone()
                    self.exit_code = 1
        finally:
            self._end_stage()
            self.sources.close()
        return self.exit_code

    # ---- joining --------------------------------------------------------------------------------

    def _join(self) -> None:
        """One step of it."""
        if self.driver is None:
            self._call()
        elif self.driver.is_open:
            self.has_joined = True
            self._tell(self._hello())
        elif self.driver.is_refused:
            self._say(f"refused by the driver at {self.address}: {self.driver.refusal}")
            self.exit_code = 2
        elif self.driver.has_ended:  # displaced by strangers, or no driver: another time
            self.failure = self.driver.refusal
            self.driver = None
        now = time.monotonic()
        if self.exit_code is None and not self.has_joined:
            if now > self.deadline:
                self._give_up()
            elif now > self.says_at_s:
                self._say_that_it_looks(self.deadline - now)

    def _call(self) -> None:
        try:
            self.driver = connecting.connect(self.address, self.sources, "keeper")
        except ConnectionError as error:
            self.failure = str(error)
        else:
            self.driver.watch_host()

    def _say_that_it_looks(self, left_s: float) -> None:
        """Once, by one on each machine."""
        self.says_at_s = inf
        if _local_place(self.rank, self.world_size)[0] == 0:
            self._say(
                f"no driver at {self.address} yet ({self.failure}); looking for it for "
                f"{left_s:.0f} s more",
                "note",
            )

    def _give_up(self) -> None:
        self._say(
            f"no driver at {self.address} within {self.join_timeout_s:g} s ({self.failure}); "
            "is it running, with --launcher external or as rank 0 of this job? Else raise "
            "--join-timeout"
        )
        self.exit_code = 1

    def _hello(self) -> control.KeeperHello:
        return control.KeeperHello(
            rank=self.rank,
            world_size=self.world_size,
            host=socket.gethostname(),
            address=self.host or self.driver.own_host,
            pid=os.getpid(),
            boot_id=boot_id(),
            native_dtypes=native_dtypes(),
            device=fingerprint(*_local_place(self.rank, self.world_size)),
            cpus=tuple(sorted(os.sched_getaffinity(0))),
        )

    # ---- once it has joined ---------------------------------------------------------------------

    def _take(self, source: Source) -> None:
        messages = source.receive()
        match source.carries:
            case "keeper":
                for message in messages:
                    self._obey(*control.decode_for_keeper(message))
            case "stage's end":
                self._report_exit()
            case "driver's end" if self.exit_code is None:
                self.exit_code = 1  # the driver is gone; perhaps before it ever answered

    def _obey(self, epoch: int, message: control.ToKeeper) -> None:
        match message:
            case StartStage():
                self._start(message, epoch)
            case Stop(has_failed, why):
                if why:
                    self._say(f"the driver at {self.address} has ended the run: {why}")
                self.exit_code = int(has_failed)
            case NotWanted():
                self._say(f"not wanted by the driver at {self.address}: {message.why}")
                self.exit_code = 2
            case Heartbeat():
                now = time.monotonic()
                self._tell(control.HeartbeatAnswer(message.sent_s, now, *self._signs()))

    def _start(self, job: StartStage, epoch: int) -> None:
        """In place of the stage that there may be, whatever that is doing: the driver has given it
        up."""
        self._end_stage()
        self.epoch = epoch
        local_rank, num_local = _local_place(self.rank, self.world_size)
        cores, quota = cores_of(os.sched_getaffinity(0)), cpu_quota() / num_local
        place = place_of(cores, quota, *job.core_share, most_threads(os.environ))
        if job.control.startswith("/"):
            job = msgspec.structs.replace(job, control=f"{self.address}{job.control}")
        job = msgspec.structs.replace(job, host=self.host or self.driver.own_host)
        self.last_spans = spans = LastSpans.make()
        launched = Launch(job, self.rank, epoch, self.secret, spans.descriptor)
        with _file_of(encode_job(launched)) as launch:
            self.stage = subprocess.Popen(
                [
                    sys.executable,
                    *("-m", "pipeserve.stage.process"),
                    *(str(os.getpid()), ",".join(map(str, place.cpus)), job.module),
                ],
                stdin=launch,
                pass_fds=[spans.descriptor],
                env=stage_environment(os.environ, self.rank, local_rank, place.num_threads),
            )
        self.stage_pidfd = os.pidfd_open(self.stage.pid)  # readable once the stage has ended
        self.stage_ended = Descriptor(self.stage_pidfd, self.sources, "stage's end")
        self.watched = Watched(self.stage.pid)

    def _signs(self) -> VitalSigns:
        """Of the stage."""
        return VitalSigns() if self.watched is None else self.watched.signs()

    def _report_exit(self) -> None:
        self._end_stage()
        self._tell(control.StageExited(self.stage.pid, self.stage.returncode))

    def _end_stage(self) -> None:
        """A stage has nothing to save, so it is killed and not asked; one that is stopped, too."""
        if self.stage_ended is None:
            return
        self.stage.kill()
        self.stage.wait()
        self.stage_ended.close()
        os.close(self.stage_pidfd)
        self.stage_ended = None
        self.watched.close()
        self.watched = None
        self._tell(control.LastSpans(tuple(self.last_spans.take())))
        self.last_spans.close()

    def _tell(self, message: control.ToDriver) -> None:
        self.driver.send(control.encode(message, self.epoch))

    def _say_that_it_is_gone(self) -> None:
        """Once on each machine. Where all of a run is on one, whoever ended it is there to see."""
        is_first = _local_place(self.rank, self.world_size)[0] == 0
        try:
            is_alone = is_loopback(split_address(self.address)[0])
        except OSError:  # nobody knows its name any more
            is_alone = False
        if is_first and not is_alone:
            self._say(f"the driver at {self.address} is gone: it was killed, or cut off")

    def _say(self, what: str, kind: str = "error") -> None:
        print(f"{kind}: keeper of rank {self.rank}: {what}", file=sys.stderr, flush=True)


def _local_place(rank: int, world_size: int) -> tuple[int, int]:
    """This rank's number among those of its machine, and how many they are; all, where the launcher
    does not say."""
    place = os.environ.get("LOCAL_RANK", rank), os.environ.get("LOCAL_WORLD_SIZE", world_size)
    return int(place[0]), int(place[1])


@contextlib.contextmanager
def _file_of(content: bytes):
    """A file in memory: unlike a pipe it takes all of it, though its reader may be stopped."""
    with open(os.memfd_create("stage"), "r+b") as file:
        file.write(content)
        file.seek(0)
        yield file
