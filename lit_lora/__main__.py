"""``python -m lit_lora COMMAND …``: the command line where the script ``lit-lora`` is not on the path."""

import sys

from lit_lora.cli import main

sys.exit(main())
