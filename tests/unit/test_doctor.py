import sys
from importlib.metadata import PackageNotFoundError

import pytest

from index.errors import CorpusError
from radt import doctor
from radt.corpora import emoji
from radt.doctor import Finding, examine, is_healthy, lines


@pytest.fixture
def listed(monkeypatch):
    """A radt that needs one package that is here, one that is not, and offers an extra that is not."""
    wanted = ["pillow>=10", "no-such-package>=2", 'other-package; extra == "serve"', 'never; python_version < "3"']
    monkeypatch.setattr(doctor, "requires", lambda name: wanted)
    return {finding.name: finding for finding in examine()}


def test_a_missing_requirement_is_broken_and_says_what_to_type(listed):
    assert listed["pillow"].state == "ok"
    assert listed["no-such-package"].state == "broken"
    assert listed["no-such-package"].remedy == "pip install 'no-such-package>=2'"


def test_a_missing_extra_is_merely_absent(listed):
    assert listed["other-package"].state == "absent"
    assert "radt[serve]" in listed["other-package"].remedy


def test_what_its_marker_rules_out_is_not_asked_for(listed):
    assert "never" not in listed


def test_health_is_the_absence_of_broken_things(listed):
    findings = list(listed.values())
    assert not is_healthy(findings)
    assert is_healthy([finding for finding in findings if finding.state != "broken"])


def test_a_radt_that_is_not_installed_says_so(monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", absent)
    monkeypatch.setattr(doctor, "version", absent)
    (finding,) = [finding for finding in examine() if finding.name == "radt"]
    assert finding.state == "broken"
    assert finding.remedy == "pip install '.'"


def test_a_missing_font_names_the_debian_package(monkeypatch):
    def none(path=None):
        raise CorpusError("no font")

    monkeypatch.setattr(emoji, "find_font", none)
    (finding,) = [finding for finding in examine() if finding.name == "colour-emoji font"]
    assert finding.state == "absent"
    assert "fonts-noto-color-emoji" in finding.remedy


def test_lines_show_every_finding_and_its_remedy():
    findings = [
        Finding(name="disk", state="ok", detail="9 GiB"),
        Finding(name="font", state="absent", detail="none", remedy="apt"),
    ]
    *body, verdict = lines(findings)
    assert body == ["ok      disk  9 GiB", "absent  font  none", "              -> apt"]
    assert verdict == "everything that radt must have is here"
    assert lines([Finding(name="x", state="broken", detail="gone")])[-1] == "1 of these must be mended"


def test_a_package_that_does_not_import_is_a_finding_and_not_a_traceback(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (finding,) = [finding for finding in examine() if finding.name == "device"]
    assert finding.state == "broken"
    assert "torch" in finding.detail
