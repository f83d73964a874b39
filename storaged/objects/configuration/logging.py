"""What is stored about access logs: where the log of a bucket's requests goes. Pure."""

from __future__ import annotations

from typing import Final

from storaged.objects.configuration.document import Kind
from storaged.wire import Message

SIMPLE: Final = "Simple"
EVENT_TIME: Final = "EventTime"
DELIVERY_TIME: Final = "DeliveryTime"


class BucketLogging(Message, frozen=True):
    """``target``: the bucket that gets the log. ``prefix``: of the keys there. ``format``: of these keys: one of the
    above, or empty (the client named none; keys are simple).
    """

    target: str
    prefix: str
    format: str = ""


LOGGING = Kind("logging", BucketLogging)
"""Not plain: what looks at answers for the log looks only at those of buckets that are not plain."""
