"""Answers of the S3 front that are about the request (304, 4xx). The code is the class name, as AWS documents it.

Source: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
"""

from __future__ import annotations

from storaged.errors.base import S3Error


class NotModified(S3Error):
    """Not Modified

    The client has this object already: If-None-Match names its ETag, or the object has not changed since
    If-Modified-Since.
    """

    status = 304


class AccessDenied(S3Error):
    """Access Denied

    The key of the request may not do this. The bucket belongs to another user, the request is not signed, or the signed
    text (a presigned URL, a form's policy) has expired or does not allow it.
    """

    hint = "`storaged bucket list` shows whose a bucket is; `storaged user list` shows who has which access key."

    status = 403


class AccessControlListNotSupported(S3Error):
    """The bucket does not allow ACLs"""


class AccessForbidden(S3Error):
    """CORSResponse: CORS is not enabled for this bucket."""

    status = 403


class AuthorizationHeaderMalformed(S3Error):
    """The authorization header that you provided is not valid."""


class AuthorizationQueryParametersError(S3Error):
    """X-Amz-Algorithm only supports "AWS4-HMAC-SHA256"."""


class BadDigest(S3Error):
    """The Content-MD5 or checksum value that you specified did not match what the server received."""


class BadRequest(S3Error):
    """The request is not well-formed HTTP."""


class BucketAlreadyExists(S3Error):
    """The requested bucket name is not available. The bucket namespace is shared by all users. Choose another name."""

    status = 409


class BucketAlreadyOwnedByYou(S3Error):
    """The bucket that you tried to create already exists, and you own it."""

    status = 409


class BucketNotEmpty(S3Error):
    """The bucket that you tried to delete is not empty."""

    status = 409


class ConditionalRequestConflict(S3Error):
    """A conflicting operation occurred during the conditional request. Retry it."""

    status = 409


class EntityTooLarge(S3Error):
    """Your proposed upload exceeds the maximum allowed object size."""


class EntityTooSmall(S3Error):
    """Your proposed upload is smaller than the minimum allowed object size. Each part but the last has at
    least 5 MiB.
    """


class IdempotencyParameterMismatch(S3Error):
    """The client token of this request was used before, for another request. Use a new token."""


class IncompleteBody(S3Error):
    """You did not provide the number of bytes specified by the Content-Length HTTP header."""


class InvalidAccessKeyId(S3Error):
    """The access key ID that you provided does not exist in our records."""

    status = 403


class InvalidAction(S3Error):
    """The action or operation requested is not valid: this endpoint does not have it."""


class InvalidArgument(S3Error):
    """Invalid Argument

    A header, a parameter or a field of the request has a value that S3 does not allow. The message of the answer names
    it, and nothing was changed.
    """

    hint = "The message names the value. Nothing was changed."


class InvalidBucketAclWithObjectOwnership(S3Error):
    """Bucket cannot have ACLs set with ObjectOwnership's BucketOwnerEnforced setting"""


class InvalidBucketName(S3Error):
    """The specified bucket is not valid."""

    hint = (
        "A bucket's name has 3 to 63 characters: lower-case letters, digits, dots and hyphens. It begins and ends with"
        " a letter or digit, is no IP address, has no two dots in a row, and does not begin with xn-- or sthree-."
    )


class IdMismatch(S3Error):
    """Document ID does not match the specified configuration ID."""


class IllegalVersioningConfigurationException(S3Error):
    """The versioning configuration specified in the request is not valid."""


class InvalidBucketState(S3Error):
    """The request is not valid for the current state of the bucket."""

    status = 409


class InvalidDigest(S3Error):
    """The Content-MD5 or checksum value that you specified is not valid."""


class InvalidEncryptionAlgorithmError(S3Error):
    """The encryption request that you specified is not valid. The valid value is AES256."""


class InvalidLocationConstraint(S3Error):
    """The specified location constraint is not valid."""


class InvalidChunkSizeError(S3Error):
    """A chunk of the body is larger than the maximum allowed."""


class InvalidPart(S3Error):
    """One or more of the specified parts could not be found. The part might not have been uploaded, or its ETag
    differs.
    """


class InvalidPartNumber(S3Error):
    """The requested partnumber is not satisfiable."""

    status = 416


class InvalidPartOrder(S3Error):
    """The list of parts was not in ascending order. The parts list must be specified in order by part number."""


class InvalidRange(S3Error):
    """The requested range is not satisfiable."""

    status = 416


class InvalidRedirectLocation(S3Error):
    """The website redirect location must have a prefix of 'http://' or 'https://' or '/'."""


class InvalidRetentionPeriod(S3Error):
    """The retention period specified is invalid."""


class InvalidRequest(S3Error):
    """Invalid Request

    The request is well formed, but its parts do not fit together: a header lacks another one that it needs, or two
    headers exclude each other. The message of the answer names them, and nothing was changed.
    """

    hint = "Read the message of the answer: it names what is missing or superfluous."


class InvalidPolicyDocument(S3Error):
    """The content of the form does not meet the conditions specified in the policy document."""


class InvalidStorageClass(S3Error):
    """The storage class that you specified is not valid."""

    hint = (
        "Use STANDARD, or another class whose objects can be read at once. GLACIER and DEEP_ARCHIVE are refused, since"
        " nothing is archived here. Lifecycle rules have no transitions: all data is kept in one way."
    )


class InvalidTag(S3Error):
    """The tag provided was not a valid tag."""


class InvalidS3DestinationBucket(S3Error):
    """Invalid bucket ARN.

    An inventory names its destination as arn:aws:s3:::NAME, without an account.
    """


class InvalidTargetBucketForLogging(S3Error):
    """The target bucket for logging does not exist, is not owned by you, or does not have the appropriate grants for
    the log-delivery group.
    """

    hint = (
        "The policy of the target bucket must allow the service logging.s3.amazonaws.com the action s3:PutObject for"
        " keys with the prefix; where access control lists count, its list may give the group LogDelivery WRITE."
    )


class InvalidToken(S3Error):
    """The provided token is malformed or otherwise not valid: no temporary credentials are issued here."""


class InvalidURI(S3Error):
    """The specified URI couldn't be parsed."""


class KMSNotFound(S3Error):
    """The key of AWS KMS that you named does not exist.

    The only such key is the cluster's keyring, under the ARN that the message names.
    """

    code = "KMS.NotFoundException"


class KeyTooLongError(S3Error):
    """Your key is too long: the limit is 1024 bytes."""


class MalformedACLError(S3Error):
    """The XML that you provided was not well formed or did not validate against our published schema."""


class MalformedPOSTRequest(S3Error):
    """The body of your POST request is not well-formed multipart/form-data."""


class MalformedPolicy(S3Error):
    """The policy is not well formed, or says something that this server does not understand. Nothing was changed."""

    hint = "The message names what is wrong: an element, an action, a resource, a principal or a condition."


class MalformedTrailerError(S3Error):
    """The request contained trailing data that was not well formed or did not conform to our published schema."""


class MalformedXML(S3Error):
    """The XML that you provided was not well formed or did not validate against our published schema."""


class MaxMessageLengthExceeded(S3Error):
    """Your request was too large."""


class MetadataTooLarge(S3Error):
    """Your metadata headers exceed the maximum allowed metadata size (2 KiB)."""


class MethodNotAllowed(S3Error):
    """The specified method is not allowed against this resource."""

    status = 405


class MissingContentLength(S3Error):
    """You must provide the Content-Length HTTP header."""

    status = 411


class MissingRequestBodyError(S3Error):
    """Request body is empty."""


class MissingSecurityHeader(S3Error):
    """Your request is missing a required header."""


class NoSuchBucket(S3Error):
    """The specified bucket does not exist."""

    status = 404


class NoSuchBucketPolicy(S3Error):
    """The bucket policy does not exist"""

    status = 404


class NoSuchConfiguration(S3Error):
    """The specified configuration does not exist."""

    status = 404


class NoSuchCORSConfiguration(S3Error):
    """The CORS configuration does not exist"""

    status = 404


class NoSuchKey(S3Error):
    """The specified key does not exist."""

    status = 404


class NoSuchLifecycleConfiguration(S3Error):
    """The lifecycle configuration does not exist"""

    status = 404


class NoSuchPublicAccessBlockConfiguration(S3Error):
    """The public access block configuration was not found"""

    status = 404


class NoSuchTagSet(S3Error):
    """The TagSet does not exist."""

    status = 404


class NoSuchUpload(S3Error):
    """The specified multipart upload does not exist. The upload ID might be invalid, or the upload was aborted or
    completed.
    """

    status = 404


class NoSuchObjectLockConfiguration(S3Error):
    """The specified object does not have a ObjectLock configuration"""

    status = 404


class NoSuchVersion(S3Error):
    """The version ID specified in the request does not match an existing version."""

    status = 404


class NoSuchWebsiteConfiguration(S3Error):
    """The specified bucket does not have a website configuration"""

    status = 404


class NotImplemented(S3Error):
    """A header or query that you provided implies functionality that is not implemented."""

    status = 501


class ObjectLockConfigurationNotFoundError(S3Error):
    """Object Lock configuration does not exist for this bucket"""

    status = 404


class OwnershipControlsNotFoundError(S3Error):
    """The bucket ownership controls were not found"""

    status = 404


class PreconditionFailed(S3Error):
    """At least one of the preconditions that you specified did not hold."""

    status = 412


class ReplicationConfigurationNotFoundError(S3Error):
    """The replication configuration was not found"""

    status = 404


class RequestHeaderSectionTooLarge(S3Error):
    """Your request header section exceeds the maximum allowed size."""


class RequestTimeTooSkewed(S3Error):
    """The difference between the request time and the server's time is too large."""

    status = 403


class QuotaExceeded(S3Error):
    """The bucket, or all buckets of its owner together, would have more than the operator allows."""

    status = 403
    hint = (
        "`storaged bucket quota` and `storaged user quota` show and change it. What was deleted counts until the bucket"
        " is counted again, after a minute or more."
    )


class RequestTimeout(S3Error):
    """Your socket connection to the server was not read from or written to within the timeout period."""


class ServerSideEncryptionConfigurationNotFoundError(S3Error):
    """The server side encryption configuration was not found"""

    status = 404


class SignatureDoesNotMatch(S3Error):
    """The request signature that the server calculated does not match the signature that you provided."""

    status = 403
    hint = "Check the secret key and the signing method; a proxy that rewrites the path or Host breaks signatures too."


class TooManyBuckets(S3Error):
    """You have attempted to create more buckets than are allowed."""


class TooManyConfigurations(S3Error):
    """You are attempting to create a new configuration but have already reached the 1,000-configuration limit."""


class UnresolvableGrantByEmailAddress(S3Error):
    """The email address you provided does not match any account on record."""


class XAmzContentSHA256Mismatch(S3Error):
    """The provided 'x-amz-content-sha256' header does not match what was computed."""
