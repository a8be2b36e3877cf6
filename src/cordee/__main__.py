"""`python -m cordee`: the `cordee` command."""

from cordee.cli import main

raise SystemExit(main())
