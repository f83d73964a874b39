"""How the command line finds its cluster and understands the names of nodes and racks."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from storaged.admin.place import lock_directory, running_pid, short_path
from storaged.cli.target import (
    NodeName,
    command_for,
    find_directory,
    gateway_directory,
    known_directories,
    record_default,
    resolve,
)
from storaged.errors import AmbiguousName, DirectoryInUse, NotRunning, SeveralClusters

NODES = [
    NodeName("n1", "FR/par1/a", ("storage",)),
    NodeName("n2", "FR/par2/b", ("storage",)),
    NodeName("n3", "FR/lyo1/c", ("storage",)),
    NodeName("gateway", "FR/par1/a", ("gateway",)),
]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n2", ["n2"]),
        ("par2", ["n2"]),
        ("b", ["n2"]),
        ("FR/par2/b", ["n2"]),
        ("FR/par2", ["n2"]),
        ("par2/b", ["n2"]),
        ("FR/par2/b/n2", ["n2"]),
        ("/par2/", ["n2"]),
        ("gateway", ["gateway"]),
        ("a", ["n1"]),
        ("par1/a", ["n1"]),
    ],
)
def test_a_name_is_any_unambiguous_part_of_the_path(text: str, names: list[str]) -> None:
    assert [node.name for node in resolve(text, NODES)] == names


def test_a_rack_means_all_storage_nodes_in_it() -> None:
    more = [*NODES, NodeName("n4", "FR/par2/b", ("storage",))]
    assert [node.name for node in resolve("b", more)] == ["n2", "n4"]


@pytest.mark.parametrize(
    ("text", "word"),
    [("FR", "more than one"), ("par", "no node"), ("", "no node"), ("par2/a", "no node"), ("N2", "no node")],
)
def test_an_ambiguous_or_unknown_name_is_refused_with_what_there_is(text: str, word: str) -> None:
    with pytest.raises(AmbiguousName, match=word):
        resolve(text, NODES)


def test_the_last_trial_cluster_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with pytest.raises(NotRunning):
        find_directory(None)
    cluster = tmp_path / "cluster"
    cluster.mkdir()
    (cluster / "dev.json").write_text(
        json.dumps({"nodes": [{"name": "gw", "rack": "FR/par1/a", "roles": ["gateway"]}]})
    )
    record_default(cluster)
    assert find_directory(None) == cluster
    assert gateway_directory(cluster) == cluster / "gw"


def trial_cluster(place: Path) -> Path:
    place.mkdir()
    (place / "dev.json").write_text(json.dumps({"nodes": []}))
    record_default(place)
    return place


def test_the_trial_cluster_that_runs_comes_before_the_one_started_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("STORAGED_DIR", raising=False)
    first, second = trial_cluster(tmp_path / "first"), trial_cluster(tmp_path / "second")
    assert find_directory(None) == second
    lock = lock_directory(first)
    assert find_directory(None) == first
    assert (command_for(first), command_for(second)) == ("storaged", f"storaged --dir {second}")
    os.close(lock)
    assert known_directories() == [second, first]


def test_with_two_running_clusters_a_command_must_name_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("STORAGED_DIR", raising=False)
    first, second = trial_cluster(tmp_path / "first"), trial_cluster(tmp_path / "second")
    locks = [lock_directory(first), lock_directory(second)]
    with pytest.raises(SeveralClusters, match=f"{first}, {second}"):
        find_directory(None)
    assert command_for(first) == f"storaged --dir {first}"
    assert find_directory(str(first)) == first
    monkeypatch.setenv("STORAGED_DIR", str(first))
    assert command_for(first) == "storaged"
    for lock in locks:
        os.close(lock)


def test_a_directory_without_a_cluster_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotRunning, match="no cluster"):
        find_directory(str(tmp_path))


def test_a_node_directory_answers_for_itself(tmp_path: Path) -> None:
    (tmp_path / "config.toml").touch()
    assert gateway_directory(find_directory(str(tmp_path))) == tmp_path


def test_a_directory_is_locked_by_one_process_and_says_by_which(tmp_path: Path) -> None:
    assert running_pid(tmp_path) is None
    lock = lock_directory(tmp_path)
    assert running_pid(tmp_path) == os.getpid()
    with pytest.raises(DirectoryInUse, match=str(os.getpid())):
        lock_directory(tmp_path)
    os.close(lock)
    assert running_pid(tmp_path) is None


def test_a_socket_deep_in_the_tree_gets_a_name_that_fits(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    (deep / "x").touch()
    with short_path(deep / "x") as name:
        assert len(name) < 100
        assert os.path.samefile(name, deep / "x")
