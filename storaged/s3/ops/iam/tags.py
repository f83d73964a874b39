"""Tags of users and roles: the condition key aws:PrincipalTag.

https://docs.aws.amazon.com/IAM/latest/APIReference/API_TagUser.html and the pages of the other actions.
"""

from __future__ import annotations

from msgspec import structs

from storaged.errors import LimitExceeded
from storaged.objects.accounts import StoredAccount
from storaged.s3.ops.iam.call import TAGS_MAX, Call, Kind, Result, find, having, page, tag_list


async def tag(call: Call, kind: Kind) -> Result:
    name, tags = call.name(kind), call.parameters.tags()
    entity = find(await call.account(), kind, name)

    def edit(account: StoredAccount) -> StoredAccount:
        found = find(account, kind, name)
        changed = found.tags | tags
        if len(changed) > TAGS_MAX:
            raise LimitExceeded(f"Cannot exceed quota for TagsPer{kind.word}: {TAGS_MAX}")
        return having(account, kind, structs.replace(found, tags=changed), name)

    await call.change(call.arn(kind, entity), edit)
    return None


async def untag(call: Call, kind: Kind) -> Result:
    name, keys = call.name(kind), set(call.parameters.members("TagKeys"))
    entity = find(await call.account(), kind, name)

    def edit(account: StoredAccount) -> StoredAccount:
        found = find(account, kind, name)
        left = {key: value for key, value in found.tags.items() if key not in keys}
        return having(account, kind, structs.replace(found, tags=left), name)

    await call.change(call.arn(kind, entity), edit)
    return None


async def list_tags(call: Call, kind: Kind) -> Result:
    entity = find(await call.account(), kind, call.name(kind))
    return page(call, "Tags", [(row["Key"], row) for row in tag_list(entity.tags)])
