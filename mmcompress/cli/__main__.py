"""`python -m mmcompress.cli`, for where no script is on the path."""

from mmcompress.cli import main

main()
