"""The cluster plane: identity, jurisdiction, layout, membership, RPC and the audit chain. It knows
no service by name.
"""
