"""A hop between two stages of several ranks: each rank sends all of the activations, or its part of
them, which the receiving ranks put together (stages/tensor_parallel/parts.py).

    python bench/activation_parts.py                    two hosts, 1 Gbit/s between them
    python bench/activation_parts.py --rate 10gbit
    python bench/activation_parts.py --rate none        as fast as this machine copies

The hosts are network namespaces (hosts.py), whose interface all ranks of a host share. Milliseconds
from when a rank begins to send until it hears that its receiver has all of it, median over the
rounds, of the slowest rank. One thread a rank; gloo gathers.
"""

import argparse
import socket
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from hosts import Host, Hosts

sys.path.insert(0, str(Path(__file__).parent.parent))
from pipeserve.stages.tensor_parallel import parts
from pipeserve.stages.tensor_parallel.shard import Shard

WIDTH = 4096
"""Numbers of a token, in bfloat16: a 7B Llama's."""
ROUNDS = 20
PORT = 7000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", default="1gbit", help="as tc writes it, or none")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 512])
    given = parser.parse_args()
    print(f"{given.ranks} ranks a stage, {given.rate}: ms a hop")
    with Hosts("left", "right") as (left, right):
        if given.rate != "none":
            for host in (left, right):
                limit = f"tc qdisc add dev eth0 root tbf rate {given.rate} burst 256kb latency 1s"
                host.run(limit.split())
        for tokens in given.tokens:
            whole, part = (
                _measure(left, right, given.ranks, tokens, way) for way in ("whole", "part")
            )
            print(f"{tokens:5} x {WIDTH}: {whole:8.2f} whole, {part:8.2f} in parts", flush=True)


def _measure(left: Host, right: Host, ranks: int, tokens: int, way: str) -> float:
    numbers = [str(number) for number in (ranks, tokens)]
    command = [sys.executable, __file__, "--rank"]
    receiving = [
        right.start([*command, str(r), "get", *numbers, way, right.address]) for r in range(ranks)
    ]
    sending = [
        left.start([*command, str(r), "send", *numbers, way, right.address], stdout=-1, text=True)
        for r in range(ranks)
    ]
    took = [float(process.communicate(timeout=120)[0]) for process in sending]
    for process in receiving:
        process.wait(timeout=60)
    return max(took)


def _rank(rank: int, role: str, of: int, tokens: int, way: str, address: str) -> None:
    torch.set_num_threads(1)
    shard, shape = Shard(rank, of), (tokens, WIDTH)
    tensor = torch.randn(shape).bfloat16()
    size = parts.size_of_part(tensor.numel(), shard) if way == "part" else tensor.numel()
    if role == "send":
        _send(tensor, shard, way, address)
        return
    listener = socket.create_server((address, PORT + 1 + rank))
    store = dist.TCPStore(address, PORT, of, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=of)
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = bytearray(2 * size)
    for _ in range(ROUNDS):
        view, done = memoryview(buffer), 0
        while done < len(buffer):
            done += connection.recv_into(view[done:])
        got = torch.frombuffer(buffer, dtype=torch.bfloat16)
        if way == "part":
            parts.joined(got, shape, shard, dist.group.WORLD)
        connection.sendall(b".")


def _send(tensor: torch.Tensor, shard: Shard, way: str, address: str) -> None:
    while True:
        try:
            connection = socket.create_connection((address, PORT + 1 + shard.number))
            break
        except OSError:
            time.sleep(0.05)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    took = []
    for _ in range(ROUNDS):
        begin_s = time.perf_counter()
        sent = parts.part_of(tensor, shard) if way == "part" else tensor
        connection.sendall(sent.contiguous().view(torch.uint8).numpy())
        connection.recv(1)
        took.append(time.perf_counter() - begin_s)
    print(1000 * statistics.median(took))


if __name__ == "__main__":
    if "--rank" in sys.argv:
        rank, role, of, tokens, way, address = sys.argv[2:]
        _rank(int(rank), role, int(of), int(tokens), way, address)
    else:
        main()
