"""The cluster plane: identity, jurisdiction, layout, membership, RPC and the audit chain.

It sends and serves RPC methods without knowing the services behind them.
"""
