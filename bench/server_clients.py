"""Clients that others wrote, unchanged, against a running `pipeserve serve`: each one's exit code.

    python -m venv VENV && VENV/bin/pip install llm litellm guidellm aiperf
    pipeserve serve smollm2-135m -pp 2 &
    python bench/server_clients.py http://127.0.0.1:8000 --bin VENV/bin

Those that are not there are passed over, and told. `llm` and litellm ask once with a stream and
once without; guidellm and aiperf measure eight requests, with the model's own tokenizer.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from pipeserve.stages.checkpoint.sources import resolve

_LIMIT_S = 240
_LITELLM = """
import litellm, sys
where = dict(model="openai/" + sys.argv[2], api_base=sys.argv[1] + "/v1", api_key="none")
asked = dict(messages=[{"role": "user", "content": "Say hi"}], max_tokens=8, **where)
answer = litellm.completion(**asked)
assert answer.choices[0].message.content and answer.usage.completion_tokens <= 8
pieces = list(litellm.completion(stream=True, stream_options={"include_usage": True}, **asked))
assert any(piece.choices and piece.choices[0].delta.content for piece in pieces)
assert pieces[-1].usage.completion_tokens <= 8
text = litellm.text_completion(prompt="The sea is", max_tokens=8, **where)
assert text.choices[0].text
try:
    litellm.completion(**{**asked, "max_tokens": 10**6})
except litellm.ContextWindowExceededError:
    print("right")
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url")
    parser.add_argument("--bin", type=Path, required=True, help="where their commands are")
    args = parser.parse_args()
    url = args.url.rstrip("/").removesuffix("/v1")
    try:
        with urllib.request.urlopen(f"{url}/v1/models") as answer:
            model = json.load(answer)["data"][0]["id"]
    except (ValueError, OSError) as error:  # no URL, nobody there, or somebody else
        parser.error(f"{args.url} is no server that says its models: {error}")
    worst = 0
    with tempfile.TemporaryDirectory(prefix="clients-") as name:
        for client, commands in _commands(args.bin, url, model, Path(name)).items():
            if not (args.bin / client).exists():
                print(f"{client}: not in {args.bin}")
                continue
            for command in commands:
                worst = max(worst, _run(client, list(map(str, command)), Path(name)))
    return worst


def _commands(bin: Path, url: str, model: str, folder: Path) -> dict[str, list[list]]:
    tokenizer = resolve(model)
    (folder / "extra-openai-models.yaml").write_text(
        f"- model_id: ours\n  model_name: {model}\n  api_base: {url}/v1\n"
    )
    asked = [bin / "llm", "-m", "ours", "-n", "-o", "max_tokens", "8", "Say hi"]
    return {
        "llm": [asked, [*asked, "--no-stream"]],
        "litellm": [[bin / "python", "-c", _LITELLM, url, model]],
        "guidellm": [
            [
                *(bin / "guidellm", "run", "--backend", f"kind=openai_http,target={url}"),
                *("--profile", "kind=concurrent,streams=2", "--constraint"),
                *("kind=max_requests,count=8", "--tokenizer", f"kind=hf_auto,model={tokenizer}"),
                *("--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=8"),
                *("--output", f"kind=json,path={folder / 'guidellm.json'}", "--disable-progress"),
            ]
        ],
        "aiperf": [
            [
                *(bin / "aiperf", "profile", "--model", model, "--url", url),
                *("--endpoint-type", "chat", "--streaming", "--tokenizer", tokenizer),
                *("--request-count", "8", "--concurrency", "2", "--output-tokens-mean", "8"),
                *("--ui", "none", "--artifact-dir", folder / "aiperf"),
            ]
        ],
    }


def _run(client: str, command: list[str], folder: Path) -> int:
    environment = {**os.environ, "LLM_USER_PATH": str(folder)}
    environment["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it asks the web for prices
    environment.pop("PYTHONPATH", None)  # they have their own packages
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        print(f"{client}: still running after {_LIMIT_S} s")
        return 1
    said = (done.stdout.strip() or done.stderr.strip()).splitlines()
    print(f"{client}: exit code {done.returncode}; {said[-1][:100] if said else ''}")
    if done.returncode:
        print(done.stderr[-1500:], file=sys.stderr)
    return min(done.returncode, 1)


if __name__ == "__main__":
    sys.exit(main())
