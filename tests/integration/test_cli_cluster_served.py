"""From nothing to folders that are copied to servers; keys that are made once; and errors that say what to do.

These are the tests that need a server or a process; the others are in tests/unit.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_cli_cluster import outcome


def test_status_of_a_stopped_trial_cluster_lists_its_nodes_and_is_down(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    nodes = [
        {"name": "n1", "rack": "FR/par1/a", "roles": ["storage"]},
        {"name": "gateway", "rack": "FR/par1/a", "roles": ["gateway"]},
    ]
    (tmp_path / "dev.json").write_text(json.dumps({"nodes": nodes}))
    code, out, _ = outcome(capsys, "--dir", str(tmp_path), "status", "--json")
    found = json.loads(out)
    assert code == 2
    assert found["verdict"] == "DOWN"
    assert [(node["name"], node["state"], node["pid"]) for node in found["nodes"]] == [
        ("n1", "down", None),
        ("gateway", "down", None),
    ]
    assert {entry["code"] for entry in found["problems"]} == {"NOT_RUNNING", "NODE_DOWN"}
    code, out, _ = outcome(capsys, "--dir", str(tmp_path), "status")
    assert out.startswith("DOWN")


def test_a_script_that_asks_for_json_gets_its_error_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments in (("status", "--json"), ("user", "list", "--json"), ("where", "s3://b/k", "--json")):
        code, out, shown = outcome(capsys, "--dir", str(tmp_path), *arguments)
        assert (code, json.loads(out)["error"]["code"]) == (2, "NOT_RUNNING")
        assert json.loads(out)["error"]["hint"]
        assert "no cluster" in shown
    (tmp_path / "config.toml").touch()
    (tmp_path / "admin.sock").symlink_to("admin.sock")  # connecting fails with an error that no command expects
    code, out, _ = outcome(capsys, "--dir", str(tmp_path), "user", "list", "--json")
    assert (code, json.loads(out)["error"]["code"]) == (1, "OPERATOR_ERROR")
    code, out, _ = outcome(capsys, "--dir", str(tmp_path), "user", "list")
    assert (code, out) == (1, "")
    for arguments in (("stauts",), ("bucket", "usage"), ("status", "--bogus")):
        code, out, shown = outcome(capsys, *arguments, "--json")
        assert (code, json.loads(out)["error"]["code"]) == (2, "OPERATOR_ERROR")
        assert json.loads(out)["error"]["message"] in shown


def test_help_imports_no_plane() -> None:
    program = (
        "import sys\nfrom storaged.cli.main import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\nbad"
        " = [m for m in sys.modules if m.split('.')[0] in ('aiohttp', 'lmdb', 'cryptography', 'msgspec', 'rich',"
        " 'structlog', 'asyncio')]\nsys.exit(' '.join(bad) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "dev" in done.stdout


def test_a_node_starts_without_what_it_never_uses(tmp_path: Path) -> None:
    """structlog would import rich and pygments, which may be installed for others."""
    program = (
        "import sys\nfrom storaged.cli.main import main\ntry:\n    main(['run', sys.argv[1]])\nexcept SystemExit:\n"
        "    pass\nassert 'storaged.node.node' in sys.modules\nbad = [m for m in sys.modules if sys.modules[m] and"
        " m.split('.')[0] in ('rich', 'pygments')]\nsys.exit(' '.join(bad) or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "none")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
