"""``python -m deploy``: the program `paramserver`."""

import sys

from deploy.main import main

sys.exit(main())
