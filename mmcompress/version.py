"""The version of the package, and the folder that it lies in."""

from __future__ import annotations

from pathlib import Path

__version__ = "0.2.0"

PACKAGE_FOLDER = Path(__file__).resolve().parent
"""The folder of the installed package. What belongs to it is found from here, wherever a module
moves to."""

CHECKOUT_FOLDER = PACKAGE_FOLDER.parent
"""The checkout that holds the package, or the site-packages folder of an installed copy."""
