"""Bodies and HTTP that nobody should send, by the thousand, against the server over a pipeline that
is none (`tests/support/fake_server.py`): never a 500, a hang or a dead server, and good requests
beside keep their tokens.

    python bench/server_fuzz.py --cases 5000

Three sources: schemathesis on the server's own OpenAPI (where it is installed), bodies built out of
JSON that is nearly right, and heads and bodies with their bytes changed. The same seed gives the
same cases.
"""

import argparse
import json
import random
import socket
import sys
import tempfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
from bad_bodies import bad_body, spoilt_bytes
from fake_client import byte_tokenizer
from fake_server import served
from http_answers import until

from pipeserve.server import gate, listening
from pipeserve.server.options import ServerOptions

PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
_ANSWER_S = 20.0
_GOOD = {"prompt": "abc", "max_tokens": 40, "temperature": 0}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = byte_tokenizer(Path(tempfile.mkdtemp()))
    options = ServerOptions(tool_call_parser="hermes", max_body_bytes=1 << 20)
    listening._HEAD_S = listening._KEEP_ALIVE_S = gate._BODY_S = 1.0  # who waits is not waited for
    with served(folder, options, max_model_len=200) as server:
        beside = Beside(server.url)
        report = {
            "bodies": fuzz_bodies(server.url, arguments.cases, arguments.seed),
            "bytes": fuzz_bytes(server.url, arguments.cases, arguments.seed),
            "schemathesis": fuzz_schema(server.url, arguments.cases, arguments.seed),
        }
        report["good requests beside"] = beside.end()
        until(lambda: server.service.num_open == server.pipeline.num_unfinished == 0)
        until(lambda: server.fake.num_unfinished == 0)
        is_well = httpx.get(f"{server.url}/health").status_code == 200
    failures = [f"{name}: {each}" for name, (_, wrong) in report.items() for each in wrong]
    for name, (counts, wrong) in report.items():
        print(f"{name}: {sum(counts.values())} cases, {len(wrong)} wrong; by status {dict(counts)}")
    print("\n".join(failures[:20]))
    print("afterwards:", "well" if is_well else "dead")
    return 0 if is_well and not failures else 1


Outcome = tuple[Counter[str], list[str]]
"""How many cases had each status, and what was wrong."""


class Beside:
    """A good request after another, while bad ones come: each says what the first one said."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._counts: Counter[str] = Counter()
        self._wrong: list[str] = []
        self._expected = self._text()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _text(self) -> str:
        answer = httpx.post(f"{self._url}{PATHS[0]}", json=_GOOD, timeout=_ANSWER_S)
        return answer.json()["choices"][0]["text"]

    def _run(self) -> None:
        while not self._is_over.is_set():
            try:
                text = self._text()
            except (httpx.HTTPError, KeyError) as error:
                self._wrong.append(repr(error))
                continue
            self._counts["right"] += 1
            if text != self._expected:
                self._wrong.append(text)

    def end(self) -> Outcome:
        self._is_over.set()
        self._thread.join()
        return self._counts, self._wrong


def fuzz_bodies(url: str, num_cases: int, seed: int) -> Outcome:
    rng, counts, wrong = random.Random(f"{seed}/bodies"), Counter(), []
    with httpx.Client(base_url=url, timeout=_ANSWER_S) as client:
        for _ in range(num_cases):
            path = rng.choice(PATHS)
            content = json.dumps(bad_body(rng, path))
            try:
                answer = client.post(
                    path, content=content, headers={"Content-Type": "application/json"}
                )
            except httpx.HTTPError as error:
                wrong.append(f"{path} {error!r}: {content[:300]}")
                continue
            counts[str(answer.status_code)] += 1
            if answer.status_code >= 500:
                wrong.append(f"{path} {answer.status_code}: {content[:300]}")
    return counts, wrong


def fuzz_bytes(url: str, num_cases: int, seed: int) -> Outcome:
    """Each connection is answered or not, and has an end: nobody says another word on it."""
    rng, counts, wrong = random.Random(f"{seed}/bytes"), Counter(), []
    port = int(url.rpartition(":")[2])

    def send(sent: bytes) -> str:
        with socket.create_connection(("127.0.0.1", port), timeout=_ANSWER_S) as connection:
            try:
                connection.sendall(sent)
                answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
            except TimeoutError:
                return "hang"
            except ConnectionError:
                return "reset"
        return answer[9:12].decode("latin-1") if answer.startswith(b"HTTP/1.1 ") else "none"

    good = json.dumps(_GOOD).encode()
    cases = [spoilt_bytes(rng, PATHS[0], good) for _ in range(num_cases)]
    with ThreadPoolExecutor(64) as pool:
        for sent, outcome in zip(cases, pool.map(send, cases), strict=True):
            counts[outcome] += 1
            if outcome == "hang" or outcome.startswith("5"):
                wrong.append(f"{outcome}: {sent[:300]!r}")
    return counts, wrong


def fuzz_schema(url: str, num_cases: int, seed: int) -> Outcome:
    counts, wrong = Counter(), []
    try:
        import schemathesis
    except ImportError:
        print("schemathesis is not installed: pip install schemathesis")
        return counts, wrong
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    operations = list(schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations())
    for found in operations:
        operation = found.ok()

        @seeded(seed)
        @settings(
            max_examples=num_cases // len(operations),
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def try_it(case) -> None:
            answer = case.call(base_url=url, timeout=_ANSWER_S)
            counts[str(answer.status_code)] += 1
            if answer.status_code >= 500:
                wrong.append(f"{answer.status_code}: {case.as_curl_command()[:300]}")

        try_it()
    return counts, wrong


if __name__ == "__main__":
    sys.exit(main())
