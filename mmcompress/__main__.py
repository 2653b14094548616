"""`python -m mmcompress` does what the command `mmcompress` does."""

from mmcompress.cli import main

if __name__ == "__main__":
    main()
