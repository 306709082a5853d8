"""What a run leaves for people and programs: metrics.jsonl, report.json, report.md, report.html, and the terminal's lines.

``schema`` is the contract that others script against, ``write`` puts it on disk, ``markdown`` and ``html`` render it,
``console`` and ``progress`` speak to the terminal. Nothing here imports torch.
"""
