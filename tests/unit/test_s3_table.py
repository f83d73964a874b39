"""Each operation, header, parameter and element of botocore's model of S3 has an answer, and deploy/S3.md says it."""

from __future__ import annotations

from tests import s3_table


def test_every_name_of_the_model_has_a_row() -> None:
    assert s3_table.without_row() == []


def test_the_document_is_what_the_command_makes() -> None:
    assert s3_table.DOCUMENT.read_text() == s3_table.document(), "run `python -m tests.s3_table`"
