"""Answers of IAM and STS on the S3 port. The code is the class name, as AWS documents it.

Sources: https://docs.aws.amazon.com/IAM/latest/APIReference/CommonErrors.html, and the page of each operation there and
in https://docs.aws.amazon.com/STS/latest/APIReference/.
"""

from __future__ import annotations

from storaged.errors.base import S3Error


class DeleteConflict(S3Error):
    """The request tried to delete a resource that has something attached. Detach or delete that first."""

    status = 409


class EntityAlreadyExists(S3Error):
    """The request tried to create a resource that already exists. Names differ by more than the case of letters."""

    status = 409


class ExpiredToken(S3Error):
    """The provided token has expired."""

    hint = "Get new temporary credentials (AssumeRole, GetSessionToken)."


class IncompleteSignature(S3Error):
    """The request signature does not conform to AWS standards."""


class InvalidClientTokenId(S3Error):
    """The security token included in the request is invalid."""

    status = 403


class LimitExceeded(S3Error):
    """The request tried to create more than a limit allows. The message names the limit."""

    status = 409


class MalformedPolicyDocument(S3Error):
    """The policy document was malformed. The message says where."""


class MissingAuthenticationToken(S3Error):
    """Request is missing Authentication Token"""

    status = 403


class NoSuchEntity(S3Error):
    """The request was rejected because it referenced a resource that does not exist."""

    status = 404


class PackedPolicyTooLarge(S3Error):
    """The policies of a session are larger than 2,048 characters in all."""


class ValidationError(S3Error):
    """A parameter of the request does not satisfy the constraints of the service. The message names it."""


class UnmodifiableEntity(S3Error):
    """The request tried to change a policy of AWS, which can't be changed."""
