"""Two network interfaces as the ends of a slow cable: what comes in at one goes out at the other,
so many seconds later. What `tc netem` would do, for kernels that have none. Takes root.

    python bench/late_network.py left0 right0 0.005
"""

import argparse
import contextlib
import heapq
import select
import socket
import time

_ALL_PROTOCOLS = 3  # linux/if_ether.h
_SOL_PACKET, _PACKET_VNET_HDR = 263, 15  # linux/if_packet.h: what the sender left to the card to do
_MOST_BYTES = 1 << 17


def end_at(interface: str) -> socket.socket:
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS))
    end.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 20)
    end.bind((interface, 0))
    return end


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("interfaces", nargs=2, metavar="INTERFACE")
    parser.add_argument("delay_s", type=float, metavar="SECONDS")
    args = parser.parse_args()
    one, other = map(end_at, args.interfaces)
    opposite = {one: other, other: one}
    on_their_way: list[tuple[float, int, socket.socket, bytes]] = []
    number = 0
    print("here", flush=True)
    while True:
        wait_s = max(on_their_way[0][0] - time.monotonic(), 0) if on_their_way else None
        ready, _, _ = select.select([one, other], [], [], wait_s)
        for here in ready:
            number += 1
            due_s = time.monotonic() + args.delay_s
            heapq.heappush(on_their_way, (due_s, number, opposite[here], here.recv(_MOST_BYTES)))
        while on_their_way and on_their_way[0][0] <= time.monotonic():
            _, _, there, packet = heapq.heappop(on_their_way)
            with contextlib.suppress(OSError):  # a cable that is pulled: it is lost
                there.send(packet)


if __name__ == "__main__":
    main()
