"""``python -m kvcli``."""

from kvcli.cli.main import main

if __name__ == "__main__":
    main()
