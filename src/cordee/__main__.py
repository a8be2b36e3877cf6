"""`python -m cordee`: the `cordee` command."""

from __future__ import annotations

from cordee.cli import main

raise SystemExit(main())
