"""``python -m bench.evidence``: writes the page from what was recorded."""

from bench.evidence.page import main

main()
