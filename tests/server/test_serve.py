"""`pipeserve serve` as its processes: it answers, drains, names who died, leaves nothing behind."""

import json
import os
import re
import resource
import signal
import ssl
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from checkpoints import greedy_tokens, random_prompts, tiny_llama
from http_answers import ask, events, until

pytestmark = pytest.mark.processes

COMPLETIONS = "/v1/completions"
_FILES = 500


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"))


class Serving:
    """A server, and all the processes behind it."""

    def __init__(self, process: subprocess.Popen, url: str) -> None:
        self.process, self.url = process, url
        self.pids = descendants(process.pid)

    @property
    def left(self) -> list[int]:
        return [pid for pid in self.pids if is_alive(pid)]

    def wait(self, seconds=40.0) -> int:
        """Its exit code, once nothing of it is left."""
        exit_code = self.process.wait(seconds)
        deadline = time.monotonic() + seconds
        while self.left:
            assert time.monotonic() < deadline, f"still there: {self.left}"
            time.sleep(0.05)
        return exit_code


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _allow_few_files() -> None:
    """Fewer than it may have where it asks for them."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (_FILES, most))


@contextmanager
def serving(folder, *arguments):
    """In a process group of its own, as a terminal's programs are."""
    command = [sys.executable, "-m", "pipeserve.launch.cli", "serve", folder, "-pp", "2"]
    command += ["--dtype", "float32", "--port", "0", *arguments]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_allow_few_files,
    )
    lines = []
    try:
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"at (http\S+)/v1", line):
                break
        else:
            raise AssertionError("".join(lines))
        threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True).start()
        it = Serving(process, found[1])
        it.lines = lines
        yield it
    finally:
        process.kill()
        process.wait()


def until_it_computed(server, seconds=30.0):
    """Waits for /metrics to say so of every stage."""
    deadline = time.monotonic() + seconds
    computing = r"pipeserve:stage_seconds_total{.*computing.*} (\S+)"
    while True:
        told = re.findall(computing, httpx.get(f"{server.url}/metrics").text)
        if len(told) == 2 and all(float(computing_s) for computing_s in told):
            return
        assert time.monotonic() < deadline, told
        time.sleep(0.2)


def test_it_answers_drains_and_ends(folder):
    prompts = random_prompts(folder, (9, 5))
    expected = greedy_tokens(folder, prompts, 12)
    with serving(folder) as server:
        assert httpx.get(f"{server.url}/ready").json()["stages"][1]["stage"] == 1
        # ROCm/ATOM#1381, langserve#714, uvicorn#1030: clients beyond the soft limit were hung up on
        assert resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)[0] > _FILES
        body = {"max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        _, answer = ask(server, COMPLETIONS, prompt=prompts, **body)
        assert [choice["token_ids"] for choice in answer["choices"]] == expected
        told = events(server, COMPLETIONS, prompt=prompts[0], **body)
        ids = [token for event in told for token in event["choices"][0]["token_ids"]]
        assert ids == expected[0]
        until_it_computed(server)
        body["max_tokens"] = 200
        whole = []
        many = {"prompt": [5], "n": 30, **body, "temperature": 1}
        asking = threading.Thread(target=lambda: whole.append(ask(server, COMPLETIONS, **many)))
        asking.start()
        until(lambda: " 30.0" in httpx.get(f"{server.url}/metrics").text)
        body["stream"] = True
        with httpx.stream("POST", server.url + COMPLETIONS, json={"prompt": [5], **body}) as slow:
            lines = slow.iter_lines()
            next(lines)
            # As systemd ends a service, and `tini -g` a container: sglang#35202 drained
            # nothing then, for its scheduler died of it.
            for pid in (server.process.pid, *server.pids):
                os.kill(pid, signal.SIGTERM)
            told = [line for line in lines if line.startswith("data: {")]
        last = json.loads(told[-1].removeprefix("data: "))
        assert last["choices"][0]["finish_reason"] == "length"
        asking.join()
        status, answer = whole[0]
        assert status == 200 and answer["usage"]["completion_tokens"] == 30 * 200
        assert server.wait() == 0


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate of its own, and its key."""
    folder = tmp_path_factory.mktemp("certificate")
    names = str(folder / "own.pem"), str(folder / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command += ["-out", names[0], "-keyout", names[1]]
    subprocess.run(command, check=True, capture_output=True)
    return names


def test_a_second_ctrl_c_does_not_wait(folder, certificate):
    """The first reaches all processes of the group, and what runs goes on. Over HTTPS."""
    own, key = certificate
    body = {"prompt": [5], "n": 120, "max_tokens": 240, "ignore_eos": True, "stream": True}
    context = ssl.create_default_context(cafile=own)
    with (
        serving(folder, "--ssl-certfile", own, "--ssl-keyfile", key) as server,
        httpx.Client(base_url=server.url, verify=context) as client,
    ):
        assert server.url.startswith("https://")
        with client.stream("POST", COMPLETIONS, json=body) as slow:
            lines = slow.iter_lines()
            next(lines)
            os.killpg(server.process.pid, signal.SIGINT)
            until(lambda: client.get("/ready").status_code == 503)
            os.killpg(server.process.pid, signal.SIGINT)  # handed on by `npm`, `uv run`: the same
            for _ in range(20):
                assert "error" not in next(lines)
            time.sleep(1.1)
            os.killpg(server.process.pid, signal.SIGINT)
            told = [line for line in lines if line.startswith("data: {")]
        assert "shutting down" in json.loads(told[-1].removeprefix("data: "))["error"]["message"]
        assert server.wait() == 0


def test_a_stream_goes_on_after_its_stage_was_killed(folder):
    """vllm#21728: its server says that all is well, and new requests hang."""
    (prompt,) = random_prompts(folder, (9,))
    expected = greedy_tokens(folder, [prompt], 200)
    body = {"prompt": prompt, "max_tokens": 200, "temperature": 0, "ignore_eos": True}
    body |= {"return_token_ids": True, "stream": True}
    with serving(folder) as server:
        pid = httpx.get(f"{server.url}/ready").json()["stages"][1]["pid"]
        with httpx.stream("POST", server.url + COMPLETIONS, json=body, timeout=60) as slow:
            lines = slow.iter_lines()
            told = [next(lines)]
            os.kill(pid, signal.SIGKILL)
            while (ready := httpx.get(f"{server.url}/ready")).status_code == 200:
                time.sleep(0.05)
            message = ready.json()["error"]["message"]
            assert re.search(
                r"stage 1 \(pid \d+ on .*\) died: .*SIGKILL.* it was (at \d+|idle)", message
            )
            assert "pipeserve:lost_stage{" in httpx.get(f"{server.url}/metrics").text
            assert httpx.get(f"{server.url}/health").status_code == 200
            told += [line for line in lines if line.startswith("data: {")]
        events = [json.loads(line.removeprefix("data: ")) for line in told]
        ids = [token for event in events for token in event["choices"][0]["token_ids"]]
        assert ids == expected[0]
        until_s = time.monotonic() + 10.0
        while (ready := httpx.get(f"{server.url}/ready")).status_code != 200:
            assert time.monotonic() < until_s
        assert ready.json()["stages"][1]["pid"] != pid
        server.pids = descendants(server.process.pid)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0


def test_the_end_of_a_stage_is_its_own(folder):
    """vllm#48966: it exits with 0, and its supervisor does not start it again."""
    with serving(folder, "--no-restart") as server:
        stage = httpx.get(f"{server.url}/ready").json()["stages"][1]
        os.kill(stage["pid"], signal.SIGKILL)
        assert server.wait() == 1
        time.sleep(0.1)
        assert any("stage 1" in line and "SIGKILL" in line for line in server.lines)


@pytest.mark.parametrize("who", ["server", "driver"])
def test_a_process_that_is_killed_leaves_none(folder, who):
    with serving(folder) as server:
        os.kill(server.process.pid if who == "server" else server.pids[0], signal.SIGKILL)
        assert server.wait() == (-signal.SIGKILL if who == "server" else 1)


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_an_end_amid_the_start_leaves_no_process(folder, ending):
    """SIGINT to all of them, which ends in order; SIGKILL to the server alone."""
    command = [sys.executable, "-m", "pipeserve.launch.cli", "serve", folder, "-pp", "2"]
    command += ["--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        server = Serving(process, "")
        while len(server.pids) < 4:  # driver, figures, two keepers
            server.pids = descendants(process.pid)
            assert process.poll() is None
        for pid in (process.pid, *server.pids) if ending == signal.SIGINT else (process.pid,):
            os.kill(pid, ending)
        assert server.wait() == (0 if ending == signal.SIGINT else -signal.SIGKILL)


def test_what_cannot_be_served_is_one_line(folder, tmp_path):
    def fails(*arguments):
        command = [sys.executable, "-m", "pipeserve.launch.cli", "serve", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        (line,) = done.stderr.splitlines()
        return done.returncode, line

    code, line = fails(str(tmp_path / "nowhere"))
    assert code == 2 and "nowhere" in line
    code, line = fails(folder, "-pp", "9")
    assert code == 2 and "layers" in line
    code, line = fails(folder, "--port", "99999")
    assert code == 2 and "--port 99999" in line
    code, line = fails(folder, "--api-key-file", str(tmp_path / "none"))
    assert code == 2 and "--api-key-file" in line
