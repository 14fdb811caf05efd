"""``python -m filterwise.lab.shipping``."""

from filterwise.lab.shipping.command import main

if __name__ == "__main__":
    raise SystemExit(main())
