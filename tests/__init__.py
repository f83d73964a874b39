"""The tests, from small to large.

* ``unit``: one plane of the product, or one module, on doubles. No server, no process (``unit/conftest.py`` refuses
  them); files where a store is what is tested.
* ``property``: what holds of all inputs, with Hypothesis or with seeded histories.
* ``integration``: several planes together in one process, real sockets, real processes of single commands.
* ``sim``: the whole ring on a virtual clock, from a seed that a failure prints.
* ``s3``: real clients against a cluster of real processes. They mostly wait: three files run at a time, beside
  the folders above. Commands are processes that ``commands`` forks.
* ``chaos``: the same, whose processes are killed and whose disks are damaged.

``doubles`` implement the product's ports in memory. ``suites`` has what every implementation of a port does: the
product's own ones and the doubles run it. ``worlds`` are arrangements that several tests share.

Markers: ``alone`` for what needs the whole machine; ``slow`` for what takes a second
or more; ``virtual_time`` for what runs in memory, on a loop whose time jumps to the next timer. ``tests/run --fast``
leaves the first two out and tries properties with a tenth of their examples (``examples``). How long a test waits for
what must happen is in ``patience``.
"""
