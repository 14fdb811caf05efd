"""``python -m filterwise.lab.compatibility``."""

from filterwise.lab.compatibility.command import main

if __name__ == "__main__":
    main()
