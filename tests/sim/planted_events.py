"""What brings events to their destinations, broken. The play ``events`` notices.

Plain data: imports nothing of the program.
"""

from __future__ import annotations

from tests.sim.planted import Planted

_OUTBOX = "storaged/objects/write/outbox.py"
_DELIVERY = "storaged/objects/event_delivery.py"
_PUT = "storaged/objects/write/put.py"
_PLAY = "events"

EVENT_BUGS = (
    Planted(
        "event_outside_of_the_change",
        "an event is sent when the change was acknowledged, and is not in the record",
        20,
        _PLAY,
        _OUTBOX,
        "        draft.outbox = (*draft.outbox, *added)\n",
        "        self._count = 0\n",
        fast=True,
    ),
    Planted(
        "removed_before_the_acknowledgement",
        "events are removed from the record when they are sent",
        20,
        _PLAY,
        _DELIVERY,
        "            else:\n                self.counts.failed += 1\n",
        "            else:\n                done.add(event.id)\n                self.counts.failed += 1\n",
        fast=True,
    ),
    Planted(
        "later_events_overtake",
        "events go on although an earlier one of the key has failed",
        20,
        _PLAY,
        _DELIVERY,
        "            if facts.destination in stuck:\n                continue\n",
        "",
    ),
    Planted(
        "noted_after_the_change",
        "the key is noted in its pointer after the accept",
        40,
        _PLAY,
        _PUT,
        " after_promise=added.before_accept)\n",
        " after_promise=lambda: added.change.put_pages(write.plane.pages, write.part.name))\n"
        "    if outgoing is not None:\n        await outgoing.note()\n",
    ),
    Planted(
        "stamps_stand_still",
        "a pointer loses a key although another change has noted it since",
        40,
        _PLAY,
        _OUTBOX,
        "        if stamps.get(name.key) != stamp:\n            return None\n        del stamps[name.key]\n",
        "        if name.key not in stamps:\n            return None\n        del stamps[name.key]\n",
    ),
    Planted(
        "forgotten_without_a_round",
        "a pointer loses a key whose outbox a mere read found empty",
        20,
        _PLAY,
        _OUTBOX,
        "    record = decode_record(await plane.registers.settle(name))\n",
        "    record = decode_record((await plane.registers.read(name)).value)\n",
    ),
)
