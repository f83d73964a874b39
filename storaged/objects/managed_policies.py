"""AWS's own managed policies, as far as they say something about what is here. Pure tables.

https://docs.aws.amazon.com/aws-managed-policy/latest/reference/policy-list.html
"""

from __future__ import annotations

import json
from typing import Final

PREFIX: Final = "arn:aws:iam::aws:policy/"


def _policy(*actions: str) -> str:
    allowed = {"Effect": "Allow", "Action": actions[0] if len(actions) == 1 else list(actions), "Resource": "*"}
    return json.dumps({"Version": "2012-10-17", "Statement": [allowed]})


AWS_POLICIES: Final[dict[str, str]] = {
    f"{PREFIX}AdministratorAccess": _policy("*"),
    f"{PREFIX}AmazonS3FullAccess": _policy("s3:*", "s3-object-lambda:*"),
    f"{PREFIX}AmazonS3ReadOnlyAccess": _policy(
        "s3:Get*", "s3:List*", "s3:Describe*", "s3-object-lambda:Get*", "s3-object-lambda:List*"
    ),
    f"{PREFIX}IAMFullAccess": _policy("iam:*"),
    f"{PREFIX}IAMReadOnlyAccess": _policy(
        "iam:GenerateCredentialReport",
        "iam:GenerateServiceLastAccessedDetails",
        "iam:Get*",
        "iam:List*",
        "iam:SimulateCustomPolicy",
        "iam:SimulatePrincipalPolicy",
    ),
}
"""ARN -> text."""


def name_of(arn: str) -> str:
    """The name at the end of a policy's ARN."""
    return arn.rpartition("/")[2]
