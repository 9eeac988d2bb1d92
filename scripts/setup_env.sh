#!/usr/bin/env bash
# setup_env.sh PYTHON VENV: a virtual environment with this project and its test dependencies, at the versions of
# constraints.txt. A torch that PYTHON already has is used as it is.
set -euo pipefail
python=$1 venv=$2
cd "$(dirname "$0")/.."
command -v g++ >/dev/null || { echo "error: DeepSpeed compiles an operator on CPUs and needs g++; install it" >&2; exit 2; }
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
site=$("$python" -c 'import importlib.util, pathlib; s = importlib.util.find_spec("torch"); print(pathlib.Path(s.origin).parents[1] if s and s.origin else "")')
if [ -n "$site" ]; then
    own=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    [ "$site" = "$own" ] || echo "$site" > "$own/installed_torch.pth"
else
    "$venv/bin/python" -m pip install --quiet "$TORCH"
fi
"$venv/bin/python" -m pip install --quiet --constraint constraints.txt --editable '.[test]'
if [ ! -e "$venv/bin/deepspeed" ]; then # PYTHON has it, and its command would start ranks without this project
    printf '#!%s\nfrom deepspeed.launcher.runner import main\n\nmain()\n' "$(cd "$venv/bin" && pwd)/python" > "$venv/bin/deepspeed"
    chmod +x "$venv/bin/deepspeed"
fi
touch "$venv/.ready"
