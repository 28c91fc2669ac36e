#!/usr/bin/env bash
# Builds the wheel of the working tree, installs it into an environment of its own, and merges by its console script in a
# directory whose modules have the names of the program's packages and of what it imports.
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONPATH
python=$PWD/.venv/bin/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mkdir "$work/source" "$work/place"
git ls-files -z --cached --others --exclude-standard | tar --create --null --files-from=- --ignore-failed-read | tar --extract -C "$work/source"
"$python" -P -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$work" "$work/source"

# Dependencies are seen where they are. Of a directory that a .pth file names no .pth file is read: the editable program is not.
"$python" -P -m venv --without-pip "$work/venv"
"$python" -P -m pip --python "$work/venv/bin/python" install --quiet --disable-pip-version-check --no-deps "$work"/*.whl
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$(echo "$work"/venv/lib/python3*/site-packages)/dependencies.pth"

cd "$work/place"
for name in flows merging ray_tasks search; do
    mkdir "$name"
    echo 'open(__file__ + ".ran", "w").close(); raise RuntimeError(__file__)' >"$name/__init__.py"
done
for name in yaml torch numpy typer pydantic safetensors json; do
    cp search/__init__.py "$name.py"
done
"$work/venv/bin/python" -P - <<'EOF'
import sys

import torch
import yaml
from transformers import BertConfig, BertModel

import merging

assert merging.__file__.startswith(sys.prefix), merging.__file__
config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
model = BertModel(config)
for name in ("base", "one", "two"):
    model.save_pretrained(name)
    for value in model.parameters():
        value.data += 0.001 * torch.randn_like(value)
recipe = {"base": "base", "members": {"one": "one", "two": "two"}, "method": "ties", "scaling": 0.5}
with open("recipe.yaml", "w") as file:
    yaml.safe_dump(recipe, file)
EOF
"$work/venv/bin/mergequest" --help >/dev/null
"$work/venv/bin/python" -m mergequest --version
"$work/venv/bin/python" -P -c 'import mergequest as mq; mq.merge("recipe.yaml", "from-python")'
"$work/venv/bin/mergequest" init my.yaml
"$work/venv/bin/mergequest" merge recipe.yaml --out merged
test -s merged/model.safetensors
test -z "$(find . -name '*.ran')" || { find . -name '*.ran'; exit 1; }
echo "the wheel merges beside modules of its packages' names"
