"""What one seam costs, between two processes.

    python bench/links.py [--rounds 200]

First a message of 16 bytes, as control, tokens and emulated headers are: how long after `send` its
receiver has it, which sleeps until then, over a `Connection` on one machine and as between two,
and over ZeroMQ. Then tensors, half a round trip with one core each: the link that stages use, on
one machine and as between two, beside ZeroMQ PAIR with zero-copy frames, a plain TCP socket that
receives into a reused buffer, and gloo. There also how long `send` keeps the caller: what a stage
cannot compute meanwhile. Minimum and median of each size, bf16 rows of 576. At last, what a
pipeline sees: a sender that computes, sends and computes on, whose receiver does the same: how much
longer than computing alone each microbatch takes, and how long the receiver waits for it. No
absolute number is promised, only their relation on one machine.
"""

import argparse
import multiprocessing
import os
import socket
import statistics
import struct
import time

import torch
import torch.distributed as dist
from commands import some_of

from pipeserve.wire.connecting import connected
from pipeserve.wire.links import TensorLinks, unpack_tensor
from pipeserve.wire.listener import Listener
from pipeserve.wire.sources import Sources

try:
    import zmq
except ModuleNotFoundError:
    zmq = None

HIDDEN = 576
ROWS = (1, 16, 128, 512, 2048)
BUSY_ROWS = (128, 2048, 8192)
COMPUTE_S = 0.02
_NOW = struct.Struct("<qd")
_PAUSE_S = 0.01
"""Between small messages: their receiver sleeps when the next one comes."""


# ---- small messages -----------------------------------------------------------------------------


class Local:
    """connection.py, on one machine"""

    def listen(self):
        self.sources, self.received = Sources(), []
        return Listener("127.0.0.1", self.sources, ("stage",)).address

    def connect(self, address):
        self.sources = Sources()
        self.send = connected(address, self.sources, "stage").send

    def receive(self):
        while not self.received:
            for source in self.sources.ready(None):
                self.received += source.receive()
        return self.received.pop(0)


class Tcp(Local):
    """As between two."""

    def connect(self, address):
        super().connect(address.partition("/")[0])


class Zmq:
    """Over TCP, too."""

    def listen(self):
        self.socket = zmq.Context().socket(zmq.PAIR)
        self.poller = zmq.Poller()
        self.poller.register(self.socket, zmq.POLLIN)
        return f"tcp://127.0.0.1:{self.socket.bind_to_random_port('tcp://127.0.0.1')}"

    def connect(self, address):
        self.socket = zmq.Context().socket(zmq.PAIR)
        self.socket.connect(address)
        self.send = self.socket.send

    def receive(self):
        self.poller.poll()
        return self.socket.recv()


def receive_small(way, results, rounds):
    results.send(way.listen())
    took = []
    for _ in range(rounds):
        _, sent_s = _NOW.unpack(way.receive())
        took.append(time.monotonic() - sent_s)
    results.send(took)


def one_way(way, rounds, spawn):
    """Seconds, sorted."""
    results, results_end = spawn.Pipe(duplex=False)
    receiver = spawn.Process(target=receive_small, args=(way, results_end, rounds))
    receiver.start()
    way.connect(results.recv())
    for index in range(rounds):
        time.sleep(_PAUSE_S)
        way.send(_NOW.pack(index, time.monotonic()))
    took = sorted(results.recv())
    receiver.join()
    return took


# ---- tensors ------------------------------------------------------------------------------------


class Link:
    """links.py, both ways."""

    def __init__(self, rank, ports):
        self.links, self.sources = TensorLinks(), Sources()
        ports.send(self.links.listen("127.0.0.1", self.sources))
        opening = self.links.connect(self.way(ports.recv()), self.sources)
        self.received = []
        while not opening.is_open:
            self.take()
        ports.send("")
        while not ports.poll():  # the other one needs answers until it has said so, too
            self.take(timeout_ms=1)
        ports.recv()

    def way(self, address):
        return address

    def take(self, timeout_ms=None):
        for source in self.sources.ready(timeout_ms):
            self.received += source.receive()

    def send(self, tensor):
        self.links.send(0, tensor)

    def receive(self, shape):
        while not self.received:
            self.take()
        return unpack_tensor(self.received.pop(0), 0, shape, torch.bfloat16)


class TcpLink(Link):
    """As between two machines."""

    def way(self, address):
        return address.partition("/")[0]


class ZmqLink:
    """A pair of ZeroMQ PAIR sockets, zero-copy frames."""

    def __init__(self, rank, ports):
        context = zmq.Context()
        self.left, self.right = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        self.poller = zmq.Poller()
        self.poller.register(self.left, zmq.POLLIN)
        ports.send(self.left.bind_to_random_port("tcp://127.0.0.1"))
        self.right.connect(f"tcp://127.0.0.1:{ports.recv()}")

    def send(self, tensor):
        flat = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        self.right.send_multipart([b"01234567", flat], copy=False)

    def receive(self, shape):
        self.poller.poll()
        _, body = self.left.recv_multipart(copy=False)
        return torch.frombuffer(body.buffer, dtype=torch.bfloat16).view(shape)


class PlainSocket:
    """One TCP connection; `send` blocks until the kernel has taken all of it."""

    def __init__(self, rank, ports):
        if rank == 0:
            server = socket.create_server(("127.0.0.1", 0))
            ports.send(server.getsockname())
            self.socket, _ = server.accept()
        else:
            self.socket = socket.create_connection(ports.recv())
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffers = {}

    def send(self, tensor):
        self.socket.sendall(tensor.view(-1).view(torch.uint8).numpy())

    def receive(self, shape):
        buffer = self.buffers.setdefault(shape, torch.empty(shape, dtype=torch.bfloat16))
        view, got = memoryview(buffer.view(-1).view(torch.uint8).numpy()), 0
        while got < len(view):
            got += self.socket.recv_into(view[got:])
        return buffer


class Gloo:
    """torch.distributed send and recv."""

    def __init__(self, rank, ports):
        if rank == 0:
            store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
            ports.send(store.port)
        else:
            store = dist.TCPStore("127.0.0.1", ports.recv(), 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        self.peer = 1 - rank

    def send(self, tensor):
        dist.send(tensor, self.peer)

    def receive(self, shape):
        buffer = torch.empty(shape, dtype=torch.bfloat16)
        dist.recv(buffer, self.peer)
        return buffer


def run(rank, make_link, ports, results, rounds):
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    link = make_link(rank, ports)
    for rows in ROWS:
        tensor = torch.randn(rows, HIDDEN).to(torch.bfloat16)
        halves, sends = [], []
        for _ in range(rounds):
            started = time.perf_counter()
            if rank == 0:
                link.send(tensor)
                sends.append(time.perf_counter() - started)
                link.receive((rows, HIDDEN))
                halves.append((time.perf_counter() - started) / 2)
            else:
                link.send(link.receive((rows, HIDDEN)).clone())
        if rank == 0:
            results.send((rows, min(halves), statistics.median(halves), statistics.median(sends)))


# ---- tensors while both ends compute ------------------------------------------------------------


def compute(seconds, factor):
    """Keeps the core busy as long, in products as a stage's: the interpreter's lock is free."""
    until_s = time.perf_counter() + seconds
    while time.perf_counter() < until_s:
        torch.mm(factor, factor)


def run_busy(rank, make_link, ports, results, rounds):
    """Rank 0 computes and sends, rank 1 receives and computes, at the same pace."""
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    link, factor = make_link(rank, ports), torch.randn(256, 256)
    for rows in BUSY_ROWS:
        tensor = torch.randn(rows, HIDDEN).to(torch.bfloat16)
        waits = []
        started = time.perf_counter()
        for _ in range(rounds):
            if rank == 0:
                compute(COMPUTE_S, factor)
                link.send(tensor)
            else:
                before = time.perf_counter()
                link.receive((rows, HIDDEN))
                waits.append(time.perf_counter() - before)
                compute(COMPUTE_S, factor)
        took = time.perf_counter() - started
        if rank == 0:
            link.receive((1, HIDDEN))
            results.send(((rank, rows), took / rounds - COMPUTE_S))
        else:
            link.send(torch.randn(1, HIDDEN).to(torch.bfloat16))
            results.send(((rank, rows), statistics.median(waits)))


def in_pair(target, make_link, spawn, rounds, num_results):
    """What two processes with a link between them find."""
    left, right = spawn.Pipe()
    results, results_end = spawn.Pipe(duplex=False)
    pair = [
        spawn.Process(target=target, args=(rank, make_link, ports, results_end, rounds))
        for rank, ports in enumerate((left, right))
    ]
    for process in pair:
        process.start()
    found = [results.recv() for _ in range(num_results)]
    for process in pair:
        process.join()
    return found


LINKS = {each.__name__: each for each in (Link, TcpLink, ZmqLink, PlainSocket, Gloo)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--repeat", type=int, default=1, help="of the tensors, in turn")
    parser.add_argument("--links", type=some_of(LINKS), default=[*LINKS])
    arguments = parser.parse_args()
    if zmq is None:
        parser.error("ZeroMQ is not installed; pip install .[bench]")
    rounds = arguments.rounds
    spawn = multiprocessing.get_context("spawn")
    print(f"{'16 bytes':<12}{'p10 us':>18}{'median us':>11}{'p90 us':>15}")
    for way in (Local, Tcp, Zmq) * 2:
        deciles = statistics.quantiles(one_way(way(), rounds, spawn), n=10)
        print(f"{way.__name__:<12}", end="")
        print(f"{deciles[0] * 1e6:18.0f}{deciles[4] * 1e6:11.0f}{deciles[8] * 1e6:15.0f}")
    print()
    print(f"{'link':<12}{'KiB':>8}{'min us':>10}{'median us':>11}{'send keeps us':>15}")
    links = [LINKS[name] for name in arguments.links]
    for make_link in links * arguments.repeat:
        for rows, least, median, keeps in in_pair(run, make_link, spawn, rounds, len(ROWS)):
            print(
                f"{make_link.__name__:<12}{rows * HIDDEN * 2 / 1024:8.0f}{least * 1e6:10.0f}"
                f"{median * 1e6:11.0f}{keeps * 1e6:15.0f}"
            )
    print()
    print(f"{'both compute':<12}{'KiB':>8}{'sender us more':>18}{'receiver waits us':>20}")
    # A plain socket or gloo would block its sender here.
    for make_link in [link for link in links if link not in (Gloo, PlainSocket)] * arguments.repeat:
        num = 2 * len(BUSY_ROWS)
        found = dict(in_pair(run_busy, make_link, spawn, min(rounds, 50), num))
        for rows in BUSY_ROWS:
            more, waits = found[0, rows] * 1e6, found[1, rows] * 1e6
            kib = rows * HIDDEN * 2 / 1024
            print(f"{make_link.__name__:<12}{kib:8.0f}{more:18.0f}{waits:20.0f}")


if __name__ == "__main__":
    main()
