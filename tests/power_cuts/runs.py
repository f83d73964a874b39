"""Runs plays by seed, and says what happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.power_cuts.faulty import DRIVES as DRIVES
from tests.sim.file_disk import directory_for_files

CUTS_A_SEED = 20
REPORT_EVERY_S = 30.0


@dataclass
class Outcome:
    """``failures``: by seed, in which life of the disk, and why."""

    cuts: int = 0
    seeds: int = 0
    seconds: float = 0.0
    first: int = 0
    happened: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, object]] = field(default_factory=list)

    def write(self, path: Path) -> None:
        rate = self.cuts / self.seconds if self.seconds else 0.0
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps({**vars(self), "cuts_per_s": round(rate, 1)}))
        fresh.replace(path)


def run_seed(seed: int, directory: Path, outcome: Outcome, *, cuts: int = CUTS_A_SEED, drive: str = "sound") -> None:
    """Plays one disk, and adds its failures to the outcome."""
    directory.mkdir()
    play = DRIVES[drive](seed, directory)
    try:
        with play.attached():
            while play.cuts < cuts and not play.over:
                play.cut()
            play.finish()
    except Exception as error:
        where = traceback.format_exc(limit=-3)
        outcome.failures.append({"seed": seed, "life": play.cuts + 1, "why": f"{type(error).__name__}: {error}"[:500]})
        outcome.failures[-1]["where"] = where[:3000]
    finally:
        shutil.rmtree(directory)
    outcome.cuts += play.cuts
    outcome.seeds += 1
    outcome.happened.update(play.happened)


def run_seed_apart(seed: int, directory: Path, outcome: Outcome, *, cuts: int, drive: str) -> None:
    """As ``run_seed``, in a process of its own. LMDB does not verify its pages, so false pages of a lying drive may
    kill the process. That is counted, and is no failure, since no wrong byte is served.
    """
    report = directory.with_suffix(".json")
    child = os.fork()
    if not child:
        try:
            mine = Outcome()
            run_seed(seed, directory, mine, cuts=cuts, drive=drive)
            mine.write(report)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert not os.WIFEXITED(status) or not os.WEXITSTATUS(status), f"seed {seed} did not end"
    outcome.seeds += 1
    if os.WIFSIGNALED(status):
        outcome.cuts += cuts
        outcome.happened[f"died by {signal.Signals(os.WTERMSIG(status)).name}"] += 1
        shutil.rmtree(directory, ignore_errors=True)
        return
    found = json.loads(report.read_text())
    report.unlink()
    outcome.cuts += found["cuts"]
    outcome.happened.update(found["happened"])
    outcome.failures.extend(found["failures"])


def run(first: int, cuts: int, report: Path | None = None, *, drive: str = "sound") -> Outcome:
    """Plays seeds from ``first`` on until there were ``cuts`` cuts."""
    outcome, began_s = Outcome(first=first), time.monotonic()
    reported_s = began_s
    play = run_seed_apart if drive == "lying" else run_seed
    with directory_for_files() as place:
        while outcome.cuts < cuts:
            play(
                first + outcome.seeds,
                Path(place) / "seed",
                outcome,
                cuts=min(CUTS_A_SEED, cuts - outcome.cuts),
                drive=drive,
            )
            now_s = time.monotonic()
            outcome.seconds = now_s - began_s
            if report is not None and (now_s - reported_s > REPORT_EVERY_S or outcome.cuts >= cuts):
                outcome.write(report)
                reported_s = now_s
    return outcome
