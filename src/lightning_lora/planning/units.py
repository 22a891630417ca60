"""Bytes in words. GB is 10^9 bytes and GiB is 2^30 bytes, here and everywhere; the two are never mixed."""

from __future__ import annotations

GB = 10**9
GIB = 2**30


def in_gb(size: float) -> str:
    """Bytes as GB (10^9), or as MB (10^6) and KB (10^3) where they are few.

    Example:
        >>> in_gb(14_000_000_000), in_gb(1_500_000)
        ('14.00 GB', '1.50 MB')
    """
    for unit, factor in (("GB", GB), ("MB", 10**6)):
        if abs(size) >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size / 1000:.2f} KB"
