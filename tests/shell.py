"""`radt index` for tests: in this process, with what it prints."""

import json
from typing import Any

import pytest

from index.cli import make_app, run


class Shell:
    """Runs the commands in this process, and keeps what they print."""

    def __init__(self, capsys: pytest.CaptureFixture[str], default_model: str | None):
        self.capsys = capsys
        self.app = make_app(default_model)

    def __call__(self, *words: object) -> tuple[int, str, str]:
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            run(self.app, [str(word) for word in words])
        out, err = self.capsys.readouterr()
        code = exit_.value.code
        assert isinstance(code, int)
        return code, out, err

    def json(self, *words: object) -> dict[str, Any]:
        code, out, err = self(*words, "--json")
        assert code == 0, err
        document: dict[str, Any] = json.loads(out)
        assert out.count("\n") == 1  # one document and nothing else
        return document

    def error(self, *words: object) -> str:
        code, out, err = self(*words)
        assert code == 1, (code, out, err)
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err
