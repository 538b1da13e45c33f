"""`python -m llava_engine.cli` is `llava-engine`."""

import sys

from llava_engine.cli import main

sys.exit(main())
