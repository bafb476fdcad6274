"""One request's failure is its own: the others go on, and files stay what every reader takes."""

import gc
import io
import json
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from fake_client import FakeClient, FakeDriver, byte_tokenizer, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from pipeserve import SamplingParams
from pipeserve.core.nouns import Output
from pipeserve.frontend.llm import LLM
from pipeserve.frontend.tokenizer import Tokenizer
from pipeserve.launch import cli
from pipeserve.launch.inputs.jsonl import strict_line
from pipeserve.launch.run import starting

pytestmark = pytest.mark.usefixtures("no_collections")


class PanicException(BaseException):
    """As Rust's panics come out of `tokenizers`: no Exception."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return byte_tokenizer(tmp_path_factory.mktemp("model"))


def _greedy(**values):
    return SamplingParams(**{"temperature": 0, "max_tokens": 6, **values})


@pytest.fixture
def breaks_at_x(monkeypatch):
    """A tokenizer that raises for one token; the test says what."""
    whole = Tokenizer.token_bytes

    def breaks(error):
        def token_bytes(self, token_id):
            if token_id == ord("X"):
                raise error
            return whole(self, token_id)

        monkeypatch.setattr(Tokenizer, "token_bytes", token_bytes)

    return breaks


def _replies(first, second=b"second"):
    return lambda prompt: list(first if bytes(prompt) == b"1" else second)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("no\nsuch piece"), "no text can be made: no such piece"),
        (KeyError(), "no text can be made: KeyError"),
        (OverflowError("x" * 9000), "no text can be made: " + "x" * 500),
        (PanicException("index out of range"), "no text can be made: index out of range"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_text_that_cannot_be_made(folder, breaks_at_x, error, message):
    breaks_at_x(error)
    driver = FakeClient(folder, reply=_replies(b"abX"))
    broken, whole = LLM.on(driver).generate(["1", "2"], _greedy())
    assert (broken.text, broken.token_ids) == ("ab", tuple(b"abX"))
    assert (broken.finish_reason, broken.error) == ("error", message)
    assert (whole.text, whole.finish_reason, whole.error) == ("second", "length", None)
    assert driver.aborted == [(0, "error")] and driver.num_unfinished == 0


def test_a_prompt_s_own_text_that_cannot_be_made(folder, breaks_at_x):
    """Its last tokens are looked at for a character that they begin."""
    breaks_at_x(ValueError("no"))
    broken, whole = LLM.on(FakeClient(folder)).generate([[ord("X")], "2"], _greedy())
    assert (broken.finish_reason, broken.text) == ("error", "")
    assert whole.finish_reason == "length"


@pytest.mark.parametrize("token", [-1, 2**32, 2**63])
def test_an_id_that_no_tokenizer_can_take(folder, token):
    """vllm#21951: what a broken kernel samples."""
    driver = FakeClient(folder, reply=lambda prompt: [97, token] if bytes(prompt) == b"1" else [])
    broken, whole = LLM.on(driver).generate(["1", "2"], _greedy())
    assert (broken.finish_reason, broken.text) == ("error", "a")
    assert broken.error.startswith("no text can be made: ")
    assert whole.finish_reason == "length"


def test_ctrl_c_is_no_failure_of_a_request(folder, breaks_at_x):
    breaks_at_x(KeyboardInterrupt())
    driver = FakeClient(folder, reply=_replies(b"abX"))
    with pytest.raises(KeyboardInterrupt):
        LLM.on(driver).generate("1", _greedy())
    assert driver.num_unfinished == 0


def test_one_sample_of_several(folder, breaks_at_x):
    breaks_at_x(ValueError("no"))
    replies = iter([b"abcdef", b"aX", b"uvwxyz"])
    driver = FakeClient(folder, reply=lambda prompt: list(next(replies)))
    (completion,) = LLM.on(driver).generate("q", SamplingParams(n=3, max_tokens=6))
    reasons = [output.finish_reason for output in completion.outputs]
    assert reasons == ["length", "error", "length"]
    assert [output.text for output in completion.outputs] == ["abcdef", "a", "uvwxyz"]


def test_what_the_engine_says_went_wrong_is_told(folder, monkeypatch):
    """A stage whose logits are not finite, say: the engine ends the request and says why."""
    driver = FakeClient(folder, reply=_replies(b"first"))
    take = driver.outputs

    def ends_first(timeout_s):
        outputs = take(timeout_s)
        if driver.num_looks == 2:
            driver.running.pop(0)
            outputs[0] = Output(0, None, "error", error="logits are not finite in float16")
        return outputs

    monkeypatch.setattr(driver, "outputs", ends_first)
    broken, whole = LLM.on(driver).generate(["1", "2"], _greedy())
    assert (broken.text, broken.token_ids) == ("f", (ord("f"),))
    assert (broken.finish_reason, broken.error) == ("error", "logits are not finite in float16")
    assert (whole.text, whole.error) == ("second", None)
    assert driver.aborted == []  # it has ended there already


# ---- streams that nobody reads ------------------------------------------------------------------


class _Collecting(FakeClient):
    """Collects garbage within a call, as Python may; none but `abort` may come within another."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.collect, self._inside = (lambda: None), False

    def _alone(self, method, *arguments):
        assert not self._inside, "a call within a call"
        self._inside = True
        try:
            collect, self.collect = self.collect, lambda: None
            collect()
            return method(*arguments)
        finally:
            self._inside = False

    def submit(self, requests):
        return self._alone(super().submit, requests)

    def outputs(self, timeout_s):
        return self._alone(super().outputs, timeout_s)


def _collect_on_another_thread():
    thread = threading.Thread(target=gc.collect)
    thread.start()
    thread.join()


def _drop_in_a_cycle(stream):
    cycle = [stream]
    cycle.append(cycle)


@pytest.mark.parametrize("collect", [gc.collect, _collect_on_another_thread])
def test_a_stream_that_is_collected_within_a_call_is_ended(folder, collect):
    driver = _Collecting(folder)
    llm = LLM.on(driver)
    kept, dropped = llm.stream("a", _greedy()), llm.stream(["b", "c"], _greedy(max_tokens=60))
    next(kept), next(dropped)
    gc.disable()
    try:
        _drop_in_a_cycle(dropped)
        del dropped
        driver.collect = collect
        assert [delta.finish_reason for delta in kept][-1] == "length"
    finally:
        gc.enable()
    assert driver.aborted == [(1, "abort"), (2, "abort")] and driver.num_unfinished == 0


def test_a_stream_that_is_collected_while_another_begins(folder):
    driver = _Collecting(folder)
    llm = LLM.on(driver)
    dropped = llm.stream("b", _greedy(max_tokens=60))
    next(dropped)
    gc.disable()
    try:
        _drop_in_a_cycle(dropped)
        del dropped
        driver.collect = gc.collect
        assert len(llm.generate(["a", "c"], _greedy())) == 2
    finally:
        gc.enable()
    assert driver.aborted == [(0, "abort")]


def test_a_stream_that_another_thread_drops_is_ended(folder):
    driver = FakeClient(folder)
    llm = LLM.on(driver)
    stream = llm.stream("b", _greedy(max_tokens=60))
    next(stream)
    thread = threading.Thread(target=stream.close)
    thread.start()
    thread.join()
    assert driver.aborted == [(0, "abort")]
    assert llm.generate("a", _greedy())[0].finish_reason == "length"


def _let_others_run_within(client, *names):
    """As a call over a socket would, each of these gives other threads the time to call too; which
    the interface does not allow."""
    is_busy = threading.Lock()

    def slowly(call, argument):
        assert is_busy.acquire(blocking=False), "a call within a call"
        try:
            time.sleep(1e-4)
            return call(argument)
        finally:
            is_busy.release()

    for name in names:
        setattr(client, name, partial(slowly, getattr(client, name)))


def test_threads_take_turns(folder):
    """As a thread pool of a user's calls it (vllm#1285, exllamav2#690)."""
    client = FakeClient(folder)
    _let_others_run_within(client, "submit", "outputs")
    llm = LLM.on(client)
    prompts = [f"{number:02}" for number in range(24)]
    with ThreadPoolExecutor(6) as pool:
        together = pool.map(lambda prompt: llm.generate(prompt, _greedy(max_tokens=9)), prompts)
        texts = [completion.text for (completion,) in together]
    alone = LLM.on(FakeClient(folder)).generate(prompts, _greedy(max_tokens=9))
    assert texts == [completion.text for completion in alone]
    assert client.num_unfinished == 0


def test_no_thread_is_left_waiting_while_another_streams(folder):
    client = FakeClient(folder)
    _let_others_run_within(client, "outputs")
    llm = LLM.on(client)
    long, seen = llm.stream("b", _greedy(max_tokens=5000)), []
    next(long)
    other = threading.Thread(target=lambda: seen.append(llm.generate("a", _greedy())))
    other.start()
    for _ in long:
        if not other.is_alive():
            break
    else:
        pytest.fail("it came last")
    assert seen[0][0].text == LLM.on(FakeClient(folder)).generate("a", _greedy())[0].text


# ---- files --------------------------------------------------------------------------------------


@pytest.fixture
def run(folder, monkeypatch):
    """Runs `generate` on fake stages with `reply`; standard output has the encoding that is said.
    Returns (exit code, standard output as bytes, the driver)."""

    def run(*command, reply=None, encoding="utf-8", errors="strict"):
        driver = FakeDriver(folder, reply=reply)

        def open_driver(run_config, record, check=lambda model_config: None):
            driver.config, driver.record = run_config, record
            check(driver)
            return driver

        monkeypatch.setattr(starting, "open_driver", open_driver)
        written = io.BytesIO()
        with monkeypatch.context() as patch:
            stdout = io.TextIOWrapper(written, encoding=encoding, errors=errors)
            patch.setattr(sys, "stdout", stdout)
            code = cli.main(["generate", "m", *(str(part) for part in command)])
            stdout.flush()
        return code, written.getvalue(), driver

    return run


def _strict(line):
    def no_constant(name):
        raise AssertionError(f"{name} in {line!r}")

    return json.loads(line, parse_constant=no_constant)


def test_a_failure_in_a_file_of_results(run, tmp_path, breaks_at_x, capsys):
    breaks_at_x(ValueError("no"))
    prompts = write_jsonl(tmp_path / "in.jsonl", {"prompt": "1"}, {"prompt": "2"})
    output = tmp_path / "out.jsonl"
    command = ["--prompts", prompts, "--output", output, "--max-tokens", "6"]
    code, _, _ = run(*command, reply=_replies(b"abX"))
    results = [_strict(line) for line in output.read_text().splitlines()]
    broken, whole = sorted(results, key=lambda result: result["index"])
    assert code == 1 and (broken["finish_reason"], broken["text"]) == ("error", "ab")
    assert broken["error"] == "no text can be made: no"
    assert "error" not in whole and whole["text"] == "second"
    err = capsys.readouterr().err
    assert "error: 1 of 2 prompts could not run, the first: no text can be made: no" in err
    code, _, driver = run(*command, "--resume")
    assert code == 1 and not driver.added
    assert "error: 1 of the 2 kept could not run" in capsys.readouterr().err


def test_a_failure_of_one_prompt_on_the_terminal(run, breaks_at_x, capsys):
    breaks_at_x(ValueError("no"))
    code, out, _ = run("--prompt", "1", "--max-tokens", "6", reply=_replies(b"abX"))
    assert (code, out) == (1, b"ab\n")
    assert capsys.readouterr().err.splitlines()[-1] == "error: no text can be made: no"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "utf-16", "cp1252"])
def test_results_on_any_standard_output(run, tmp_path, encoding):
    """promptflow#4172: PYTHONIOENCODING=ascii, and a terminal of another country."""
    reply = lambda prompt: list("caf\u00e9 \u20ac \U0001f600 \u2028".encode())  # noqa: E731
    prompts = write_jsonl(tmp_path / "in.jsonl", {"prompt": "\u00fc\u65e5"})
    command = ["--prompts", prompts, "--max-tokens", "18"]
    code, out, _ = run(*command, reply=reply, encoding=encoding)
    (line,) = out.decode(encoding).splitlines()
    result = _strict(line)
    assert (code, result["prompt"]) == (0, "\u00fc\u65e5")
    assert result["text"] == "caf\u00e9 \u20ac \U0001f600 \u2028"
    code, out, _ = run("--prompt", "x", "--max-tokens", "5", reply=reply, encoding=encoding)
    expected = "caf\u00e9\n".encode(encoding, "backslashreplace")
    assert (code, out) == (0, expected)
    code, out, _ = run(*command, "--print", reply=reply, encoding=encoding)
    assert code == 0 and b"caf" in out.replace(b"\0", b"")


def test_how_errors_of_encoding_are_handled_may_be_chosen(run):
    reply = lambda prompt: list("\u00e9".encode())  # noqa: E731
    command = ["--prompt", "x", "--max-tokens", "2"]
    for errors, expected in (("replace", b"?\n"), ("surrogateescape", b"\\xe9\n")):
        _, out, _ = run(*command, reply=reply, encoding="ascii", errors=errors)
        assert out == expected


def _read(run, tmp_path, data, *flags):
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_bytes(data)
    output.unlink(missing_ok=True)
    code, _, driver = run("--prompts", prompts, "--output", output, *flags)
    return code, driver


@pytest.mark.parametrize(
    "data",
    [
        b'\xef\xbb\xbf{"prompt": "a"}\n{"prompt": "b"}\n',  # promptflow#4172
        b'{"prompt": "a"}\r\n{"prompt": "b"}\r\n',
        b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \r\n\xef\xbb\xbf{"prompt": "b"}',
        b'\n\n{"prompt": "a"}\n\n{"prompt": "b"}\n\n',
        b'  {"prompt":"a"}\t\n\t{"prompt":"b"} ',
        b'{"prompt": "a", "stop": null, "messages": null, "temperature": null}\n{"prompt": "b"}',
        b'{"prompt": "\\u0061"}\n{"prompt": "b", "seed": null, "max_tokens": null}\n',
    ],
)
def test_files_that_are_read(run, tmp_path, data):
    code, driver = _read(run, tmp_path, data)
    assert code == 0
    assert [bytes(request.prompt) for request in driver.added] == [b"a", b"b"]
    assert {request.params.stop for request in driver.added} == {()}


def test_every_option_as_null(run, tmp_path):
    """llama.cpp#25515. What a flag says is what is left out then."""
    from pipeserve.frontend.params import PARAM_NAMES

    line = {"prompt": "a", **dict.fromkeys(PARAM_NAMES)}
    code, driver = _read(run, tmp_path, json.dumps(line).encode())
    (params,) = [request.params for request in driver.added]
    _, plain = _read(run, tmp_path, b'{"prompt": "a"}')
    assert code == 0 and [request.params for request in plain.added] == [params]
    _, flagged = _read(run, tmp_path, json.dumps(line).encode(), "--max-tokens", "3")
    assert flagged.added[0].params.max_tokens == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a", "temperature": NaN}', "NaN is no JSON number"),
        (b'{"prompt": "a", "logit_bias": {"5": -Infinity}}', "-Infinity is no JSON number"),
        (b'{"prompt": "a", "prompt": "b"}', "'prompt' is there twice"),
        (b'{"messages": [{"role": "user", "role": "user", "content": "x"}]}', "'role' is there"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
        (b'{"prompt": ' + b"[" * 100_000, "not JSON: "),
        (b'{"prompt": "a\\ud800"}', "half a surrogate pair"),
        (b'{"messages": [{"role": "user", "content": "\\udc00"}]}', "half a surrogate pair"),
        (b'{"prompt": "a", "stop": ["\\ud83d"]}', "stop has half a surrogate pair"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "'image_url'"),
        (b'{"messages": [{"content": "hi"}]}', "message 0 has no role"),
        (b'{"prompt": null}', "this one has none of them"),
        (b'{"prompt": ["a"]}', "must be text"),
        (b'{"prompt_token_ids": 5}', "must be a list of token ids"),
        (b'{"prompt_token_ids": [true]}', "must be a list of token ids"),
        (b'{"prompt": "a", "structured_outputs": {"json": {}}}', "structured_outputs is a param"),
        (b'{"prompt": "a", "best_of": 2}', "best_of is a parameter of vLLM"),
        (b"{'prompt': 'a'}", "not JSON: "),
        (b'{"prompt": "a"}{"prompt": "b"}', "not JSON: Extra data"),
        (b'{"prompt": "a\x00"}', "not JSON: "),
        (b"null", "not an object"),
    ],
)
def test_lines_that_are_refused_name_file_and_line(run, tmp_path, capsys, line, message):
    code, driver = _read(run, tmp_path, b'{"prompt": "a"}\n' + line + b"\n")
    err = capsys.readouterr().err
    assert code == 2 and not driver.added and err.count("\n") == 1, err
    assert f"in.jsonl:2: {message}" in err or ("in.jsonl:2: " in err and message in err)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"prompt": "a"}'.encode("utf-16"), "not UTF-8 at byte 0; save it as UTF-8"),
        (b'{"prompt": "a"}\n{"prompt": "\xe9"}', "not UTF-8 at byte 28"),
        (b"\xef\xbb\xbf\r\n", "empty; give one JSON object a line"),
    ],
)
def test_files_that_are_refused(run, tmp_path, capsys, data, message):
    code, _ = _read(run, tmp_path, data)
    assert code == 2 and message in capsys.readouterr().err


def test_a_prompt_that_the_shell_handed_over_broken(run, capsys):
    code, _, _ = run("--prompt", "caf\udce9")
    assert code == 2 and "half a surrogate pair" in capsys.readouterr().err


def test_a_very_long_line(run, tmp_path):
    code, driver = _read(run, tmp_path, b'{"prompt": "a",' + b" " * 5_000_000 + b'"top_k": 3}')
    assert code == 0 and driver.added[0].params.top_k == 3


_any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=6)
    | st.sampled_from(["\x85", "\u2028", "\u2029", "\ud83d\ude00", "\udc00\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner,
                                                                max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(value=_any_json, ascii_only=st.booleans())
def test_a_line_is_strict_json_whatever_it_says(value, ascii_only):
    line = strict_line(value, ascii_only=ascii_only)
    assert len(line.splitlines()) == 1
    _strict(line.encode().decode())
    assert "\\ud" not in line or ascii_only  # halves are replaced; ASCII writes whole pairs so
    json.dumps(json.loads(line), ensure_ascii=False).encode()  # no half is left
    if ascii_only:
        assert line.isascii()


def test_numbers_that_are_none_and_halves_of_characters():
    assert strict_line({"a": [float("nan"), float("-inf"), 1.5]}) == '{"a": [null, null, 1.5]}'
    assert strict_line({"a\ud800": "\udfffb"}) == '{"a\ufffd": "\ufffdb"}'
    assert strict_line("\u2028") == '"\\u2028"'
    assert Counter(strict_line({"t": "\u00e9"}, ascii_only=True))["\\"] == 1
