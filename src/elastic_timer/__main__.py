"""`python -m elastic_timer` is the command `elastic-timer`."""

from __future__ import annotations

from elastic_timer._command.main import main

if __name__ == "__main__":
    raise SystemExit(main())
