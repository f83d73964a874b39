"""Deletes data that no register needs any more: mark, settle, compare, delete if unchanged.

All collection of data that a record may name goes through ``delete_unneeded``: of replaced and of unclaimed fragments
(``gc``), of manifest pages (``manifest_gc``), and of false fragments that are in the way of repair (``discard``).

Theory of operation. A writer makes sure that its data is there after its promise, and before its accept. The order of
these steps makes each deletion safe against it:

1. *Mark.* The store remembers the data as it is now. A writer that makes sure of it changes that.
2. *Settle.* The register that the data belongs to is brought to a value that ends what was promised before. The use
   says how: two looks around a round that a gateway makes (``disuse``), a round of one's own, or a settled read.
3. *Compare.* Data that this value refers to stays, and so does data that can't be judged now.
4. *Delete if unchanged.* The store compares with the mark and deletes in one step. Data that has changed since stays.

So a writer gets its promise either before the settling, which ends the promise, or after it. In the second case it
finds that its data is gone, or it has changed the data before the store compared it with the mark.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from storaged.maintain.disuse import Proof
from storaged.meta.names import RegisterName

T = TypeVar("T")

Prove = Callable[[Sequence[RegisterName]], Awaitable[Mapping[RegisterName, Proof | str]]]
"""Settles registers. Returns for each a proof, or the reason why there is none now."""


class Use(Protocol[T]):
    """One kind of data, in its store."""

    async def mark(self, items: Sequence[T]) -> None: ...

    def unmark(self, items: Sequence[T]) -> None:
        """The store need not remember them any more."""

    async def compare(self, owner: RegisterName, items: Sequence[T], proof: Proof) -> Sequence[T]:
        """Those that may go."""

    def wait(self, items: Sequence[T], reason: str) -> None:
        """They can't be judged now."""

    async def delete_unchanged(self, items: Sequence[T]) -> int:
        """Returns how much was deleted. Data that has changed since ``mark`` stays."""


async def delete_unneeded(prove: Prove, use: Use[T], found: Mapping[RegisterName, Sequence[T]]) -> int:
    """``found``: by the register that it belongs to. Returns how much was deleted. Raises what the use raises."""
    everything = [item for items in found.values() for item in items]
    await use.mark(everything)
    try:
        proofs = await prove(list(found))
        doomed: list[T] = []
        for owner, items in found.items():
            proof = proofs.get(owner, "it was not looked at")
            if isinstance(proof, str):
                use.wait(items, proof)
            else:
                doomed.extend(await use.compare(owner, items, proof))
        return await use.delete_unchanged(doomed) if doomed else 0
    finally:
        use.unmark(everything)
