"""Stores on object storage: addresses, requests that are retried, and what is kept of them on this machine."""
