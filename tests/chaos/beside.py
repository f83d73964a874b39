"""What spans a change of the cluster: a bucket and an upload in parts that begin before it and end after it, and a
bucket that is deleted while it is under way.
"""

from __future__ import annotations

import random
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

PART_BYTES = 5 * 1024 * 1024


class Beside:
    """``begin``, ``middle`` and ``end`` follow each other, once. ``wrong`` has what was not as it should be."""

    def __init__(self, client: Any, number: int) -> None:
        """``client`` tries again what was refused."""
        self._client = client
        self._kept, self._deleted = f"beside-{number}", f"beside-{number}-deleted"
        source = random.Random(number)
        self._parts = [source.randbytes(PART_BYTES), source.randbytes(1000)]
        self._upload = ""
        self._tags: list[str] = []
        self.wrong: list[str] = []

    def begin(self) -> None:
        for bucket in (self._kept, self._deleted):
            self._client.create_bucket(Bucket=bucket)
        self._upload = self._client.create_multipart_upload(Bucket=self._kept, Key="parts")["UploadId"]
        self._put_part(1)

    def middle(self) -> None:
        self._delete(self._deleted)

    def end(self) -> None:
        self._put_part(2)
        parts = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(self._tags, 1)]
        self._client.complete_multipart_upload(
            Bucket=self._kept, Key="parts", UploadId=self._upload, MultipartUpload={"Parts": parts}
        )
        if self._client.get_object(Bucket=self._kept, Key="parts")["Body"].read() != b"".join(self._parts):
            self.wrong.append(f"{self._kept}: an upload that spans the change has another content")
        names = {bucket["Name"] for bucket in self._client.list_buckets()["Buckets"]}
        if self._kept not in names or self._deleted in names:
            self.wrong.append(f"{self._kept} is lost, or {self._deleted} is not deleted")
        self._client.delete_object(Bucket=self._kept, Key="parts")
        self._delete(self._kept)

    def _put_part(self, number: int) -> None:
        body = self._parts[number - 1]
        done = self._client.upload_part(
            Bucket=self._kept, Key="parts", UploadId=self._upload, PartNumber=number, Body=body
        )
        self._tags.append(done["ETag"])

    def _delete(self, bucket: str) -> None:
        """A deletion that was refused once may have been done."""
        try:
            self._client.delete_bucket(Bucket=bucket)
        except ClientError as error:
            if error.response["Error"]["Code"] != "NoSuchBucket":
                self.wrong.append(f"{bucket} is not deleted: {error}")
        except BotoCoreError as error:
            self.wrong.append(f"{bucket} is not deleted: {error}")
