"""`python -m mergequest`: the command line without its console script."""

import os
import sys

# `-m` puts the working directory first: a `yaml.py` or `search/` of the user's there would be imported instead of ours.
# Only `os` and `sys` are imported by now, which Python itself needs before it looks there.
if not sys.flags.safe_path and os.path.realpath(sys.path[0]) != os.path.realpath(f"{__file__}/../.."):
    del sys.path[0]

from flows.cli.app import main

main()
