"""The configuration of one node: a TOML file, read strictly; all mistakes are listed at once.

Paths are relative to the folder of the file, so that a node's folder can be moved. Sizes are integers (bytes) or text
(``"64 MiB"``). ``$CREDENTIALS_DIRECTORY`` at the start of a path is the folder where systemd puts what
``LoadCredential=`` names.

    [node]     name, directory, roles
    [cluster]  identity (the folder with this node's certificate, the cluster's authority and the layout)
    [[disks]]  id, directory            (role storage; one table per disk)
    [rpc]      listen
    [s3]       listen, workers, region, strict_region, new_buckets, domains, website_domain,
               tls_certificate, tls_key, unauthenticated_*_max, proxies, access_log_*
                                                                       (role gateway)
    [admin]    listen
    [keys]     keyring, credential or passphrase                       (role gateway)
    [audit]    directory
    [[notifications]]  name, url, secret, authority, timeout_s         (role gateway; one table per destination)
    [limits]   bounds with their unit in the name
    [log]      level, format, access, slow_ms
"""

from storaged.config.read import NO_CREDENTIALS, Mistake, load, parse
from storaged.config.sections import (
    KEEP_DAYS_MIN,
    ROLES,
    SECTIONS,
    AdminSection,
    AuditSection,
    ClusterSection,
    Config,
    DiskSection,
    KeysSection,
    LimitsSection,
    LogSection,
    NodeSection,
    NotificationSection,
    RpcSection,
    S3Section,
)
from storaged.config.values import split_address

__all__ = [
    "KEEP_DAYS_MIN",
    "NO_CREDENTIALS",
    "ROLES",
    "SECTIONS",
    "AdminSection",
    "AuditSection",
    "ClusterSection",
    "Config",
    "DiskSection",
    "KeysSection",
    "LimitsSection",
    "LogSection",
    "Mistake",
    "NodeSection",
    "NotificationSection",
    "RpcSection",
    "S3Section",
    "load",
    "parse",
    "split_address",
]
