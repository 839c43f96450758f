"""Functions of tests that need lmms-eval: each call in a process of its own.

Importing it changes the process that does it: log handlers, file locks, SSL, and whether Pillow
takes half an image for a whole one.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MARK = "returned: "


def call(function: str, home: Path, **options: Any) -> Any:
    """What `function`, such as "tests.module.name", returns for `options`; plain data both ways.

    `home` takes the caches of the Hugging Face libraries. There is no key for any judge.
    """
    environment = {
        "HF_HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.own_process", function, json.dumps(options, default=str)],
        env={k: v for k, v in os.environ.items() if not k.endswith(("_API_KEY", "_OFFLINE"))}
        | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    returned = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    assert done.returncode == 0 and returned, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(returned[-1].removeprefix(MARK))


if __name__ == "__main__":
    module, _, name = sys.argv[1].rpartition(".")
    result = getattr(importlib.import_module(module), name)(**json.loads(sys.argv[2]))
    print(MARK + json.dumps(result))
