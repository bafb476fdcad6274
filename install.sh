# Sourced by ./quickstart and ./test: puts pipeserve, and the extra named as $1, into .venv.
# Does nothing when .venv already has them, and nothing that the package is built from is newer.

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $("$python" --version) is too old; pipeserve needs Python 3.11 or newer (set PYTHON)" >&2
    exit 2
}
extra=${1:-}
stamp=.venv/installed-${extra:-base}
built_from=(pyproject.toml setup.py stages/backends/cpu/kernel{_sources.py,s/*.[ch]})
if [ ! -e "$stamp" ] || [ -n "$(find "${built_from[@]}" -newer "$stamp")" ]; then
    echo "installing into .venv (once; about two minutes)" >&2
    [ -e .venv/bin/python ] || "$python" -m venv .venv
    # torch first and by exact version: an open range can pull gigabytes of CUDA.
    .venv/bin/python -c 'import torch' 2>/dev/null || .venv/bin/python -m pip install -q torch==2.13.0
    .venv/bin/python -m pip install -q -e ".${extra:+[$extra]}"
    touch "$stamp"
fi
