"""`python -m distiljax`."""

import sys

from distiljax.cli import main

sys.exit(main())
