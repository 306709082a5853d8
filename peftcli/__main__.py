"""``python -m peftcli``."""

from peftcli.cli import main

if __name__ == "__main__":
    main()
