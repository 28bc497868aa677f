import json
import resource
import subprocess
import sys

import pytest

HEAVY = ("torch", "lancedb", "lance", "open_clip", "transformers", "scann", "numpy", "PIL", "pyarrow")
PROGRAM = f"""
import json, sys
from radt.cli import main
try:
    main()
except SystemExit as end:
    print(json.dumps([end.code, [name for name in {HEAVY!r} if name in sys.modules]]))
"""


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["generate", "--help"],
        ["index", "build", "--help"],
        ["index", "plan", "--help"],
        ["train", "--help"],
    ],
)
def test_help_imports_nothing_heavy(words):
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=True)
    code, imported = json.loads(done.stdout.splitlines()[-1])
    assert code in (0, None)
    assert imported == []


def test_help_takes_less_than_half_a_second_of_processor_time():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "radt.cli", "--help"], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
