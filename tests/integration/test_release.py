"""A release is one thing: version, changelog, tag and wheel agree."""

from __future__ import annotations

import datetime
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import storaged

ROOT = Path(__file__).resolve().parents[2]
VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")
SECTION = re.compile(r"^## (.+)$", re.MULTILINE)
DATED = re.compile(rf"({VERSION.pattern}) \((\d{{4}}-\d\d-\d\d)\)")


def sections() -> list[str]:
    return SECTION.findall((ROOT / "CHANGELOG.md").read_text())


def released() -> dict[str, datetime.date]:
    """version -> date, the newest first."""
    found = {}
    for title in sections()[1:]:
        dated = DATED.fullmatch(title)
        assert dated, f"CHANGELOG.md: «## {title}» is not «## 1.2.3 (2026-01-31)»"
        found[dated[1]] = datetime.date.fromisoformat(dated[5])
    return found


def test_the_changelog_begins_with_what_is_unreleased_and_then_the_programs_version() -> None:
    assert sections()[0] == "Unreleased"
    assert next(iter(released())) == storaged.__version__, "storaged/__init__.py and CHANGELOG.md differ"


def test_versions_and_dates_fall_down_the_changelog() -> None:
    versions = [tuple(map(int, version.split("."))) for version in released()]
    assert versions == sorted(set(versions), reverse=True)
    dates = list(released().values())
    assert dates == sorted(dates, reverse=True)


def test_every_tag_is_v_and_a_version_that_the_changelog_has() -> None:
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a clone")
    done = subprocess.run(["git", "tag", "--list"], cwd=ROOT, capture_output=True, text=True, check=True)
    for tag in done.stdout.split():
        assert tag.startswith("v"), f"the tag {tag} is not «v» and a version"
        assert tag[1:] in released(), f"CHANGELOG.md has no section for the tag {tag}"


@pytest.mark.slow
def test_the_wheel_has_every_module_the_documents_and_py_typed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "storaged", source / "storaged", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(
        [sys.executable, "-c", build], cwd=source, env=environment, capture_output=True, check=True, timeout=120
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"storaged-{storaged.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if name.startswith("storaged/")}
    wanted = {str(path.relative_to(source)) for path in (source / "storaged").rglob("*") if path.is_file()}
    assert names == wanted
    assert {"storaged/py.typed", "storaged/FORMATS.md", "storaged/README.md"} <= names
