"""Bugs in acceptors, proposers, readers and what carries their messages.

Plain data: imports nothing of the program.
"""

from __future__ import annotations

from tests.sim.planted import Planted

REPLICA = "storaged/meta/acceptor/replica.py"
ACCEPTOR = "storaged/meta/consensus/acceptor.py"
OVERTAKING = "storaged/meta/consensus/overtaking.py"
PROPOSER = "storaged/meta/consensus/proposer.py"
READER = "storaged/meta/consensus/reader.py"
REGISTER = "storaged/meta/consensus/register.py"
ROUNDS = "storaged/meta/consensus/rounds.py"
QUORUMS = "storaged/meta/consensus/quorums.py"
PENDING = "storaged/meta/acceptor/pending_accept.py"
FENCES = "storaged/meta/acceptor/fences.py"
ROWS = "storaged/meta/acceptor/rows.py"

_ACCEPTORS = (
    Planted(
        "full_and_ok",
        "a disk without room says that it has the row",
        100,
        path=REPLICA,
        old="            on_answer(self._refused(Verdict.FULL, acceptor, name, ballot))\n",
        new="            on_answer(messages.AcceptReply(Verdict.OK, ballot))\n",
    ),
    Planted(
        "full_is_known",
        "a change that full disks refused counts as not made, though another disk may have it",
        400,
        path=PROPOSER,
        old='                return self._give_up("disks of its replicas have no room for it")\n',
        new='                return self._fail(__import__("storaged.errors").errors.ServiceUnavailable("full"))\n',
    ),
    Planted(
        "prepare_beside_accept",
        "a prepare is answered while an accept of its register is on its way to the disk (rule 1)",
        200,
        path=REPLICA,
        old="        if name in self.pending.by_name:\n            return None\n"
        "        check_name(name, ballot)\n        state",
        new="        check_name(name, ballot)\n        state",
    ),
    Planted(
        "evicted_without_floor",
        "a promise that is evicted raises no floor",
        600,
        path=ACCEPTOR,
        old="            self._raise_common(evicted)\n",
        new="",
    ),
    Planted(
        "accept_sees_no_row",
        "an accept under a ballot that is not promised is judged as if it were",
        100,
        path=REPLICA,
        old="        if not request.identity and self.state.promises.get(name) == ballot:\n",
        new="        if not request.identity:\n",
        fast=True,
    ),
    Planted(
        "any_accept_joins",
        "an accept that meets another one of its register gets that one's answer",
        200,
        path=PENDING,
        old="        if same:\n            self.again.append(on_answer)\n        return same",
        new="        self.again.append(on_answer)\n        return True",
    ),
    Planted(
        "epoch_fence_not_kept",
        "a fence of an epoch is forgotten at a restart (rule 10)",
        1500,
        path=REPLICA,
        old='int.from_bytes(epoch or b"", "big")',
        new="0",
    ),
    Planted(
        "high_water_not_awaited",
        "a promise does not wait for the high-water ballot (rule 2)",
        1500,
        path=REPLICA,
        old="            if needs_high_water(ballot, state.high_water_at(ballot.epoch)):\n"
        "                return None\n",
        new="",
        tests="tests/unit/test_replica.py::test_a_promise_beyond_the_high_water_ballot_waits_for_the_disk",
        why=(
            "The promise that is not awaited begins to write the high-water ballot. Its disk has to die within "
            "these ms, and another proposer has to come in below, before the accept."
        ),
    ),
    Planted(
        "damaged_row_created",
        "a create is taken where the row is damaged",
        1500,
        path=ACCEPTOR,
        old="    if acceptor.damaged:\n        return Verdict.DAMAGED\n    if acceptor.accepted not in",
        new="    if acceptor.accepted not in",
        tests="tests/unit/test_create.py::test_a_create_is_taken_by_who_holds_nothing",
        why=(
            "What is damaged counts as promised up to the high-water ballot. So the create has to come from a clock "
            "that is 5 s ahead, where one of the others has missed what was chosen."
        ),
    ),
    Planted(
        "damaged_row_forgets_promises",
        "a replica with a damaged row promises what it may have promised to others",
        1500,
        path=ACCEPTOR,
        old="        above_all = max(self.promises.get(name, ZERO_BALLOT), self.common_at(epoch), high_water)\n",
        new="        above_all = ZERO_BALLOT\n",
        tests="tests/unit/test_replica.py::test_a_damaged_row_counts_for_nothing_until_a_higher_ballot",
        why=(
            "An accept has to sleep while another change is chosen without one replica, and a row of that change "
            "has to be damaged before the accept arrives."
        ),
    ),
    Planted(
        "damaged_row_is_none",
        "a damaged row is read as one that was never written",
        300,
        path=ROWS,
        old="            return None, self._state.of_damaged(name, fence, epoch)\n",
        new="            return None, self._state.of(name, None, fence, epoch)\n",
    ),
    Planted(
        "tombstone_dropped",
        "a register is dropped with its deletion (rule 7)",
        200,
        path=ROWS,
        old="        return slot, self._state.of(name, slot, fence, epoch)\n",
        new="        if slot is not None and slot.value.visibility == 0:\n            slot = None\n"
        "        return slot, self._state.of(name, slot, fence, epoch)\n",
        fast=True,
    ),
)

_PROPOSERS = (
    Planted(
        "create_by_less_than_a_quorum",
        "a create counts one disk too early",
        1000,
        path=ROUNDS,
        old="        if len(taken) < quorum.fewest or not",
        new="        if len(taken) < quorum.fewest - 1 or not",
    ),
    Planted(
        "held_by_some_is_held_everywhere",
        "a create that a majority refused counts as over, although a replica may have taken it",
        3000,
        path=ROUNDS,
        old="everywhere=len(self._held) == len(self._quorum.disks)",
        new="everywhere=True",
    ),
    Planted(
        "lost_create_overtakes",
        "a create that is lost counts among what a created value has overtaken",
        5000,
        path=OVERTAKING,
        old=" for reply in self._counted if reply.accepted != self.lost_at]",
        new=" for reply in self._counted]",
        tests="tests/property/test_proposer.py::test_a_create_that_lost_raises_no_sequence_of_what_it_lost_against",
        why="It costs unknown outcomes, and nothing else: the value gets a sequence above that of the own create.",
    ),
    Planted(
        "created_below_ignored",
        "a value below the ballot of an own create counts against the create",
        3000,
        path=REGISTER,
        old="        below = ballot < created_at\n",
        new="        below = False\n",
        tests="tests/unit/test_create.py::test_what_lies_below_a_create_does_not_descend_from_it_and_does_not_end_it",
        why=(
            "Mostly it costs an unknown outcome. To be seen, a PUT has to be applied twice, with another change "
            "between."
        ),
    ),
    Planted(
        "first_attempt_judges_nothing",
        "a sparing attempt does not ask what became of the create before it",
        300,
        path=PROPOSER,
        old="        if standing is Standing.CLEAR:\n",
        new="        if standing is Standing.CLEAR or self.sparing:\n",
    ),
    Planted(
        "unsettled_reported",
        "a failed condition is reported on a value that no quorum has confirmed (rule 5)",
        300,
        path=PROPOSER,
        old="        if self._found.settled and not self._wanted.commit and not self.lineage.open:\n",
        new="        if not self._wanted.commit:\n",
    ),
    Planted(
        "own_attempt_left_open",
        "a failed condition is reported while an own attempt may yet be applied",
        3000,
        path=PROPOSER,
        old="        if self._found.settled and not self._wanted.commit and not self.lineage.open:\n",
        new="        if self._found.settled and not self._wanted.commit:\n",
        tests="tests/unit/test_create.py::test_no_create_that_one_replica_took_overturns_an_answer",
        why=(
            "The first attempt has to go on from an unconfirmed value that one replica has, the second one must not "
            "see that replica, and a third proposer must miss another one."
        ),
    ),
    Planted(
        "kept_copy_left_behind",
        "a change that keeps the copy of an unconfirmed value does not bring the copy along",
        2000,
        path=PROPOSER,
        old="        if copies is None and (found is None or change.payload != found.payload):\n",
        new="        if copies is None:\n",
        tests="tests/unit/test_change_ends.py::test_a_change_that_keeps_the_copy_of_a_settled_record_sends_none",
        why=(
            "A replica without the copy refuses the row (rule 22), and the next read settles the record with its "
            "copy. So it costs refused changes until then."
        ),
    ),
    Planted(
        "sparing_adopts_create_in_place",
        "a created value that has overtaken another keeps its sequence in a first attempt (rule 14)",
        2000,
        path=PROPOSER,
        old="        if not self._found.settled and may_create(self.name):\n",
        new="        if not (self.sparing or self._found.settled) and may_create(self.name):\n",
        tests="tests/unit/test_create.py::test_a_proposer_carries_a_create_on_after_the_chosen_value",
        why=(
            "A new value's sequence is above all that its promises report, settled or not, so that none falls. "
            "Only what the attempt says of the value before differs."
        ),
    ),
    Planted(
        "condition_judged_once",
        "a condition is judged by the first attempt alone, and not by the record of the prepare that counts",
        300,
        path=PROPOSER,
        old="            change = self._wanted.update(value)\n        except",
        new="            change = getattr(self._wanted.update, 'once', None) or self._wanted.update(value)\n"
        "            self._wanted.update.once = change\n        except",
        fast=True,
    ),
    Planted(
        "acknowledged_with_too_few_copies",
        "a change is acknowledged when a quorum has accepted it, wherever its copies are",
        50,
        "flicker",
        path=ROUNDS,
        old="        return self._copies is None or self._copies.enough(self._synced())\n",
        new="        return True\n",
        fast=True,
    ),
    Planted(
        "unknown_is_clear",
        "a change is tried again although an earlier attempt may be in the value's past (rule 6)",
        200,
        path=PROPOSER,
        old="        if standing is Standing.UNKNOWN or found is None:\n",
        new="        if standing is Standing.UNKNOWN and found is not None:\n            return self._apply()\n"
        "        if found is None:\n",
        fast=True,
    ),
    Planted(
        "newest_by_first_answer",
        "the first promise leads, not the one with the highest ballot",
        100,
        path=ROUNDS,
        old="                if reply.accepted > newest.accepted:\n                    newest = reply\n",
        new="",
    ),
    Planted(
        "late_accept_counts_twice",
        "answers to an earlier accept count for a later one",
        3000,
        path=PROPOSER,
        old="        if turn != self.turn or self.state is not ACCEPTING:\n",
        new="        if self.state is not ACCEPTING:\n",
        tests="tests/property/test_proposer.py::test_an_answer_to_an_earlier_accept_does_not_count_for_a_later_one",
        why="The late answer has to come within the ms of a later accept that reaches one replica alone.",
    ),
    Planted(
        "half_is_a_quorum",
        "half of a set is a majority",
        100,
        path=QUORUMS,
        old="        self.fewest = max(len(disks) for disks in sets) // 2 + 1\n",
        new="        self.fewest = (max(len(disks) for disks in sets) + 1) // 2\n"
        "        if self.fewest == 2:\n            self.fewest = 1\n",
    ),
)

_READERS = (
    Planted(
        "read_of_one",
        "a read believes one replica (rule 3)",
        100,
        path="storaged/meta/proposer/read.py",
        old="        asked = view.quorum.prefix(self._suspects.last(view.quorum.disks))\n",
        new="        asked = self._suspects.last(view.quorum.disks)[:1]\n",
        fast=True,
    ),
    Planted(
        "checks_not_compared",
        "a read does not compare the checks of rows (rule 3)",
        100,
        path=READER,
        old="        if row_hash is None or (self._hash is not None and row_hash != self._hash):\n",
        new="        if row_hash is None:\n",
        fast=True,
    ),
)

_FENCES = (
    Planted(
        "fence_not_kept",
        "a fence is forgotten at a restart",
        300,
        "buckets",
        FENCES,
        "            fence = self._store.get_fence(scope)\n",
        "            fence = None\n",
        fast=True,
    ),
    Planted(
        "fence_does_not_wait",
        "a fence is answered while accepts are on their way to the disk",
        2000,
        "buckets",
        REPLICA,
        "        await self._writes.durably(*write)\n        await self.pending.all_arrived()\n",
        "        await self._writes.durably(*write)\n",
        tests="tests/unit/test_replica.py::test_a_fence_is_answered_after_an_accept_whose_copy_arrives_late",
        why=(
            "Groups reach a disk in their order. So the row of an accept comes after the fence only where its copy "
            "takes longer."
        ),
    ),
    Planted(
        "final_fence_lifted",
        "the fence of a bucket that is gone is lifted",
        2000,
        "buckets",
        FENCES,
        "        if present is not None and (present.final or nonce < present.nonce):\n            return False\n",
        "",
        tests="tests/unit/test_replica.py::test_a_fence_is_lifted_by_its_nonce_unless_it_is_final",
        why=(
            "A gateway that deletes has to sleep until another one has deleted the bucket for good under the same "
            "nonce."
        ),
    ),
    Planted(
        "late_fence_stays",
        "a fence that comes late, after it was lifted, is set",
        2000,
        "buckets",
        FENCES,
        "        if not final and (nonce <= self._lifted(scope) or (present is not None and nonce < present.nonce)):\n"
        "            return None\n",
        "",
    ),
    Planted(
        "older_fence_counts",
        "a fence counts when all that was judged before an older one has arrived",
        1,
        path=FENCES,
        old="        if self._arriving.get(scope) == nonce:\n",
        new="        if scope in self._arriving:\n",
        tests="tests/unit/test_replica.py",
        why="An accept must wait for its copy for longer than a deletion that finds an object, and the next one, take.",
    ),
    Planted(
        "any_change_passes_fence",
        "whoever has the nonce may change values of a fenced bucket",
        2000,
        "buckets",
        ACCEPTOR,
        "    if acceptor.fence is not None and not _passes(acceptor.fence, nonce, identity, rules):\n",
        "    if acceptor.fence is not None and not _passes(acceptor.fence, nonce, True, rules):\n",
        tests="tests/unit/test_register.py::test_an_accept_is_answered_by_the_table",
        why=(
            "Prepares are fenced too, and the deletion settles each key above earlier promises. What is left is the "
            "first change of a key, which was promised before the fence and sleeps until the deletion has looked."
        ),
    ),
    Planted(
        "fenced_create",
        "a create passes a fence",
        300,
        "buckets",
        ACCEPTOR,
        "    verdict = judge_accept(acceptor, ballot, value, nonce, identity, rules, copied=copied)\n",
        "    acceptor = acceptor._replace(fence=None)\n"
        "    verdict = judge_accept(acceptor, ballot, value, nonce, identity, rules, copied=copied)\n",
        tests="tests/unit/test_create.py::test_a_create_is_taken_by_who_holds_nothing",
        why=(
            "Gateways look at the bucket's record before they create. So a create has to be on its way when the "
            "fence is set, for a key without any row, and arrive after the deletion has looked."
        ),
    ),
    Planted(
        "bucket_not_fenced",
        "a bucket is deleted without a fence",
        300,
        "buckets",
        "storaged/objects/system/buckets.py",
        "        everywhere = await plane.fences.fence(bucket.id, bucket.shard_numbers, bucket.nonce)\n",
        "        everywhere = True\n",
    ),
    Planted(
        "one_shard_fenced",
        "a fence is set on the first shard alone",
        1000,
        "buckets",
        "storaged/objects/system/buckets.py",
        "        everywhere = await plane.fences.fence(bucket.id, bucket.shard_numbers, bucket.nonce)\n",
        "        everywhere = await plane.fences.fence(bucket.id, bucket.shard_numbers[:1], bucket.nonce)\n",
        tests="tests/unit/test_objects_buckets.py::test_a_deletion_fences_every_shard_before_it_looks_and_for_good",
        why=(
            "A fence is that of the bucket at each disk, and two shards of five disks share a disk at least. So two "
            "changes of three are fenced all the same."
        ),
    ),
)

_TRANSPORT = (
    Planted(
        "accepts_mixed_up",
        "the answers to the accepts of one message go to each other's callers",
        50,
        "bursts",
        path="storaged/meta/transport/accept_batching.py",
        old="            replies, errors = answer.replies, answer.errors\n",
        new="            replies, errors = answer.replies[::-1], answer.errors\n",
        fast=True,
    ),
    Planted(
        "one_answer_for_all",
        "the answer to the first accept of a message counts for all of them",
        50,
        "bursts",
        path="storaged/meta/transport/accept_batching.py",
        old="            replies, errors = answer.replies, answer.errors\n",
        new="            replies, errors = [answer.replies[0]] * count, answer.errors\n",
        fast=True,
    ),
    Planted(
        "refused_with_another",
        "one refused accept of a message counts for all of them",
        50,
        "bursts",
        path="storaged/meta/transport/accept_batching.py",
        old="            replies, errors = answer.replies, answer.errors\n",
        new="            replies, errors = answer.replies, answer.errors\n"
        "            if refused := [reply for reply in replies if reply is not None and reply.verdict]:\n"
        "                replies = refused[:1] * count\n",
        fast=True,
    ),
    Planted(
        "creates_as_accepts",
        "creates of one message are judged as accepts",
        200,
        path="storaged/meta/transport/accept_batching.py",
        old="            creates.append(create)\n",
        new="            creates.append(False)\n",
    ),
    Planted(
        "rows_mixed_up",
        "the rows of one message go to each other's callers",
        200,
        "bursts",
        path="storaged/meta/transport/read_batching.py",
        old="            for ask, on_row, row in zip(asks, callbacks, rows, strict=False):\n",
        new="            for ask, on_row, row in zip(asks, callbacks, rows[::-1], strict=False):\n",
    ),
    Planted(
        "pending_row_read",
        "a read shows the row before an accept that is on its way, without waiting for that",
        600,
        path=ROWS,
        old=" or (pending and RegisterName.unpack(name) in pending):\n",
        new=":\n",
        open=True,
        why=(
            "It is no violation: an accept that is on its way was not answered, so the row before it is a right "
            "answer. The read comes before the change. Waiting only spares readers a disagreement of the replicas."
        ),
    ),
)

CONSENSUS_BUGS = (*_ACCEPTORS, *_PROPOSERS, *_READERS, *_FENCES, *_TRANSPORT)
