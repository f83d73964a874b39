"""Keyring and key management. Imported by gateways only; a storage node never loads this package."""
