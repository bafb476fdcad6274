"""What one seam costs: half a round trip between two processes, one core each.

    python bench/links.py [--rounds 200]

Compares the link that stages use (ZeroMQ PAIR, zero-copy frames) with a plain TCP socket that
receives into a reused buffer and with gloo. Also shows how long `send` keeps the caller: what a
stage cannot compute meanwhile. Minimum and median of each size, bf16 rows of 576; no absolute
number is promised, only their relation on one machine.
"""

import argparse
import multiprocessing
import os
import socket
import statistics
import time

import torch
import torch.distributed as dist
import zmq

from pipeserve import links

HIDDEN = 576
ROWS = (1, 16, 128, 512, 2048)


class ZmqLink:
    """links.py, both ways."""

    def __init__(self, rank, ports):
        self.context = zmq.Context()
        if rank == 0:
            self.incoming, endpoint = links.listen(self.context, "127.0.0.1")
            ports.send(endpoint)
            self.outgoing = links.connect(self.context, ports.recv())
        else:
            self.incoming, endpoint = links.listen(self.context, "127.0.0.1")
            self.outgoing = links.connect(self.context, ports.recv())
            ports.send(endpoint)

    def send(self, tensor):
        links.send_tensor(self.outgoing, 0, tensor)

    def receive(self, shape):
        frames = self.incoming.recv_multipart(copy=False)
        return links.receive_tensor(frames, 0, shape, torch.bfloat16)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    spawn = multiprocessing.get_context("spawn")
    print(f"{'link':<12}{'KiB':>8}{'min us':>10}{'median us':>11}{'send keeps us':>15}")
    for make_link in (ZmqLink, PlainSocket, Gloo):
        left, right = spawn.Pipe()
        results, results_end = spawn.Pipe(duplex=False)
        pair = [
            spawn.Process(target=run, args=(rank, make_link, ports, results_end, rounds))
            for rank, ports in enumerate((left, right))
        ]
        for process in pair:
            process.start()
        for _ in ROWS:
            rows, least, median, keeps = results.recv()
            print(
                f"{make_link.__name__:<12}{rows * HIDDEN * 2 / 1024:8.0f}{least * 1e6:10.0f}"
                f"{median * 1e6:11.0f}{keeps * 1e6:15.0f}"
            )
        for process in pair:
            process.join()


if __name__ == "__main__":
    main()
