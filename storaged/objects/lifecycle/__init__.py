"""The lifecycle of objects: what has to be looked at and when (``notes``, ``index``), and what a look does (``look``).

Theory of operation. Rules say when a version is due (``objects.code.lifecycle``). The *index* of a bucket says on which
day which keys have to be looked at, so that nobody walks over all objects each day. It is derived from the objects, and
decides nothing: a look judges the record again, inside the compare-and-set that deletes. So an entry that is lost,
false or there twice can delay a deletion or cost a look, and never deletes anything.

* A change of an object in a bucket with rules leaves a *note*, in memory: this key, on that day (``notes``). Another
  bucket pays the test of one bit. Each process of a gateway writes its notes as rows of the table LIFECYCLE, up to
  KEYS_A_ROW keys of one day in a row (``index``). Notes of a gateway that dies are lost.
* A *walk* over the bucket notes every object that has a day. It happens when the rules change, and once a week for what
  was lost. Its progress is a row, so that another gateway goes on where one stopped. When it has ended, older rows go.
* On a day, the rows up to that day are read in order; each key is looked at, and each row goes after its last key.

One gateway does this at a time (``maintain.lifecycle``); two at once do the same twice.

The index is not sealed: storage nodes know the keys of objects anyway, from their registers. A storage node that lies
about it can delay deletions.
"""
