"""``python -m clipmb``."""

from clipmb.cli import main

main()
