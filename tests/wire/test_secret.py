"""Where the shared secret comes from."""

import pytest

from pipeserve.errors import ConfigError
from pipeserve.wire.secret import VARIABLE, control_secret


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    path = tmp_path / "secret"

    def write(content, mode=0o600):
        path.write_bytes(content)
        path.chmod(mode)
        return str(path)

    return write


@pytest.mark.parametrize(
    ("content", "secret"),
    [
        (b"abc", b"abc"),
        (b"abc\n", b"abc"),
        (b"abc\r\n", b"abc"),
        (b" a c ", b" a c "),
        (b"\xff\x00\x01", b"\xff\x00\x01"),
        (b"x" * 4096, b"x" * 4096),
    ],
)
def test_a_newline_at_the_end_is_none_of_it(file, capsys, content, secret):
    assert control_secret(file(content)) == secret
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660])
def test_a_file_that_others_can_read_is_warned_of(file, capsys, mode):
    assert control_secret(file(b"abc", mode)) == b"abc"
    assert capsys.readouterr().err.endswith(f"(mode {mode:o}); chmod 600 it\n")


@pytest.mark.parametrize(("content", "reason"), [(b"", "empty"), (b"\n\r\n", "empty"),
                                                 (b"x" * 4097, "over 4096 bytes")])  # fmt: skip
def test_what_cannot_be_meant_is_refused(file, content, reason):
    with pytest.raises(ConfigError, match=f"^--control-secret .*{reason}"):
        control_secret(file(content))


@pytest.mark.parametrize(("name", "reason"), [("", "Is a directory"), ("absent", "No such file")])
def test_what_cannot_be_read_is_one_line(tmp_path, name, reason):
    with pytest.raises(ConfigError, match=f"^--control-secret .*: {reason}"):
        control_secret(str(tmp_path / name))


def test_the_flag_wins_over_the_variable(file, monkeypatch):
    monkeypatch.setenv(VARIABLE, "in the environment\n")
    assert control_secret(None) == b"in the environment"
    assert control_secret(file(b"in a file")) == b"in a file"


def test_an_empty_variable_is_a_mistake(monkeypatch):
    monkeypatch.setenv(VARIABLE, "")
    with pytest.raises(ConfigError, match=f"^{VARIABLE} is empty"):
        control_secret(None)


def test_neither_is_none(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert control_secret(None) is None
