from __future__ import annotations
def write_page(report, whole=True): return ""
