"""Runs merges by mergekit, in its own environment: python run_mergekit.py JOBS.json, a list of [configuration, directory]."""

import json
import sys
from pathlib import Path

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

if __name__ == "__main__":
    for configuration, out in json.loads(Path(sys.argv[1]).read_text()):
        settings = yaml.safe_load(Path(configuration).read_text())
        options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False, random_seed=0)
        try:
            run_merge(MergeConfiguration.model_validate(settings), out, options=options)
        except Exception as error:
            Path(out).mkdir(parents=True, exist_ok=True)
            (Path(out) / "error.txt").write_text(f"{type(error).__name__}: {error}")
